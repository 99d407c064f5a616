"""The engine loop: rank 0's inbox, scheduler and step; and what the other ranks do meanwhile.

It drives the pure scheduler with a real clock and a real runner, and sleeps while there is nothing
to do. Whatever goes wrong in a step ends every live request with an error and marks the engine
failed, so that its owner replaces it: state that may be half written is never used again.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from parallelism.placement import imbalance
from workers.gang import Member
from workers.plans import BEAT, Follower, Leader
from workers.rounds import RoundLost
from workers.scheduler import Scheduler
from workers.wire import Abort, Batch, Load, Output, Request, Round, StepResult

STALL = 600.0  # seconds after which a step counts as hung: big chunks on small machines take long
REPORT = 0.2  # seconds between reports while steps run

log = logging.getLogger(__name__)


def settle_garbage_collection() -> None:
    """For a process that has loaded what it will keep, and now makes a list for every token.

    The default of 700 new containers would start a collection several times a step; what the
    scheduler drops has no cycles, so it goes without one.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000)


@dataclass(frozen=True, slots=True)
class Compiled:
    """The grammar of a request is there."""

    id: str


class Runner(Protocol):
    @property
    def ahead(self) -> int:
        """How many steps may be launched before the first one is collected."""

    def launch(self, batch: Batch) -> Any: ...

    def collect(self, handle: Any) -> StepResult: ...

    def expert_calls(self) -> Callable[[], tuple[list[list[int]], list[list[int]]]]:
        """Start fetching the (token, expert) pairs since the start, [layers][experts] and
        [layers][ranks]; the call waits for them."""


