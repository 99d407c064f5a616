"""The engine loop: rank 0's inbox, scheduler and step; and what the other ranks do meanwhile.

A thread of the rank's process drives the pure scheduler with a real clock and a real runner. It
sleeps while there is nothing to do. Whatever goes wrong in a step ends every live request with an
error and marks the engine failed, so that its owner replaces it: state that may be half written is
never used again.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec

from workers.plans import BEAT_SECONDS, PlanReceiver, PlanSender
from workers.scheduler import Scheduler
from workers.wire import Abort, Batch, Load, Output, Request, StepResult

STALL_SECONDS = 120.0  # a step that takes longer counts as hung
LOAD_SECONDS = 0.2  # how old a report may be while steps run


class Runner(Protocol):
    def launch(self, batch: Batch) -> Any: ...

    def collect(self, handle: Any) -> StepResult: ...


class EngineLoop:
    """Requests in, outputs out, from a thread of its own.

    ``publish`` gets the outputs of each step on that thread and must not block. ``round`` is called
    once before every step; several engines will agree there on whether to take part in one.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        publish: Callable[[Sequence[Output]], None],
        plans: PlanSender | None = None,
        round: Callable[[], None] = lambda: None,
    ) -> None:
        self._scheduler, self._runner = scheduler, runner
        self._publish, self._plans, self._round = publish, plans, round
        self._inbox: deque[Request | Abort] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._live: dict[str, int] = {}  # request -> epoch
        self._load = scheduler.load()
        self._load_at = self._progress_at = time.monotonic()
        self._idle = True
        self.failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Take a request; from any thread. Its terminal Output comes, whatever happens."""
        self._put(request)

    def abort(self, id: str) -> None:
        """End a request before the next step; from any thread."""
        self._put(Abort(id))

    def stop(self, seconds: float = 10.0) -> None:
        """End the loop after the step that runs; live requests get an error."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def load(self) -> Load:
        """The last report; from any thread."""
        age = 0.0 if self._idle else time.monotonic() - self._progress_at
        return msgspec.structs.replace(self._load, progress_ms=int(age * 1000))

    def trouble(self) -> str | None:
        """Why the engine cannot serve; None while it is idle or makes progress."""
        if self.failure is not None:
            return self.failure
        age = time.monotonic() - self._progress_at
        if not self._idle and age > STALL_SECONDS:
            return f"no step has ended for {age:.0f} s"
        return None

    def _put(self, item: Request | Abort) -> None:
        self._inbox.append(item)
        self._wake.set()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_inbox()
                if self._scheduler.has_work():
                    self._step()
                else:
                    self._sleep()
        except Exception as error:
            traceback.print_exc()
            self._fail(f"the engine failed: {type(error).__name__}: {error}")
        else:
            self._fail("the engine was shut down")
        finally:
            if self._plans is not None:
                self._plans.close()

    def _take_inbox(self) -> None:
        self._wake.clear()
        now = time.monotonic()
        outputs: list[Output] = []
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Abort):
                outputs += self._scheduler.abort(item.id, now)
            else:
                self._live[item.id] = item.epoch
                outputs += self._scheduler.add(item, now)
        if outputs:
            self._emit(outputs)
            self._report(now)

    def _step(self) -> None:
        if self._idle:
            self._idle, self._progress_at = False, time.monotonic()
        self._round()
        batch = self._scheduler.plan(time.monotonic())
        if self._plans is not None:
            self._plans.send(batch)
        result = self._runner.collect(self._runner.launch(batch))
        now = time.monotonic()
        outputs = self._scheduler.commit(batch, result, now)
        self._progress_at = now
        if outputs:
            self._emit(outputs)
        if now - self._load_at >= LOAD_SECONDS:
            self._report(now)

    def _sleep(self) -> None:
        """Until something arrives, a deadline passes, or the ranks must hear a sign of life."""
        now = time.monotonic()
        if not self._idle:
            self._idle = True
            self._report(now)
        deadline = self._scheduler.next_deadline()
        if deadline is not None and deadline <= now:
            self._step()  # expires what is due
            return
        seconds = None if deadline is None else deadline - now
        if self._plans is not None:
            seconds = min(seconds or BEAT_SECONDS, BEAT_SECONDS)
        if not self._wake.wait(seconds) and self._plans is not None:
            self._plans.check()
            self._plans.send(None)

    def _report(self, now: float) -> None:
        self._load, self._load_at = self._scheduler.load(), now

    def _emit(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            if output.reason is not None:
                self._live.pop(output.id, None)
        self._publish(outputs)

    def _fail(self, why: str) -> None:
        """Every live request ends here, and so does every one that still comes."""
        self.failure = why
        self._put_failed(why)

    def _put_failed(self, why: str) -> None:
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, Request):
                self._live[item.id] = item.epoch
        outputs = [Output(id, epoch, 0, [], "error", why) for id, epoch in self._live.items()]
        self._live.clear()
        if outputs:
            self._publish(outputs)


def follow(plans: PlanReceiver, runner: Runner) -> None:
    """What a rank other than 0 does until rank 0 stops it. Raises PlanLost, and what a step does."""
    try:
        while (batch := plans.receive()) is not None:
            runner.collect(runner.launch(batch))
    finally:
        plans.close()
