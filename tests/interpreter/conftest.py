"""Matrix products as tensor cores make them, in place of the interpreter's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter


def _wide(x: Any) -> Any:
    """The values of an operand: the interpreter keeps bf16 as its bits."""
    if x.dtype.scalar == tl.bfloat16:
        return (x.data.astype(np.uint32) << 16).view(np.float32)
    if x.dtype.primitive_bitwidth == 8 and x.dtype.is_floating():
        return interpreter._convert_float(x.data, x.dtype, tl.float32, None).view(np.float32)
    return x.data.astype(np.float32)


@pytest.fixture(autouse=True)
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in fp32, a row's never depending on its place in the tile; the interpreter's own product
    goes through BLAS, which does depend on it, and takes bf16 operands for integers."""

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        assert d.dtype.scalar == tl.float32, "sums belong into fp32"
        product = np.einsum("...ik,...kj->...ij", _wide(a), _wide(b))
        return interpreter.TensorHandle(product + d.data, tl.float32)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
