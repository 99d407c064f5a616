"""Placements: properties of all, and against every placement there is where there are few."""

from __future__ import annotations

from itertools import product
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallelism.placement import (
    ExpertLoad,
    Placement,
    PlacementError,
    _pack,
    contiguous,
    imbalance,
    parse,
    place,
)


def load(*calls: tuple[int, ...], **fields: Any) -> ExpertLoad:
    known: dict[str, Any] = {"model": "m", "config": "c" * 64, "expert_bytes": 100}
    return ExpertLoad(calls=calls, **(known | fields))


@st.composite
def cases(draw: st.DrawFn) -> tuple[ExpertLoad, int, int, int]:
    """A load, ranks, ranks per node, and the most redundant experts that may be asked for."""
    per_node, nodes = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    ranks = per_node * nodes
    experts = draw(st.integers(ranks, 20))
    few = st.sampled_from([0, 1, 2, 3, 10, 1000])
    layer = st.lists(few | st.integers(0, 10**6), min_size=experts, max_size=experts)
    calls = draw(st.lists(layer.map(tuple), min_size=1, max_size=3))
    return load(*calls), ranks, per_node, experts - -(-experts // ranks)


@given(cases())
@settings(max_examples=400)
def test_every_placement_is_right_and_none_is_worse(
    case: tuple[ExpertLoad, int, int, int],
) -> None:
    """Right: what ``Placement`` refuses does not come up, and tokens are neither lost nor made."""
    recorded, ranks, per_node, most = case
    before = contiguous(recorded, ranks, per_node)
    least = [max(loads) for loads in before.loads(recorded)]
    for redundant in range(min(most, 4) + 1):
        found = place(recorded, ranks, redundant, per_node)
        assert found.slots == before.slots + redundant
        assert found.ranks == ranks
        for calls, places, loads in zip(
            recorded.calls, found.layers, found.loads(recorded), strict=True
        ):
            assert sum(loads) == pytest.approx(sum(calls))
            assert all(places), "a rank without experts"
            assert sum(map(len, places)) <= recorded.experts + ranks * redundant
            on = [
                {expert for held in places[at:][:per_node] for expert in held}
                for at in range(0, ranks, per_node)
            ]
            assert sum(map(len, on)) == recorded.experts, "an expert is on two nodes"
        most_now = [max(loads) for loads in found.loads(recorded)]
        assert all(now <= then for now, then in zip(most_now, least, strict=True))
        least = most_now
        assert 1 - 1e-9 <= imbalance(found.loads(recorded)) <= ranks + 1e-9
        assert place(recorded, ranks, redundant, per_node) == found
        assert parse(Placement, msgspec.json.encode(found)) == found


@given(st.lists(st.integers(0, 50), min_size=2, max_size=6))
def test_greedy_is_near_the_best_there_is(calls: list[int]) -> None:
    """On two ranks, without copies: what longest-first misses at most, here."""
    recorded = load(tuple(calls))
    slots = -(-len(calls) // 2)
    best = min(
        max(sum(calls[i] for i, at in enumerate(on) if at == rank) for rank in (0, 1))
        for on in product((0, 1), repeat=len(calls))
        if max(on.count(0), on.count(1)) <= slots
    )
    assert max(place(recorded, 2).loads(recorded)[0]) <= 7 / 6 * best + 1e-9


def test_the_busiest_expert_is_copied_first() -> None:
    recorded = load((100, 10, 10, 10), (10, 10, 10, 100))
    assert imbalance(contiguous(recorded, 2).loads(recorded)) == pytest.approx(110 / 65)
    assert imbalance(place(recorded, 2).loads(recorded)) == pytest.approx(110 / 65)
    found = place(recorded, 2, 1)
    assert [[held.count(0) for held in places] for places in found.layers] == [[1, 1], [1, 1]]
    assert [[held.count(3) for held in places] for places in found.layers] == [[0, 1], [1, 1]]
    assert imbalance(found.loads(recorded)) == pytest.approx(1, abs=0.1)
    assert found.bytes(100) == 100 * 6


def test_no_rank_gets_an_expert_twice() -> None:
    """A copy too many is left out; its tokens go to the others."""
    assert _pack([(9, 0), (1, 1), (1, 1)], [1, 2]) == ((0,), (1,))


def test_nodes_come_before_ranks() -> None:
    """Flat packing would level the ranks and leave one node with more than the other."""
    recorded = load((8, 7, 6, 5, 4, 3, 2, 1))
    found = place(recorded, 4, 0, 2)
    assert found.loads(recorded, 2) == [[18, 18]]
    assert contiguous(recorded, 4, 2).loads(recorded, 2) == [[26, 10]]


def test_loads_add_up() -> None:
    one, two = load((1, 2), (3, 4)), load((10, 20), (30, 40), model="copy")
    assert one.plus(two) == load((11, 22), (33, 44))
    with pytest.raises(PlacementError, match=r"m \(2 layers, 2 experts.*m \(1 layers, 2 experts"):
        one.plus(load((1, 2)))
    with pytest.raises(PlacementError, match="two models"):
        one.plus(load((1, 2), (3, 4), config="d"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((5,), "5 ranks for 4 experts: give 1 to 4"),
        ((0,), "0 ranks for 4 experts"),
        ((2, 3), "3 redundant experts on each of 2 ranks, which hold 2 of 4 already: give 0 to 2"),
        ((2, -1), "-1 redundant"),
        ((4, 0, 3), "4 ranks do not fill nodes of 3"),
        ((4, 0, -2), "do not fill nodes of -2"),
    ],
)
def test_what_cannot_be_placed(arguments: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(PlacementError, match=sentence):
        place(load((1, 2, 3, 4)), *arguments)


GOOD: dict[str, Any] = {
    "version": 1,
    "model": "m",
    "config": "c" * 64,
    "experts": 3,
    "slots": 2,
    "ranks_per_node": 2,
    "layers": [[[0, 2], [1, 2]], [[0], [1, 2]]],
}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"version": 2}, r"\$.version"),
        ({"more": 1}, "unknown field `more`"),
        ({"layers": []}, "no layers"),
        ({"layers": [[]]}, "no ranks"),
        ({"layers": [[[0, 1], [1, 2]], [[0, 1, 2]]]}, "layer 1 has 1 ranks, layer 0 has 2"),
        ({"layers": [[[0, 1, 2], [1]]]}, "layer 0, rank 0: 3 experts for 2 slots"),
        ({"layers": [[[0, 1], [2, 2]]]}, "layer 0, rank 1: experts are not in ascending order"),
        ({"layers": [[[0, 1], [1]]]}, "layer 0: no rank holds expert 2"),
        (
            {"layers": [[[0, 1], [2, 3]]]},
            "layer 0, rank 1: experts 2 to 3 of a model that has 0 to 2",
        ),
        ({"layers": [[[-1, 1], [0, 2]]]}, "experts -1 to 1"),
        ({"layers": "x"}, r"\$.layers"),
        ({"experts": 10**30}, "no rank holds expert 3"),
        ({"ranks_per_node": 3}, "2 ranks do not fill nodes of 3"),
        ({"ranks_per_node": 0}, r"\$.ranks_per_node"),
    ],
)
def test_a_bad_file_says_what_is_wrong(fields: dict[str, Any], sentence: str) -> None:
    assert parse(Placement, msgspec.json.encode(GOOD)).ranks == 2
    with pytest.raises(PlacementError, match=f"this is no placement: .*{sentence}"):
        parse(Placement, msgspec.json.encode(GOOD | fields))


