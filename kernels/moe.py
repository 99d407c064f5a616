"""A mixture of experts in Triton: routing, sorting, and two grouped products.

Pairs of a token and one of its experts are sorted by expert on the device, without atomics and in
one order for one input. The first product gathers its rows from the tokens and ends in SwiGLU, the
second one weighs its rows and scatters them to their pairs; a token's pairs are then added in the
order of its choices. A row's result depends on its own values only, so one tile shape for all
batches makes it independent of its batch. Weights may be packed: see ``kernels/packed.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.configurations import Experts, Tile
from kernels.launch import launch
from kernels.packed import (
    INTERPRETED,
    Packed,
    quantize_mxfp8,
    quantize_nvfp4,
    unpack_int4,
    unpack_mxfp4,
    unpack_nvfp4,
)

SORTED = 1024  # pairs that the sort looks at a time
NATIVE = ("mxfp4 x mxfp8", "nvfp4 x nvfp4")  # forms that tensor cores take with their scales


@triton.jit
def _route(  # type: ignore[no-untyped-def]
    logits_ptr,
    slots_ptr,
    ids_ptr,
    weights_ptr,
    experts,
    k,
    CHOICES: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Grid (T): the k largest logits, the lower id first among equals, and their softmax."""
    token = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, EXPERTS)
    inside = index < experts
    logits = tl.load(logits_ptr + token * experts + index, mask=inside, other=0.0).to(tl.float32)
    # NaN, of a model that is broken, is the largest of nothing and would choose nobody.
    logits = tl.where(inside & (logits == logits), logits, float("-inf"))
    choices = tl.arange(0, CHOICES)
    ids = tl.zeros([CHOICES], tl.int32)
    tops = tl.full([CHOICES], float("-inf"), tl.float32)
    for choice in range(k):
        top = tl.max(logits, 0)
        best = tl.min(tl.where(logits == top, index, EXPERTS), 0)
        ids = tl.where(choices == choice, best, ids)
        tops = tl.where(choices == choice, top, tops)
        logits = tl.where(index == best, float("-inf"), logits)
    weights = tl.exp(tops - tl.max(tops, 0))
    weights /= tl.sum(weights, 0)
    ids = tl.where(tl.load(slots_ptr + token) < 0, -1, ids)
    tl.store(ids_ptr + token * k + choices, ids, mask=choices < k)
    tl.store(weights_ptr + token * k + choices, weights, mask=choices < k)


@triton.jit(do_not_specialize=["pairs", "first"])
def _sort(  # type: ignore[no-untyped-def]
    ids_ptr, order_ptr, offsets_ptr, pairs, first, experts, BLOCK: tl.constexpr
):
    """Grid (E + 1): program e lists the pairs of local expert e, in order, behind those of the
    experts before it; offsets [E + 1] says where each one's list starts."""
    expert = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    before = 0
    for at in range(0, pairs, BLOCK):
        ids = tl.load(ids_ptr + at + index, mask=at + index < pairs, other=-1) - first
        before += tl.sum(((ids >= 0) & (ids < expert)).to(tl.int32), 0)
    tl.store(offsets_ptr + expert, before)
    if expert < experts:
        for at in range(0, pairs, BLOCK):
            ids = tl.load(ids_ptr + at + index, mask=at + index < pairs, other=-1) - first
            mine = ids == expert
            count = tl.cumsum(mine.to(tl.int32), 0)
            tl.store(order_ptr + before + count - 1, at + index, mask=mine)
            before += tl.sum(mine.to(tl.int32), 0)


