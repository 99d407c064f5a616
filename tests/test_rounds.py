"""Who takes part in which step: the protocol as a value, then between threads over sockets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.fakes import FakeRunner
from tests.oracle import generate
from tests.test_engine import CONFIG, DEADLINE, KEY, KV, VOCAB, Published, request, start
from workers.engine import EngineLoop, follow
from workers.gang import Coordinator, Member
from workers.plans import Follower, Leader, PlanLost
from workers.rounds import Hello, RoundLost, Rounds
from workers.scheduler import Scheduler
from workers.wire import Batch, Round, StepResult

ENGINES = 3
FACTS = {"dtype": "float32", "weights": "abc"}


class Protocol(RuleBasedStateMachine):
    """Engines that call and rest as they like; each runs the rounds it was told of, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.rounds = Rounds(ENGINES, 2, 10.0, 10.0)
        self.now = 0.0
        self.called: list[int | None] = [None] * ENGINES  # not answered by a round yet
        self.resting = [False] * ENGINES
        self.made: list[Round] = []

    @rule(engine=st.integers(0, ENGINES - 1), tokens=st.integers(1, 9))
    def call(self, engine: int, tokens: int) -> None:
        if self.called[engine] is None:
            self.called[engine], self.resting[engine] = tokens, False
            self.rounds.say(engine, tokens)
            self._make()

    @rule(engine=st.integers(0, ENGINES - 1))
    def rest(self, engine: int) -> None:
        if self.called[engine] is None:
            self.resting[engine] = True
            self.rounds.say(engine, 0)
            self._make()

    @rule(seconds=st.floats(0, 4))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for engine in range(ENGINES):
            for rank in range(2):
                self.rounds.heard((engine, rank), len(self.made), self.now)

    def _make(self) -> None:
        round = self.rounds.make(self.now)
        ready = all(c is not None or r for c, r in zip(self.called, self.resting, strict=True))
        assert (round is not None) == (ready and any(self.called)), "made too early, or not at all"
        if round is not None:
            self.made.append(round)
            assert round.number == len(self.made)
            assert round.tokens == tuple(tokens or 0 for tokens in self.called)
            self.called = [None] * ENGINES
            assert self.rounds.make(self.now) is None, "made twice"

    @invariant()
    def only_who_owes_a_word_is_overdue(self) -> None:
        why = self.rounds.overdue(self.now)
        if why is not None and "round" in why:
            busy = [e for e in range(ENGINES) if self.called[e] is None and not self.resting[e]]
            assert any(f"engine {e}, rank 0" in why for e in busy)


TestProtocol = Protocol.TestCase


def test_who_holds_a_round_up_is_named() -> None:
    rounds = Rounds(2, 2, 10.0, 10.0)
    for engine in range(2):
        for rank in range(2):
            assert rounds.meet(Hello(engine, rank, FACTS), 0.0) is None
    assert not rounds.missing
    rounds.say(1, 0)
    assert rounds.make(0.0) is None
    rounds.say(0, 5)
    assert rounds.make(1.0) == Round(1, (5, 0))
    for now in (1.0, 9.0, 10.5):
        for engine, rank in ((0, 0), (0, 1), (1, 0), (1, 1)):
            rounds.heard((engine, rank), 12 if engine == rank == 1 else 14, now)
    assert rounds.overdue(11.0) is None
    why = rounds.overdue(11.5)
    assert why == "round 1 is not over after 10.0 s: engine 1, rank 1 held it up"
    rounds.say(0, 0)
    assert rounds.overdue(11.5) is None, "an idle group has no deadline"
    rounds.heard((0, 1), 14, 0.5)
    assert rounds.overdue(11.5) == "engine 0, rank 1 has been silent for 11.0 s"


def test_who_does_not_fit_is_refused_with_what_differs() -> None:
    rounds = Rounds(2, 1, 5.0, 10.0)
    assert rounds.meet(Hello(1, 0, FACTS), 0.0) is None
    assert rounds.overdue(11.0) == "engine 0, rank 0 has not come in 11.0 s"
    assert rounds.meet(Hello(1, 0, FACTS), 0.0) == "engine 1, rank 0 came twice"
    assert "engine 2, rank 0 is none of 2" in str(rounds.meet(Hello(2, 0, FACTS), 0.0))
    why = rounds.meet(Hello(0, 0, FACTS | {"dtype": "bfloat16", "weights": "abd"}), 0.0)
    assert why == (
        "engine 0, rank 0 differs from engine 1, rank 0: dtype is bfloat16, not float32, "
        "weights is abd, not abc"
    )


