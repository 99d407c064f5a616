"""Engines that share experts on Triton kernels, their decode steps replayed as graphs are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import tiny_gpt_oss
from tests.engines import Engine, greedy, prompts
from tests.gangs import Gang


# Padding's attention is never written, and what memory held may be anything.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_replayed_steps_exchange_as_others_do(tmp_path: Path, ranks: int) -> None:
    """Two engines, two steps in the air; one decodes while the other prefills, then alone."""
    directory = tiny_gpt_oss(tmp_path, num_hidden_layers=2)
    requests = [greedy(f"r{n}", p, 8 + 4 * n) for n, p in enumerate(prompts(4, longest=20))]
    spec: dict[str, Any] = {
        "block_size": 4,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 48,
    }
    expected = Engine(directory, kernels="reference", **spec).generate(requests)
    with Gang(directory, 2, ranks, replaying=True, kernels="triton", **spec) as gang:
        for at in range(2):
            gang.submit(at, requests[at::2])
        gang.finish(requests)
        assert {request.id: gang.answers[request.id].tokens for request in requests} == expected
        gang.stop()
        for at in range(2):
            found = re.search(r"; (\d+) steps replayed", gang.ends[at, 0][1])
            assert found is not None
            assert int(found[1]) > 5
