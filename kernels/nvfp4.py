"""NVFP4 weights: 4-bit floats (e2m1) in blocks of 16 with an e4m3 scale each, and one fp32 factor
for the whole matrix.

Format: NVIDIA ModelOpt's ``weight``, ``weight_scale`` and ``weight_scale_2``. Number times scale is
exactly a bf16 number; the factor is not a power of two, so the matrix is rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.mxfp4 import pairs

BLOCK = 16
LARGEST = 6.0 * 448.0  # number times scale


@dataclass(frozen=True, slots=True)
class NVFP4:
    """Packed matrices [..., out, in]; the blocks run along ``in``.

    ``blocks`` u8 [..., out, in / 2]: byte b holds element 2 b in its low nibble.
    ``scales`` e4m3 [..., out, in / 16]. ``factors`` fp32 [...].
    """

    blocks: Tensor
    scales: Tensor
    factors: Tensor


def dequantize(packed: NVFP4, dtype: torch.dtype) -> Tensor:
    """[..., out, in] in ``dtype``."""
    values = pairs(torch.float32, packed.blocks.device)[packed.blocks.int()].flatten(-2)
    values = values.unflatten(-1, (-1, BLOCK)) * packed.scales.float()[..., None]
    matrix: Tensor = values.flatten(-2) * packed.factors[..., None, None]
    return matrix.to(dtype)


def quantize(x: Tensor, factors: Tensor) -> NVFP4:
    """x [..., out, in], which times 1 / ``factors`` [...] is within LARGEST.

    A block's scale is its largest over 6; scales and numbers are rounded to the nearest, to the
    even of two. What is not a number makes its block so.
    """
    blocks = x.float().unflatten(-1, (-1, BLOCK)) / factors[..., None, None, None]
    # Times the inverse, as the kernel does it; a NaN must not become a scale of 448.
    scales = (blocks.abs().amax(-1) * (1 / 6)).clamp(max=448.0).to(torch.float8_e4m3fn)
    wide = scales.float()[..., None]
    values = torch.where(wide > 0, blocks / wide, 0.0)
    size = values.abs()
    code = (size > 0.25).to(torch.uint8)
    for bound, even in zip((0.75, 1.25, 1.75, 2.5, 3.5, 5.0), (1, 0, 1, 0, 1, 0), strict=True):
        code += (size >= bound) if even else (size > bound)
    code |= (values < 0).to(torch.uint8) << 3
    code = code.flatten(-2)
    return NVFP4(code[..., 0::2] | code[..., 1::2] << 4, scales, factors)
