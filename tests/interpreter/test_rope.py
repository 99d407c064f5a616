"""Rotary embedding and the KV write under Triton's interpreter against the reference."""

from __future__ import annotations

import pytest
import torch

from kernels import reference, rope


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (20, 17)])
@pytest.mark.parametrize("cache", [torch.float32, torch.float8_e4m3fn])
def test_rope_and_kv_write(interleaved: bool, heads: tuple[int, int], cache: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    tokens, size, slots = 5, 32, 12
    qkv = torch.randn(tokens, heads[0] + 2 * heads[1], size, generator=draw) * 3
    qkv[1, -1, 0] = 1000.0  # beyond e4m3
    q, k, v = qkv.split((heads[0], heads[1], heads[1]), 1)
    cos, sin = torch.randn(2, tokens, 1, size, generator=draw)
    where = torch.randperm(slots, generator=draw)[:tokens]
    caches = torch.zeros(2, 2, slots, heads[1], size).to(cache)
    results = []
    for (k_cache, v_cache), kernel in zip(caches, (reference, rope), strict=True):
        results.append(
            kernel.rope_kv_write(q, k, v, cos, sin, k_cache, v_cache, where, interleaved)
        )
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(caches[0].float(), caches[1].float())
    assert caches[0].float().count_nonzero()