@triton.jit(do_not_specialize=["tiles"])
def _grouped(  # type: ignore[no-untyped-def]
    x_ptr,
    x_scales_ptr,
    x_factors_ptr,
    w_ptr,
    scales_ptr,
    factors_ptr,
    bias_ptr,
    weights_ptr,
    order_ptr,
    offsets_ptr,
    out_ptr,
    rows,  # of w: output features
    depth,
    w_stride,  # of a row of w, in its elements (dense) or words
    tiles,
    experts,
    limit,
    alpha,
    K: tl.constexpr,
    UP: tl.constexpr,
    FORM: tl.constexpr,
    PLAIN: tl.constexpr,
    WIDE: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Grid (tiles * tiles of columns). UP: out [P, N / 2] sorted = swiglu(x[token] w^T + bias);
    else out [P, N] by pair = weight * (x [P, D] sorted w^T + bias)."""
    tile = tl.program_id(0) % tiles
    column = tl.program_id(0) // tiles * COLUMNS
    # Which expert's tile this is: experts have ceil(count / ROWS) tiles each.
    index = tl.arange(0, EXPERTS)
    begins = tl.load(offsets_ptr + index, mask=index < experts, other=0)
    ends = tl.load(offsets_ptr + index + 1, mask=index < experts, other=0)
    last = tl.cumsum((ends - begins + ROWS - 1) // ROWS, 0)
    expert = tl.sum((last <= tile).to(tl.int32), 0)
    if expert < experts:
        begin = tl.load(offsets_ptr + expert)
        end = tl.load(offsets_ptr + expert + 1)
        before = tl.max(tl.where(index < expert, last, 0), 0)
        m = begin + (tile - before) * ROWS + tl.arange(0, ROWS)
        real = m < end
        pair = tl.load(order_ptr + m, mask=real, other=0)
        source = (pair // K if UP else tl.where(real, m, begin)).to(tl.int64)
        n = column + tl.arange(0, COLUMNS)
        inside = n < rows
        n = tl.where(inside, n, 0)
        row = expert.to(tl.int64) * rows + n
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        if FORM == "mxfp4 x mxfp8" or FORM == "nvfp4 x nvfp4":
            FOUR: tl.constexpr = FORM == "nvfp4 x nvfp4"  # bits of an activation, too
            KIND: tl.constexpr = "e2m1" if FOUR else "e4m3"
            WIDTH: tl.constexpr = DEPTH // 2 if FOUR else DEPTH  # bytes of activations
            SCALES: tl.constexpr = DEPTH // 16 if FOUR else DEPTH // 32
            b, c, half = tl.arange(0, SCALES), tl.arange(0, WIDTH), tl.arange(0, DEPTH // 2)
            steps = w_stride // (DEPTH // 2)
            x_at = x_ptr + source[:, None] * (steps * WIDTH) + c[None, :]
            x_scales_at = x_scales_ptr + source[:, None] * (steps * SCALES) + b[None, :]
            w_at = w_ptr + row[:, None] * w_stride + half[None, :]
            scales_at = scales_ptr + row[:, None] * (steps * SCALES) + b[None, :]
            # Tensor cores want 128 rows on the left: of few tokens, the features are more.
            turned = tl.zeros([COLUMNS, ROWS], tl.float32)
            for _ in range(steps):
                x, x_scales = tl.load(x_at), tl.load(x_scales_at)
                w, scales = tl.load(w_at), tl.load(scales_at)
                if ROWS < 128:
                    turned = tl.dot_scaled(w, scales, "e2m1", tl.trans(x), x_scales, KIND, turned)
                else:
                    total = tl.dot_scaled(x, x_scales, KIND, tl.trans(w), scales, "e2m1", total)
                x_at += WIDTH
                x_scales_at += SCALES
                w_at += DEPTH // 2
                scales_at += SCALES
            if ROWS < 128:
                total = tl.trans(turned)
        elif FORM != "dense":
            c = tl.arange(0, 32)
            x_at = x_ptr + source[:, None] * depth + c[None, :]
            w_at = w_ptr + row[:, None] * w_stride + tl.arange(0, 16)[None, :]
            STEP: tl.constexpr = 2 if FORM == "nvfp4" else 1  # words of a chunk's scales
            if FORM == "nvfp4":
                scales_at = scales_ptr + row[:, None] * (w_stride // 8) + tl.arange(0, 2)[None, :]
            else:
                scales_at = scales_ptr + row * (w_stride // 16)
            for at in range(0, depth, 128):
                words = tl.load(w_at).to(tl.uint32, bitcast=True)
                scales = tl.load(scales_at)
                for j in tl.static_range(4):
                    held = (at + 32 * j + c)[None, :] < depth
                    x = tl.load(x_at + 32 * j, mask=held, other=0.0)
                    if FORM == "int4":
                        w = unpack_int4(words, scales, j, WIDE)
                    elif FORM == "nvfp4":
                        w = unpack_nvfp4(words, scales, j, WIDE)
                    else:
                        w = unpack_mxfp4(words, scales, j, WIDE)
                    total = tl.dot(x, tl.trans(w.to(x.dtype)), total, input_precision="ieee")
                x_at += 128
                w_at += 16
                scales_at += STEP
        else:
            c = tl.arange(0, DEPTH)
            x_at = x_ptr + source[:, None] * depth + c[None, :]
            w_at = w_ptr + row[:, None] * w_stride + c[None, :]
            for at in range(0, depth, DEPTH):
                held = (at + c)[None, :] < depth
                x = tl.load(x_at, mask=held, other=0.0)
                w = tl.load(w_at, mask=held, other=0.0)
                total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
                x_at += DEPTH
                w_at += DEPTH
        if factors_ptr is not None:
            total *= tl.load(factors_ptr + expert)
        if x_factors_ptr is not None:
            total *= tl.load(x_factors_ptr + source)[:, None]
        if bias_ptr is not None:
            total += tl.load(bias_ptr + row).to(tl.float32)[None, :]
        if UP:
            # The reference rounds the product before it splits it.
            total = total.to(out_ptr.dtype.element_ty).to(tl.float32)
            gate, up = tl.split(tl.reshape(total, [ROWS, COLUMNS // 2, 2]))
            if PLAIN:
                out = gate * tl.sigmoid(gate) * up
            else:
                gate = tl.minimum(gate, limit)
                up = tl.clamp(up, -limit, limit)
                out = gate * tl.sigmoid(alpha * gate) * (up + 1)
            n = column // 2 + tl.arange(0, COLUMNS // 2)
            at = m.to(tl.int64)[:, None] * (rows // 2) + n[None, :]
            mask = real[:, None] & (n < rows // 2)[None, :]
        else:
            total = total.to(out_ptr.dtype.element_ty).to(tl.float32)
            out = total * tl.load(weights_ptr + pair, mask=real, other=0.0)[:, None]
            at = pair.to(tl.int64)[:, None] * rows + (column + tl.arange(0, COLUMNS))[None, :]
            mask = real[:, None] & inside[None, :]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first"])
def _add_pairs(  # type: ignore[no-untyped-def]
    pairs_ptr, ids_ptr, out_ptr, width, first, experts, K: tl.constexpr, COLUMNS: tl.constexpr
):
    """Grid (T, columns): the sum over those of a token's pairs that are on this rank."""
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = n < width
    total = tl.zeros([COLUMNS], tl.float32)
    for choice in tl.static_range(K):
        pair = token * K + choice
        expert = tl.load(ids_ptr + pair) - first
        here = n < tl.where((expert >= 0) & (expert < experts), width, 0)
        row = tl.load(pairs_ptr + pair * width + n, mask=here, other=0.0)
        total += row.to(tl.float32)
    tl.store(out_ptr + token * width + n, total.to(out_ptr.dtype.element_ty), mask=inside)


def route(logits: Tensor, k: int, slots: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kernels.reference.route``; ids are int32."""
    tokens, experts = logits.shape
    assert logits.is_contiguous()
    ids = torch.empty(tokens, k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(tokens, k, dtype=torch.float32, device=logits.device)
    launch(
        _route,
        (tokens,),
        logits,
        slots,
        ids,
        weights,
        experts,
        k,
        CHOICES=triton.next_power_of_2(k),
        EXPERTS=triton.next_power_of_2(experts),
        num_warps=1,
    )
    return ids, weights


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    w13: Tensor | Packed,
    b13: Tensor,
    w2: Tensor | Packed,
    b2: Tensor | None,
    first: int,
    limit: float,
    alpha: float,
    plain: bool = False,
    *,
    config: Experts,
) -> Tensor:
    """See ``kernels.reference.experts``; weights as ``kernels.packed.pack`` leaves them."""
    assert x.is_contiguous()
    assert ids.is_contiguous()
    tokens, k = ids.shape
    count, pairs = len(b13), tokens * k
    device = x.device
    order = torch.empty(pairs, dtype=torch.int32, device=device)
    offsets = torch.empty(count + 1, dtype=torch.int32, device=device)
    launch(_sort, (count + 1,), ids, order, offsets, pairs, first, count, BLOCK=SORTED)
    form = w13.form if isinstance(w13, Packed) else "dense"
    tiles = config.scaled if form in NATIVE else config.words if form != "dense" else config.dense
    tile = tiles.of(pairs, count)
    sorted_ = (order, offsets, count, k, limit, alpha, plain, tile)
    h = torch.empty(pairs, b13.shape[1] // 2, dtype=x.dtype, device=device)
    _product(x, w13, b13, None, h, *sorted_)
    y = torch.empty(pairs, x.shape[1], dtype=x.dtype, device=device)
    _product(h, w2, b2, weights, y, *sorted_)
    out = torch.empty_like(x)
    launch(
        _add_pairs,
        (tokens, triton.cdiv(x.shape[1], 1024)),
        y,
        ids,
        out,
        x.shape[1],
        first,
        count,
        K=k,
        COLUMNS=1024,
    )
    return out


def _product(
    x: Tensor,
    w: Tensor | Packed,
    bias: Tensor | None,
    weights: Tensor | None,
    out: Tensor,
    order: Tensor,
    offsets: Tensor,
    count: int,
    k: int,
    limit: float,
    alpha: float,
    plain: bool,
    tile: Tile,
) -> None:
    """The first product (``weights`` is None) or the second one."""
    form, matrix, scales, factors = "dense", w, None, None
    if isinstance(w, Packed):
        form, matrix, scales, factors = w.form, w.bits, w.scales, w.factors
    assert isinstance(matrix, Tensor)
    depth = x.shape[1]
    x_scales = x_factors = None
    if form == "mxfp4 x mxfp8":
        x, x_scales = quantize_mxfp8(x)
    elif form == "nvfp4 x nvfp4":
        x, x_scales, x_factors = quantize_nvfp4(x)
    rows = matrix.shape[1]
    pairs = len(order)
    # No more tiles than pairs, and no more than full ones and one broken one for each expert.
    tiles = min(pairs, pairs // tile.rows + count)
    launch(
        _grouped,
        (tiles * triton.cdiv(rows, tile.columns),),
        x,
        x_scales,
        x_factors,
        matrix,
        scales,
        factors,
        bias,
        weights,
        order,
        offsets,
        out,
        rows,
        depth,
        matrix.shape[2],
        tiles,
        count,
        limit,
        alpha,
        K=k,
        UP=weights is None,
        FORM=form,
        PLAIN=plain,
        # The interpreter multiplies the bits of bf16 numbers as if they were integers.
        WIDE=x.dtype == torch.float32 or INTERPRETED,
        EXPERTS=triton.next_power_of_2(count),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        tile=tile,
    )
