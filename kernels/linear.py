"""A dense layer in Triton for batch-invariant runs: one tile shape and one order of summation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.configurations import Tile
from kernels.launch import launch


@triton.jit(do_not_specialize=["tokens", "tiles"])
def _linear(  # type: ignore[no-untyped-def]
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    tokens,
    rows,
    depth,
    tiles,
    x_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Grid (tiles of tokens * tiles of features), tokens first: neighbours share a tile of w."""
    m = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) // tiles * COLUMNS + tl.arange(0, COLUMNS)
    real = m < tokens
    inside = n < rows
    c = tl.arange(0, DEPTH)
    x_at = x_ptr + tl.where(real, m, 0).to(tl.int64)[:, None] * x_stride + c[None, :]
    w_at = w_ptr + tl.where(inside, n, 0).to(tl.int64)[:, None] * depth + c[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for at in range(0, depth, DEPTH):
        held = (at + c)[None, :] < depth
        x = tl.load(x_at, mask=held, other=0.0)
        w = tl.load(w_at, mask=held, other=0.0)
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
        x_at += DEPTH
        w_at += DEPTH
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    at = m.to(tl.int64)[:, None] * rows + n[None, :]
    mask = real[:, None] & inside[None, :]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, tile: Tile) -> Tensor:
    """See ``kernels.reference.linear``."""
    assert x.stride(1) == 1
    assert weight.is_contiguous()
    tokens, rows = len(x), len(weight)
    out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(tokens, tile.rows)
    launch(
        _linear,
        (tiles * triton.cdiv(rows, tile.columns),),
        x,
        weight,
        bias,
        out,
        tokens,
        rows,
        x.shape[1],
        tiles,
        x.stride(0),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        tile=tile,
    )
    return out
