"""The KV ledger against formulas, and what the prefix cache may and may not share."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.engines import greedy
from tests.fakes import FakeRunner
from workers.architecture import Architecture
from workers.config import KVConfig, KVGroup, SchedulerConfig
from workers.scheduler import Scheduler
from workers.wire import Request

FULL = KVGroup("full", (1,), 64)
VOCABULARY = 50


def scheduler(
    *groups: KVGroup, blocks: int = 400, block_size: int = 4, budget: int = 64, **more: int
) -> Scheduler:
    config = SchedulerConfig(more.get("seqs", 8), budget, more.get("length", 1000), ())
    return Scheduler(config, KVConfig(groups, blocks, block_size), "rev", "bf16")


class Run:
    """A scheduler and a fake model, step by step."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.runner = FakeRunner(scheduler.config, scheduler.pool.config, VOCABULARY)
        self.ended: list[str] = []
        self.tokens: dict[str, list[int]] = {}

    def add(self, *requests: Request) -> None:
        for request in requests:
            assert self.scheduler.add(request, 0.0) == []

    def step(self) -> None:
        batch = self.scheduler.plan(0.0)
        result = self.runner.collect(self.runner.launch(batch))
        outputs = self.scheduler.commit(batch, result, 0.0)
        self.ended += [output.id for output in outputs if output.reason]
        for output in outputs:
            self.tokens.setdefault(output.id, []).extend(output.tokens)
        self.scheduler.check()

    def finish(self) -> None:
        while self.scheduler.has_work():
            self.step()


