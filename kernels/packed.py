"""Weights of experts arranged for the kernels that multiply them, and activations packed alike.

Two ways. Where tensor cores take 4-bit floats in blocks with scales (sm_100, sm_103), weights stay
as they are and activations are packed before each product: to mxfp8 for MXFP4, to NVFP4 for NVFP4.
Elsewhere, and of integers everywhere, weights are bits in words of 32, which few instructions turn
into bf16 numbers in registers; activations stay as they are.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels import mxfp4, nvfp4
from kernels.int4 import Int4, nibbles
from kernels.launch import launch
from kernels.mxfp4 import MXFP4
from kernels.nvfp4 import NVFP4

CHUNK = 128  # elements along the sum in one run of words
# The bits of a 4-bit float, element j of a half word: sign, exponent (2), mantissa.
PLACES = ((15, 8, 7, 6), (12, 5, 4, 3), (9, 2, 1, 0), (10, 14, 13, 11))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

Form = Literal["mxfp4", "nvfp4", "int4", "mxfp4 x mxfp8", "nvfp4 x nvfp4"]


@dataclass(frozen=True, slots=True)
class Packed:
    """Matrices [E, N, K], K padded to a multiple of CHUNK by zeros.

    Words (``mxfp4``, ``nvfp4``, ``int4``): ``bits`` int32 [E, N, chunks * 16]. Word c of a chunk
    holds, for j in 0..3, elements 32 j + 2 c in its lower half and 32 j + 2 c + 1 in its upper one:
    an integer at bit 4 j, each bit of a float at ``PLACES[j]``. bf16 has its sign in bit 15 and a
    small number's exponent and mantissa in bits 8 to 6: a shift by 3 j takes elements 0 to 2 there;
    3 gets what is left. ``scales``: of mxfp4 int32 [E, N, chunks], byte j the scale of elements
    32 j and on; of nvfp4 int32 [E, N, chunks * 2], byte j of word h that of 32 j + 16 h and on; of
    int4 bf16 [E, N, chunks].

    Blocks (``... x ...``): ``bits`` u8 [E, N, K / 2], byte b of a row holds elements 2 b (low
    nibble) and 2 b + 1. ``scales``: of mxfp4 u8 [E, N, K / 32], of nvfp4 e4m3 [E, N, K / 16].
    """

    form: Form
    bits: Tensor
    scales: Tensor
    factors: Tensor | None = None  # fp32 [E], of nvfp4: what the products are multiplied with


Weights = Tensor | MXFP4 | NVFP4 | Int4


def pack(w: Weights, native: bool = False) -> Tensor | Packed:
    """``native``: for tensor cores that take scales. Plain matrices stay as they are.

    Raises ValueError for MXFP4 scales above 2, which no trained model has: 2^126 times them is not
    a bf16 number.
    """
    if isinstance(w, Tensor):
        return w
    if isinstance(w, Int4):
        return _pack_int4(w)
    block = mxfp4.BLOCK if isinstance(w, MXFP4) else nvfp4.BLOCK
    spare = -w.scales.shape[2] % (CHUNK // block)  # blocks of zeros
    scales = F.pad(w.scales.view(torch.uint8), (0, spare)).contiguous()
    blocks = F.pad(w.blocks.flatten(2), (0, spare * block // 2))
    if isinstance(w, MXFP4):
        if native:
            return Packed("mxfp4 x mxfp8", blocks, scales)
        if int(scales.max()) > 128:
            raise ValueError(f"an MXFP4 scale of 2^{int(scales.max()) - 127} is above 2")
        return Packed("mxfp4", _words(blocks), scales.view(torch.int32))
    if native:
        return Packed("nvfp4 x nvfp4", blocks, scales.view(torch.float8_e4m3fn), w.factors)
    halves = scales.unflatten(2, (-1, 4, 2)).transpose(-1, -2).contiguous().flatten(2)
    return Packed("nvfp4", _words(blocks), halves.view(torch.int32), w.factors * 2.0**8)


def _words(blocks: Tensor) -> Tensor:
    """u8 [E, N, K / 2] -> int32 [E, N, K / 8], expert by expert."""
    experts, rows, width = blocks.shape
    words = torch.empty(experts, rows, width // 4, dtype=torch.int32, device=blocks.device)
    for e in range(experts):
        numbers = torch.stack((blocks[e] & 15, blocks[e] >> 4), -1).to(torch.int32)
        element = numbers.view(rows, -1, 4, 16, 2)  # j, c, half
        half = element.new_zeros(rows, element.shape[1], 16, 2)
        for j, places in enumerate(PLACES):
            for bit, place in zip((3, 2, 1, 0), places, strict=True):
                half |= (element[:, :, j] >> bit & 1) << place
        words[e] = (half[..., 0] | half[..., 1] << 16).view(rows, -1)
    return words


def _pack_int4(w: Int4) -> Packed:
    experts, rows, chunks = w.scales.shape
    element = nibbles(w.words).view(experts, rows, chunks, 4, 16, 2)  # j, c, half
    words = element.new_zeros(experts, rows, chunks, 16)
    for j in range(4):
        words |= element[:, :, :, j, :, 0] << 4 * j | element[:, :, :, j, :, 1] << 16 + 4 * j
    return Packed("int4", words.flatten(2), w.scales)


@triton.jit
def _floats(words, j: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements 32 j .. of every chunk: words [N, 16] -> [N, 32]: fp32 and 2^-14 times what they
    are, or bf16 and 2^-126 times that, a subnormal for 0.5: bf16 products take those."""
    if j < 3:
        pair = (words << (3 * j)) & 0x81C081C0
    else:
        pair = ((words >> 6) & 0x01800180) | ((words >> 5) & 0x00400040)
        pair |= (words << 5) & 0x80008000
    if WIDE:
        # As fp16, which has the same form with three more bits of mantissa.
        pair = (pair & 0x80008000) | ((pair & 0x01C001C0) << 3)
        low = pair.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        low = pair.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        high = (pair >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.reshape(tl.join(low, high), [words.shape[0], 32])


@triton.jit
def unpack_mxfp4(words, scales, j: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Elements 32 j .. of every chunk: words [N, 16], scales [N] -> [N, 32], bf16 or fp32."""
    scale = (scales.to(tl.uint32, bitcast=True) >> (8 * j)) & 255
    if WIDE:
        factor = ((scale + 14) << 23).to(tl.float32, bitcast=True)
    else:
        factor = ((scale + 126) << 7).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return _floats(words, j, WIDE) * factor[:, None]


@triton.jit
def unpack_nvfp4(words, scales, j: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """As ``unpack_mxfp4`` with scales [N, 2], and 2^-8 times what they are: a scale of 448 times
    2^126 is no bf16 number."""
    # e4m3's bits in fp32's places are 2^-120 of it, for subnormals, too.
    scale = ((scales.to(tl.uint32, bitcast=True) >> (8 * j)) & 255) << 20
    factor = scale.to(tl.float32, bitcast=True) * 2.0**120
    numbers = tl.reshape(_floats(words, j, WIDE), [words.shape[0], 2, 16])
    factor = factor * 2.0**6 if WIDE else (factor * 2.0**118).to(tl.bfloat16)
    return tl.reshape(numbers * factor[:, :, None], [words.shape[0], 32])


@triton.jit
def unpack_int4(words, scales, j: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
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
    scales = torch.empty(rows, padded // mxfp4.BLOCK, dtype=torch.uint8, device=x.device)
    blocks = 32
    launch(
        _quantize_mxfp8,
        (rows, triton.cdiv(padded, blocks * mxfp4.BLOCK)),
        x,
        out,
        scales,
        width,
        padded,
        BLOCKS=blocks,
        num_warps=4,
    )
    return out, scales


@triton.jit
def _quantize_nvfp4(  # type: ignore[no-untyped-def]
    x_ptr, out_ptr, scales_ptr, factors_ptr, width, padded, BLOCKS: tl.constexpr
):
    """Grid (T); BLOCKS of 16 hold a row."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    c = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + row * width + c, mask=c < width, other=0.0).to(tl.float32)
    most = tl.max(tl.abs(x), 1)
    broken = tl.max((x != x).to(tl.int32), 1) > 0  # a maximum drops what is not a number
    factor = tl.maximum(tl.max(most, 0), 2.0**-100) / 2688.0
    factor = tl.where(tl.max(broken.to(tl.int32), 0) > 0, float("nan"), factor)
    x /= factor
    scale = tl.minimum(tl.max(tl.abs(x), 1) * (1 / 6), 448.0).to(tl.float8e4nv)
    wide = scale.to(tl.float32)[:, None]
    x = tl.where(wide > 0, x / tl.where(wide > 0, wide, 1.0), 0.0)
    size = tl.abs(x)
    code = (size > 0.25).to(tl.uint8) + (size >= 0.75) + (size > 1.25) + (size >= 1.75)
    code += (size > 2.5).to(tl.uint8) + (size >= 3.5) + (size > 5.0)
    code |= (x < 0).to(tl.uint8) << 3
    low, high = tl.split(tl.reshape(code, [BLOCKS, 8, 2]))
    b = block[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out_ptr + row * (padded // 2) + b, low | (high << 4), mask=b < padded // 2)
    tl.store(scales_ptr + row * (padded // 16) + block, scale, mask=block * 16 < padded)
    tl.store(factors_ptr + row, factor)


def quantize_nvfp4(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ``kernels.reference.quantize_nvfp4``; K is padded to a multiple of CHUNK by zeros."""
    assert x.is_contiguous()
    rows, width = x.shape
    padded = -(-width // CHUNK) * CHUNK
    out = torch.empty(rows, padded // 2, dtype=torch.uint8, device=x.device)
    shape = rows, padded // nvfp4.BLOCK
    scales = torch.empty(shape, dtype=torch.float8_e4m3fn, device=x.device)
    factors = torch.empty(rows, dtype=torch.float32, device=x.device)
    blocks = triton.next_power_of_2(shape[1])
    launch(
        _quantize_nvfp4,
        (rows,),
        x,
        out,
        scales,
        factors,
        width,
        padded,
        BLOCKS=blocks,
        num_warps=8,
    )
    return out, scales, factors
