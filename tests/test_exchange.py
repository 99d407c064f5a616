"""Dispatch and combine against a dense computation, over ranks that are threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from parallelism.exchange import STATIC, Exchange
from parallelism.experts import Slots
from parallelism.group import Group
from parallelism.layout import Layout, Places

DEADLINE = 120.0
HIDDEN = 8


class Table:
    """Where threads lay down what they send; one for all ranks, or for those of an engine."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=DEADLINE)
        self._laid: list[Any] = [None] * size

    def share(self, rank: int, x: Any) -> list[Any]:
        self._laid[rank] = x
        self._barrier.wait()
        all = list(self._laid)
        self._barrier.wait()
        return all


class Threads(Group):
    """A rank that is a thread. ``sent`` counts the rows of packed tokens that left it."""

    def __init__(self, layout: Layout, world: Table, engine: Table) -> None:
        super().__init__(layout.rank, layout.tp, layout.dp_rank, layout.dp)
        self._at, self._world, self._table = layout.ep_rank, world, engine
        self.sent = 0

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._table.share(self.rank, x))

    def spread(self, x: Tensor) -> Tensor:
        parts = self._world.share(self._at, x)
        assert len({part.shape for part in parts}) == 1, "shapes differ"
        return torch.cat(parts)

    def swap(
        self, x: Tensor, received: Sequence[int] | None = None, sent: Sequence[int] | None = None
    ) -> Tensor:
        ranks = self.size * self._engines
        if sent is None:
            sent = [len(x) // ranks] * ranks
        if x.dtype == torch.uint8:
            self.sent += len(x)
        assert sum(sent) == len(x), "rows are left over"
        mine = [parts[self._at] for parts in self._world.share(self._at, x.split(list(sent)))]
        assert received is None or [*map(len, mine)] == [*received], "other rows than announced"
        return torch.cat(mine)


def on_threads(
    layouts: Sequence[Layout],
    run: Callable[[Layout, Threads], Any],
    kind: type[Threads] = Threads,
) -> list[tuple[Any, int]]:
    """What ``run`` gives on every rank, and how many rows it sent."""
    world = Table(len(layouts))
    engines = [Table(layout.tp) for layout in layouts[:: layouts[0].tp]]

    def one(layout: Layout) -> tuple[Any, int]:
        group = kind(layout, world, engines[layout.dp_rank])
        return run(layout, group), group.sent

    with ThreadPoolExecutor(len(layouts)) as pool:
        return [*pool.map(one, layouts)]


def function(e: Tensor, h: Tensor) -> Tensor:
    """What expert ``e`` [...] makes of rows [..., D]: any function of a row alone will do."""
    return torch.sin(h * (1 + e[..., None]) + e[..., None])


class Share:
    """The sums over a rank's own experts, in order of k, as the kernels make them. ``pairs`` counts
    what was added up."""

    def __init__(self, rank: int, slots: Slots) -> None:
        self.slots, self._first, self._held = slots, slots.first(rank), slots.held[rank]
        self.pairs = 0

    def __call__(self, h: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(h)
        for s, weight in zip((slots - self._first).unbind(1), weights.unbind(1), strict=True):
            mine = (s >= 0) & (s < len(self._held))
            self.pairs += int(mine.sum())
            expert = torch.tensor([*self._held, 0])[s.where(mine, len(self._held))]
            total += torch.where(mine[:, None], weight[:, None] * function(expert, h), 0)
        return total


def place(draw: torch.Generator, ranks: int, experts: int) -> Places:
    """Every expert on one to three ranks; some rank may hold none."""
    held: list[list[int]] = [[] for _ in range(ranks)]
    for expert in range(experts):
        copies = int(torch.randint(1, 4, (), generator=draw))
        for rank in torch.randperm(ranks, generator=draw)[:copies].tolist():
            held[rank].append(expert)
    return tuple(map(tuple, held))


def grid(dp: int, tp: int) -> list[Layout]:
    return [Layout(tp, True, rank, dp, engine) for engine in range(dp) for rank in range(tp)]


@given(
    data=st.data(),
    dp=st.integers(2, 4),
    tp=st.integers(1, 3),
    experts=st.integers(12, 20),
    placed=st.booleans(),
    k=st.integers(1, 5),
    seed=st.integers(0, 1 << 30),
)
def test_tokens_come_back_as_if_computed_in_one_place(
    data: st.DataObject, dp: int, tp: int, experts: int, placed: bool, k: int, seed: int
) -> None:
    """By either way, the same bits, whatever the others bring, and wherever experts and their
    copies are; rows go only where they must. Every rank computes the pairs that the engines count
    for it."""
    draw = torch.Generator().manual_seed(seed)
    tokens = data.draw(st.lists(st.integers(0, 9), min_size=dp, max_size=dp))
    layouts = grid(dp, tp)
    places = place(draw, dp * tp, experts) if placed else layouts[0].places(experts)
    slots = Slots(places)
    given: list[tuple[Tensor, Tensor, Tensor]] = []
    for count in tokens:
        ids = torch.rand(count, experts, generator=draw).argsort(1)[:, :k]
        padding = torch.rand(count, generator=draw) < 0.2
        h = torch.randn(count, HIDDEN, generator=draw)
        weights = torch.rand(count, k, generator=draw)
        given.append((h, ids.masked_fill(padding[:, None], -1), weights))
    most = max(tokens) + data.draw(st.integers(0, 3))

    def run(layout: Layout, group: Threads) -> tuple[list[Tensor], int]:
        exchange, share = Exchange(layout, group), Share(layout.ep_rank, slots)
        h, ids, weights = given[layout.dp_rank]
        results = []
        for bound in (most, STATIC + 1):
            exchange.begin(bound)
            results.append(exchange(share, h, slots(ids), weights))  # type: ignore[arg-type]
        return results, share.pairs

    everything = torch.cat([ids for _, ids, _ in given]).flatten()
    everywhere = torch.cat([slots(ids) for _, ids, _ in given]).flatten()
    counted = torch.bincount(everywhere[everywhere >= 0], minlength=len(slots) + 2).tolist()
    by_expert, by_rank = slots.fold(counted)
    assert by_expert == torch.bincount(everything[everything >= 0], minlength=experts).tolist()
    found = on_threads(layouts, run)
    assert [pairs for (_, pairs), _ in found] == [2 * pairs for pairs in by_rank]
    for layout, (((static, exact), _), sent) in zip(layouts, found, strict=True):
        h, ids, weights = given[layout.dp_rank]
        each = -(-len(h) // tp)
        chosen = slots(ids)
        alone = [slots(token) for token in ids.split(1)]
        assert torch.equal(torch.cat([*alone, ids[:0]]), chosen)
        narrow = slots(ids.int())
        assert narrow.dtype == torch.int32
        assert torch.equal(narrow.long(), chosen)
        shares = [Share(rank, slots)(h, chosen, weights) for rank in range(dp * tp)]
        expected = torch.zeros_like(h)
        for share in shares:
            expected += share
        assert torch.equal(static, expected)
        assert torch.equal(exact, expected)
        assert torch.equal(torch.signbit(static), torch.signbit(exact))
        dense = torch.where(
            ids[..., None] < 0, 0, weights[..., None] * function(ids, h[:, None])
        ).sum(1)
        torch.testing.assert_close(exact, dense)
        owner = [rank for rank, held in enumerate(places) for _ in held]
        mine = chosen[layout.rank * each : (layout.rank + 1) * each].tolist()
        assert sent == sum(len({owner[e] for e in row if e >= 0}) for row in mine)
