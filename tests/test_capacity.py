"""What start-up promises is what the ledger can hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import tiny_gpt_oss
from tests.engines import Engine, greedy
from workers.architecture import Architecture
from workers.blocks import BlockPool
from workers.capacity import TooLittleMemory, capacity, default_kv_bytes
from workers.config import ModelSpec

ARCH = Architecture(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=96,
    num_layers=4,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    num_experts=8,
    experts_per_token=4,
    windows=(8, 0, 8, 0),
    max_position=512,
    rope_theta=1e4,
    rope_scaling=None,
)


@pytest.mark.parametrize("memory", [20_000, 100_000, 1 << 20])
def test_the_longest_sequence_fits_and_not_one_token_more(memory: int) -> None:
    plan = capacity(ARCH, ModelSpec(block_size=4), memory, 4, 512)
    pool = BlockPool(plan.kv)
    assert plan.bytes_per_rank <= memory
    assert pool.blocks_needed(plan.tokens) <= pool.num_blocks
    assert plan.tokens == 512 or pool.blocks_needed(plan.tokens + 1) > pool.num_blocks
    assert plan.scheduler.max_model_len == min(512, plan.tokens + 1)
    assert plan.reduced is (plan.scheduler.max_model_len < 512)


def test_the_promised_sequence_runs(tmp_path: Path) -> None:
    """Admission equals prediction: a request of the full model length fills the pool and ends."""
    tiny_gpt_oss(tmp_path)
    engine = Engine(tmp_path, kv_cache_memory=100_000, block_size=4)
    length = engine.plan.scheduler.max_model_len
    assert engine.plan.reduced
    assert len(engine.generate([greedy("r", [1, 2, 3], length - 3)])["r"]) == length - 3
    (refused,) = engine.scheduler.add(greedy("s", [1] * length, 1), 0.0)
    assert refused.reason == "refused"
    assert engine.runner._cache.arena.nbytes == engine.plan.bytes_per_rank


@pytest.mark.parametrize(
    ("spec", "memory", "message"),
    [
        (ModelSpec(max_model_len=400), 50_000, r"needs .* KV blocks .* give --kv-cache-memory \d+"),
        (ModelSpec(max_model_len=513), 1 << 30, "513 is more than the model's 512 positions"),
        (ModelSpec(), 10, "too little; a block takes 8,192 bytes"),
    ],
)
def test_refusals_name_the_numbers(spec: ModelSpec, memory: int, message: str) -> None:
    with pytest.raises(TooLittleMemory, match=message):
        capacity(ARCH, spec, memory, 4, 512)


def test_the_advised_memory_is_enough() -> None:
    spec = ModelSpec(max_model_len=400)
    with pytest.raises(TooLittleMemory) as refused:
        capacity(ARCH, spec, 50_000, 4, 512)
    advised = int(str(refused.value).split("--kv-cache-memory ")[1].split()[0])
    assert capacity(ARCH, spec, advised, 4, 512).scheduler.max_model_len == 400
    with pytest.raises(TooLittleMemory):
        capacity(ARCH, spec, advised - 1, 4, 512)


def test_defaults() -> None:
    assert default_kv_bytes(100 << 30, ModelSpec(), cuda=False) == 1 << 30
    assert default_kv_bytes(1 << 30, ModelSpec(), cuda=False) == 1 << 28
    assert default_kv_bytes(10 << 30, ModelSpec(), cuda=True) == 10 << 30
    assert default_kv_bytes(10 << 30, ModelSpec(kv_cache_memory=5), cuda=True) == 5