@given(
    window=st.integers(1, 40),
    block_size=st.sampled_from([1, 4, 16]),
    prompt=st.integers(1, 60),
    tokens=st.integers(2, 60),
)
def test_ledger_equals_the_formula(window: int, block_size: int, prompt: int, tokens: int) -> None:
    """Full layers keep every page. Window layers keep, before the query at position i, the pages
    from that of i - window + 1 on; older ones are free at once."""
    plan = scheduler(FULL, KVGroup("window", (0,), 64, window), block_size=block_size, budget=7)
    run = Run(plan)
    run.add(greedy("r", [at % VOCABULARY for at in range(prompt)], tokens))
    while plan.has_work():
        batch = plan.plan(0.0)
        (row,) = batch.rows()
        end = row.start + row.count
        pages = -(-end // block_size)
        first = max(0, row.start - window + 1) // block_size
        full, windowed = plan.pool.used
        assert full == pages
        # Pages are looked at again when the sequence reaches a page's end: up to one more is held.
        assert pages - first <= windowed <= pages - first + 1
        assert windowed <= (window + 6 + block_size - 2) // block_size + 2
        result = run.runner.collect(run.runner.launch(batch))
        plan.commit(batch, result, 0.0)
    assert plan.pool.used == [0, 0]
    assert plan.pool.num_free == plan.pool.num_blocks


def test_bytes_per_token_are_the_models() -> None:
    """gpt-oss-20b in bf16: 24 KiB per token in 12 full layers, 3 MiB of window per sequence, and
    half of it on each of two ranks."""
    arch = Architecture(
        vocab_size=201_088,
        hidden_size=2880,
        intermediate_size=2880,
        num_layers=24,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        num_experts=32,
        experts_per_token=4,
        windows=(128, 0) * 12,
        max_position=131_072,
        rope_theta=150_000.0,
        rope_scaling=None,
    )
    full, window = arch.kv_groups(16, tp=1, kv_dtype_bytes=2)
    assert (full.kind, window.kind, window.size) == ("full", "window", 128)
    assert full.block_bytes == window.block_bytes == 16 * 24 * 1024
    assert 8 * window.block_bytes == 3 << 20
    assert arch.kv_groups(16, tp=2, kv_dtype_bytes=2)[0].block_bytes == 8 * 24 * 1024
    assert arch.kv_groups(16, tp=16, kv_dtype_bytes=2)[0].block_bytes == 3 * 16 * 1024


def hits(run: Run, request: Request) -> int:
    """Prompt tokens of ``request`` that the prefix cache had."""
    before = run.scheduler.load().prefix_hits
    run.add(request)
    run.finish()
    return run.scheduler.load().prefix_hits - before


def test_prefix_hits() -> None:
    run = Run(scheduler(FULL, KVGroup("window", (0,), 64, 9)))
    prompt = [at % 11 for at in range(42)]
    assert hits(run, greedy("first", prompt, 3)) == 0
    # All full pages, and never the whole prompt: its last token must be computed.
    assert hits(run, greedy("same", prompt, 3)) == 40
    assert hits(run, greedy("page", prompt[:40], 3)) == 36
    follow_up = [*prompt, *run.tokens["first"], 1, 2, 3]
    assert hits(run, greedy("follow-up", follow_up, 3)) == 44, "generated tokens count, too"
    assert hits(run, greedy("other", [12, *prompt[1:]], 3)) == 0
    salted = greedy("salt", prompt, 3)
    salted = Request(
        **{f: getattr(salted, f) for f in ("id", "model", "prompt", "sampling")}, salt="t"
    )
    assert hits(run, salted) == 0, "another tenant's prefix"


def test_a_shared_prefix_outlives_the_window() -> None:
    """The first page leaves the window of the first request long before the second comes: its block
    is free, but known until somebody takes it."""
    run = Run(scheduler(KVGroup("window", (0,), 64, 5), FULL))
    prompt = list(range(20))
    run.add(greedy("first", prompt, 30))
    for _ in range(20):
        run.step()
    assert run.scheduler.pool.used[0] <= 3
    run.add(greedy("second", [*prompt, 1, 2], 3))
    run.finish()
    assert run.scheduler.load().prefix_hits == 20


def test_taken_blocks_are_forgotten() -> None:
    run = Run(scheduler(FULL, blocks=12, seqs=2))
    prompt = list(range(17))
    assert hits(run, greedy("first", prompt, 3)) == 0
    run.add(greedy("big", [40 + at % 5 for at in range(44)], 3))
    run.finish()
    assert hits(run, greedy("again", prompt, 3)) == 0
    assert len(run.scheduler.pool.cached_keys()) <= 12


def test_lower_priority_values_run_first_and_preempt_last() -> None:
    run = Run(scheduler(FULL, blocks=9, seqs=4))
    late = greedy("urgent", [3] * 8, 12)
    urgent = Request(
        id="urgent", model="m", prompt=late.prompt, sampling=late.sampling, priority=-1
    )
    run.add(greedy("first", [1] * 8, 16), greedy("second", [2] * 8, 16))
    run.step()
    run.add(urgent)
    run.finish()
    assert run.ended == ["urgent", "first", "second"]
    assert run.scheduler.load().preemptions > 0


def test_what_never_fits_is_refused_with_the_numbers() -> None:
    plan = scheduler(FULL, blocks=5, length=100)
    (output,) = plan.add(greedy("r", [1] * 10, 20), 0.0)
    assert output.reason == "refused"
    assert output.detail is not None
    assert "10 prompt tokens and max_tokens 20 need 8 KV blocks, the pool has 5" in output.detail
    (output,) = plan.add(greedy("s", [1] * 100, 1), 0.0)
    assert "100 tokens and the model length is 100" in (output.detail or "")
    assert not plan.has_work()


def test_deadlines() -> None:
    plan = scheduler(FULL)
    run = Run(plan)
    request = greedy("r", [1, 2, 3], 500)
    late = Request(id="late", model="m", prompt=[1], sampling=request.sampling, deadline_ms=50)
    run.add(request, late)
    run.step()
    assert plan.next_deadline() == 0.05
    batch = plan.plan(0.06)
    outputs = plan.commit(batch, run.runner.collect(run.runner.launch(batch)), 0.06)
    (end,) = [output for output in outputs if output.reason]
    assert (end.id, end.reason, end.detail) == (
        "late",
        "timeout",
        "the deadline passed after 1 tokens",
    )
    assert plan.next_deadline() is None
