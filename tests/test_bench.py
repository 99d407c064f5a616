"""What the benchmark of expert parallelism counts, and what it computes on paper."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import pytest
import torch

from parallelism.exchange import STATIC
from parallelism.experts import Slots
from parallelism.layout import Layout
from tests.bench import experts, paper
from tests.bench.experts import Event, Grid, Step, WatchedExchange, WatchedGroup
from tests.bench.streams import PacedEngine
from tests.test_exchange import HIDDEN, Share, Threads, grid, on_threads
from workers.actor import EngineReplica

DOCUMENT = Path(__file__).parents[1] / "docs" / "expert-parallel.md"


class Watched(WatchedGroup, Threads):
    """A rank that is a thread, watched."""


@pytest.mark.parametrize(
    ("dp", "tp", "tokens"), [(2, 1, [5, 3]), (2, 2, [7, 0]), (3, 1, [1, 2, 6])]
)
def test_bytes_counted_are_those_of_the_formulas(dp: int, tp: int, tokens: list[int]) -> None:
    """Against rows that the threads counted for themselves, and sizes worked out here."""
    k, count, ranks = 3, 12, dp * tp
    draw = torch.Generator().manual_seed(dp + tp)
    slots = Slots(Layout(tp, True, dp=dp).places(count))
    owner = [rank for rank, held in enumerate(slots.held) for _ in held]
    given = [
        (
            torch.randn(n, HIDDEN, generator=draw),
            torch.rand(n, count, generator=draw).topk(k).indices,
            torch.rand(n, k, generator=draw),
        )
        for n in tokens
    ]

    def run(layout: Layout, group: Threads) -> list[tuple[Step, int]]:
        watched = WatchedExchange(layout, group)
        share, found = Share(layout.ep_rank, slots), []
        assert isinstance(group, Watched)
        for most in (max(tokens), STATIC + 1):
            watched.begin(most)
            before = group.sent
            watched(share, *given[layout.dp_rank])  # type: ignore[arg-type]
            events, group.events = group.events, []
            found.append((Step(0, 1, 0, watched.take(), events), group.sent - before))
        return found

    results = [found for found, _ in on_threads(grid(dp, tp), run, Watched)]
    fixed, exact = ([found[way] for found in results] for way in (0, 1))
    shares = [-(-n // tp) for n in tokens]
    row, packed = 4 * HIDDEN, 4 * HIDDEN + 8 * k
    gathered = tp * sum((tp - 1) * row * each for each in shares)  # the engine's ranks, at the end
    most = -(-max(tokens) // tp)

    sent = experts.wire([step for step, _ in fixed], row)
    assert sent.dispatch == ranks * (ranks - 1) * most * packed
    assert sent.combine == ranks * (ranks - 1) * most * row + gathered
    needed = 0  # rows that leave their rank
    for engine, (_, ids, _) in enumerate(given):
        for token, chosen in enumerate(ids.tolist()):
            own = engine * tp + token // shares[engine]
            needed += len({owner[e] for e in chosen} - {own})
    assert sent.least == needed * row

    sent = experts.wire([step for step, _ in exact], row)
    counts = ranks * (ranks - 1) * 8  # an int64 to every other rank
    assert sent.dispatch == needed * packed + counts
    assert sent.combine == needed * row + gathered
    assert sent.least == needed * row
    stayed = sum(
        sum(own == rank for rank in {owner[e] for e in chosen})
        for engine, (_, ids, _) in enumerate(given)
        for token, chosen in enumerate(ids.tolist())
        for own in [engine * tp + token // shares[engine]]
    )
    assert sum(rows for _, rows in exact) == needed + stayed


def test_waits_are_for_the_last_rank_and_add_up() -> None:
    """Two engines of one rank: rank 1 comes to dispatch 3 late and is late for combine by 2; rank 0
    gets nothing in the second and leaves before rank 1 has come."""
    first = Step(
        0,
        20,
        0,
        [experts.Layer([1, 6, 10, 12])],
        [Event("dispatch", True, 2, 5.5, 8), Event("combine", True, 10, 11, 8)],
    )
    second = Step(
        0,
        20,
        0,
        [experts.Layer([4, 6, 11, 15])],
        [Event("dispatch", True, 5, 5.5, 8), Event("combine", True, 12, 14, 8)],
    )
    one, two = experts.shares(Grid(2, 1), [first, second])
    assert one.waits == {"dispatch": 3, "combine": 1, "": 0}
    assert two.waits == {"dispatch": 0, "combine": 0, "": 0}
    assert (one.dispatch, one.compute, one.combine) == (2, 4, 1)
    assert (two.dispatch, two.compute, two.combine) == (2, 5, 4)
    for share in (one, two):
        parts = share.dispatch + share.compute + share.combine + share.rest
        assert parts + sum(share.waits.values()) == share.step


def test_figures_on_paper() -> None:
    """By hand: a rank of 8 is missed by C(112, 4) / C(128, 4) = 149,059,680 / 256,032,000."""
    assert paper.distinct(8) == pytest.approx(8 * (1 - 149_059_680 / 256_032_000))
    assert paper.distinct(72) == pytest.approx(
        56 * (1 - (126 * 125 * 124 * 123) / (128 * 127 * 126 * 125)) + 16 * 4 / 128
    )
    assert paper.distinct(512) == 4
    assert (paper.ROW.out, paper.ROW.back) == (5792, 5760)
    # An expert has 24,883,200 weights of 4.25 bits: 13,219,200 bytes, 3.946 us on an H100;
    # a token's 49,766,400 operations take 0.05032 us: as long with 78.4 tokens.
    assert paper.compute_bound(paper.H100, 8) == pytest.approx(78.42 * 16 / 4, rel=1e-3)
    assert paper.experts_cost(8, 10_000).bytes == pytest.approx(16 * 13_219_200)
    assert paper.experts_cost(512, 1).bytes == pytest.approx(
        13_219_200 * (1 - (1 - 4 / 512) ** 512)
    )
    eight = paper.MACHINES[0]
    rows = paper.distinct(8) * 7 / 8 * 64
    assert paper.exchange_seconds(eight, 5792, 64) == pytest.approx(11e-6 + rows * 5792 / 153e9)
    far = paper.MACHINES[1]
    rows = paper.distinct(72) * 64 / 72 * 64
    assert paper.exchange_seconds(far, 5792, 64) == pytest.approx(11e-6 + rows * 5792 / 43e9)


@pytest.mark.parametrize(("ranks", "tokens"), [(8, 8), (72, 8), (72, 64)])
def test_the_expected_imbalance_is_that_of_drawn_tokens(ranks: int, tokens: int) -> None:
    draw = torch.Generator().manual_seed(0)
    owner = torch.tensor([rank for rank, own in enumerate(paper.held(ranks)) for _ in range(own)])
    ratios = []
    for _ in range(40):
        chosen = torch.rand(ranks * tokens, 128, generator=draw).topk(4).indices
        pairs = owner[chosen].flatten().bincount(minlength=ranks)
        ratios.append(float(pairs.max() / pairs.float().mean()))
    error = 4 * torch.tensor(ratios).std().item() / math.sqrt(len(ratios)) + 0.03
    assert paper.imbalance(ranks, tokens) == pytest.approx(sum(ratios) / len(ratios), abs=error)


def test_the_document_has_the_figures_that_are_computed() -> None:
    assert "\n".join(paper.report()).strip() in DOCUMENT.read_text()


def test_the_paced_engine_is_bound_like_the_real_one() -> None:
    real = inspect.signature(EngineReplica.__init__)
    assert inspect.signature(PacedEngine.__init__) == real
