"""A request on its way through one engine, and the steps it takes part in. Pure."""

from __future__ import annotations

from collections.abc import Sequence as List
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from workers.blocks import BlockPool, PageTable, prefix_hashes
from workers.config import SchedulerConfig
from workers.wire import Batch, FinishReason, Join, Request, Sampling, Table

Columns = npt.NDArray[np.int32]
Rows = npt.NDArray[np.intp]


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's progress in one engine. ``tokens`` are all that are known, the prompt first."""

    id: str
    epoch: int
    order: tuple[int, int]  # priority, arrival: who goes first
    sampling: Sampling
    choice: int
    prompt: int  # tokens
    tokens: list[int]
    limit: int  # tokens at which it ends
    stops: frozenset[int]
    waits: set[str]
    root: bytes  # of its prefix hashes
    hashes: list[bytes]  # of its full pages, as far as they are known
    grammar: str
    slot: int = -1  # -1: not running
    table: PageTable | None = None  # while running
    barrier: int = 0  # the last step that may hold a row of its earlier life
    admitted: bool = False  # ever
    cached: int = 0  # prompt tokens found in the prefix cache, until reported
    done: bool = False

    @classmethod
    def of(cls, request: Request, arrival: int, config: SchedulerConfig, root: bytes) -> Sequence:
        sampling, prompt = request.sampling, len(request.prompt)
        eos = () if sampling.ignore_eos else config.eos_token_ids
        return cls(
            id=request.id,
            epoch=request.epoch,
            order=(request.priority, arrival),
            sampling=sampling,
            choice=request.choice,
            prompt=prompt,
            tokens=[*request.prompt, *request.emitted],
            limit=min(prompt + sampling.max_tokens, config.max_model_len),
            stops=frozenset((*eos, *sampling.stop_token_ids)),
            waits=set(request.waits),
            root=root,
            hashes=list(request.hashes),
            grammar=request.grammar,
        )

    def refusal(self, config: SchedulerConfig, pool: BlockPool) -> str | None:
        """Why this can never be served, with the numbers; None if it can."""
        max_tokens = self.sampling.max_tokens
        how = self.sampling
        if how.logprobs is not None and how.logprobs < 0:
            return f"logprobs must be at least 0, not {how.logprobs}"
        if how.repetition_penalty <= 0 or not 0 <= how.min_p <= 1:
            return (
                "needs repetition_penalty above 0 and min_p from 0 to 1, not "
                f"{how.repetition_penalty} and {how.min_p}"
            )
        if not self.prompt or max_tokens < 1:
            return f"needs a prompt and max_tokens >= 1, got {self.prompt} tokens and {max_tokens}"
        if self.prompt >= config.max_model_len:
            return (
                f"the prompt has {self.prompt} tokens and the model length is "
                f"{config.max_model_len}: no room for an answer; shorten the prompt or raise "
                "--max-model-len"
            )
        needed = pool.blocks_needed(self.limit - 1)  # the last token is sampled, never computed
        if needed > pool.num_blocks:
            return (
                f"{self.prompt} prompt tokens and max_tokens {max_tokens} need {needed} KV blocks, "
                f"the pool has {pool.num_blocks}: ask for fewer tokens or raise --kv-cache-memory"
            )
        return None

    def ended(self) -> FinishReason | None:
        """Why the last known token ends the sequence, if it does.

        A stop token counts once ``min_tokens`` others have been generated before it; where there is
        a grammar, it comes sooner only if nothing else may.
        """
        generated = len(self.tokens) - self.prompt
        least = 0 if self.grammar else self.sampling.min_tokens
        if generated > least and self.tokens[-1] in self.stops:
            return "stop"
        return "length" if len(self.tokens) >= self.limit else None

    def hash_pages(self, pages: int, block_size: int) -> list[bytes]:
        """Hashes of at least the first ``pages`` pages."""
        known = len(self.hashes)
        if known < pages:
            tokens = self.tokens[known * block_size : pages * block_size]
            root = self.hashes[-1] if known else self.root
            self.hashes += prefix_hashes(root, tokens, block_size)
        return self.hashes


@dataclass(slots=True, eq=False)
class Chunk:
    """Known tokens of one sequence that a step computes: positions [start, stop)."""

    seq: Sequence
    start: int
    stop: int

    @property
    def samples(self) -> bool:
        return self.stop == len(self.seq.tokens)


@dataclass(slots=True, eq=False)
class Step:
    """A planned step that has not been committed."""

    number: int
    sampling: list[Sequence] = field(default_factory=list)  # of the sampling rows, in row order
    # Pages the step fills: sequence, number of the first, and by group their blocks.
    full_pages: list[tuple[Sequence, int, list[list[int]]]] = field(default_factory=list)

    def fill(self, seq: Sequence, start: int, stop: int, block_size: int) -> None:
        """Note the pages that positions [start, stop) fill, to be published at the commit.

        By then the sequence may have left them, or be gone.
        """
        first, end, table = start // block_size, stop // block_size, seq.table
        assert table is not None
        if end > first:
            # Counted from the end: groups hold different numbers of pages before it.
            last = table.end
            blocks = [
                held[len(held) - last + first : len(held) - last + end] for held in table.blocks
            ]
            self.full_pages.append((seq, first, blocks))

    def batch(
        self,
        rows: Rows,
        starts: Columns,
        chunks: List[Chunk],
        joins: list[Join],
        tables: list[Table],
    ) -> Batch:
        """The step as the ranks see it: decoding rows by slot and start, then chunks."""
        batch = Batch(
            self.number,
            slots=rows.astype(np.int32).tobytes(),
            starts=starts.tobytes(),
            counts=np.ones(len(rows), np.int32).tobytes(),
            given=bytes(len(rows)),
            samples=b"\1" * len(rows),
            joins=joins,
            tables=tables,
        )
        if chunks:
            columns = [(chunk.seq.slot, chunk.start, chunk.stop - chunk.start) for chunk in chunks]
            slots, begins, counts = np.array(columns, np.int32).T
            tokens = [t for chunk in chunks for t in chunk.seq.tokens[chunk.start : chunk.stop]]
            batch.slots += slots.tobytes()
            batch.starts += begins.tobytes()
            batch.counts += counts.tobytes()
            batch.given += b"\1" * len(chunks)
            batch.samples += bytes(chunk.samples for chunk in chunks)
            batch.tokens = np.array(tokens, np.int32).tobytes()
        return batch