class Steps:
    """Plans, launches and commits, as many steps ahead of their results as the runner allows.

    ``tell`` hears of every batch before it is launched.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        tell: Callable[[Batch], None] = lambda batch: None,
    ) -> None:
        self._scheduler, self._runner, self._tell = scheduler, runner, tell
        self._flying: deque[tuple[Batch, Any]] = deque()

    def next(self) -> list[Output]:
        """Launch one more step, if there is one, and take the result that is due, if one is."""
        batch = self._scheduler.plan(time.monotonic())
        if self._flying and not len(batch):
            self._scheduler.rollback(batch)  # all that could run waits for a result
        else:
            self._tell(batch)
            self._flying.append((batch, self._runner.launch(batch)))
            if len(self._flying) < self._runner.ahead:
                return []
        batch, handle = self._flying.popleft()
        result = self._runner.collect(handle)
        return self._scheduler.commit(batch, result, time.monotonic())


class EngineLoop:
    """Requests in, outputs out, in the thread that calls ``run``.

    ``publish`` gets the outputs of each step, and now and then a report; it must not block, and is
    called from the loop's thread, or from that of a ``submit`` to an engine that has ended.
    ``member``: of the engines that share experts; every step with tokens is a round of theirs.
    ``ended`` is called when the loop is over, after its last outputs. ``compile`` prepares a
    grammar, in a thread of its own; what is wrong with it is told by the steps.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        publish: Callable[[list[Output], Load | None], None],
        leader: Leader | None = None,
        member: Member | None = None,
        ended: Callable[[], object] = lambda: None,
        compile: Callable[[str], object] = lambda grammar: None,
    ) -> None:
        self.failure: str | None = None
        self.experts: list[list[int]] = []  # pairs [layers][experts] as of the last report
        self._scheduler, self._runner = scheduler, runner
        self._steps = Steps(scheduler, runner, self._begin)
        self._publish, self._ended = publish, ended
        self._leader, self._member = leader, member
        self._compile = compile
        self._compiler = ThreadPoolExecutor(1, "grammars")
        self._inbox: list[Request | Abort | Compiled] = []
        self._lock = threading.Lock()  # of the inbox and the failure
        self._wake = threading.Event()
        self._stopping = False
        self._live: dict[str, Request] = {}
        self._load = scheduler.load()
        self._fetching: Callable[[], tuple[list[list[int]], list[list[int]]]] = lambda: ([], [])
        self._reported = self._progress = time.monotonic()
        self._idle, self._audited = True, True
        self._over = threading.Event()

    def run(self) -> None:
        """Serve until ``stop`` or a failure; raises nothing."""
        if self._member is not None:
            self._member.notify(self._wake.set)
        try:
            while not self._stopping:
                self._take_inbox()
                if self._scheduler.has_work() or self._due() == 0:
                    self._step()
                else:
                    self._rest()
            self._fail("the engine was shut down", "")
            if self._member is not None:
                self._retire(self._member)
        except Exception as error:
            if self._member is not None:
                error = self._member.explain(error)
            log.exception("the engine failed")
            kind = type(error).__name__
            self._fail(f"the engine failed ({kind}) and is being replaced", f": {error}")
        finally:
            self._compiler.shutdown(wait=False, cancel_futures=True)
            if self._member is not None:
                self._member.close()
            if self._leader is not None:
                self._leader.close()
            self._ended()
            self._over.set()

    def submit(self, request: Request) -> None:
        """Take a request; from any thread. It gets exactly one terminal Output, whatever comes."""
        if not self._put(request):
            self._publish([_error(request, "the engine has ended")], None)

    def abort(self, id: str) -> None:
        """End a request before the next step; from any thread."""
        self._put(Abort(id))

    def stop(self, timeout: float = 10.0) -> None:
        """End the loop after the step that runs; live requests get an error.

        An engine that shares experts then helps the others until all have been told to stop.
        """
        self._stopping = True
        self._wake.set()
        self._over.wait(timeout)

    def load(self) -> Load:
        """The last report; from any thread."""
        age = 0.0 if self._idle else time.monotonic() - self._progress
        return msgspec.structs.replace(self._load, progress_ms=int(age * 1000))

    def trouble(self) -> str | None:
        """Why the engine cannot serve; None while it is idle or makes progress."""
        age = time.monotonic() - self._progress
        if self.failure is None and not self._idle and age > STALL:
            return f"no step has ended for {age:.0f} s"
        return self.failure

    def _put(self, item: Request | Abort | Compiled) -> bool:
        with self._lock:
            if self.failure is not None:
                return False
            self._inbox.append(item)
        self._wake.set()
        return True

    def _take_inbox(self) -> None:
        self._wake.clear()
        with self._lock:
            items, self._inbox = self._inbox, []
        now = time.monotonic()
        outputs: list[Output] = []
        for item in items:
            if isinstance(item, Abort):
                outputs += self._scheduler.abort(item.id, now)
            elif isinstance(item, Compiled):
                self._scheduler.resolve(item.id, "grammar", now)
            else:
                self._live[item.id] = item
                outputs += self._scheduler.add(item, now)
                if "grammar" in item.waits:
                    self._compiler.submit(self._prepare, item)
        if items:
            self._emit(outputs)

    def _prepare(self, request: Request) -> None:
        try:
            if request.id in self._live:  # it may have ended while others were compiled
                self._compile(request.grammar)
        finally:
            self._put(Compiled(request.id))

    def _step(self) -> None:
        if self._idle:
            self._progress = time.monotonic()
            self._idle = self._audited = False
        outputs = self._steps.next()
        self._progress = time.monotonic()
        self._emit(outputs)

    def _rest(self) -> None:
        """Until something arrives, a deadline passes, or the ranks must hear a sign of life."""
        self._idle = True
        if self._member is not None:
            self._member.rest()
            if (round := self._member.wait(0)) is not None:
                self._assist(round)
                return
        due = self._due()
        if self._wake.wait(BEAT if due is None else min(BEAT, due)):
            return
        if not self._audited:
            self._scheduler.check()
            self._audited = True
        self._tell(None)

    def _due(self) -> float | None:
        """Seconds until a request expires; None if none can."""
        deadline = self._scheduler.next_deadline()
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    def _begin(self, batch: Batch) -> None:
        if self._member is not None and len(batch):
            batch.round = self._agree(self._member, batch.num_tokens)
        self._tell(batch)

    def _agree(self, member: Member, tokens: int) -> Round:
        """The round that this engine brings ``tokens`` to."""
        member.call(tokens)
        while True:
            round = member.wait(BEAT)
            if round is None:
                self._tell(None)  # the others may take longer than the ranks wait for a plan
            elif round.tokens[member.engine]:
                return round
            else:
                self._assist(round)  # made before the others knew of this call

    def _retire(self, member: Member) -> None:
        """Take part in the others' rounds until the group ends."""
        member.retire()
        try:
            while True:
                if (round := member.wait(BEAT)) is not None:
                    self._assist(round)
                else:
                    self._tell(None)
        except RoundLost as over:
            log.info("%s", over)

    def _assist(self, round: Round) -> None:
        """Take part in a round without tokens."""
        batch = Batch(0, round=round)
        self._tell(batch)
        self._runner.collect(self._runner.launch(batch))

    def _tell(self, batch: Batch | None) -> None:
        if self._leader is not None:
            self._leader.send(batch)

    def _emit(self, outputs: list[Output]) -> None:
        for output in outputs:
            if output.reason is not None:
                self._live.pop(output.id, None)
        now, load = time.monotonic(), None
        if now - self._reported >= REPORT or not self._scheduler.has_work():
            load = self._load = self._report()
            self._reported = now
        if outputs or load is not None:
            self._publish(outputs, load)

    def _report(self) -> Load:
        load = self._scheduler.load()
        before, self._fetching = self._fetching, self._runner.expert_calls()
        # While steps run, what was asked for at the last report, and has come since: no wait.
        self.experts, by_rank = (before if self._scheduler.has_work() else self._fetching)()
        load.expert_calls = [sum(layers) for layers in zip(*by_rank, strict=True)]
        load.expert_imbalance = imbalance(by_rank)
        return load

    def _fail(self, why: str, details: str) -> None:
        """Every live request ends here; those that still come are answered by ``submit``."""
        with self._lock:
            self.failure = why + details
            items, self._inbox = self._inbox, []
        live = [*self._live.values(), *[item for item in items if isinstance(item, Request)]]
        self._live.clear()
        self._publish([_error(request, f"{why}; send the request again") for request in live], None)


def _error(request: Request, why: str) -> Output:
    return Output(request.id, request.epoch, len(request.emitted), [], "error", why)


def follow(follower: Follower, runner: Runner, member: Member | None = None) -> None:
    """What a rank other than 0 does until rank 0 is gone. Raises PlanLost, RoundLost, and what a
    step does."""
    flying: deque[Any] = deque()
    if member is not None:
        member.notify(follower.interrupt)
    try:
        while True:
            batch = follower.receive()
            if batch is not None:
                flying.append(runner.launch(batch))
                if len(flying) == runner.ahead:
                    runner.collect(flying.popleft())
    except Exception as error:
        if member is not None and (cause := member.explain(error)) is not error:
            raise cause from error
        raise
    finally:
        if member is not None:
            member.close()
        follower.close()
