"""RMSNorm under Triton's interpreter against the reference."""

from __future__ import annotations

import pytest
import torch

from kernels import norm, reference

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 17), (3, 63), (5, 100), (2, 720)])
@pytest.mark.parametrize("round_first", [False, True])
def test_norms(dtype: torch.dtype, shape: tuple[int, int], round_first: bool) -> None:
    def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(ours, expected, atol=tolerance, rtol=tolerance)

    draw = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, *shape, generator=draw).mul(3).to(dtype)
    weight = torch.rand(shape[1], generator=draw).to(dtype)
    rest = (weight, 1e-5, round_first)
    close(norm.rms_norm(x, *rest), reference.rms_norm(x, *rest))
    ours, total = norm.add_rms_norm(x, residual, *rest)
    expected, expected_total = reference.add_rms_norm(x, residual, *rest)
    assert torch.equal(total, expected_total)
    close(ours, expected)
