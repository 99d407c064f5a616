"""What everything must agree with: a model and a ledger so naive that they are plainly right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from workers.config import KVConfig, KVGroup, SchedulerConfig
from workers.wire import Request, Sampling

U64 = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]
Key = tuple[int, bytes]
BROKEN, BROKEN_AFTER = "broken", 3  # a grammar of the fake model that goes on for so many tokens


def visible(group: KVGroup, position: int) -> list[int]:
    """Positions a query at ``position`` attends to, one by one."""
    if group.kind == "full":
        return list(range(position + 1))
    if group.kind == "window":
        return [p for p in range(position + 1) if p > position - group.size]
    return [p for p in range(position + 1) if p // group.size == position // group.size]


def mask(group: KVGroup, queries: U64, keys: U64) -> Mask:
    """The same as a matrix [queries, keys]."""
    q, k = queries[:, None].astype(np.int64), keys[None, :].astype(np.int64)
    seen: Mask = k <= q
    if group.kind == "window":
        seen &= k > q - group.size
    elif group.kind == "chunk":
        seen &= k // group.size == q // group.size
    return seen


def mix(x: U64) -> U64:
    """The splitmix64 finaliser: every input bit changes every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def embed(tokens: U64, positions: U64) -> U64:
    return mix(tokens * np.uint64(0x9E3779B97F4A7C15) + positions + np.uint64(1))


def layers(groups: Sequence[KVGroup]) -> list[int]:
    """The group of each layer of the fake model: two rounds, so that KV depends on context."""
    return [*range(len(groups)), *range(len(groups))]


def attend(hidden: U64, keys: U64, positions: U64, seen: Mask) -> U64:
    """Order-sensitive "attention": hidden [Q], keys and positions [K], seen [Q, K]."""
    weights = keys * (positions * np.uint64(2) + np.uint64(1))
    return mix(hidden + np.where(seen, weights, np.uint64(0)).sum(axis=1, dtype=np.uint64))


def sample(hidden: int, sampling: Sampling, choice: int, position: int, vocab: int) -> int:
    """The token at ``position``: greedy, or with noise from (seed, choice, position) only."""
    noise = (sampling.seed * 1_000_003 + choice * 101 + position) if sampling.temperature else 0
    return int(mix(np.array([(hidden + noise * 0x9E3779B97F4A7C15) % 2**64], np.uint64))[0]) % vocab


def next_token(
    tokens: Sequence[int], groups: Sequence[KVGroup], sampling: Sampling, choice: int, vocab: int
) -> int:
    """The fake model over the whole history: no cache, no blocks, no batch."""
    positions = np.arange(len(tokens), dtype=np.uint64)
    hidden = embed(np.array(tokens, np.uint64), positions)
    for layer, g in enumerate(layers(groups)):
        keys = mix(hidden + np.uint64(layer))
        hidden = attend(hidden, keys, positions, mask(groups[g], positions, positions))
    return sample(int(hidden[-1]), sampling, choice, len(tokens), vocab)


def generate(
    request: Request, config: SchedulerConfig, groups: Sequence[KVGroup], vocab: int
) -> tuple[list[int], str, int | None]:
    """All generated tokens (``emitted`` included), why it ends, and the stop token if one did."""
    sampling = request.sampling
    stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else config.eos_token_ids)}
    least = 0 if request.grammar else sampling.min_tokens  # the mask is what keeps stops away
    generated: list[int] = []
    while True:
        if request.grammar == BROKEN and len(generated) == BROKEN_AFTER:
            return generated, "refused", None
        tokens = [*request.prompt, *generated]
        generated.append(next_token(tokens, groups, sampling, request.choice, vocab))
        if generated[-1] in stops and len(generated) > least:
            return generated, "stop", generated[-1]
        if len(generated) == sampling.max_tokens or len(tokens) + 1 == config.max_model_len:
            return generated, "length", None


class NaiveTable:
    def __init__(self, num_groups: int) -> None:
        self.pages: list[dict[int, int]] = [{} for _ in range(num_groups)]  # page -> block
        self.end = 0


class NaiveLedger:
    """The block pool in plain lists: every question is answered by looking at everything."""

    def __init__(self, config: KVConfig) -> None:
        self.config = config
        self.groups = config.groups
        self.free = list(range(config.num_blocks))  # in eviction order
        self.parked: list[list[int]] = []
        self.keys: dict[int, Key] = {}
        self.tables: list[NaiveTable] = []

    def references(self, block: int) -> int:
        return sum(block in pages.values() for table in self.tables for pages in table.pages)

    def needed_pages(self, group: KVGroup, position: int) -> set[int]:
        """Pages that a query at ``position`` sees behind itself."""
        return {p // self.config.block_size for p in visible(group, position) if p != position}

    def match(self, hashes: Sequence[bytes], num_tokens: int) -> int:
        known = set(self.keys.values())
        for pages in range(len(hashes), 0, -1):
            tokens = pages * self.config.block_size
            if tokens < num_tokens and all(
                (g, hashes[page]) in known
                for g, group in enumerate(self.groups)
                for page in self.needed_pages(group, tokens)
            ):
                return pages
        return 0

    def adopt(self, hashes: Sequence[bytes], pages: int) -> NaiveTable:
        table = NaiveTable(len(self.groups))
        table.end = pages
        blocks = {key: block for block, key in self.keys.items()}
        for g, group in enumerate(self.groups):
            for page in sorted(self.needed_pages(group, pages * self.config.block_size)):
                block = table.pages[g][page] = blocks[g, hashes[page]]
                for place in (self.free, *self.parked):
                    if block in place:
                        place.remove(block)
        self.tables.append(table)
        return table

    def trim(self, table: NaiveTable, position: int) -> None:
        for g, group in enumerate(self.groups):
            seen = {p // self.config.block_size for p in visible(group, position)}
            for page in sorted(table.pages[g], reverse=True):
                if page not in seen:
                    self._drop(table.pages[g].pop(page))

    def extend(self, table: NaiveTable, num_tokens: int) -> None:
        end = max(table.end, -(-num_tokens // self.config.block_size))
        for pages in table.pages:
            for page in range(table.end, end):
                block = pages[page] = self.free.pop(0)
                self.keys.pop(block, None)
        table.end = end

    def release(self, table: NaiveTable) -> None:
        for pages in table.pages:
            for page in sorted(pages, reverse=True):
                self._drop(pages.pop(page))
        self.tables.remove(table)

    def publish(self, group: int, block: int, digest: bytes) -> None:
        if block not in self.keys and (group, digest) not in self.keys.values():
            self.keys[block] = (group, digest)

    def open_step(self) -> None:
        self.parked.append([])

    def close_step(self) -> None:
        for block in self.parked.pop(0):
            self._free(block)

    def _drop(self, block: int) -> None:
        if self.references(block):
            return
        if self.parked:
            self.parked[-1].append(block)
        else:
            self._free(block)

    def _free(self, block: int) -> None:
        self.free.insert(len(self.free) if block in self.keys else 0, block)


def peak_blocks(config: KVConfig, num_tokens: int) -> int:
    """Most blocks a lone sequence holds on its way to ``num_tokens``, counted query by query."""
    size = config.block_size
    return sum(
        max(len({p // size for p in visible(group, q)}) for q in range(num_tokens))
        for group in config.groups
    )
