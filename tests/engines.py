"""The engine in one process, driven step by step: for tests of what it computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workers.config import ModelSpec
from workers.engine import Steps
from workers.model import Block, Decoder
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


class Watch:
    """From now on: what a rank's router chose, int64 [layers, experts], and how many pairs its
    experts computed."""

    def __init__(self, model: Decoder) -> None:
        self.chosen = torch.zeros(model.arch.num_layers, model.arch.num_experts, dtype=torch.int64)
        self.computed = 0
        for layer, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            self._listen(layer, block)

    def _listen(self, layer: int, block: Block) -> None:
        route, compute = block.ops.route, block.experts._experts

        def choosing(*args: Any) -> tuple[Tensor, Tensor]:
            ids, weights = route(*args)
            real = ids[ids >= 0].long()
            self.chosen[layer] += torch.bincount(real, minlength=self.chosen.shape[1])
            return ids, weights

        def computing(*args: Any) -> Tensor:
            slots, biases, first = args[1], args[4], args[7]
            self.computed += int(((slots >= first) & (slots < first + len(biases))).sum())
            return compute(*args)

        block.ops = replace(block.ops, route=choosing)
        block.experts._experts = computing


def greedy(id: str, prompt: Sequence[int], tokens: int, **sampling: Any) -> Request:
    how = {"temperature": 0.0, "ignore_eos": True} | sampling
    return Request(
        id=id, model="m", prompt=list(prompt), sampling=Sampling(max_tokens=tokens, **how)
    )


def prompts(count: int, vocabulary: int = 250, longest: int = 40, seed: int = 0) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=draw).tolist()
    return [torch.randint(0, vocabulary, (n,), generator=draw).tolist() for n in lengths]
