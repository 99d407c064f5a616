"""Sharded engines, in real processes, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from parallelism.group import Symmetric, symmetric
from tests.checkpoints import oracle, tiny_gpt_oss
from tests.engines import Engine, greedy, prompts
from tests.ranks import collectives, generate
from workers.wire import Request

TIGHT = {"kv_cache_memory": 130_000, "block_size": 4, "max_model_len": 72}


def requests() -> list[Request]:
    return [
        greedy(f"r{i}", prompt, 20, temperature=0.7 * (i % 3 == 2), seed=i)
        for i, prompt in enumerate(prompts(12, longest=40, seed=1))
    ]


def assert_same(
    directory: Path, ours: dict[str, list[int]], expected: dict[str, list[int]]
) -> None:
    """Equal, or different first where the oracle itself can hardly tell."""
    for request in requests():
        mine, wanted = ours[request.id], expected[request.id]
        if mine == wanted:
            continue
        assert request.sampling.temperature == 0, f"{request.id} differs"
        at = next(i for i, (a, b) in enumerate(zip(mine, wanted, strict=True)) if a != b)
        with torch.inference_mode():
            logits = oracle(directory)(torch.tensor([request.prompt + wanted[:at]])).logits[0, -1]
        best, second = logits.topk(2).values.tolist()
        assert best - second < 1e-3, f"{request.id} differs at {at}, margin {best - second}"


@pytest.mark.parametrize("world", [2, 4])
def test_tokens_equal_those_of_one_process(world: int, tmp_path: Path) -> None:
    """EP on and off, bf16 and MXFP4 (five blocks: uneven), calm and preempting. 2 KV heads: with
    four ranks each is held twice."""
    forms = [tiny_gpt_oss(tmp_path / "bf16"), tmp_path / "mxfp4"]
    tiny_gpt_oss(forms[1], mxfp4=True, intermediate_size=160, num_local_experts=6)
    jobs: list[Any] = [
        (directory, {"enable_expert_parallel": ep} | (TIGHT if ep else {}), requests())
        for directory in forms
        for ep in (False, True)
    ]
    expected = {directory: Engine(directory).generate(requests()) for directory in forms}
    for (directory, spec, _), (tokens, load, _) in zip(jobs, generate(world, jobs), strict=True):
        assert_same(directory, tokens, expected[directory])
        assert len(load.expert_calls) == world
        assert min(load.expert_calls) > 0
        assert (load.preemptions > 0) is ("block_size" in spec)


def test_symmetric_memory_is_chosen_by_all_ranks_or_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """On stand-ins: no GPU has run it."""
    made: list[Symmetric] = [object.__new__(Symmetric)]

    def broken() -> Symmetric:
        raise RuntimeError("no NVLink")

    assert symmetric(lambda: made[0], lambda mine: mine) is made[0]
    assert not caplog.records
    asked: list[bool] = []

    def refuse(mine: bool) -> bool:
        asked.append(mine)
        return False

    assert symmetric(lambda: made[0], refuse) is None
    assert symmetric(broken, refuse) is None
    assert asked == [True, False]
    said = [record.getMessage() for record in caplog.records]
    for line, why in zip(said, ("another rank could not", "RuntimeError: no NVLink"), strict=True):
        assert why in line


def test_symmetric_memory_takes_what_fits() -> None:
    ours: Symmetric = object.__new__(Symmetric)
    ours._buffer = torch.empty(64, dtype=torch.bfloat16)
    assert ours.takes(torch.empty(8, 8, dtype=torch.bfloat16))
    assert not ours.takes(torch.empty(9, 8, dtype=torch.bfloat16))
    assert not ours.takes(torch.empty(8, 8))
    assert not ours.takes(torch.empty(3, dtype=torch.bfloat16))
    assert not ours.takes(torch.empty(8, 8, dtype=torch.bfloat16).T)


def test_four_ranks_sum_in_the_order_of_ranks() -> None:
    """An element's sum must not depend on where in the tensor it lies."""
    store = dist.TCPStore("127.0.0.1", 0, 4, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(collectives, (store.port,), nprocs=4)
