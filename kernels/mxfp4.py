"""MXFP4 weights: 4-bit floats (e2m1) in blocks of 32 with one power-of-two scale (e8m0) each.

Format: OCP Microscaling specification 1.0. Every value is exactly a bf16 number, so dequantising to
bf16 or fp32 loses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

BLOCK = 32
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, slots=True)
class MXFP4:
    """Packed matrices [..., out, in]; the blocks run along ``in``.

    ``blocks`` u8 [..., out, in/32, 16]: byte b of a block holds element 2b in its low nibble.
    ``scales`` u8 [..., out, in/32]: a scale byte s stands for 2^(s-127).
    """

    blocks: Tensor
    scales: Tensor


@cache
def pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two values of every byte: [256, 2]."""
    values = torch.tensor([*_VALUES, *(-v for v in _VALUES)], dtype=dtype, device=device)
    byte = torch.arange(256, device=device)
    return torch.stack((values[byte & 15], values[byte >> 4]), dim=1)


def dequantize(packed: MXFP4, dtype: torch.dtype) -> Tensor:
    """[..., out, in] in ``dtype``, which must be bf16 or fp32 to be exact."""
    values = pairs(dtype, packed.blocks.device)[packed.blocks.to(torch.int32)].flatten(-2)
    exponents = packed.scales.to(torch.int32)[..., None] - 127
    return torch.ldexp(values, exponents).flatten(-2)
