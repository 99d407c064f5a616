"""A mixture of experts in Triton: routing, sorting, and two grouped products.

Pairs of a token and one of its experts are sorted by expert on the device, without atomics and in
one order for one input. The first product gathers its rows from the tokens and ends in SwiGLU, the
second one weighs its rows and scatters them to their pairs; a token's pairs are then added in the
order of its choices. A row's result depends on its own values only, so one tile shape for all
batches makes it independent of its batch.

MXFP4 weights without native support are unpacked in registers: see ``MXFP4Words``. Where tensor
cores take blocks with scales (sm_100, sm_103), they stay as they are, and activations become
mxfp8 before each product: see ``Scaled`` and ``quantize_mxfp8``. INT4 weights are unpacked much
like MXFP4's: see ``Int4Words``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.configurations import Experts, Tile
from kernels.int4 import Int4, nibbles
from kernels.launch import launch
from kernels.mxfp4 import BLOCK, MXFP4

CHUNK = 128  # elements along the sum in one run of words
# The bits of element j in its half word: sign, exponent (2), mantissa.
PLACES = ((15, 8, 7, 6), (12, 5, 4, 3), (9, 2, 1, 0), (10, 14, 13, 11))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SORTED = 1024  # pairs that the sort looks at a time


@dataclass(frozen=True, slots=True)
class MXFP4Words:
    """MXFP4 matrices [E, N, K] arranged so that few integer instructions unpack two elements.

    ``words`` int32 [E, N, chunks * 16]: word c of a chunk of 128 holds, for j in 0..3, elements
    32 j + 2 c in its lower half and 32 j + 2 c + 1 in its upper half, each bit of the four numbers
    of a half at ``PLACES[j]``. bf16 has its sign in bit 15 and a small number's exponent and
    mantissa in bits 8 to 6: a shift by 3 j takes elements 0 to 2 there; 3 gets what is left.
    ``scales`` int32 [E, N, chunks]: byte j is the scale of elements 32 j and on.
    """

    words: Tensor  # zero beyond K
    scales: Tensor


Weights: TypeAlias = "Tensor | MXFP4Words | Scaled | Int4Words"


@dataclass(frozen=True, slots=True)
class Scaled:
    """MXFP4 matrices [E, N, K] as tensor cores take them, K padded to a multiple of CHUNK by zeros.

    ``blocks`` u8 [E, N, K / 2]: byte b of a row holds elements 2 b (low nibble) and 2 b + 1.
    ``scales`` u8 [E, N, K / 32]: s stands for 2^(s - 127).
    """

    blocks: Tensor
    scales: Tensor


def scaled(w: Tensor | MXFP4 | Int4) -> Weights:
    """``pack``, but MXFP4 weights are only padded."""
    if not isinstance(w, MXFP4):
        return pack(w)
    spare = -w.scales.shape[2] % (CHUNK // BLOCK)
    return Scaled(
        F.pad(w.blocks, (0, 0, 0, spare)).flatten(2), F.pad(w.scales, (0, spare)).contiguous()
    )


@dataclass(frozen=True, slots=True)
class Int4Words:
    """INT4 matrices [E, N, K] arranged so that one mask unpacks two elements.

    ``words`` int32 [E, N, chunks * 16]: word c of a chunk of 128 holds, for j in 0..3, elements
    32 j + 2 c at bit 4 j and 32 j + 2 c + 1 at bit 16 + 4 j. ``scales`` bf16 [E, N, chunks].
    """

    words: Tensor
    scales: Tensor


def pack(w: Tensor | MXFP4 | Int4) -> Weights:
    """Rearrange packed weights, MXFP4's expert by expert; others stay as they are.

    Raises ValueError for MXFP4 scales above 2, which no trained model has: 2^126 times them is not
    a bf16 number.
    """
    if isinstance(w, Int4):
        experts, rows, chunks = w.scales.shape
        element = nibbles(w.words).view(experts, rows, chunks, 4, 16, 2)  # j, c, half
        words = element.new_zeros(experts, rows, chunks, 16)
        for j in range(4):
            words |= element[:, :, :, j, :, 0] << 4 * j | element[:, :, :, j, :, 1] << 16 + 4 * j
        return Int4Words(words.flatten(2), w.scales)
    if not isinstance(w, MXFP4):
        return w
    experts, rows, blocks, _ = w.blocks.shape
    chunks = -(-blocks * BLOCK // CHUNK)
    words = torch.empty(experts, rows, chunks * 16, dtype=torch.int32, device=w.blocks.device)
    scales = torch.empty(experts, rows, chunks, dtype=torch.int32, device=w.blocks.device)
    if int(w.scales.max()) > 128:
        raise ValueError(f"an MXFP4 scale of 2^{int(w.scales.max()) - 127} is above 2")
    spare = (0, chunks * CHUNK // BLOCK - blocks)
    for e in range(experts):
        numbers = torch.stack((w.blocks[e] & 15, w.blocks[e] >> 4), -1).flatten(-2)
        numbers = F.pad(numbers, (0, 0, *spare)).to(torch.int32)
        element = numbers.view(rows, chunks, 4, 16, 2)  # j, c, half
        half = element.new_zeros(rows, chunks, 16, 2)
        for j, places in enumerate(PLACES):
            for bit, place in zip((3, 2, 1, 0), places, strict=True):
                half |= (element[:, :, j] >> bit & 1) << place
        words[e] = (half[..., 0] | half[..., 1] << 16).view(rows, -1)
        scales[e] = F.pad(w.scales[e], spare).view(torch.int32)
    return MXFP4Words(words, scales)


@triton.jit
def _unpack(words, scales, j: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements 32 j .. of every chunk: words [N, 16], scales [N] -> [N, 32], bf16 or fp32."""
    if j < 3:
        pair = (words << (3 * j)) & 0x81C081C0
    else:
        pair = ((words >> 6) & 0x01800180) | ((words >> 5) & 0x00400040)
        pair |= (words << 5) & 0x80008000
    scale = (scales >> (8 * j)) & 255
    if WIDE:
        # As fp16, which has the same form with three more bits of mantissa; then times 2^14.
        pair = (pair & 0x80008000) | ((pair & 0x01C001C0) << 3)
        low = pair.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        factor = ((scale + 14) << 23).to(tl.float32, bitcast=True)
    else:
        # The bits are 2^-126 of the value, a subnormal for 0.5: bf16 products take those.
        low = pair.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        high = (pair >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        factor = ((scale + 126) << 7).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    values = tl.reshape(tl.join(low, high), [words.shape[0], 32])
    return values * factor[:, None]


@triton.jit
def _unpack_int4(words, scales, j: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements 32 j .. of every chunk: words [N, 16], scales [N] -> [N, 32], bf16 or fp32."""
    pair = (words >> (4 * j)) & 0x000F000F
    if WIDE:
        low, high = (pair & 15).to(tl.float32), (pair >> 16).to(tl.float32)
        values = tl.reshape(tl.join(low, high), [words.shape[0], 32]) - 8.0
        return values * scales.to(tl.float32)[:, None]
    # The bits of 128 + n in bf16, whose mantissa has room for n.
    pair |= 0x43004300
    low = pair.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    high = (pair >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    values = tl.reshape(tl.join(low, high), [words.shape[0], 32]) - 136.0
    return values.to(tl.bfloat16) * scales[:, None]


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
    w_ptr,
    scales_ptr,
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
        if FORM == "scaled":
            b = tl.arange(0, DEPTH // 32)
            c, half = tl.arange(0, DEPTH), tl.arange(0, DEPTH // 2)
            x_at = x_ptr + source[:, None] * (2 * w_stride) + c[None, :]
            x_scales_at = x_scales_ptr + source[:, None] * (w_stride // 16) + b[None, :]
            w_at = w_ptr + row[:, None] * w_stride + half[None, :]
            scales_at = scales_ptr + row[:, None] * (w_stride // 16) + b[None, :]
            # Tensor cores want 128 rows on the left: of few tokens, the features are more.
            turned = tl.zeros([COLUMNS, ROWS], tl.float32)
            for _ in range(0, w_stride, DEPTH // 2):
                x, x_scales = tl.load(x_at), tl.load(x_scales_at)
                w, scales = tl.load(w_at), tl.load(scales_at)
                if ROWS < 128:
                    turned = tl.dot_scaled(w, scales, "e2m1", tl.trans(x), x_scales, "e4m3", turned)
                else:
                    total = tl.dot_scaled(x, x_scales, "e4m3", tl.trans(w), scales, "e2m1", total)
                x_at += DEPTH
                x_scales_at += DEPTH // 32
                w_at += DEPTH // 2
                scales_at += DEPTH // 32
            if ROWS < 128:
                total = tl.trans(turned)
        elif FORM == "words" or FORM == "int4":
            c = tl.arange(0, 32)
            x_at = x_ptr + source[:, None] * depth + c[None, :]
            w_at = w_ptr + row[:, None] * w_stride + tl.arange(0, 16)[None, :]
            scales_at = scales_ptr + row * (w_stride // 16)
            for at in range(0, depth, 128):
                words = tl.load(w_at).to(tl.uint32, bitcast=True)
                scales = tl.load(scales_at)
                for j in tl.static_range(4):
                    held = (at + 32 * j + c)[None, :] < depth
                    x = tl.load(x_at + 32 * j, mask=held, other=0.0)
                    if FORM == "int4":
                        w = _unpack_int4(words, scales, j, WIDE).to(x.dtype)
                    else:
                        w = _unpack(words, scales.to(tl.uint32, bitcast=True), j, WIDE).to(x.dtype)
                    total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
                x_at += 128
                w_at += 16
                scales_at += 1
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


@triton.jit
def _quantize_mxfp8(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, scales_ptr, width, padded, BLOCKS: tl.constexpr
):
    """Grid (T, blocks / BLOCKS)."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    c = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    x = tl.load(x_ptr + row * width + c, mask=c < width, other=0.0).to(tl.float32)
    # The exponent of the largest, less that of e4m3's largest; the scale's inverse from its bits.
    exponent = (tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True) >> 23) - 8
    scale = tl.maximum(exponent, 0)
    x *= ((254 - scale) << 23).to(tl.float32, bitcast=True)[:, None]
    x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    inside = c < padded
    tl.store(out_ptr + row * padded + c, x.to(out_ptr.dtype.element_ty), mask=inside)
    scales_at = scales_ptr + row * (padded // 32) + block
    tl.store(scales_at, scale.to(tl.uint8), mask=block * 32 < padded)


def quantize_mxfp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """See ``kernels.reference.quantize_mxfp8``; K is padded to a multiple of CHUNK by zeros."""
    assert x.is_contiguous()
    rows, width = x.shape
    padded = -(-width // CHUNK) * CHUNK
    out = torch.empty(rows, padded, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, padded // BLOCK, dtype=torch.uint8, device=x.device)
    blocks = 32
    launch(
        _quantize_mxfp8,
        (rows, triton.cdiv(padded, blocks * BLOCK)),
        x,
        out,
        scales,
        width,
        padded,
        BLOCKS=blocks,
        num_warps=4,
    )
    return out, scales


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
    w13: Weights,
    b13: Tensor,
    w2: Weights,
    b2: Tensor | None,
    first: int,
    limit: float,
    alpha: float,
    plain: bool = False,
    *,
    config: Experts,
) -> Tensor:
    """See ``kernels.reference.experts``; packed weights as ``pack`` or ``scaled`` leave them."""
    assert x.is_contiguous()
    assert ids.is_contiguous()
    tokens, k = ids.shape
    count, pairs = len(b13), tokens * k
    device = x.device
    order = torch.empty(pairs, dtype=torch.int32, device=device)
    offsets = torch.empty(count + 1, dtype=torch.int32, device=device)
    launch(_sort, (count + 1,), ids, order, offsets, pairs, first, count, BLOCK=SORTED)
    dense = config.dense if isinstance(w13, Tensor) else config.words
    tiles = config.scaled if isinstance(w13, Scaled) else dense
    tile = tiles.small if pairs <= tiles.small.rows * count else tiles.large
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
    w: Weights,
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
    if isinstance(w, Scaled):
        form, matrix, scales = "scaled", w.blocks, w.scales
    elif isinstance(w, MXFP4Words | Int4Words):
        form = "words" if isinstance(w, MXFP4Words) else "int4"
        matrix, scales = w.words, w.scales
    else:
        form, matrix, scales = "dense", w, None
    depth = x.shape[1]
    x, x_scales = quantize_mxfp8(x) if form == "scaled" else (x, None)
    rows = matrix.shape[1]
    pairs = len(order)
    # No more tiles than pairs, and no more than full ones and one broken one for each expert.
    tiles = min(pairs, pairs // tile.rows + count)
    launch(
        _grouped,
        (tiles * triton.cdiv(rows, tile.columns),),
        x,
        x_scales,
        matrix,
        scales,
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