@given(st.binary())
def test_any_bytes_are_refused_as_a_load(data: bytes) -> None:
    with pytest.raises(PlacementError, match="this is no expert load"):
        parse(ExpertLoad, data)


@pytest.mark.parametrize(
    ("calls", "sentence"),
    [
        ([], "no layers or no experts"),
        ([[]], "no layers or no experts"),
        ([[1, 2], [1]], "layer 1 has 1 experts, layer 0 has 2"),
        ([[1, -2]], r"\$.calls"),
    ],
)
def test_a_bad_load_says_what_is_wrong(calls: list[list[int]], sentence: str) -> None:
    fields = {"version": 1, "model": "m", "config": "c", "expert_bytes": 1, "calls": calls}
    with pytest.raises(PlacementError, match=sentence):
        parse(ExpertLoad, msgspec.json.encode(fields))


def test_a_placement_is_for_one_model_and_what_fits() -> None:
    found = parse(Placement, msgspec.json.encode(GOOD))
    found.check("c" * 64, 2, 3, 2)
    for asked, sentence in (
        (("c" * 64, 2, 4, 2), r"for m \(2 layers, 3 experts.*not for a model of 2 layers, 4 exp"),
        (("d" * 64, 2, 3, 2), "config.json dddddddddddd"),
        (("c" * 64, 2, 3, 4), "for 2 ranks, not for 4"),
    ):
        with pytest.raises(PlacementError, match=sentence):
            found.check(*asked)
    found.fit(10, 40)
    with pytest.raises(PlacementError, match=r"puts 40 bytes .* room for 39"):
        found.fit(10, 39)


def test_imbalance() -> None:
    assert imbalance([[1, 1], [3, 1], [0, 0]]) == pytest.approx((1 + 1.5) / 2)
    assert imbalance([]) == imbalance([[0, 0]]) == 1
