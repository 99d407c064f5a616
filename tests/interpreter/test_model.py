"""The whole engine on Triton kernels under the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.llm import LLM, SamplingParams
from tests.checkpoints import tiny_gpt_oss
from tests.engines import prompts
from workers.config import Kernels

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
