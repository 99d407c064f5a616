"""The whole engine on Triton kernels under the interpreter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster.llm import LLM, SamplingParams
from tests.checkpoints import tiny_gpt_oss
from tests.engines import Engine, greedy, prompts
from tests.fakes import Replaying
from workers.config import Kernels
from workers.runner import Launched, Runner, inputs_bytes
from workers.wire import Batch

PARAMS = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)


@pytest.mark.parametrize(
    ("invariant", "kv"),
    [(False, "auto"), (True, "auto"), pytest.param(False, "fp8", marks=pytest.mark.slow)],
)
def test_tokens_equal_the_references(tmp_path: Path, invariant: bool, kv: str) -> None:
    """Packed experts on the fast tiles, dense ones on the batch-invariant tiles."""
    directory = str(tiny_gpt_oss(tmp_path / "tiny", mxfp4=not invariant))
    asked = prompts(1, longest=40)

    def tokens(kernels: Kernels, batch_invariant: bool = False) -> list[list[int]]:
        llm = LLM(
            directory,
            device="cpu",
            dtype="float32",
            kernels=kernels,
            batch_invariant=batch_invariant,
            kv_cache_memory=1 << 20,
            kv_cache_dtype=kv,
            block_size=4,
        )
        assert any(f"{kernels} kernels" in note for note in llm.report.notes)
        return [completion.token_ids for completion in llm.generate(asked, PARAMS)]

    assert tokens("triton", invariant) == tokens("reference")


# Padding's attention is never written, and what memory held may be anything.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("invariant", [False, True])
def test_graphs_change_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, invariant: bool
) -> None:
    """Decode steps padded and replayed, two in the air, through a pool that preempts: tokens equal
    those of eager steps, one at a time, on the reference kernels, and log probabilities, which are
    computed behind the graphs, are near theirs."""
    directory = tiny_gpt_oss(tmp_path / "tiny")
    requests = [
        greedy(str(n), ids, 12, logprobs=(None, 0, 3)[n % 3])
        for n, ids in enumerate(prompts(5, longest=30))
    ]
    spec = {"block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64}
    plain = Engine(directory, kernels="reference", **spec)
    expected = plain.generate(requests)

    engine = Engine(
        directory, kernels="triton", batch_invariant=invariant, kv_cache_memory=80_000, **spec
    )
    device = Replaying(inputs_bytes(engine.plan.scheduler))
    assert engine.rank._place is not None
    engine.runner = Runner(
        engine.model, engine.runner._cache, engine.plan.scheduler, engine.rank._place, device
    )
    engine.runner.rehearse(16)
    assert engine.runner.capture() == device.captured
    captured = device.captured
    before, _ = engine.runner.expert_calls()()
    launch, computed = engine.runner.launch, bytearray()

    def listening(batch: Batch) -> Launched:
        computed.extend(batch.counts)
        return launch(batch)

    monkeypatch.setattr(engine.runner, "launch", listening)
    assert engine.generate(requests) == expected
    # Padding is no token; a replay counts, too.
    tokens = np.frombuffer(computed, np.int32).sum()
    after, _ = engine.runner.expert_calls()()
    pairs = [sum(layer) - sum(earlier) for layer, earlier in zip(after, before, strict=True)]
    assert pairs == [tokens * engine.model.arch.experts_per_token] * engine.model.arch.num_layers
    assert device.replayed > 10
    for request in requests:
        ours, theirs = engine.logprobs[request.id], plain.logprobs[request.id]
        assert len(ours) == (0 if request.sampling.logprobs is None else 12)
        for mine, wanted in zip(ours, theirs, strict=True):
            assert mine.tokens == wanted.tokens
            assert [mine.chosen, *mine.values] == pytest.approx(
                [wanted.chosen, *wanted.values], abs=1e-3
            )
    assert device.captured == captured, "a decode step came that start-up had not captured"
    assert engine.scheduler.load().preemptions
