"""Stand-ins for what tests have no need of. Importable, so that other processes can use them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tests.oracle import BROKEN, BROKEN_AFTER, U64, attend, embed, layers, mask, mix, sample
from workers.config import KVConfig, SchedulerConfig
from workers.device import Staging
from workers.wire import Batch, Join, Logprobs, StepResult

Ints = npt.NDArray[np.int64]


class Replaying:
    """A device with graphs, on a CPU: what was recorded is computed again from the very tensors it
    was recorded with. What a step leaves elsewhere is lost, as it is on a GPU."""

    graphs = True
    ahead = 2

    def __init__(self, size: int) -> None:
        self._staging = Staging(size, torch.device("cpu"), pinned=False)
        self.put = self._staging.put
        self.captured = self.replayed = 0

    def flush(self) -> None:
        self._staging.flush()

    def send(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def fetch(self, tensor: Tensor) -> Callable[[], Tensor]:
        copy = tensor.clone()
        return lambda: copy

    def capture(self, compute: Callable[[], object]) -> Callable[[], None]:
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            compute()

        return replay


def fake_logprobs(token: int, position: int, most: int) -> Logprobs:
    """What a FakeRunner gives with a token."""
    likeliest = [*range(token, token + most)]
    return Logprobs(-1.0 - token - position / 1000, likeliest, [-float(i) for i in likeliest])


class FakeRunner:
    """A runner whose tokens are a hash of everything the step could see through its block tables.

    Each layer of the step first writes the cells of all rows and then reads, as a real model does:
    a wrong table, a stale page, a wrong position, or a block that two rows share within one step
    all give other tokens than ``tests.oracle.next_token``. A row under a grammar must come after
    the result that holds its last token, as no mask could be made for it before.
    """

    def __init__(self, config: SchedulerConfig, kv: KVConfig, vocab: int, ahead: int = 1) -> None:
        self.kv, self.vocab, self.ahead = kv, vocab, ahead
        pages = -(-config.max_model_len // kv.block_size)
        shape = (config.max_num_seqs, len(kv.groups), pages)
        self.tables = np.full(shape, -1, np.int64)
        self.joins: dict[int, Join] = {}
        self.last = [-1] * config.max_num_seqs  # token last sampled in each slot
        self.layers = layers(kv.groups)
        # Whatever memory holds before it is written must never matter.
        garbage = np.random.default_rng(0).integers(
            0, 2**63, (len(self.layers), kv.num_blocks, kv.block_size)
        )
        self.cells = garbage.astype(np.uint64)
        self.steps = 0
        self.walks: dict[int, list[int]] = {}  # by slot: tokens that its grammar has seen
        self._results: deque[tuple[StepResult, dict[int, list[int]]]] = deque()

    def launch(self, batch: Batch) -> int:
        """Run the step; its result waits for ``collect``."""
        self.steps += 1
        assert batch.step == self.steps, f"step {batch.step} launched as number {self.steps}"
        for join in batch.joins:
            self.joins[join.slot] = join
            self.tables[join.slot] = -1
            self.last[join.slot] = -1
            self.walks.pop(join.slot, None)
            if join.grammar:
                self.walks[join.slot] = join.tokens[join.prompt_tokens :]
        for table in batch.tables:
            held = self.tables[table.slot, table.group, table.first :][: len(table.blocks)]
            held[:] = table.blocks
        rows = list(batch.rows())
        assert len({row.slot for row in rows}) == len(rows), "a slot has two rows"
        hidden, positions = [], []
        for row in rows:
            tokens = [self.last[row.slot]] if row.tokens is None else row.tokens
            assert min(tokens) >= 0, f"slot {row.slot} continues from a token it never sampled"
            positions.append(np.arange(row.start, row.start + row.count, dtype=np.uint64))
            hidden.append(embed(np.array(tokens, np.uint64), positions[-1]))
        for layer, group in enumerate(self.layers):
            for row, x, position in zip(rows, hidden, positions, strict=True):
                self.cells[layer, *self._places(group, row.slot, position)] = mix(
                    x + np.uint64(layer)
                )
            for i, row in enumerate(rows):
                context = np.arange(row.start + row.count, dtype=np.uint64)
                seen = mask(self.kv.groups[group], positions[i], context)
                first = int(seen[0].argmax())
                context, seen = context[first:], seen[:, first:]
                keys = self.cells[layer, *self._places(group, row.slot, context)]
                hidden[i] = attend(hidden[i], keys, context, seen)
        tokens = []
        logprobs = {}
        errors: dict[int, str] = {}
        walks: dict[int, list[int]] = {}
        for row, x in zip(rows, hidden, strict=True):
            if row.sample:
                join = self.joins[row.slot]
                end = row.start + row.count
                token = sample(int(x[-1]), join.sampling, join.choice, end, self.vocab)
                self.last[row.slot] = token
                if join.sampling.logprobs is not None:
                    logprobs[len(tokens)] = fake_logprobs(token, end, join.sampling.logprobs)
                if row.slot in self.walks:
                    walk = walks[len(tokens)] = self.walks[row.slot]
                    assert len(walk) == end - join.prompt_tokens, "a token its grammar has not seen"
                    if join.grammar == BROKEN and len(walk) == BROKEN_AFTER:
                        errors[len(tokens)] = BROKEN
                tokens.append(token)
        result = StepResult(batch.step, tokens, logprobs=logprobs, errors=errors)
        self._results.append((result, walks))
        return batch.step

    def _places(self, group: int, slot: int, positions: U64) -> tuple[Ints, Ints]:
        """Block and offset of each position, through the slot's table."""
        pages, offsets = np.divmod(positions.astype(np.int64), self.kv.block_size)
        blocks = self.tables[slot, group, pages]
        assert (blocks >= 0).all(), f"slot {slot} reads a page of group {group} it was never given"
        return blocks, offsets

    def collect(self, handle: int) -> StepResult:
        result, walks = self._results.popleft()
        assert result.step == handle, "steps are collected in order"
        for row, walk in walks.items():
            walk.append(result.tokens[row])
        return result

    def expert_calls(self) -> Callable[[], tuple[list[list[int]], list[list[int]]]]:
        """One layer, two experts on two ranks; each step is one pair, of the first."""
        calls = [[self.steps, 0]]
        return lambda: (calls, calls)
