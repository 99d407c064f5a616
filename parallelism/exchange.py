"""Tokens to the ranks that hold their experts, and the experts' sums back: dispatch and combine.

T tokens of an engine, n of them dispatched by this rank, M rows that arrive here, D hidden size, k
experts per token. A row goes once to every rank that holds any of its experts. What the ranks
have added up for a token is summed in the order of the ranks, in fp32, then rounded: a token's sum
does not depend on the other tokens, nor on how the rows travelled.

All ranks of an engine have the same tokens, so each dispatches its share, in one piece, and the
sums are gathered at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from parallelism.experts import Experts, Slots
from parallelism.group import Group
from parallelism.layout import Layout

STATIC = 64  # tokens of an engine up to which shapes are fixed; not tuned

# h [n, D], slots int [n, k] (-1: none), weights fp32 [n, k]
Routed = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Sent:
    """What ``combine`` must know of a ``dispatch``."""

    tokens: int  # T
    rows: Tensor | None = None  # int64: the rows sent, by the rank they went to; None: all to all
    sent: tuple[int, ...] = ()  # how many to each rank
    received: tuple[int, ...] = ()  # and from each


class Exchange:
    """The two verbs, for one engine or several. Every rank calls them for every layer of a step,
    without tokens, too."""

    def __init__(self, layout: Layout, group: Group) -> None:
        self._layout, self._group = layout, group
        self._most: int | None = None

    def begin(self, most: int, step: int = 0) -> None:
        """Settle how the rows of the next step travel, the ``step``-th of all engines; ``most``
        tokens has any of them. All ranks must be told the same.

        Few rows are padded to as many for every rank, and go to all of them: the shapes depend on
        ``most`` alone and the host waits for nothing, so it can be captured in a CUDA graph.
        Otherwise the ranks first tell each other how many there are.
        """
        self._most = most if most <= STATIC else None
        self._group.begin(step)

    def __call__(
        self,
        experts: Experts,
        h: Tensor,
        slots: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """h [T, D], slots and weights [T, k] -> the sum over each token's experts [T, D]."""
        sent, rows = self.dispatch(experts.slots, h, slots, weights)
        return self.combine(experts(*rows) if len(rows[0]) else rows[0], sent)

    def dispatch(
        self, where: Slots, h: Tensor, slots: Tensor, weights: Tensor
    ) -> tuple[Sent, Routed]:
        """The rows [M] that have experts at this rank; others, too, where all go everywhere."""
        tokens, layout = len(h), self._layout
        if layout.dp == 1:
            return Sent(tokens), (h, slots, weights)
        each = -(-tokens // layout.tp)
        share = slice(layout.rank * each, (layout.rank + 1) * each)
        h, slots, weights = h[share], slots[share], weights[share]
        if self._most is not None:
            more = -(-self._most // layout.tp) - len(h)
            h, weights = F.pad(h, (0, 0, 0, more)), F.pad(weights, (0, 0, 0, more))
            slots = F.pad(slots, (0, 0, 0, more), value=-1)
            everybody = self._group.spread(_pack(h, slots, weights))
            return Sent(tokens), _unpack(everybody, h, slots)
        owner = where.owners(slots)
        wanted = slots.new_zeros(len(slots), layout.world + 1).scatter_(1, owner, 1)[:, :-1]
        counts = wanted.sum(0)
        rows = wanted.T.nonzero()[:, 1]
        sent, received = torch.stack((counts, self._group.swap(counts))).tolist()
        arrived = self._group.swap(_pack(h, slots, weights)[rows], received, sent)
        return Sent(tokens, rows, tuple(sent), tuple(received)), _unpack(arrived, h, slots)

    def combine(self, sums: Tensor, sent: Sent) -> Tensor:
        """What this rank's experts made of the rows [M, D] -> each token's sum [T, D]."""
        layout = self._layout
        if layout.dp == 1:
            return self._group.all_reduce(sums)
        each = -(-sent.tokens // layout.tp)
        mine = min(each, max(0, sent.tokens - layout.rank * each))
        # From +0: a rank that adds +0 then changes nothing, so it need not take part.
        if sent.rows is None:
            parts = self._group.swap(sums).view(layout.world, -1, sums.shape[1])
            total = torch.zeros_like(parts[0], dtype=torch.float32)
            for part in parts:
                total += part
            total = total[:mine]
        else:
            arrived = self._group.swap(sums, list(sent.sent), list(sent.received))
            total = sums.new_zeros(mine, sums.shape[1], dtype=torch.float32)
            for at, part in zip(sent.rows.split(sent.sent), arrived.split(sent.sent), strict=True):
                total.index_add_(0, at, part.float())
        y = total.to(sums.dtype)
        if layout.tp == 1 or not sent.tokens:
            return y
        return self._group.all_gather(F.pad(y, (0, 0, 0, each - mine)))[: sent.tokens]


def _pack(h: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """One row of bytes for each token: one message instead of three."""
    return torch.cat([t.contiguous().view(torch.uint8) for t in (h, slots.int(), weights)], 1)


def _unpack(packed: Tensor, h: Tensor, slots: Tensor) -> Routed:
    """The rows, in the dtypes and widths of what was packed here."""
    k = 4 * slots.shape[1]
    width = packed.shape[1] - 2 * k
    x, numbers, weights = (part.contiguous() for part in packed.split((width, k, k), 1))
    numbers = numbers.view(torch.int32).to(slots.dtype)
    return x.view(h.dtype), numbers, weights.view(torch.float32)