# Engine loops in threads, with a fake model whose exchange is a barrier.


class Meeting:
    """Where the runners of all engines meet in every round, unless it is closed; each round takes
    ``pause`` seconds."""

    pause = 0.0

    def __init__(self, engines: int = ENGINES) -> None:
        self.barrier = threading.Barrier(engines, timeout=DEADLINE)
        self.open = threading.Event()
        self.open.set()
        self.rounds: list[list[Round]] = [[] for _ in range(ENGINES)]


class Rounded(FakeRunner):
    def __init__(self, meeting: Meeting, engine: int, ahead: int) -> None:
        super().__init__(CONFIG, KV, VOCAB, ahead)
        self._meeting, self._engine = meeting, engine

    def launch(self, batch: Batch) -> int:
        assert (batch.round is not None) == (len(batch) > 0 or batch.step == 0)
        if batch.round is not None:
            assert batch.round.tokens[self._engine] == batch.num_tokens
            self._meeting.rounds[self._engine].append(batch.round)
            assert self._meeting.open.wait(DEADLINE)
            time.sleep(self._meeting.pause)
            self._meeting.barrier.wait()
        return super().launch(batch) if batch.step else 0

    def collect(self, handle: int) -> StepResult:
        return super().collect(handle) if handle else StepResult(0, [])


class Group:
    """Engines with a coordinator, all in this process."""

    def __init__(self, ahead: int = 1, deadline: float = DEADLINE) -> None:
        self.coordinator = Coordinator("127.0.0.1", KEY, ENGINES, 1, deadline)
        self.meeting = Meeting()
        self.published = [Published() for _ in range(ENGINES)]
        address = ("127.0.0.1", self.coordinator.port)
        members: list[Any] = [None] * ENGINES

        def meet(engine: int) -> None:
            members[engine] = Member(
                address,
                KEY,
                (engine, 0),
                FACTS,
                abort=self.meeting.barrier.abort,
                deadline=deadline,
            )

        in_threads([lambda e=e: meet(e) for e in range(ENGINES)])  # type: ignore[misc]
        self.members: list[Member] = members
        self.started = 0
        self.loops = [
            EngineLoop(
                Scheduler(CONFIG, KV),
                Rounded(self.meeting, engine, ahead),
                self.published[engine],
                member=members[engine],
            )
            for engine in range(ENGINES)
        ]

    def __enter__(self) -> Group:
        for loop in self.loops[self.started :]:
            start(loop)
        return self

    def __exit__(self, *exc: object) -> None:
        in_threads([loop.stop for loop in self.loops])
        self.coordinator.close()


