"""RMSNorm in Triton, alone or after adding the residual: one program a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch


@triton.jit
def _rms_norm(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    width,
    eps,
    ADD: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    y = tl.load(x_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        y += tl.load(residual_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        total = y.to(out_ptr.dtype.element_ty)
        tl.store(total_ptr + row * width + columns, total, mask=inside)
        y = total.to(tl.float32)
    y *= tl.rsqrt(tl.sum(y * y, 0) / width + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    if ROUND_FIRST:
        y = y.to(out_ptr.dtype.element_ty).to(tl.float32)
    y *= weight.to(tl.float32)
    tl.store(out_ptr + row * width + columns, y.to(out_ptr.dtype.element_ty), mask=inside)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, round_first: bool
) -> tuple[Tensor, Tensor]:
    assert x.is_contiguous()
    assert residual is None or residual.is_contiguous()
    rows, width = x.shape
    out = torch.empty_like(x)
    total = torch.empty_like(x) if residual is not None else x
    block = triton.next_power_of_2(width)
    launch(
        _rms_norm,
        (rows,),
        x,
        x if residual is None else residual,
        weight,
        out,
        total,
        width,
        eps,
        ADD=residual is not None,
        ROUND_FIRST=round_first,
        BLOCK=block,
        num_warps=min(16, max(1, block // 256)),
    )
    return out, total


def rms_norm(x: Tensor, weight: Tensor, eps: float, round_first: bool = False) -> Tensor:
    """See ``kernels.reference.rms_norm``."""
    return _launch(x, None, weight, eps, round_first)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, round_first: bool = False
) -> tuple[Tensor, Tensor]:
    """See ``kernels.reference.add_rms_norm``."""
    return _launch(x, residual, weight, eps, round_first)
