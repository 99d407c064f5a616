"""The scheduler under random traffic, against the oracle that recomputes everything."""

from __future__ import annotations

from collections import deque
from copy import deepcopy
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.fakes import FakeRunner, fake_logprobs
from tests.oracle import BROKEN, generate, visible
from tests.strategies import (
    FULL,
    VOCAB,
    kv_configs,
    requests,
    samplings,
    scheduler_configs,
)
from workers.blocks import prefix_hashes, prefix_root
from workers.config import KVConfig, KVGroup, SchedulerConfig
from workers.engine import Steps
from workers.scheduler import Scheduler
from workers.sequence import Sequence
from workers.wire import Batch, Output, Request, Sampling


def state(value: Any) -> Any:
    """A scheduler's state as comparable plain values."""
    if isinstance(value, Scheduler):
        hidden = {"_joins", "_tables", "_undo", "_starved", "_rollbacks", "config"}
        return {k: state(v) for k, v in vars(value).items() if k not in hidden}
    if isinstance(value, Sequence):
        # Hashes are a memory of a pure function: to know more of them is no difference.
        return {k: state(getattr(value, k)) for k in value.__slots__ if k != "hashes"}
    if hasattr(value, "free_list"):
        links = {"_next", "_prev", "undo", "config", "_bounded"}
        return {k: state(v) for k, v in vars(value).items() if k not in links} | {
            "free": value.free_list(),
            "parked": [list(blocks) for blocks in value._parked],
        }
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {k: state(v) for k, v in value.items()}
    if isinstance(value, list | tuple | deque):
        return [state(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if hasattr(value, "__slots__") and not isinstance(value, msgspec.Struct):
        return [state(getattr(value, k)) for k in value.__slots__]
    return deepcopy(value)


Prefix = tuple[str | int, ...]  # a salt, and the tokens up to a page's end


class Client:
    """What an ingress sees of one request."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens = list(request.emitted)
        self.end: Output | None = None

    def receive(self, output: Output) -> None:
        assert self.end is None, f"{output} after the end"
        assert output.epoch == self.request.epoch
        assert output.offset == len(self.tokens), f"gap or repeat: {output}"
        most, end = self.request.sampling.logprobs, len(self.request.prompt) + output.offset
        assert output.logprobs == (
            None
            if most is None or not output.tokens
            else [fake_logprobs(token, end + i, most) for i, token in enumerate(output.tokens)]
        )
        self.tokens += output.tokens
        if output.reason:
            self.end = output


class Traffic(RuleBasedStateMachine):
    """Random arrivals, aborts, resolutions, rollbacks and steps up to two deep."""

    def __init__(self) -> None:
        super().__init__()
        self.clients: dict[str, Client] = {}
        self.flying: deque[tuple[Batch, int]] = deque()
        self.filling: deque[set[Prefix]] = deque()  # what the steps in flight fill
        self.now = 0.0

    @initialize(kv=kv_configs(), config=scheduler_configs())
    def start(self, kv: KVConfig, config: SchedulerConfig) -> None:
        self.kv, self.config = kv, config
        self.scheduler = Scheduler(config, kv)
        self.runner = FakeRunner(config, kv, VOCAB)

    def add(self, request: Request) -> None:
        client = self.clients[request.id] = Client(request)
        answer = self.scheduler.add(request, self.now)
        assert len(answer) <= 1
        self.receive(answer)
        if client.end is None:
            limit = min(
                len(request.prompt) + request.sampling.max_tokens, self.config.max_model_len
            )
            assert self.scheduler.pool.blocks_needed(limit - 1) <= self.kv.num_blocks

    def receive(self, outputs: list[Output]) -> None:
        for output in outputs:
            self.clients[output.id].receive(output)

    @rule(data=st.data(), count=st.integers(1, 4))
    def arrive(self, data: st.DataObject, count: int) -> None:
        for _ in range(count):
            request = data.draw(requests(f"r{len(self.clients)}"))
            if data.draw(st.booleans()):
                root = prefix_root("", "", salt=request.salt)
                hashes = prefix_hashes(root, request.prompt, self.kv.block_size)
                request = msgspec.structs.replace(request, hashes=hashes)
            self.add(request)

    @rule(data=st.data(), sampling=samplings())
    def resume(self, data: st.DataObject, sampling: Sampling) -> None:
        """A request that lost its engine after some tokens; or a follow-up of an earlier one."""
        request = data.draw(requests(f"r{len(self.clients)}"))
        if len(request.prompt) + 1 >= self.config.max_model_len:
            return
        tokens, _, _ = generate(request, self.config, self.kv.groups, VOCAB)
        sent = data.draw(st.integers(0, len(tokens)))
        self.add(msgspec.structs.replace(request, emitted=tokens[:sent], epoch=1))

    @precondition(lambda self: any(not c.end for c in self.clients.values()))
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from([i for i, c in self.clients.items() if not c.end]))
        self.receive(self.scheduler.abort(id, self.now))
        end = self.clients[id].end
        assert end is not None
        assert end.reason == "abort"
        assert self.scheduler.abort(id, self.now) == []

    @rule(data=st.data())
    def resolve(self, data: st.DataObject) -> None:
        for id, client in self.clients.items():
            for what in client.request.waits:
                if data.draw(st.booleans()):
                    self.scheduler.resolve(id, what, self.now)

    @precondition(lambda self: len(self.flying) < 2)
    @rule(rollback=st.sampled_from([False, False, False, True]))
    def plan(self, rollback: bool) -> None:
        self.now += 0.01
        if rollback:
            before = state(self.scheduler)
            self.scheduler.rollback(self.scheduler.plan(self.now))
            assert state(self.scheduler) == before
            self.scheduler.check()
        batch = self.scheduler.plan(self.now)
        self.check_batch(batch)
        sent = msgspec.msgpack.decode(msgspec.msgpack.encode(batch), type=Batch)
        self.flying.append((batch, self.runner.launch(sent)))

    def check_batch(self, batch: Batch) -> None:
        rows = list(batch.rows())
        assert sum(row.count for row in rows) <= self.config.max_num_batched_tokens
        self.check_prefixes(batch)
        if not self.flying and not rows:
            # Nothing is in flight that could come to its aid: then nothing may be able to run.
            assert not self.scheduler.load().running
            assert all(c.end or c.request.waits for c in self.clients.values())

    def check_prefixes(self, batch: Batch) -> None:
        """Nobody who comes in computes a page that a step in flight fills, or that a better one
        is about to."""
        size = self.kv.block_size

        def pages(slot: int, first: int, end: int) -> set[Prefix]:
            seq = self.scheduler._slots[slot]
            assert seq is not None
            salt = self.clients[seq.id].request.salt
            return {(salt, *seq.tokens[: (p + 1) * size]) for p in range(first, end)}

        chunks = [(row, self.scheduler._slots[row.slot]) for row in batch.rows() if row.tokens]
        joined = {join.slot for join in batch.joins}
        for row, seq in chunks:
            assert seq is not None
            page = row.start // size
            if row.slot not in joined or page >= (len(seq.tokens) - 1) // size:
                continue
            (mine,) = pages(row.slot, page, page + 1)
            ahead = [
                pages(other.slot, other.start // size, len(better.tokens) // size)
                for other, better in chunks
                if better is not None and better.order < seq.order
            ]
            if self.kv.prefix_caching:
                assert mine not in set().union(*self.filling, *ahead)
        self.filling.append(
            {
                page
                for row, _ in chunks
                for page in pages(row.slot, row.start // size, (row.start + row.count) // size)
            }
        )

    @precondition(lambda self: self.flying)
    @rule()
    def commit(self) -> None:
        batch, handle = self.flying.popleft()
        self.filling.popleft()
        self.receive(self.scheduler.commit(batch, self.runner.collect(handle), self.now))

    @rule(steps=st.integers(1, 12), depth=st.integers(1, 2))
    def run(self, steps: int, depth: int) -> None:
        for _ in range(steps):
            while len(self.flying) < depth:
                self.plan(rollback=False)
            self.commit()
            self.scheduler.check()

    @invariant()
    def audit(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        scheduler.check()
        load = scheduler.load()
        live = sum(not client.end for client in self.clients.values())
        assert load.running + load.waiting == live
        assert sum(load.finished.values()) == len(self.clients) - live
        # The naive ledger: exactly the pages that the next query of each sequence, or the last
        # one planned, can see; the page being written among them.
        for seq in scheduler._slots:
            if seq is None:
                continue
            assert seq.table is not None
            position = int(scheduler._columns[0, seq.slot])
            for group, blocks in zip(self.kv.groups, seq.table.blocks, strict=True):
                held = set(range(seq.table.end - len(blocks), seq.table.end))
                needed = {p // self.kv.block_size for p in visible(group, position) if p < position}
                assert needed <= held, f"{group.name}: {needed} not in {held} at {position}"

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for id, client in self.clients.items():
            for what in client.request.waits:
                self.scheduler.resolve(id, what, self.now)
        # Each step computes a token of the best sequence, unless it waits for a commit.
        tokens = sum(
            len(c.request.prompt) + c.request.sampling.max_tokens for c in self.clients.values()
        )
        for _ in range(3 * tokens + 10):
            if not self.scheduler.has_work():
                break
            self.plan(rollback=False)
            self.commit()
            self.scheduler.check()
        while self.flying:
            self.commit()
        assert not self.scheduler.has_work(), "requests are stuck"
        self.scheduler.check()
        pool = self.scheduler.pool
        assert pool.num_free == self.kv.num_blocks, "blocks leaked"
        assert pool.used == [0] * len(self.kv.groups)
        for client in self.clients.values():
            self.check_answer(client)

    def check_answer(self, client: Client) -> None:
        request, end = client.request, client.end
        assert end is not None, f"{request.id} never ended"
        if end.reason == "refused" and end.detail != BROKEN:
            limit = min(
                len(request.prompt) + request.sampling.max_tokens, self.config.max_model_len
            )
            too_long = len(request.prompt) >= self.config.max_model_len
            assert too_long or self.scheduler.pool.blocks_needed(limit - 1) > self.kv.num_blocks
            assert str(len(request.prompt)) in (end.detail or "")
            return
        tokens, reason, stop = generate(request, self.config, self.kv.groups, VOCAB)
        if end.reason == "abort":
            assert client.tokens == tokens[: len(client.tokens)]
        else:
            assert (client.tokens, end.reason, end.stop) == (tokens, reason, stop)


def run_siblings(ahead: int, prompt: int, salts: list[str]) -> tuple[Scheduler, int, list[str]]:
    """Choices of one prompt sent at once, and a stranger behind them; prompt tokens computed, and
    the order in which first tokens came."""
    config = SchedulerConfig(
        max_num_seqs=10, max_num_batched_tokens=64, max_model_len=400, eos_token_ids=()
    )
    kv = KVConfig((FULL, KVGroup("window", (0,), 64, 9)), num_blocks=400, block_size=4)
    scheduler, runner = Scheduler(config, kv), FakeRunner(config, kv, VOCAB, ahead)
    how = Sampling(max_tokens=5, seed=3)
    tokens = [1 + i % 5 for i in range(prompt)]
    clients = {}
    for choice, salt in enumerate(salts):
        request = Request(
            id=f"r{choice}", model="m", prompt=tokens, sampling=how, choice=choice, salt=salt
        )
        clients[request.id] = Client(request)
    clients["s"] = Client(Request(id="s", model="m", prompt=[6, 6, 6], sampling=how))
    for client in clients.values():
        assert scheduler.add(client.request, 0.0) == []
    batches: list[Batch] = []
    steps, first = Steps(scheduler, runner, batches.append), []
    for _ in range(200):
        for output in steps.next() if scheduler.has_work() else []:
            clients[output.id].receive(output)
            if output.offset == 0:
                first.append(output.id)
    for client in clients.values():
        assert client.tokens == generate(client.request, config, kv.groups, VOCAB)[0]
    computed = sum(row.count for batch in batches for row in batch.rows() if row.tokens)
    return scheduler, computed, first


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("prompt", [48, 50, 150])
def test_choices_of_one_prompt_compute_it_once(ahead: int, prompt: int) -> None:
    """But for the tokens after its last full page, or that page where nothing follows it."""
    scheduler, computed, first = run_siblings(ahead, prompt, [""] * 8)
    own = prompt % 4 or 4
    assert computed == prompt + 7 * own + 3
    assert scheduler.load().prefix_hits == 7 * (prompt - own)
    assert first == [*(f"r{i}" for i in range(8)), "s"], "who waits is not overtaken"
    _, strangers, _ = run_siblings(ahead, prompt, list("abcdefgh"))
    assert strangers == 8 * prompt + 3


def run_machine(examples: int, steps: int, phases: tuple[Phase, ...]) -> None:
    run_state_machine_as_test(
        Traffic,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            suppress_health_check=list(HealthCheck),
            phases=phases,
            print_blob=True,
        ),
    )


def test_traffic() -> None:
    run_machine(150, 25, (Phase.generate,))  # to shrink takes minutes: that is the long test's


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_traffic_long() -> None:
    run_machine(1500, 60, (Phase.reuse, Phase.generate, Phase.shrink))
