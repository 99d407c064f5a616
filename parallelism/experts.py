"""One layer's experts on one rank: whole ones (expert parallelism) or a cut through all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from itertools import accumulate, chain, groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from kernels.mxfp4 import BLOCK, MXFP4, dequantize
from parallelism.layers import Place, declare
from parallelism.layout import Places
from parallelism.shard import Range, Slice

_PACKED = ("_blocks", "_scales")  # ends of names


class Slots:
    """Where each expert of a layer is. Slots are counted through all ranks; an expert may have
    several, and which one serves a token depends on the token's own experts alone."""

    def __init__(self, places: Places) -> None:
        self.held = places
        self._experts = [*chain.from_iterable(places)]
        self._plain = self._experts == [*range(len(self._experts))]
        self._ends: Tensor | None = None  # int64 [ranks]: one past each rank's last slot
        self._tables: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._experts)

    def first(self, rank: int) -> int:
        """The first slot of a rank."""
        return sum(map(len, self.held[:rank]))

    def fold(self, pairs: Sequence[int]) -> tuple[list[int], list[int]]:
        """What was counted of every slot, of every expert and of every rank; more is ignored."""
        ends = accumulate(map(len, self.held), initial=0)
        ranks = [sum(pairs[first:last]) for first, last in pairwise(ends)]
        if self._plain:
            return [*pairs[: len(self)]], ranks
        experts = [0] * (max(self._experts) + 1)
        for expert, count in zip(self._experts, pairs, strict=False):
            experts[expert] += count
        return experts, ranks

    def __call__(self, ids: Tensor) -> Tensor:
        """Expert ids int [T, k] to slots of the same dtype; -1 stays."""
        if self._plain:
            return ids
        tables = self._tables
        if tables is None or (tables[0].device, tables[0].dtype) != (ids.device, ids.dtype):
            tables = self._tables = self._make(ids)
        slots, copies = tables
        known = ids.clamp(min=0)
        turn = known.sum(-1, keepdim=True) % copies[known]
        return torch.where(ids < 0, ids, slots[known, turn])

    def owners(self, slots: Tensor) -> Tensor:
        """The ranks that slots [...] are on; one more than there are for -1."""
        if self._ends is None or self._ends.device != slots.device:
            ends = torch.tensor([*map(len, self.held)]).cumsum(0)
            self._ends = ends.to(slots.device)
        return torch.where(
            slots < 0, len(self.held), torch.bucketize(slots, self._ends, right=True)
        )

    def _make(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Slots of every expert [experts, most], in the dtype of ``ids``, and how many are its own
        int64 [experts]."""
        found: list[list[int]] = [[] for _ in range(max(self._experts) + 1)]
        for slot, expert in enumerate(self._experts):
            found[expert].append(slot)
        copies = torch.tensor([len(slots) for slots in found])
        most = int(copies.max())
        padded = torch.tensor([slots + [-1] * (most - len(slots)) for slots in found])
        return padded.to(ids), copies.to(ids.device)


def _runs(experts: tuple[int, ...]) -> list[Range]:
    """Adjacent experts together; one empty range where there are none."""
    runs = groupby(enumerate(experts), lambda pair: pair[1] - pair[0])
    found = [[expert for _, expert in run] for _, run in runs]
    return [(run[0], run[-1] + 1) for run in found] or [(0, 0)]


class Experts(nn.Module):
    """h [T, D], slots and weights [T, k] -> [T, D]: this rank's share, to be summed over the ranks.

    Checkpoints keep gate and up rows interleaved, so a cut of columns i0..i1 takes rows
    2 i0 .. 2 i1 of ``gate_up_proj``. bf16 matrices are stored [E, in, out]; MXFP4 ones as
    ``_blocks`` [E, out, in/32, 16] and ``_scales`` [E, out, in/32].
    """

    def __init__(
        self,
        name: str,
        *,
        experts: int,
        hidden: int,
        intermediate: int,
        mxfp4: bool,
        limit: float,
        alpha: float,
        place: Place,
        places: Places | None = None,
    ) -> None:
        super().__init__()
        layout = place.layout
        whole = layout.expert_parallel
        self.slots = Slots((places or layout.places(experts)) if whole else ((*range(experts),),))
        held = self.slots.held[layout.ep_rank if whole else 0]
        self.count, mine = len(held), _runs(held)
        first, last = layout.intermediate(intermediate, BLOCK if mxfp4 else 1)
        pairs = (2 * first, 2 * last)
        every = (0, hidden)
        self._experts, self._pack, self._dtype = place.ops.experts, place.ops.pack, place.dtype
        self._first = self.slots.first(layout.ep_rank) if whole else 0
        self._limit, self._alpha = limit, alpha
        up, down = f"{name}.gate_up_proj", f"{name}.down_proj"
        self.w13: Any = None  # as ``place.ops.pack`` makes them
        self.w2: Any = None
        if mxfp4:
            self._declare_packed("w13", up, (experts, 2 * intermediate, hidden), mine, pairs, every)
            self._declare_packed(
                "w2", down, (experts, hidden, intermediate), mine, every, (first, last)
            )
        else:
            shape = (experts, hidden, 2 * intermediate)
            slices = [Slice(up, shape, (run, every, pairs), transposed=True) for run in mine]
            self.w13_dense = declare(place.dtype, *slices)
            shape, cut = (experts, intermediate, hidden), (first, last)
            slices = [Slice(down, shape, (run, cut, every), transposed=True) for run in mine]
            self.w2_dense = declare(place.dtype, *slices)
        shape13 = (experts, 2 * intermediate)
        self.b13 = declare(
            place.dtype, *[Slice(f"{up}_bias", shape13, (run, pairs)) for run in mine]
        )
        owned = every if layout.adds_expert_bias else (0, 0)
        shape2 = (experts, hidden)
        self.b2 = declare(
            place.dtype, *[Slice(f"{down}_bias", shape2, (run, owned)) for run in mine]
        )

    def _declare_packed(
        self,
        own: str,
        name: str,
        shape: tuple[int, int, int],
        experts: list[Range],
        rows: Range,
        columns: Range,
    ) -> None:
        *outer, width = shape
        blocks = (columns[0] // BLOCK, columns[1] // BLOCK)
        scales = (*outer, width // BLOCK)
        ranges = [(run, rows, blocks) for run in experts]
        half = BLOCK // 2  # bytes of a block
        stored = (*scales, half)
        packed = [
            Slice(f"{name}_blocks", stored, (*each, (0, half)), packed=True) for each in ranges
        ]
        setattr(self, f"{own}_blocks", declare(torch.uint8, *packed))
        exponents = [Slice(f"{name}_scales", scales, each, packed=True) for each in ranges]
        setattr(self, f"{own}_scales", declare(torch.uint8, *exponents))

    @property
    def unpacked_bytes(self) -> int:
        """What packed weights would take in the activations' dtype; 0 where nothing is packed."""
        blocks = [p for name, p in self.named_parameters() if name.endswith("_blocks")]
        return sum(2 * p.numel() * self._dtype.itemsize for p in blocks)

    def bytes(self, dequantise: bool) -> int:
        """Of all weights in the form that ``finish`` would give them; before it."""
        packed = [p.nbytes for name, p in self.named_parameters() if name.endswith(_PACKED)]
        kept = sum(p.nbytes for p in self.parameters())
        return kept - sum(packed) + self.unpacked_bytes if dequantise else kept

    def finish(self, dequantise: bool) -> None:
        """After loading: settle in which form the kernels get the matrices."""
        for own in ("w13", "w2"):
            if hasattr(self, f"{own}_dense"):
                setattr(self, own, self._pack(getattr(self, f"{own}_dense")))
                continue
            packed = MXFP4(getattr(self, f"{own}_blocks"), getattr(self, f"{own}_scales"))
            setattr(self, own, self._dequantised(packed) if dequantise else self._pack(packed))
            if getattr(self, own) is not packed:
                delattr(self, f"{own}_blocks")
                delattr(self, f"{own}_scales")

    @property
    def matrices(self) -> list[Tensor]:
        """What w13 and w2 are made of once they are loaded."""
        tensors: list[Tensor] = []
        for w in (self.w13, self.w2):
            parts = [w] if isinstance(w, Tensor) else [getattr(w, f.name) for f in fields(w)]
            tensors += [part for part in parts if isinstance(part, Tensor)]
        return tensors

    def _dequantised(self, packed: MXFP4) -> Tensor:
        """Expert by expert: the steps in between take more room than the result."""
        experts, rows, blocks, _ = packed.blocks.shape
        out = packed.blocks.new_empty(experts, rows, blocks * BLOCK, dtype=self._dtype)
        for matrix, each, scales in zip(out, packed.blocks, packed.scales, strict=True):
            matrix.copy_(dequantize(MXFP4(each, scales), self._dtype))
        return out

    def forward(self, h: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        assert self.w13 is not None, "not loaded"
        assert self.w2 is not None, "not loaded"
        return self._experts(
            h,
            slots,
            weights,
            self.w13,
            self.b13,
            self.w2,
            self.b2 if self.b2.shape[1] else None,
            self._first,
            self._limit,
            self._alpha,
        )
