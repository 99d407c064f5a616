"""Rotary embedding and the write into the paged KV cache, in one Triton program per token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import launch


@triton.jit
def _rope_kv_write(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    q_stride,
    k_stride,
    v_stride,
    slot_stride,
    heads,
    kv_heads,
    D: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    FP8: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Grid (T, query heads / HEADS + 1): the last program of a token handles its key and value."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, D)
    partner = columns ^ 1 if INTERLEAVED else (columns + D // 2) % D
    cos = tl.load(cos_ptr + token * D + columns).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + token * D + columns).to(tl.float32)[None, :]
    head = tl.arange(0, HEADS)
    if part * HEADS < heads:
        head += part * HEADS
        inside = (head < heads)[:, None]
        row = q_ptr + token * q_stride + head[:, None] * D
        x = tl.load(row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        y = tl.load(row + partner[None, :], mask=inside, other=0.0).to(tl.float32)
        out = (x * cos + y * sin).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (token * heads + head[:, None]) * D + columns[None, :], out, mask=inside)
    else:
        slot = tl.load(slots_ptr + token) * slot_stride
        if slot >= 0:
            for first in range(0, kv_heads, HEADS):
                kv = first + head
                inside = (kv < kv_heads)[:, None]
                row = k_ptr + token * k_stride + kv[:, None] * D
                x = tl.load(row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
                y = tl.load(row + partner[None, :], mask=inside, other=0.0).to(tl.float32)
                k = x * cos + y * sin
                v_at = v_ptr + token * v_stride + kv[:, None] * D + columns[None, :]
                v = tl.load(v_at, mask=inside, other=0.0).to(tl.float32)
                if FP8:  # beyond its range e4m3 has only NaN
                    k = tl.clamp(k, -448.0, 448.0)
                    v = tl.clamp(v, -448.0, 448.0)
                at = slot + kv[:, None] * D + columns[None, :]
                tl.store(k_cache_ptr + at, k.to(k_cache_ptr.dtype.element_ty), mask=inside)
                tl.store(v_cache_ptr + at, v.to(v_cache_ptr.dtype.element_ty), mask=inside)


def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    interleaved: bool = False,
) -> Tensor:
    """See ``kernels.reference.rope_kv_write``."""
    tokens, heads, size = q.shape
    kv_heads = k.shape[1]
    assert q.stride()[1:] == k.stride()[1:] == v.stride()[1:] == (size, 1)
    assert k_cache.stride() == v_cache.stride() == (k_cache.stride(0), size, 1)
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    out = torch.empty(tokens, heads, size, dtype=q.dtype, device=q.device)
    each = 16
    launch(
        _rope_kv_write,
        (tokens, triton.cdiv(heads, each) + 1),
        q,
        k,
        v,
        cos,
        sin,
        out,
        k_cache,
        v_cache,
        slots,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        k_cache.stride(0),
        heads,
        kv_heads,
        D=size,
        INTERLEAVED=interleaved,
        FP8=k_cache.dtype == torch.float8_e4m3fn,
        HEADS=each,
        num_warps=4,
    )
    return out
