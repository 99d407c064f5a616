"""The model against transformers, and a token's logits against themselves in other company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.checkpoints import ROPE, oracle, tiny_gpt_oss
from tests.engines import Engine, greedy, prompts
from workers.architecture import Llama3, Yarn, parse
from workers.blocks import prefix_hashes, prefix_root
from workers.model import inverse_frequencies
from workers.wire import Request

FORMS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16, hub's rope": {"hub_rope": True, "shards": 3},
    "mxfp4": {"mxfp4": True, "shards": 2},
    "truncated yarn": {"rope_parameters": ROPE | {"truncate": True}},
    "no yarn": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "tied": {"tie_word_embeddings": True},
    "2 KV heads of 4, top 2": {"num_attention_heads": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt_oss(tmp_path_factory.mktemp("tiny"))


def listen(engine: Engine) -> list[Tensor]:
    """Logits of every sampled token, as the model gives them."""
    heard: list[Tensor] = []
    engine.model.register_forward_hook(lambda *call: heard.append(call[2][0].clone()))
    return heard


def run(engine: Engine, request: Request) -> Tensor:
    """Logits [tokens, vocabulary] of one request on its own."""
    heard = listen(engine)
    engine.generate([request])
    return torch.cat(heard)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_logits_equal_transformers(form: str, kernels: str, tmp_path: Path) -> None:
    """Prefill and decode, beyond the window of 8, chunked by a budget of 7."""
    tiny_gpt_oss(tmp_path, **FORMS[form])
    model = oracle(tmp_path)
    for length in (1, 8, 37):
        prompt = prompts(1, longest=2, seed=length)[0] * length
        prompt = [(token + 7 * at) % 250 for at, token in enumerate(prompt)]
        engine = Engine(tmp_path, kernels=kernels, max_num_batched_tokens=7, max_num_seqs=4)
        heard = listen(engine)
        tokens = engine.generate([greedy("r", prompt, 12)])["r"]
        ours = torch.cat(heard)[-12:]
        with torch.inference_mode():
            theirs = model(torch.tensor([prompt + tokens[:-1]])).logits[0, length - 1 :]
        assert tokens == theirs.argmax(-1).tolist()
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_bf16_follows_fp32(tmp_path: Path) -> None:
    """With small weights no expert is chosen by a hair, so bf16 stays near."""
    tiny_gpt_oss(tmp_path, initializer_range=0.1)
    request = greedy("r", prompts(1, longest=40, seed=3)[0] * 3, 1)
    exact, fast = (run(Engine(tmp_path, dtype=d), request) for d in ("float32", "bfloat16"))
    assert (exact[-1] - fast[-1].float()).abs().mean() < 0.05 * exact.std()


@pytest.mark.parametrize("mxfp4", [False, True])
def test_a_tokens_logits_never_depend_on_its_company(mxfp4: bool, tmp_path: Path) -> None:
    """Bit for bit: alone, in a batch, chunked, preempted, or found in the prefix cache."""
    tiny_gpt_oss(tmp_path, mxfp4=mxfp4)
    watched = [(token * 3) % 250 for token in range(45)]

    def logits(others: int, budget: int, memory: int, again: bool) -> dict[int, Tensor]:
        engine = Engine(
            tmp_path,
            max_num_batched_tokens=budget,
            max_num_seqs=8,
            kv_cache_memory=memory,
            block_size=4,
            max_model_len=80,
        )
        if again:
            engine.generate([greedy("first", watched, 3)])
        found: dict[int, Tensor] = {}
        rows: list[tuple[int, int]] = []

        def hear(model: Any, inputs: Any, outputs: Any) -> None:
            step = rows.pop(0) if rows else None
            if step is not None:
                found[step[1]] = outputs[0][step[0]].clone()

        engine.model.register_forward_hook(hear)
        requests = [
            greedy(f"o{i}", prompt, 30, temperature=float(i % 2), seed=i)
            for i, prompt in enumerate(prompts(others, longest=50, seed=9))
        ]
        for request in [*requests[::2], greedy("w", watched, 20), *requests[1::2]]:
            assert not engine.scheduler.add(request, 0.0)
        while engine.scheduler.has_work():
            batch = engine.scheduler.plan(0.0)
            slot = next((s for s in engine.slots() if engine.slots()[s] == "w"), None)
            sampling = [row for row in batch.rows() if row.sample]
            mine = [i for i, row in enumerate(sampling) if row.slot == slot]
            at = [row.start + row.count for row in sampling if row.slot == slot]
            rows[:] = [(mine[0], at[0])] if mine else []
            result = engine.runner.collect(engine.runner.launch(batch))
            engine.scheduler.commit(batch, result, 0.0)
        assert (engine.scheduler.load().preemptions > 0) is (memory < 1 << 20)
        assert not again or engine.scheduler.load().prefix_hits > 0
        return found

    alone = logits(0, 512, 4 << 20, False)
    assert len(alone) == 20
    for others, budget, memory, again in (
        (7, 512, 4 << 20, False),
        (5, 13, 4 << 20, False),
        (7, 64, 220_000, False),
        (3, 29, 4 << 20, True),
    ):
        found = logits(others, budget, memory, again)
        assert found.keys() == alone.keys()
        for position, expected in alone.items():
            assert torch.equal(found[position], expected), (others, budget, memory, position)


PENALTIES = {"repetition_penalty": 1.4, "frequency_penalty": 0.5, "logit_bias": {7: 2.0}}


@pytest.fixture
def requests() -> list[Request]:
    return [
        greedy(
            f"r{i}",
            prompt,
            25,
            temperature=0.8 * (i % 2),
            seed=i,
            top_k=20 * (i % 3),
            **(PENALTIES if i % 4 == 3 else {}),
        )
        for i, prompt in enumerate(prompts(12, longest=45))
    ]


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_tokens_survive_preemption_and_chunking(
    tiny: Path, requests: list[Request], kernels: str
) -> None:
    calm = Engine(tiny, kernels=kernels)
    expected = calm.generate(requests)
    assert calm.scheduler.load().preemptions == 0
    tight = Engine(
        tiny,
        kernels=kernels,
        kv_cache_memory=300_000,
        block_size=4,
        max_num_batched_tokens=24,
        max_model_len=80,
    )
    assert tight.generate(requests) == expected
    assert tight.scheduler.load().preemptions > 0
    # Resumed after some of the tokens have been sent.
    resumed = [
        Request(
            id=r.id, model=r.model, prompt=r.prompt, sampling=r.sampling, emitted=expected[r.id][:7]
        )
        for r in requests
    ]
    assert calm.generate(resumed) == expected


@pytest.mark.parametrize("kv", ["auto", "fp8"])
def test_freed_blocks_are_never_read(tiny: Path, requests: list[Request], kv: str) -> None:
    """Every block that the scheduler has freed is poisoned before the next step."""
    expected = Engine(tiny, kv_cache_dtype=kv).generate(requests)
    engine = Engine(
        tiny,
        kv_cache_dtype=kv,
        kv_cache_memory=300_000,
        block_size=4,
        max_model_len=80,
        max_num_batched_tokens=24,
        enable_prefix_caching=False,
    )
    tokens: dict[str, list[int]] = {r.id: [] for r in requests}
    for request in requests:
        assert not engine.scheduler.add(request, 0.0)
    while engine.scheduler.has_work():
        for output in engine.step():
            tokens[output.id] += output.tokens
        engine.runner._cache.poison(engine.scheduler.pool.free_list())
    assert tokens == expected


def test_an_fp8_cache_holds_twice_the_tokens(tiny: Path) -> None:
    """And its pages are never taken for those of another dtype."""
    half, fp8 = (
        Engine(tiny, dtype="bfloat16", kv_cache_dtype=kv, kv_cache_memory=48 << 10, block_size=4)
        for kv in ("auto", "fp8")
    )
    assert fp8.plan.kv.groups[0].block_bytes * 2 == half.plan.kv.groups[0].block_bytes
    # One block is padding in either, and windows take the same blocks of both.
    assert fp8.plan.kv.num_blocks == 2 * half.plan.kv.num_blocks + 1
    assert 2 * half.plan.tokens <= fp8.plan.tokens < 2.2 * half.plan.tokens
    cache = fp8.runner._cache
    assert cache.arena.dtype == torch.float8_e4m3fn
    assert cache.arena.nbytes == fp8.plan.bytes_per_rank
    assert cache.arena.float().count_nonzero() == 0
    cache.poison([1])
    assert cache.arena[:, :, 1].float().isnan().all()
    assert fp8.report.kv_dtype_bytes == 1
    assert any("in float8_e4m3fn: 256 bytes per token" in note for note in fp8.report.notes)
    roots = [{*prefix_hashes(prefix_root(*e.scheduler._identity), [1] * 4, 4)} for e in (half, fp8)]
    assert not roots[0] & roots[1]


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("head_dim", [16, 64])
def test_yarn_equals_transformers(truncate: bool, head_dim: int) -> None:
    config = GptOssConfig(
        head_dim=head_dim, rope_parameters=ROPE | {"truncate": truncate}, eos_token_id=5
    )
    theirs, factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    arch = parse(config.to_dict())
    assert isinstance(arch.rope_scaling, Yarn)
    ours, ours_factor = inverse_frequencies(arch)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert ours_factor == pytest.approx(factor)


@pytest.mark.parametrize("bands", [(1.0, 1.0), (1.0, 4.0)])
def test_llama3_rope_equals_transformers(bands: tuple[float, float]) -> None:
    """Scout's instruct model, which has no band to blend, and its base model."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 16.0,
        "low_freq_factor": bands[0],
        "high_freq_factor": bands[1],
        "original_max_position_embeddings": 8192,
    }
    config = GptOssConfig(head_dim=128, rope_parameters=rope, eos_token_id=5)
    theirs, factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    arch = parse(config.to_dict())
    assert isinstance(arch.rope_scaling, Llama3)
    ours, our_factor = inverse_frequencies(arch)
    assert our_factor == factor
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    plain = inverse_frequencies(msgspec.structs.replace(arch, rope_scaling=None))[0]
    assert int((ours != plain).sum()) == (29 if bands == (1.0, 1.0) else 35)
