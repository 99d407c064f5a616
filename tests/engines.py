"""The engine in one process, driven step by step: for tests of what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from workers.config import ModelSpec
from workers.engine import Steps
from workers.rank import Rank
from workers.runner import Runner
from workers.scheduler import Scheduler
from workers.wire import Logprobs, Output, Request, Sampling


class Engine:
    """One rank, its scheduler and its runner."""

    def __init__(self, directory: Path, rank: int = 0, store: Any = None, **spec: Any) -> None:
        defaults: dict[str, Any] = {
            "device": "cpu",
            "dtype": "float32",
            "kv_cache_memory": 4 << 20,
        }
        self.spec = ModelSpec(model=str(directory), **(defaults | spec))
        self.rank = Rank(self.spec, rank)
        self.report = self.rank.load(store)
        self.plan = self.rank.plan(self.report.free_bytes)
        self.runner: Runner = self.rank.allocate(self.plan)
        self.model = self.runner._model
        self.scheduler: Scheduler = self.rank.scheduler(self.plan)
        self.logprobs: dict[str, list[Logprobs]] = {}  # what the last ``generate`` has given

    def generate(self, requests: Sequence[Request]) -> dict[str, list[int]]:
        """Run all requests, sent at once; tokens by id."""
        tokens: dict[str, list[int]] = {request.id: list(request.emitted) for request in requests}
        self.logprobs = {request.id: [] for request in requests}
        for request in requests:
            for output in self.scheduler.add(request, 0.0):
                raise ValueError(output.detail)
        steps = Steps(self.scheduler, self.runner)
        while self.scheduler.has_work():
            for output in steps.next():
                assert output.offset == len(tokens[output.id]), "a gap or a repeat"
                tokens[output.id] += output.tokens
                self.logprobs[output.id] += output.logprobs or ()
        self.scheduler.check()
        return tokens

    def leave(self) -> None:
        """End the group of ranks."""
        assert self.rank._place is not None
        self.rank._place.group.leave()

    def slots(self) -> dict[int, str]:
        """Which request is in which slot."""
        return {at: seq.id for at, seq in enumerate(self.scheduler._slots) if seq}

    def step(self) -> list[Output]:
        batch = self.scheduler.plan(0.0)
        result = self.runner.collect(self.runner.launch(batch))
        return self.scheduler.commit(batch, result, 0.0)


def greedy(id: str, prompt: Sequence[int], tokens: int, **sampling: Any) -> Request:
    how = {"temperature": 0.0, "ignore_eos": True} | sampling
    return Request(
        id=id, model="m", prompt=list(prompt), sampling=Sampling(max_tokens=tokens, **how)
    )


def prompts(count: int, vocabulary: int = 250, longest: int = 40, seed: int = 0) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=draw).tolist()
    return [torch.randint(0, vocabulary, (n,), generator=draw).tolist() for n in lengths]
