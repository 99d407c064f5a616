"""One layer's experts on one rank: whole ones (expert parallelism) or a cut through all of them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from kernels.mxfp4 import BLOCK, MXFP4, dequantize
from parallelism.layers import Place, declare
from parallelism.shard import Range, Slice


class Experts(nn.Module):
    """h [T, D], ids and weights [T, k] -> [T, D]: this rank's share, to be summed over the ranks.

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
    ) -> None:
        super().__init__()
        layout = place.layout
        mine = layout.experts(experts)
        first, last = layout.intermediate(intermediate, BLOCK if mxfp4 else 1)
        pairs = (2 * first, 2 * last)
        every = (0, hidden)
        self._experts, self._pack, self._dtype = place.ops.experts, place.ops.pack, place.dtype
        self._first, self._limit, self._alpha = mine[0], limit, alpha
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
            slice13 = Slice(up, shape, (mine, every, pairs), transposed=True)
            shape = (experts, intermediate, hidden)
            slice2 = Slice(down, shape, (mine, (first, last), every), transposed=True)
            self.w13_dense = declare(place.dtype, slice13)
            self.w2_dense = declare(place.dtype, slice2)
        shape13 = (experts, 2 * intermediate)
        self.b13 = declare(place.dtype, Slice(f"{up}_bias", shape13, (mine, pairs)))
        owned = every if layout.adds_expert_bias else (0, 0)
        self.b2 = declare(place.dtype, Slice(f"{down}_bias", (experts, hidden), (mine, owned)))

    def _declare_packed(
        self,
        own: str,
        name: str,
        shape: tuple[int, int, int],
        experts: Range,
        rows: Range,
        columns: Range,
    ) -> None:
        *outer, width = shape
        blocks = (columns[0] // BLOCK, columns[1] // BLOCK)
        scales = (*outer, width // BLOCK)
        ranges = (experts, rows, blocks)
        half = BLOCK // 2  # bytes of a block
        packed = Slice(f"{name}_blocks", (*scales, half), (*ranges, (0, half)), packed=True)
        setattr(self, f"{own}_blocks", declare(torch.uint8, packed))
        exponents = Slice(f"{name}_scales", scales, ranges, packed=True)
        setattr(self, f"{own}_scales", declare(torch.uint8, exponents))

    @property
    def unpacked_bytes(self) -> int:
        """What packed weights would take in the activations' dtype; 0 where nothing is packed."""
        blocks = [p for name, p in self.named_parameters() if name.endswith("_blocks")]
        return sum(2 * p.numel() * self._dtype.itemsize for p in blocks)

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

    def forward(self, h: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        assert self.w13 is not None, "not loaded"
        assert self.w2 is not None, "not loaded"
        return self._experts(
            h,
            ids,
            weights,
            self.w13,
            self.b13,
            self.w2,
            self.b2 if self.b2.shape[1] else None,
            self._first,
            self._limit,
            self._alpha,
        )
