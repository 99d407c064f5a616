"""Layers that hold one rank's part of their weights.

A parameter is born on the meta device, with its shape, its dtype and the slices of the checkpoint
it is made of; ``workers.weights`` fills it. T is the number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.dispatch import Ops
from parallelism.group import Group
from parallelism.layout import Layout, Places
from parallelism.shard import Slice, part, whole


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model lives: which rank of which grid, with which kernels."""

    layout: Layout
    group: Group
    ops: Ops
    dtype: torch.dtype
    device: torch.device
    placement: tuple[Places, ...] | None = None  # of the experts, by layer; None: in their order


class Sharded(nn.Parameter):
    """A parameter before it is loaded: ``parts`` concatenated along the first dimension."""

    parts: tuple[Slice, ...]


def declare(dtype: torch.dtype, *parts: Slice) -> Sharded:
    """A parameter on the meta device, made of ``parts``."""
    first = parts[0].local_shape
    shape = (sum(each.local_shape[0] for each in parts), *first[1:])
    parameter = Sharded(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
    parameter.parts = parts
    return parameter


class Vector(nn.Module):
    """A vector that every rank holds whole: a norm's weight."""

    def __init__(self, name: str, size: int, place: Place) -> None:
        super().__init__()
        self.weight = declare(place.dtype, whole(name, size))


class HeadVector(nn.Module):
    """One number per attention head, sharded like the heads."""

    def __init__(self, name: str, heads: int, place: Place) -> None:
        super().__init__()
        self.weight = declare(place.dtype, part(name, (heads,), 0, place.layout.heads(heads)))


class Linear(nn.Module):
    """x [T, in] -> [T, out], whole on every rank."""

    def __init__(self, name: str, inputs: int, outputs: int, place: Place) -> None:
        super().__init__()
        self._linear = place.ops.linear
        self.weight = declare(place.dtype, whole(f"{name}.weight", outputs, inputs))
        self.bias = declare(place.dtype, whole(f"{name}.bias", outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self._linear(x, self.weight, self.bias)


class HeadLinear(nn.Module):
    """x [T, in] -> [T, heads of this rank, d]: several projections in one product.

    ``heads`` are (checkpoint name, number of heads), each sharded by heads.
    """

    def __init__(
        self, heads: list[tuple[str, int]], inputs: int, head_dim: int, place: Place
    ) -> None:
        super().__init__()
        self._linear, self._d = place.ops.linear, head_dim
        rows, weights, biases = [], [], []
        for name, count in heads:
            first, last = place.layout.heads(count)
            cut = first * head_dim, last * head_dim
            rows.append(last - first)
            weights.append(part(f"{name}.weight", (count * head_dim, inputs), 0, cut))
            biases.append(part(f"{name}.bias", (count * head_dim,), 0, cut))
        self.rows = tuple(rows)
        self.weight = declare(place.dtype, *weights)
        self.bias = declare(place.dtype, *biases)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """One tensor for each projection."""
        y = self._linear(x, self.weight, self.bias)
        projections: tuple[Tensor, ...] = y.view(len(x), -1, self._d).split(self.rows, 1)
        return projections


class RowLinear(nn.Module):
    """x [T, heads of this rank * d] -> [T, out], to be summed over the ranks.

    Rank 0 adds the bias.
    """

    def __init__(self, name: str, heads: int, head_dim: int, outputs: int, place: Place) -> None:
        super().__init__()
        self._linear = place.ops.linear
        first, last = place.layout.heads(heads)
        cut = first * head_dim, last * head_dim
        mine = (0, outputs if place.layout.rank == 0 else 0)
        self.weight = declare(
            place.dtype, part(f"{name}.weight", (outputs, heads * head_dim), 1, cut)
        )
        self.bias = declare(place.dtype, part(f"{name}.bias", (outputs,), 0, mine))

    def forward(self, x: Tensor) -> Tensor:
        return self._linear(x, self.weight, self.bias if len(self.bias) else None)


class VocabEmbedding(nn.Module):
    """Token ids int64 [T] -> [T, hidden]; every rank looks up its part of the vocabulary."""

    def __init__(self, name: str, vocabulary: int, hidden: int, place: Place) -> None:
        super().__init__()
        self._group = place.group
        self._first, self._last = place.layout.vocabulary(vocabulary)
        shape = (vocabulary, hidden)
        self.weight = declare(
            place.dtype, part(f"{name}.weight", shape, 0, (self._first, self._last))
        )

    def forward(self, ids: Tensor) -> Tensor:
        if self._group.size == 1:
            return F.embedding(ids, self.weight)
        mine = (ids >= self._first) & (ids < self._last)
        x = F.embedding(torch.where(mine, ids - self._first, 0), self.weight)
        return self._group.all_reduce(x.masked_fill_(~mine[:, None], 0))


class VocabHead(nn.Module):
    """h [S, hidden] -> logits [S, vocabulary] on rank 0; other ranks get their own part."""

    def __init__(self, name: str, vocabulary: int, hidden: int, place: Place) -> None:
        super().__init__()
        self._linear, self._group, self._vocabulary = place.ops.linear, place.group, vocabulary
        self._each = -(-vocabulary // place.layout.tp)
        cut = place.layout.vocabulary(vocabulary)
        self.weight = declare(place.dtype, part(f"{name}.weight", (vocabulary, hidden), 0, cut))

    def forward(self, h: Tensor) -> Tensor:
        logits = self._linear(h, self.weight, None)
        if self._group.size == 1:
            return logits
        parts = self._group.gather(F.pad(logits, (0, self._each - logits.shape[1])))
        return torch.cat(parts, 1)[:, : self._vocabulary] if parts else logits
