"""Runs steps on one rank: from a Batch to the model's inputs, and from logits to tokens.

A step is laid out on the host (``prepare``), sent in one copy, and computed on the device without
the host waiting for anything (``compute``), so that the next one can be planned and launched
meanwhile. Where the device has graphs, steps that only decode are padded to the next size of a
ladder and replayed; what a graph depends on beyond that size is ``Plan.key``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.dispatch import Plan
from kernels.reference import Rows
from parallelism.exchange import STATIC
from parallelism.experts import Experts
from parallelism.layers import Place
from workers.config import KVGroup, SchedulerConfig
from workers.device import Device
from workers.grammar import ANYTHING, Grammars, Walk
from workers.kvcache import KVCache
from workers.model import Decoder
from workers.sampler import Sampler, read_logprobs
from workers.wire import Batch, Join, Logprobs, Sampling, StepResult

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Step:
    """A step's inputs on the device: T tokens, S of which are followed by a new one."""

    tokens: Tensor  # int64 [T]; -1: the one last sampled in the slot
    slots: Tensor  # int64 [T] of each token's sequence
    positions: Tensor  # int64 [T]
    last: Tensor  # int64 [S]
    plans: Sequence[Plan]  # by KV group


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on its way."""

    step: int
    tokens: Callable[[], Tensor]  # int64 [S]
    logprobs: Callable[[], dict[int, Logprobs]] | None = None  # where rows ask; rank 0 only
    walks: Sequence[tuple[int, Walk]] = ()  # rows that follow a grammar


def ladder(most: int) -> list[int]:
    """Batch sizes of captured decode steps: powers of two up to 32, then multiples of 32."""
    sizes = [1 << i for i in range(6)] + [*range(64, most + 1, 32)]
    return [size for size in sizes if size < most] + [most]


def inputs_bytes(config: SchedulerConfig) -> int:
    """More than enough for all that a step puts on the device: a few numbers for every token and
    row, in every KV group."""
    return 256 * (config.max_num_batched_tokens + config.max_num_seqs) + (64 << 10)


class Runner:
    """Holds what steps leave behind for the next: block tables and the last token of every slot."""

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        config: SchedulerConfig,
        place: Place,
        device: Device,
        grammars: Grammars | None = None,
    ) -> None:
        self._model, self._cache, self._device = model, cache, device
        self._group, self._world, self._config = place.group, place.layout.world, config
        slots = config.max_num_seqs
        self._sampler = Sampler(slots, config.eos_token_ids, model.ops, device.send, grammars)
        self._joined = np.zeros(slots, bool)
        pages = -(-config.max_model_len // cache.config.block_size)
        tables = torch.zeros(len(cache.config.groups), slots, pages, dtype=torch.int32)
        self._tables = tables.numpy()
        # The kernels' own copy, which on a CPU is the same memory.
        self._resident = tables.to(cache.arena.device)
        self._last = torch.zeros(slots, dtype=torch.int64, device=cache.arena.device)
        self._graphs: dict[Hashable, Callable[[], None]] = {}
        self._logits: Tensor | None = None  # of the graphs
        self._experts = [m.slots for m in model.modules() if isinstance(m, Experts)]  # by layer
        most = max(map(len, self._experts))
        # (token, expert) pairs since the start, by slot; the last column is padding's.
        self._calls = torch.zeros(
            len(self._experts), most + 1, dtype=torch.int64, device=cache.arena.device
        )
        if place.layout.dp > 1:
            slots = min(slots, STATIC)  # beyond, the host waits for how many rows there are
        self._ladder = ladder(slots) if device.graphs else []

    @property
    def ahead(self) -> int:
        """How many steps may be launched before the first one is collected."""
        return self._device.ahead

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Launched:
        self._enter(batch)
        if batch.round is not None:
            most = max(batch.round.tokens)
            self._model.exchange.begin(self._size(most) or most, batch.round.number)
            if not len(batch):
                self._model.assist()
        if not len(batch):
            return Launched(batch.step, lambda: self._last[:0])
        slots, starts, counts, _, samples = _columns(batch)
        step = self.prepare(batch)
        # A key that start-up did not think of is computed as it is: capturing takes a pause.
        replay = self._graphs.get(_key(step)) if self._padded(batch, counts, samples) else None
        if replay is None:
            logits = self.compute(step)
        else:
            replay()
            assert self._logits is not None
            logits = self._logits
        seats = slots[samples]
        chosen = self._choose(logits[: len(seats)], seats, (starts + counts)[samples])
        self._last[self._device.send(torch.from_numpy(seats))] = chosen
        mine = self._group.rank == 0
        return Launched(
            batch.step,
            self._device.fetch(chosen),
            self._fetch_logprobs(logits[: len(seats)], seats, chosen) if mine else None,
            self._sampler.walks(seats),
        )

    def _fetch_logprobs(
        self, logits: Tensor, slots: Ints, tokens: Tensor
    ) -> Callable[[], dict[int, Logprobs]] | None:
        found = self._sampler.logprobs(logits, slots, tokens)
        if found is None:
            return None
        rows, wanted, table = found
        fetched = self._device.fetch(table)
        return lambda: read_logprobs(rows, wanted, fetched())

    def collect(self, launched: Launched) -> StepResult:
        tokens, errors = launched.tokens().tolist(), {}
        for row, walk in launched.walks:
            walk.advance([tokens[row]])
            if walk.error:
                errors[row] = walk.error
        logprobs = launched.logprobs() if launched.logprobs is not None else {}
        return StepResult(launched.step, tokens, logprobs=logprobs, errors=errors)

    def expert_calls(self) -> Callable[[], tuple[list[list[int]], list[list[int]]]]:
        """(token, expert) pairs since the start, [layers][experts] and [layers][ranks]. Starts
        copying them; the call waits for it."""
        fetched = self._device.fetch(self._calls)

        def read() -> tuple[list[list[int]], list[list[int]]]:
            counted: list[list[int]] = fetched()[:, :-1].tolist()
            layers = zip(self._experts, counted, strict=True)
            folded = [slots.fold(pairs) for slots, pairs in layers]
            # Where experts are cut, every rank computes its part of every pair.
            times = self._world // len(self._experts[0].held)
            return [calls for calls, _ in folded], [by_rank * times for _, by_rank in folded]

        return read

    def prepare(self, batch: Batch) -> Step:
        """A step's inputs, sent to the device."""
        slots, starts, counts, given, samples = _columns(batch)
        assert self._joined[slots].all(), f"step {batch.step} names a slot that nobody joined"
        assert (counts[~given] == 1).all(), f"step {batch.step} continues by more than one token"
        ends = counts.cumsum()
        positions = np.arange(ends[-1]) + np.repeat(starts - ends + counts, counts)
        tokens = np.full(ends[-1], -1)
        tokens[np.repeat(given, counts)] = np.frombuffer(batch.tokens, np.int32)
        last, padding = ends[samples] - 1, 0
        if size := self._padded(batch, counts, samples):
            last, padding = np.arange(size), size - len(slots)
        columns = [slots, starts, counts, tokens, np.repeat(slots, counts), positions]
        return self._send(last, *(np.pad(column, (0, padding)) for column in columns))

    def _send(
        self,
        last: Ints,
        slots: Ints,
        starts: Ints,
        counts: Ints,
        tokens: Ints,
        token_slots: Ints,
        positions: Ints,
    ) -> Step:
        """Columns of R rows, then of T tokens; rows of no tokens and tokens of no row, both at the
        end, are padding."""
        put, config = self._device.put, self._cache.config
        # Without graphs, plans may be of any size and need no fixed address.
        put_plan = put if self._device.graphs else self._device.send

        def plan(group: KVGroup, tables: npt.NDArray[np.int32], resident: Tensor) -> Plan:
            rows = Rows(
                starts=torch.from_numpy(starts),
                counts=torch.from_numpy(counts),
                lines=torch.from_numpy(slots),
                tables=torch.from_numpy(tables),
                resident=resident,
                tokens=len(tokens),
                block_size=config.block_size,
                zero_block=self._cache.zero_block,
                window=group.size if group.kind == "window" else 0,
                chunk=group.size if group.kind == "chunk" else 0,
            )
            return self._model.ops.plan(rows, put_plan)

        step = Step(
            tokens=put(torch.from_numpy(tokens)),
            slots=put(torch.from_numpy(token_slots)),
            positions=put(torch.from_numpy(positions)),
            last=put(torch.from_numpy(last)),
            plans=[
                plan(*group)
                for group in zip(config.groups, self._tables, self._resident, strict=True)
            ],
        )
        self._device.flush()
        return step

    def compute(self, step: Step) -> Tensor:
        """Logits [S, vocabulary] on the device, where the tokens of every slot are counted."""
        tokens = torch.where(step.tokens < 0, self._last[step.slots], step.tokens)
        logits: Tensor
        logits, routed = self._model(tokens, step.positions, step.plans, self._cache, step.last)
        slots = routed.flatten(1).long()
        slots = torch.where(slots < 0, self._calls.shape[1] - 1, slots)  # padding
        self._calls.scatter_add_(1, slots, torch.ones_like(slots))
        return logits

    @torch.inference_mode()
    def capture(self) -> int:
        """Record the decode steps that may come, if the device has graphs; how many."""
        longest = self._config.max_model_len
        # From the largest on, so that smaller ones find memory that it has left.
        for size in reversed(self._ladder):
            for length in [longest, *(1 << i for i in range(longest.bit_length()))]:
                step = self._padding(size, length)
                self._model.exchange.begin(size)
                if self._logits is None:
                    self._logits = self.compute(step)
                if _key(step) not in self._graphs:
                    self._graphs[_key(step)] = self._device.capture(partial(self._record, step))
        return len(self._graphs)

    def _record(self, step: Step) -> None:
        """Compute a step into the logits that all graphs share: they are large, graphs many."""
        assert self._logits is not None
        logits = self.compute(step)
        self._logits.narrow(0, 0, len(logits)).copy_(logits)

    def _padding(self, size: int, length: int) -> Step:
        """A decode step of nothing but padding, laid out for sequences of ``length`` tokens."""
        none = np.zeros(size, np.int64)
        starts = np.full(size, length - 1)
        return self._send(np.arange(size), none, starts, none, none, none, none)

    @torch.inference_mode()
    def rehearse(self, tokens: int) -> None:
        """Compute the largest steps there can be, of empty sequences, with all that sampling may
        ask for: for who measures memory."""
        how = Sampling(
            max_tokens=1, min_tokens=1, repetition_penalty=2.0, logit_bias={0: 1.0}, logprobs=20
        )
        for slot in range(self._config.max_num_seqs):
            self._sampler.join(Join(slot, how, 0, 0, grammar=ANYTHING))
        self.compute(self._padding(self._config.max_num_seqs, self._config.max_model_len))
        rows = min(self._config.max_num_seqs, tokens)
        counts = np.full(rows, tokens // rows)
        counts[: tokens % rows] += 1
        slots, starts = np.arange(rows), np.zeros(rows, np.int64)
        ends = counts.cumsum()
        positions = np.arange(tokens) - np.repeat(ends - counts, counts)
        token_slots = np.repeat(slots, counts)
        step = self._send(ends - 1, slots, starts, counts, token_slots * 0, token_slots, positions)
        logits = self.compute(step)
        self._sampler.logprobs(logits, slots, self._sampler(logits, slots, ends))

    def _size(self, tokens: int) -> int:
        """The least size of a captured step that holds so many; 0 if there is none."""
        return next((size for size in self._ladder if size >= tokens), 0)

    def _padded(self, batch: Batch, counts: Ints, samples: Bools) -> int:
        """The size that a step of a kind that graphs exist for is padded to, of all engines the
        same; 0 for other steps."""
        if not self._ladder or not bool((counts == 1).all() and samples.all()):
            return 0
        return self._size(len(counts) if batch.round is None else max(batch.round.tokens))

    def _enter(self, batch: Batch) -> None:
        """What the step brings: sequences for slots, blocks for tables."""
        for join in batch.joins:
            self._joined[join.slot] = True
            self._sampler.join(join)
        changed = []
        for table in batch.tables:
            end = table.first + len(table.blocks)
            self._tables[table.group, table.slot, table.first : end] = table.blocks
            line = (table.group * self._tables.shape[1] + table.slot) * self._tables.shape[2]
            changed.append(np.arange(line + table.first, line + end))
        if changed and self._resident.device.type != "cpu":
            # As the host has them now: a slot may have changed hands within the step.
            at = np.concatenate(changed)
            send = self._device.send
            blocks = torch.from_numpy(self._tables.reshape(-1)[at])
            self._resident.view(-1).index_copy_(0, send(torch.from_numpy(at)), send(blocks))

    def _choose(self, logits: Tensor, slots: Ints, positions: Ints) -> Tensor:
        """Rank 0 samples; every rank learns the tokens, since the next step starts from them."""
        if self._group.rank == 0:
            tokens = self._sampler(logits, slots, positions)
        else:
            tokens = torch.empty(len(slots), dtype=torch.int64, device=logits.device)
        return self._group.broadcast(tokens, 0) if len(slots) else tokens


def _key(step: Step) -> Hashable:
    """What a graph of the step depends on."""
    return (len(step.tokens), *(plan.key for plan in step.plans))


def _columns(batch: Batch) -> tuple[Ints, Ints, Ints, Bools, Bools]:
    """Slots, starts, counts, given and samples of the rows."""
    slots, starts, counts = (
        np.frombuffer(column, np.int32).astype(np.int64)
        for column in (batch.slots, batch.starts, batch.counts)
    )
    given, samples = (
        np.frombuffer(column, np.uint8).astype(bool) for column in (batch.given, batch.samples)
    )
    return slots, starts, counts, given, samples
