"""Products and conversions as the hardware makes them, in place of the interpreter's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.language import semantic
from triton.runtime import interpreter

NARROW = {
    tl.bfloat16: (torch.bfloat16, torch.int16),
    tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
}


def _wide(x: Any) -> Any:
    """The values of an operand: the interpreter keeps bf16 as its bits."""
    if x.dtype.scalar == tl.bfloat16:
        return (x.data.astype(np.uint32) << 16).view(np.float32)
    if x.dtype.primitive_bitwidth == 8 and x.dtype.is_floating():
        return interpreter._convert_float(x.data, x.dtype, tl.float32, None).view(np.float32)
    return x.data.astype(np.float32)


def _scaled(data: Any, scales: Any, form: str) -> Any:
    """Rows of numbers times their scales: 2^(scale - 127) for every 32, e4m3 for every 16."""
    stored = np.ascontiguousarray(data).view(np.uint8)
    if form == "e4m3":
        values = torch.from_numpy(stored).view(torch.float8_e4m3fn).float().numpy()
    else:
        assert form == "e2m1", form
        nibbles = np.stack((stored & 15, stored >> 4), -1).reshape(len(stored), -1)
        table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
        values = np.where(nibbles & 8, -table[nibbles & 7], table[nibbles & 7])
    if scales.dtype.is_fp8e4nv():
        return values * np.repeat(_wide(scales), 16, 1)
    factors = np.ldexp(np.float32(1), scales.data.astype(np.int32) - 127)
    return values * np.repeat(factors, 32, 1)


@pytest.fixture(autouse=True)
def hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in fp32, a row's never depending on its place in the tile; the interpreter's own product
    goes through BLAS, which does depend on it, and takes bf16 operands for integers. Narrow floats
    rounded to the nearest; the interpreter cuts bf16 off and loses fp8's carries."""

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        assert d.dtype.scalar == tl.float32, "sums belong into fp32"
        product = np.einsum("...ik,...kj->...ij", _wide(a), _wide(b))
        return interpreter.TensorHandle(product + d.data, tl.float32)

    def dot_scaled(
        self: Any, a: Any, a_scale: Any, a_form: str, b: Any, b_scale: Any, b_form: str, total: Any,
        *rest: Any,
    ) -> Any:  # fmt: skip
        """The interpreter has none. Scales lie along the sum, which is the last dimension of a and
        of b turned; 4-bit numbers are packed along it, the lower half first."""
        left = _scaled(a.handle.data, a_scale.handle, a_form)
        right = _scaled(np.swapaxes(b.handle.data, -1, -2), b_scale.handle, b_form)
        sums = np.einsum("ik,jk->ij", left, right) + total.handle.data
        return self.tensor(interpreter.TensorHandle(sums, tl.float32), total.type)

    convert_float = interpreter._convert_float

    def convert(x: Any, given: Any, wanted: Any, rounding: Any) -> Any:
        if given != tl.float32 or wanted not in NARROW:
            return convert_float(x, given, wanted, rounding)
        dtype, bits = NARROW[wanted]
        narrow = torch.from_numpy(x.view(np.float32)).to(dtype)
        return narrow.view(bits).numpy().view(f"uint{8 * dtype.itemsize}").reshape(x.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(semantic.TritonSemantic, "dot_scaled", dot_scaled)
