"""The engine loop and its followers: real threads and sockets, a fake model."""

from __future__ import annotations

import queue
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from tests.fakes import FakeRunner
from tests.oracle import BROKEN, generate
from workers.config import KVConfig, KVGroup, SchedulerConfig
from workers.engine import EngineLoop, follow
from workers.plans import Follower, Leader, PlanLost
from workers.scheduler import Scheduler
from workers.wire import Batch, Load, Output, Request, Sampling, StepResult

VOCAB = 50
DEADLINE = 120.0
CONFIG = SchedulerConfig(
    max_num_seqs=4, max_num_batched_tokens=16, max_model_len=200, eos_token_ids=(0,)
)
KV = KVConfig(
    (KVGroup("full", (0,), 64), KVGroup("window", (1,), 64, 8)), num_blocks=60, block_size=4
)
KEY = b"a key of thirty-two bytes ......"


def request(id: str, tokens: int = 20, prompt: list[int] | None = None, **fields: Any) -> Request:
    sampling = Sampling(max_tokens=tokens, ignore_eos=True, seed=3)
    prompt = prompt or [1 + (len(id) + i) % (VOCAB - 1) for i in range(9)]
    given: dict[str, Any] = {"prompt": prompt, "sampling": sampling} | fields
    return Request(id=id, model="m", **given)


