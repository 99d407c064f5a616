"""Real ranks: one process each, over gloo, for tests."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import distributed as dist

from parallelism.group import Group
from tests.engines import Engine
from workers.wire import Load, Logprobs, Request

PATIENCE = 300.0  # seconds for a job; every rank must import torch first

Job = tuple[Path, dict[str, Any], Sequence[Request]]
Answer = tuple[dict[str, list[int]], Load, dict[str, list[Logprobs]]]


def generate(world: int, jobs: Sequence[Job]) -> list[Answer]:
    """Run every job on ``world`` ranks; rank 0's tokens, load and log probabilities. All ranks plan
    alike here."""
    context = mp.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)
    ours, theirs = context.Pipe()
    processes = [
        context.Process(target=_rank, args=(rank, world, store.port, jobs, theirs))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    theirs.close()
    try:
        answers = []
        for _ in jobs:
            assert ours.poll(PATIENCE), f"no answer within {PATIENCE:.0f} s"
            answers.append(ours.recv())
        for process in processes:
            process.join(PATIENCE)
            assert process.exitcode == 0, f"a rank ended with {process.exitcode}"
        return answers
    finally:
        ours.close()
        for process in processes:
            process.kill()
            process.join()


def _rank(rank: int, world: int, port: int, jobs: Sequence[Job], answers: Connection) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.TCPStore("127.0.0.1", port, world, is_master=False)
        for number, (directory, spec, requests) in enumerate(jobs):
            prefix = dist.PrefixStore(f"job {number}", store)
            engine = Engine(directory, rank, prefix, tensor_parallel_size=world, **spec)
            tokens = engine.generate(requests)
            if rank == 0:
                load = engine.scheduler.load()
                _, by_rank = engine.runner.expert_calls()()
                load.expert_calls = [sum(layers) for layers in zip(*by_rank, strict=True)]
                answers.send((tokens, load, engine.logprobs))
            engine.leave()
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None


def collectives(rank: int, port: int) -> None:
    """One of four ranks; a float's sum shows the order in which it was made."""
    group = Group(rank, 4)
    group.join(dist.TCPStore("127.0.0.1", port, 4, is_master=False), torch.device("cpu"))
    values = torch.tensor([1e8, 1.0, -1e8, 1.0])
    many, one = values[rank].repeat(1000), values[rank].repeat(1)
    assert group.all_reduce(many).unique().tolist() == group.all_reduce(one).tolist() == [1.0]
    parts = group.gather(one * rank)
    assert len(parts) == (4 if rank == 0 else 0)
    assert group.broadcast(torch.tensor([rank]), 3).item() == 3
    group.leave()