def in_threads(calls: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_engines_with_different_loads_go_in_step(ahead: int) -> None:
    """One has much to do, one little, one nothing; later they change places. A sleeping group
    makes no rounds, and wakes."""
    with Group(ahead) as group:
        for turn in range(3):
            wanted = []
            for engine, count in enumerate((6, 1, 0)):
                at = (engine + turn) % ENGINES
                wanted += [(at, request(f"{turn} {at} {'r' * n}", 20 + n)) for n in range(count)]
            group.meeting.open.clear()
            for at, each in wanted:
                group.loops[at].submit(each)
            group.meeting.open.set()
            for at, each in wanted:
                assert group.published[at].end(each.id).reason == "length"
                expected = generate(each, CONFIG, KV.groups, VOCAB)[0]
                assert group.published[at].tokens[each.id] == expected
            time.sleep(0.3)
            assert len({len(rounds) for rounds in group.meeting.rounds}) == 1
        first, *others = group.meeting.rounds
        assert all(rounds == first for rounds in others)
        assert [round.number for round in first] == [*range(1, len(first) + 1)]
        assert all(any(round.tokens) for round in first)
        busy = [sum(tokens > 0 for tokens in round.tokens) for round in first]
        assert {1, 2} <= {*busy}


def test_the_ranks_of_an_engine_that_waits_for_another_hear_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others may load their weights, or fill a long prompt, for longer than a plan may take."""
    monkeypatch.setattr("workers.engine.BEAT", 0.05)
    ends: list[Exception] = []
    heard = threading.Semaphore(0)

    class Listening(Follower):
        def receive(self) -> Batch | None:
            if (batch := super().receive()) is None and group.coordinator._rounds._said[0]:
                heard.release()  # a sign of life while the engine's call is not answered
            return batch

    def run(port: int) -> None:
        try:
            follow(Listening("127.0.0.1", port, 1, KEY), Rounded(Meeting(1), 0, 1))
        except PlanLost as lost:
            ends.append(lost)

    group = Group()
    leader = Leader("127.0.0.1", KEY)
    follower = threading.Thread(target=run, args=(leader.port,))
    follower.start()
    leader.accept(1)
    group.loops[0] = EngineLoop(
        Scheduler(CONFIG, KV),
        Rounded(group.meeting, 0, 1),
        group.published[0],
        leader,
        group.members[0],
    )
    start(group.loops[0])
    group.started = 1
    group.loops[0].submit(request("r"))
    for _ in range(5):
        assert heard.acquire(timeout=DEADLINE), f"the rank hears nothing: {ends}"
    assert not ends, "the rank gave up"
    with group:  # now the others begin, too
        assert group.published[0].end("r").reason == "length"
    follower.join(DEADLINE)
    assert "closed the plan channel" in str(ends[0])


def test_an_engine_that_stops_helps_the_others_to_their_end() -> None:
    with Group() as group:
        group.meeting.pause = 0.1  # nobody comes to an end before one is stopped
        for engine in range(ENGINES):
            group.loops[engine].submit(request(f"r{engine}", tokens=150))
        group.published[1].until(lambda: bool(group.published[1].tokens))
        group.loops[1].stop(timeout=0)
        assert group.published[1].end("r1").reason == "error"
        group.meeting.pause = 0.0
        group.loops[1].submit(request("late"))
        assert group.published[1].end("late").reason == "error"
        for engine in (0, 2):
            assert group.published[engine].end(f"r{engine}").reason == "length"
        group.loops[2].stop(timeout=0)
        group.loops[0].submit(request("more"))
        assert group.published[0].end("more").reason == "length"
        assert not any(loop._over.is_set() for loop in group.loops)
        group.loops[0].stop()
        for loop in group.loops:
            assert loop._over.wait(DEADLINE)
            assert loop.failure == "the engine was shut down"


class Slow(Rounded):
    """Still in a round when others have left it; fails if the group ends meanwhile."""

    def launch(self, batch: Batch) -> int:
        handle = super().launch(batch)
        time.sleep(0.3)
        if self._meeting.barrier.broken:
            raise RuntimeError("a collective was aborted")
        return handle


def test_the_end_may_come_amid_the_last_round_of_an_engine_that_has_stopped() -> None:
    with Group() as group:
        group.loops[1]._runner = group.loops[1]._steps._runner = Slow(group.meeting, 1, 1)
        for engine in (1, 2):
            group.loops[engine].stop(timeout=0)
        group.loops[0].submit(request("r", tokens=5))
        assert group.published[0].end("r").reason == "length"
        group.loops[0].stop()
        for loop in group.loops:
            assert loop._over.wait(DEADLINE)
            assert loop.failure == "the engine was shut down"


def test_a_step_that_fails_names_its_rank_everywhere() -> None:
    with Group() as group:

        def fail(batch: Batch) -> int:
            raise RuntimeError("no memory")

        group.loops[2]._runner.launch = fail  # type: ignore[method-assign]
        group.loops[0].submit(request("r"))
        assert group.published[0].end("r").reason == "error"
        for engine in (0, 1):
            assert group.loops[engine]._over.wait(DEADLINE)
            why = "engine 2, rank 0 failed: RuntimeError: no memory"
            assert why in str(group.loops[engine].trouble())
        assert "no memory" in str(group.loops[2].trouble())


def test_strangers_and_the_late_stay_out() -> None:
    coordinator = Coordinator("127.0.0.1", KEY, 2, 1, meet=1.0)
    address = ("127.0.0.1", coordinator.port)
    with pytest.raises(RoundLost, match="engine 0, rank 0 is gone"):
        Member(address, b"another key", (0, 0), FACTS, meet=1.0)
    with pytest.raises(RoundLost, match="engine 1, rank 0 has not come in"):
        Member(address, KEY, (0, 0), FACTS, meet=1.0)
    with pytest.raises(RoundLost, match="engine 1, rank 0 has not come in"):
        Member(address, KEY, (1, 0), FACTS, meet=1.0)
    coordinator.close()
