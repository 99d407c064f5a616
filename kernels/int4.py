"""INT4 weights: symmetric 4-bit integers in groups of 128 with one bf16 scale each (W4A16).

Format: compressed-tensors' ``pack-quantized``. Dequantising to bf16 rounds each product of integer
and scale once, as that library does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 128


@dataclass(frozen=True, slots=True)
class Int4:
    """Packed matrices [..., out, in]; the groups run along ``in``, a multiple of GROUP.

    ``words`` int32 [..., out, in / 8]: bits 4 i to 4 i + 3 of a word hold element i plus 8.
    ``scales`` bf16 [..., out, in / GROUP].
    """

    words: Tensor
    scales: Tensor


def nibbles(words: Tensor) -> Tensor:
    """int32 [..., n] -> int32 [..., 8 n], each 0 to 15."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    numbers: Tensor = words[..., None] >> shifts & 15
    return numbers.flatten(-2)


def dequantize(packed: Int4, dtype: torch.dtype) -> Tensor:
    """[..., out, in] in ``dtype``."""
    groups = (nibbles(packed.words) - 8).to(dtype).unflatten(-1, (-1, GROUP))
    matrix: Tensor = (groups * packed.scales[..., None].to(dtype)).flatten(-2)
    return matrix
