"""Runs steps on one rank: from a Batch to the model's inputs, and from logits to tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.reference import Rows
from parallelism.layers import Place
from workers.config import SchedulerConfig
from workers.kvcache import KVCache
from workers.model import Decoder
from workers.sampler import Sampler
from workers.wire import Batch, StepResult


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on its way."""

    step: int
    tokens: Tensor  # int64 [S]
    experts: Tensor | None  # int64 [layers, T, k]; rank 0 only


class Runner:
    """Holds what steps leave behind for the next: block tables and the last token of every slot."""

    def __init__(
        self, model: Decoder, cache: KVCache, config: SchedulerConfig, place: Place
    ) -> None:
        self._model, self._cache = model, cache
        self._group, self._layout = place.group, place.layout
        self._sampler = Sampler(config.max_num_seqs, config.eos_token_ids)
        self._joined = np.zeros(config.max_num_seqs, bool)
        self._tables = np.zeros((len(cache.config.groups), config.max_num_seqs, 8), np.int32)
        self._last = torch.zeros(config.max_num_seqs, dtype=torch.int64, device=cache.arena.device)

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Launched:
        self._enter(batch)
        device = self._last.device
        if not len(batch):
            return Launched(batch.step, self._last[:0], None)
        slots = np.frombuffer(batch.slots, np.int32).astype(np.int64)
        starts = np.frombuffer(batch.starts, np.int32).astype(np.int64)
        counts = np.frombuffer(batch.counts, np.int32).astype(np.int64)
        given = np.frombuffer(batch.given, np.uint8).astype(bool)
        samples = np.frombuffer(batch.samples, np.uint8).astype(bool)
        assert self._joined[slots].all(), f"step {batch.step} names a slot that nobody joined"
        assert (counts[~given] == 1).all(), f"step {batch.step} continues by more than one token"
        ends = counts.cumsum()
        positions = np.arange(ends[-1]) + np.repeat(starts - ends + counts, counts)
        tokens = torch.from_numpy(np.repeat(slots, counts)).to(device)
        tokens = self._last.index_select(0, tokens)
        if given.any():
            ids = torch.from_numpy(np.frombuffer(batch.tokens, np.int32).astype(np.int64))
            tokens[torch.from_numpy(np.repeat(given, counts)).to(device)] = ids.to(device)
        plans = [
            self._model.ops.plan(
                Rows(
                    torch.from_numpy(starts),
                    torch.from_numpy(counts),
                    torch.from_numpy(tables[slots].astype(np.int64)),
                    self._cache.config.block_size,
                    self._cache.zero_block,
                    **({group.kind: group.size} if group.size else {}),
                ),
                device,
            )
            for group, tables in zip(self._cache.config.groups, self._tables, strict=True)
        ]
        last = torch.from_numpy(ends[samples] - 1).to(device)
        logits, experts = self._model(
            tokens, torch.from_numpy(positions).to(device), plans, self._cache, last
        )
        chosen = self._choose(logits, slots[samples], (starts + counts)[samples])
        self._last[torch.from_numpy(slots[samples]).to(device)] = chosen
        return Launched(batch.step, chosen, experts if self._group.rank == 0 else None)

    def collect(self, launched: Launched) -> StepResult:
        calls: list[int] = []
        if launched.experts is not None:
            hit = torch.bincount(launched.experts.flatten(), minlength=self._model.arch.num_experts)
            calls = self._layout.calls_by_rank(hit.tolist())
        return StepResult(launched.step, launched.tokens.tolist(), expert_calls=calls)

    def _enter(self, batch: Batch) -> None:
        for join in batch.joins:
            self._joined[join.slot] = True
            self._sampler.join(join)
        for table in batch.tables:
            end = table.first + len(table.blocks)
            if end > self._tables.shape[2]:
                grown = max(end, 2 * self._tables.shape[2]) - self._tables.shape[2]
                self._tables = np.pad(self._tables, ((0, 0), (0, 0), (0, grown)))
            self._tables[table.group, table.slot, table.first : end] = table.blocks

    def _choose(self, logits: Tensor, slots: np.ndarray, positions: np.ndarray) -> Tensor:
        """Rank 0 samples; every rank learns the tokens, since the next step starts from them."""
        if self._group.rank == 0:
            tokens = self._sampler(logits, slots, positions)
        else:
            tokens = torch.empty(len(slots), dtype=torch.int64, device=logits.device)
        return self._group.broadcast(tokens, 0) if len(slots) else tokens
