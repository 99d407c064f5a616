"""Who holds what: every layout covers everything, and a layout that cannot be says why."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.mxfp4 import BLOCK
from parallelism.layout import Layout, LayoutError, check
from parallelism.shard import Slice
from workers.architecture import MXFP4_BLOCK

GPT_OSS_20B = {
    "heads": 64,
    "kv_heads": 8,
    "experts": 32,
    "intermediate": 2880,
    "unit": 32,
    "vocabulary": 201_088,
}


@given(
    tp=st.integers(1, 16),
    count=st.integers(1, 300),
    unit=st.sampled_from([1, 32]),
    ep=st.booleans(),
)
def test_shares_cover_everything_once(tp: int, count: int, unit: int, ep: bool) -> None:
    ranks = [Layout(tp, ep, rank) for rank in range(tp)]
    vocabulary = [at for rank in ranks for at in range(*rank.vocabulary(count))]
    assert vocabulary == list(range(count))
    experts = [at for rank in ranks for at in range(*rank.experts(count))]
    columns = [at for rank in ranks for at in range(*rank.intermediate(count * unit, unit))]
    if ep:
        assert experts == list(range(count))
        assert columns == list(range(count * unit)) * tp
    else:
        assert experts == list(range(count)) * tp
        assert columns == list(range(count * unit))
        assert all(at % unit == 0 for rank in ranks for at in rank.intermediate(count * unit, unit))
    assert sum(rank.adds_expert_bias for rank in ranks) == (tp if ep else 1)


@given(dp=st.integers(1, 6), tp=st.integers(1, 6), count=st.integers(1, 80))
def test_engines_share_the_experts_and_nothing_else(dp: int, tp: int, count: int) -> None:
    ranks = [Layout(tp, True, rank, dp, engine) for engine in range(dp) for rank in range(tp)]
    assert [rank.ep_rank for rank in ranks] == [*range(dp * tp)]
    held = [at for places in ranks[0].places(count) for at in places]
    assert held == [at for rank in ranks for at in range(*rank.experts(count))]
    assert held == [*range(count)]
    for rank in ranks:
        alone = Layout(tp, True, rank.rank)
        assert rank.heads(tp * 2) == alone.heads(tp * 2)
        assert rank.vocabulary(count) == alone.vocabulary(count)


@pytest.mark.parametrize(("tp", "kv_heads"), [(1, 8), (2, 8), (8, 8), (16, 8), (4, 1), (4, 2)])
def test_query_heads_meet_their_kv_head(tp: int, kv_heads: int) -> None:
    """Query head h attends to KV head h // group, on whatever rank it lies."""
    heads, group = 16, 16 // kv_heads
    for rank in range(tp):
        layout = Layout(tp, False, rank)
        first, last = layout.heads(heads)
        first_kv, last_kv = layout.heads(kv_heads)
        local_group = (last - first) // (last_kv - first_kv)
        for head in range(first, last):
            assert first_kv + (head - first) // local_group == head // group


@pytest.mark.parametrize(
    ("layout", "numbers", "sentence"),
    [
        (Layout(3), {}, "--tensor-parallel-size 3 does not divide the model's 64 attention heads"),
        (Layout(0), {}, "must be at least 1"),
        (Layout(32), {"kv_heads": 12}, "32 and the model's 12 KV heads"),
        (Layout(32), {"intermediate": 96}, "32 exceeds the 3 MXFP4 blocks"),
        (Layout(64, True), {}, "exceeds the model's 32 experts"),
        (Layout(4), {"vocabulary": 3}, "vocabulary of 3 tokens"),
        (Layout(2, dp=2), {}, "--data-parallel-size 2 needs --enable-expert-parallel"),
        (Layout(2, True, dp=0), {}, "--data-parallel-size 0 must be at least 1"),
        (Layout(8, True, dp=5), {}, "5 x --tensor-parallel-size 8 = 40 ranks .* 32 experts"),
    ],
)
def test_refusals_name_the_numbers(layout: Layout, numbers: dict[str, int], sentence: str) -> None:
    with pytest.raises(LayoutError, match=sentence):
        check(layout, **(GPT_OSS_20B | numbers))
    check(Layout(8), **GPT_OSS_20B)
    check(Layout(8, True), **GPT_OSS_20B)
    check(Layout(4, True, dp=8), **GPT_OSS_20B)


@given(data=st.data())
def test_runs_are_the_bytes_of_the_slice(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    ranges = []
    for size in shape:
        first = data.draw(st.integers(0, size))
        ranges.append((first, data.draw(st.integers(first, size))))
    item = data.draw(st.sampled_from([1, 2, 4]))
    whole = np.arange(prod(shape) * item, dtype=np.uint8).reshape(*shape, item)
    expected = whole[tuple(slice(*each) for each in ranges)].tobytes()
    offset, repeats, length = Slice("t", shape, tuple(ranges)).runs(item)
    starts = [offset]
    for count, stride in repeats:
        starts = [start + at * stride for start in starts for at in range(count)]
    flat = whole.tobytes()
    assert b"".join(flat[start : start + length] for start in starts) == expected


def test_experts_are_cut_between_blocks() -> None:
    assert MXFP4_BLOCK == BLOCK