class Published:
    """What an engine has published, by request."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.ends: dict[str, list[Output]] = {}
        self.load = Load()
        self._changed = threading.Condition()

    def __call__(self, outputs: Sequence[Output], load: Load | None) -> None:
        with self._changed:
            for output in outputs:
                self.tokens.setdefault(output.id, []).extend(output.tokens)
                if output.reason is not None:
                    self.ends.setdefault(output.id, []).append(output)
            self.load = load or self.load
            self._changed.notify_all()

    def until(self, ready: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(ready, DEADLINE), "not in time"

    def end(self, id: str) -> Output:
        self.until(lambda: id in self.ends)
        (end,) = self.ends[id]
        return end


class Gate:
    """A runner whose steps wait to be let through."""

    def __init__(self, inner: FakeRunner) -> None:
        self.inner, self.steps = inner, threading.Semaphore(0)
        self.ahead = inner.ahead
        self.failure: Exception | None = None

    def launch(self, batch: Batch) -> int:
        assert self.steps.acquire(timeout=DEADLINE)
        if self.failure is not None:
            raise self.failure
        return self.inner.launch(batch)

    def collect(self, handle: int) -> StepResult:
        return self.inner.collect(handle)

    def expert_calls(self) -> Callable[[], tuple[list[list[int]], list[list[int]]]]:
        return self.inner.expert_calls()


def runner(ahead: int = 1) -> FakeRunner:
    return FakeRunner(CONFIG, KV, VOCAB, ahead)


def start(loop: EngineLoop) -> None:
    threading.Thread(target=loop.run, daemon=True).start()


@pytest.fixture
def published() -> Published:
    return Published()


@pytest.fixture
def loops() -> Iterator[list[EngineLoop]]:
    """Loops to be stopped."""
    loops: list[EngineLoop] = []
    yield loops
    for loop in loops:
        loop.stop()


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_requests_from_many_threads_end_as_they_would_alone(
    published: Published, loops: list[EngineLoop], ahead: int
) -> None:
    """Also where steps are launched before the results of earlier ones are known."""
    loop = EngineLoop(Scheduler(CONFIG, KV), runner(ahead), published)
    loops.append(loop)
    start(loop)
    requests = [request("r" * n) for n in range(1, 13)]
    threads = [threading.Thread(target=loop.submit, args=(r,)) for r in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for r in requests:
        assert published.end(r.id).reason == "length"
        assert published.tokens[r.id] == generate(r, CONFIG, KV.groups, VOCAB)[0]
    published.until(lambda: published.load.running + published.load.waiting == 0)
    steps = published.load.steps
    assert loop.experts == [[steps, 0]]
    assert published.load.expert_calls == [steps, 0]
    assert published.load.expert_imbalance == 2
    assert loop.trouble() is None
    assert loop.load().progress_ms == 0


def test_an_abort_frees_the_request_whether_it_runs_or_waits(
    published: Published, loops: list[EngineLoop]
) -> None:
    gate = Gate(runner())
    loop = EngineLoop(Scheduler(CONFIG, KV), gate, published)
    loops.append(loop)
    start(loop)
    for n in range(6):  # four run, two wait
        loop.submit(request(f"r{n}", tokens=150))
    gate.steps.release()
    published.until(lambda: bool(published.tokens))
    for n in range(6):
        loop.abort(f"r{n}")
    gate.steps.release()  # the step that was under way
    for n in range(6):
        assert published.end(f"r{n}").reason == "abort"
    published.until(lambda: published.load.free == KV.num_blocks)
    loop.abort("unknown")
    loop.submit(request("after", tokens=3))
    gate.steps.release(10)
    assert published.end("after").reason == "length"


def test_what_can_never_be_served_is_refused(published: Published, loops: list[EngineLoop]) -> None:
    loop = EngineLoop(Scheduler(CONFIG, KV), runner(), published)
    loops.append(loop)
    start(loop)
    loop.submit(request("long", prompt=[1] * 300))
    end = published.end("long")
    assert end.reason == "refused"
    assert "300 tokens" in str(end.detail)


def test_a_deadline_passes_while_nothing_else_happens(
    published: Published, loops: list[EngineLoop]
) -> None:
    loop = EngineLoop(Scheduler(CONFIG, KV), runner(), published)
    loops.append(loop)
    start(loop)
    loop.submit(request("r", waits=("image",), deadline_ms=50))
    assert published.end("r").detail == "the deadline passed after 0 tokens"


def test_a_grammar_is_prepared_beside_the_steps(
    published: Published, loops: list[EngineLoop]
) -> None:
    """Others go on meanwhile; what fails there is the steps' to tell, and a deadline counts."""
    ready, begun, asked = threading.Event(), threading.Event(), []

    def compile(grammar: str) -> None:
        asked.append(grammar)
        begun.set()
        assert ready.wait(DEADLINE)
        if grammar == "worse":
            raise RuntimeError("out of memory")

    loop = EngineLoop(Scheduler(CONFIG, KV), runner(2), published, compile=compile)
    loops.append(loop)
    start(loop)
    grammars = {"held": "any", "bad": BROKEN, "worse": "worse", "late": "any", "gone": "any"}
    held = {
        id: request(id, grammar=text, waits=("grammar",), deadline_ms=50 if id == "late" else None)
        for id, text in grammars.items()
    }
    for each in held.values():
        loop.submit(each)
    loop.abort("gone")
    loop.submit(request("free"))
    assert published.end("free").reason == "length"
    assert published.end("late").detail == "the deadline passed after 0 tokens"
    assert published.end("gone").reason == "abort"
    assert not published.tokens.get("held")
    assert begun.wait(DEADLINE)
    assert asked == ["any"], "one at a time"
    asked.clear()
    ready.set()
    for id in ("held", "bad", "worse"):
        tokens, reason, _ = generate(held[id], CONFIG, KV.groups, VOCAB)
        assert published.end(id).reason == reason
        assert published.tokens[id] == tokens
    assert published.end("bad").detail == BROKEN
    assert asked == [BROKEN, "worse"], "nothing is prepared for those that have ended"
    assert loop.trouble() is None


def test_a_failed_step_ends_every_request_once_and_later_ones_too(published: Published) -> None:
    gate = Gate(runner())
    ended = threading.Event()
    loop = EngineLoop(Scheduler(CONFIG, KV), gate, published, ended=ended.set)
    start(loop)
    for n in range(6):
        loop.submit(request(f"r{n}", tokens=100))
    gate.steps.release()
    published.until(lambda: bool(published.tokens))
    gate.failure = RuntimeError("device lost")
    gate.steps.release()
    assert ended.wait(DEADLINE)
    loop.submit(request("late"))
    loop.abort("late")
    for id in ("r0", "r1", "r2", "r3", "r4", "r5", "late"):
        end = published.end(id)
        assert end.reason == "error", id
        assert "device lost" not in str(end.detail), "clients need no internals"
    assert "device lost" in str(loop.trouble())
    loop.stop()


