"""Placement is a pure function of beliefs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.routing import SETTLE_SECONDS, STALE_SECONDS, Belief, NoEngine, choose
from workers.wire import Engine, Load, Request, Sampling

A, B, C = (Engine("s", "m", name) for name in "abc")


def request(id: str = "r", tokens: int = 1, model: str = "m") -> Request:
    return Request(id=id, model=model, prompt=[0] * tokens, sampling=Sampling(max_tokens=1))


def belief(
    heard: float = 0.0, running: int = 0, waiting: int = 0, queued_tokens: int = 0
) -> Belief:
    return Belief(Load(running=running, waiting=waiting, queued_tokens=queued_tokens), heard)


def test_fewest_sequences_then_fewest_prompt_tokens() -> None:
    engines = {A: belief(running=3), B: belief(running=1, waiting=1), C: belief(running=4)}
    placement = choose(request(), engines, 0.0)
    assert (placement.engine, placement.prefill, placement.expected_hit) == (B, None, 0)
    engines = {A: belief(running=1, queued_tokens=9), B: belief(running=1, queued_tokens=8)}
    assert choose(request(), engines, 0.0).engine == B


def test_only_engines_of_the_model_count() -> None:
    other = Engine("s", "other", "a")
    engines = {other: belief(), A: belief(running=9)}
    assert choose(request(), engines, 0.0).engine == A
    with pytest.raises(NoEngine, match="'x'"):
        choose(request(model="x"), engines, 0.0)
    with pytest.raises(NoEngine):
        choose(request(), {}, 0.0)


def test_silent_engines_are_the_last_resort() -> None:
    late = STALE_SECONDS + 1
    engines = {A: belief(0.0), B: belief(late, running=50)}
    assert choose(request(), engines, late).engine == B
    assert choose(request(), {A: belief(0.0)}, late).engine == A


def test_reservations_count_until_the_engine_reports_them() -> None:
    engines = {A: belief(), B: belief(running=1)}
    engines[A].reserve(request("1"), 1.0)
    engines[A].reserve(request("2"), 1.0)
    assert choose(request(), engines, 1.0).engine == B
    engines[A].hear(Load(running=0), 1.0 + SETTLE_SECONDS / 2)
    assert choose(request(), engines, 1.1).engine == B, "the report left before the requests came"
    engines[A].release("1")
    engines[A].release("1")
    engines[A].hear(Load(running=0), 1.0 + 2 * SETTLE_SECONDS)
    assert engines[A].reserved == {}
    assert choose(request(), engines, 1.2).engine == A


def test_ingresses_that_believe_the_same_spread() -> None:
    engines = {A: belief(), B: belief(), C: belief()}
    chosen = [choose(request(f"r{i}"), engines, 0.0).engine for i in range(300)]
    assert all(chosen.count(engine) > 60 for engine in engines)


@settings(max_examples=200)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_a_burst_is_spread_evenly_without_any_report(tokens: list[int]) -> None:
    engines = {A: belief(), B: belief(), C: belief()}
    for at, count in enumerate(tokens):
        one = request(str(at), count)
        engines[choose(one, engines, 0.0).engine].reserve(one, 0.0)
    counts = [len(b.reserved) for b in engines.values()]
    assert max(counts) - min(counts) <= 1
