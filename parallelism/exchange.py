"""Tokens to the ranks that hold their experts, and the experts' sums back: dispatch and combine.

T tokens of an engine, n of them dispatched by this rank, M rows that arrive here, D hidden size, k
experts per token. A row goes once to every rank that holds any of its experts. What the ranks
have added up for a token is summed in the order of the ranks, in fp32, then rounded: a token's sum
does not depend on the other tokens, nor on how the rows travelled.

All ranks of an engine have the same tokens, so each dispatches its share, in one piece, and the
sums are gathered at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from parallelism.group import Group
from parallelism.layout import Layout

STATIC = 64  # tokens of an engine up to which shapes are fixed; not tuned

Routed = tuple[Tensor, Tensor, Tensor]  # h [n, D], ids int64 [n, k] (-1: none), weights fp32 [n, k]


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

    def __init__(self, layout: Layout, group: Group, experts: int) -> None:
        self._layout, self._group = layout, group
        ranks = range(layout.world)
        sizes = [last - first for first, last in (layout.experts(experts, r) for r in ranks)]
        self._sizes = torch.tensor(sizes)
        self._owners: Tensor | None = None  # int64 [experts] the rank of each, on the device
        self._most: int | None = None

    def begin(self, most: int) -> None:
        """Settle how the next step's rows travel; ``most`` tokens has any engine. All ranks must
        be told the same.

        Few rows are padded to as many for every rank, and go to all of them: the shapes depend on
        ``most`` alone and the host waits for nothing, so it can be captured in a CUDA graph.
        Otherwise the ranks first tell each other how many there are.
        """
        self._most = most if most <= STATIC else None

    def __call__(
        self,
        experts: Callable[[Tensor, Tensor, Tensor], Tensor],
        h: Tensor,
        ids: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """h [T, D], ids and weights [T, k] -> the sum over each token's experts [T, D]."""
        sent, rows = self.dispatch(h, ids, weights)
        return self.combine(experts(*rows) if len(rows[0]) else rows[0], sent)

    def dispatch(self, h: Tensor, ids: Tensor, weights: Tensor) -> tuple[Sent, Routed]:
        """The rows [M] that have experts at this rank (others, too, where all go everywhere)."""
        tokens, layout = len(h), self._layout
        if layout.dp == 1:
            return Sent(tokens), (h, ids, weights)
        each = -(-tokens // layout.tp)
        share = slice(layout.rank * each, (layout.rank + 1) * each)
        h, ids, weights = h[share], ids[share], weights[share]
        if self._most is not None:
            more = -(-self._most // layout.tp) - len(h)
            h, weights = F.pad(h, (0, 0, 0, more)), F.pad(weights, (0, 0, 0, more))
            ids = F.pad(ids, (0, 0, 0, more), value=-1)
            everybody = self._group.spread(_pack(h, ids, weights))
            return Sent(tokens), _unpack(everybody, h, ids)
        if self._owners is None or self._owners.device != ids.device:
            owners = torch.arange(layout.world).repeat_interleave(self._sizes)
            self._owners = owners.to(ids.device)
        owner = torch.where(ids < 0, layout.world, self._owners[ids.clamp(min=0)])
        wanted = ids.new_zeros(len(ids), layout.world + 1).scatter_(1, owner, 1)[:, :-1]
        counts = wanted.sum(0)
        rows = wanted.T.nonzero()[:, 1]
        sent, received = torch.stack((counts, self._group.swap(counts))).tolist()
        arrived = self._group.swap(_pack(h, ids, weights)[rows], received, sent)
        return Sent(tokens, rows, tuple(sent), tuple(received)), _unpack(arrived, h, ids)

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


def _pack(h: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """One row of bytes for each token: one message instead of three."""
    return torch.cat([t.contiguous().view(torch.uint8) for t in (h, ids.int(), weights)], 1)


def _unpack(packed: Tensor, h: Tensor, ids: Tensor) -> Routed:
    """The rows, in the dtypes and widths of what was packed here."""
    k = 4 * ids.shape[1]
    width = packed.shape[1] - 2 * k
    x, slots, weights = (part.contiguous() for part in packed.split((width, k, k), 1))
    return x.view(h.dtype), slots.view(torch.int32).to(ids.dtype), weights.view(torch.float32)