def test_stopping_ends_live_requests(published: Published) -> None:
    gate = Gate(runner())
    loop = EngineLoop(Scheduler(CONFIG, KV), gate, published)
    start(loop)
    loop.submit(request("r", tokens=100))
    gate.steps.release()
    published.until(lambda: "r" in published.tokens)
    stop = threading.Thread(target=loop.stop, args=(DEADLINE,))
    stop.start()
    while not loop._stopping:
        time.sleep(0.01)
    gate.steps.release()  # the step that is under way
    assert published.end("r").detail == "the engine was shut down; send the request again"
    stop.join(DEADLINE)
    assert not stop.is_alive()


class Ranks:
    """Rank 0's loop with real followers, each in a thread."""

    def __init__(self, published: Published, world: int) -> None:
        leader = Leader("127.0.0.1", KEY)
        self.runners = [runner() for _ in range(world)]
        self.ends: queue.Queue[Exception] = queue.Queue()
        self.followers: list[Follower] = []
        for rank in range(1, world):
            threading.Thread(target=self._follow, args=(leader.port, rank), daemon=True).start()
        leader.accept(world - 1, DEADLINE)
        self.loop = EngineLoop(Scheduler(CONFIG, KV), self.runners[0], published, leader)
        start(self.loop)

    def _follow(self, port: int, rank: int) -> None:
        follower = Follower("127.0.0.1", port, rank, KEY)
        self.followers.append(follower)
        try:
            follow(follower, self.runners[rank])
        except Exception as error:
            self.ends.put(error)


def test_every_rank_runs_every_step_and_hears_of_the_end(published: Published) -> None:
    ranks = Ranks(published, 3)
    requests = [request("r" * n) for n in range(1, 7)]
    for r in requests:
        ranks.loop.submit(r)
    for r in requests:
        published.end(r.id)
        assert published.tokens[r.id] == generate(r, CONFIG, KV.groups, VOCAB)[0]
    ranks.loop.stop()
    for _ in range(2):
        assert isinstance(ranks.ends.get(timeout=DEADLINE), PlanLost)
    assert len({runner.steps for runner in ranks.runners}) == 1
    for other in ranks.runners[1:]:
        assert other.last == ranks.runners[0].last


def test_a_follower_that_fails_fails_the_engine(published: Published) -> None:
    ranks = Ranks(published, 2)
    ranks.loop.submit(request("r", tokens=5))
    published.end("r")
    ranks.runners[1].steps = 1000  # the next step will not be what it expects
    ranks.loop.submit(request("last", tokens=5))
    assert isinstance(ranks.ends.get(timeout=DEADLINE), AssertionError)
    # An idle leader hears of it by its next heartbeats; a fake step needs no other rank.
    published.end("last")
    published.until(lambda: ranks.loop.trouble() is not None)
    assert "rank 1" in str(ranks.loop.trouble())


def test_a_stranger_cannot_follow() -> None:
    leader = Leader("127.0.0.1", KEY)
    heard: queue.Queue[str] = queue.Queue()

    def intrude() -> None:
        stranger = Follower("127.0.0.1", leader.port, 1, b"another key")
        try:
            stranger.receive()
        except PlanLost as lost:
            heard.put(str(lost))
        finally:
            stranger.close()

    thread = threading.Thread(target=intrude)
    thread.start()
    assert select.select([leader._listener], [], [], DEADLINE)[0], "it does not come"
    with pytest.raises(PlanLost, match=r"ranks \[1\] have not come"):
        leader.accept(1, 1.0)
    thread.join(DEADLINE)
    assert "closed the plan channel" in heard.get(timeout=DEADLINE)
    leader.close()
