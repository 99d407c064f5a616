"""The ledger of KV blocks: who holds which, what may be reused, what the prefix cache knows. Pure.

A sequence's tokens lie in *pages* of ``block_size`` positions. Every KV group backs a page with a
*block* of its own, taken from the one pool that all groups share. ``full`` groups keep every page;
``window`` and ``chunk`` groups give a page back as soon as no later query can see it.

A block is in exactly one state: *used* (references > 0), *parked* (freed, but a planned step may
still touch it) or *free*. A free block that holds a known prefix stays in the prefix cache until it
is taken: the free list is the eviction queue, blank blocks at its head and the most recently freed
prefix at its tail.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from workers.config import KVConfig, KVGroup

DIGEST_SIZE = 16  # bytes: without comparing tokens, 64 bits would serve strangers' KV one day
PARKED = -1

Undo = list[tuple[Callable[..., object], tuple[Any, ...]]]


def prefix_root(revision: str, kv_dtype: str, adapter: str = "", salt: str = "") -> bytes:
    """Start of a hash chain: KV is shared only between requests that agree on all of these."""
    seed = hashlib.blake2b(digest_size=DIGEST_SIZE)
    for part in (revision, kv_dtype, adapter, salt):
        data = part.encode()
        seed.update(len(data).to_bytes(8, "little") + data)
    return seed.digest()


def prefix_hashes(root: bytes, tokens: Sequence[int], block_size: int) -> list[bytes]:
    """One 16-byte hash for each full page of ``tokens``, as int32; each covers all before it.

    To continue a chain, pass its last hash as ``root`` and only the tokens after it.
    """
    pages = len(tokens) // block_size
    data = array("i", tokens[: pages * block_size]).tobytes()
    size = 4 * block_size
    hashes = []
    for at in range(0, pages * size, size):
        root = hashlib.blake2b(root + data[at : at + size], digest_size=DIGEST_SIZE).digest()
        hashes.append(root)
    return hashes


def first_visible(group: KVGroup, position: int) -> int:
    """The earliest position that a query at ``position`` attends to."""
    if group.kind == "full":
        return 0
    if group.kind == "window":
        return max(0, position - group.size + 1)
    return position // group.size * group.size


class PageTable:
    """What one sequence holds: for each group, the blocks of its last pages before ``end``."""

    __slots__ = ("blocks", "end")

    def __init__(self, num_groups: int) -> None:
        self.end = 0  # pages; the same in all groups, since every token is written in each
        self.blocks: list[list[int]] = [[] for _ in range(num_groups)]


class BlockPool:
    """Allocation, sharing and eviction of blocks.

    Raises ValueError for a configuration that cannot be. Running out of blocks is the caller's to
    prevent: ask ``room`` before ``extend``.
    """

    def __init__(self, config: KVConfig) -> None:
        if config.num_blocks < 1 or config.block_size < 1 or not config.groups:
            raise ValueError(
                f"a KV pool needs blocks, tokens per block and groups, not {config.num_blocks}, "
                f"{config.block_size} and {len(config.groups)}: give it more memory"
            )
        if len({group.block_bytes for group in config.groups}) > 1:
            raise ValueError("KV groups that share a pool must have equal block_bytes")
        for group in config.groups:
            if group.kind == "chunk" and group.size % config.block_size:
                raise ValueError(
                    f"attention chunks of {group.size} tokens must be a multiple of the block size "
                    f"{config.block_size}: choose another --block-size"
                )
        n = config.num_blocks
        self.config = config
        self.block_size = config.block_size
        self.num_groups = len(config.groups)
        self.num_blocks = self.num_free = n
        self.num_parked = 0
        self.used = [0] * self.num_groups  # used blocks by group
        self.undo: Undo = []  # how to take back what was done; the caller clears it
        self._bounded = [(g, kv) for g, kv in enumerate(config.groups) if kv.kind != "full"]
        self._full = [g for g, kv in enumerate(config.groups) if kv.kind == "full"]
        # The free list: a ring through the sentinel n, so a block leaves its middle in O(1).
        self._next: list[int] = [*range(1, n + 1), 0]
        self._prev: list[int] = [n, *range(n)]
        self._references = [0] * n  # PARKED while parked
        self._keys: list[tuple[int, bytes] | None] = [None] * n
        self._cached: dict[tuple[int, bytes], int] = {}
        self._parked: deque[dict[int, None]] = deque()  # by uncommitted step, oldest first

    # What fits.

    def blocks_needed(self, num_tokens: int) -> int:
        """Blocks that a sequence of ``num_tokens`` holds at its peak, computed token by token."""
        pages = -(-num_tokens // self.block_size)
        total = 0
        for group in self.config.groups:
            if group.kind == "full":
                total += pages
            elif group.kind == "window":  # n tokens at their worst alignment to pages
                total += min(pages, (group.size - 1 + self.block_size - 1) // self.block_size + 1)
            else:
                total += min(pages, group.size // self.block_size)
        return total

    def room(self, table: PageTable) -> int:
        """How many tokens the sequence could hold if it took every free block."""
        return (table.end + self.num_free // self.num_groups) * self.block_size

    # Prefix cache.

    def match(self, hashes: Sequence[bytes], num_tokens: int) -> int:
        """Longest cached prefix, in pages, that leaves at least one token to compute.

        A hit of L pages needs, in every group, the pages that a query right after them can see.
        """
        limit = min(len(hashes), (num_tokens - 1) // self.block_size)
        hit = 0
        cached = self._cached
        while hit < limit and all((g, hashes[hit]) in cached for g in self._full):
            hit += 1
        settled = False
        while not settled:
            settled = True
            for g, group in self._bounded:
                first = first_visible(group, hit * self.block_size) // self.block_size
                for page in range(hit - 1, first - 1, -1):
                    if (g, hashes[page]) not in cached:
                        hit, settled = page, False
                        break
        return hit

    def _hit_blocks(self, hashes: Sequence[bytes], pages: int) -> list[list[int]]:
        position = pages * self.block_size
        return [
            [
                self._cached[g, hashes[page]]
                for page in range(first_visible(group, position) // self.block_size, pages)
            ]
            for g, group in enumerate(self.config.groups)
        ]

    def shared(self, hashes: Sequence[bytes], pages: int) -> int:
        """Blocks of a hit of ``pages`` that adopting would not take from the free list."""
        return sum(
            self._references[block] != 0
            for blocks in self._hit_blocks(hashes, pages)
            for block in blocks
        )

    def adopt(self, hashes: Sequence[bytes], pages: int) -> PageTable:
        """A table that starts with a hit of ``pages``, as ``match`` found it."""
        table = PageTable(self.num_groups)
        table.end = pages
        table.blocks = self._hit_blocks(hashes, pages)
        for g, blocks in enumerate(table.blocks):
            for block in blocks:
                self._reference(g, block)
        return table

    def publish(self, group: int, block: int, digest: bytes) -> None:
        """Make a full page findable. Only after the step that wrote it has been committed."""
        key = (group, digest)
        if self.config.prefix_caching and self._keys[block] is None and key not in self._cached:
            self._keys[block] = key
            self._cached[key] = block

    # A sequence's life.

    def trim(self, table: PageTable, position: int) -> int:
        """Free the pages that no query from ``position`` on can see.

        Returns the first position at which there will be something to free again.
        """
        soonest = sys.maxsize
        for g, group in self._bounded:
            blocks = table.blocks[g]
            held = table.end - len(blocks)
            leaves = self._leaves(group, held)
            if position >= leaves and blocks:
                gone = first_visible(group, position) // self.block_size - held
                leaving = blocks[:gone]
                del blocks[:gone]
                self.undo.append((blocks.__setitem__, (slice(0, 0), leaving)))
                for block in reversed(leaving):
                    self._drop(g, block)
                leaves = self._leaves(group, table.end - len(blocks))
            if leaves < soonest:
                soonest = leaves
        return soonest

    def _leaves(self, group: KVGroup, page: int) -> int:
        """The first position that sees nothing of ``page``."""
        if group.kind == "window":
            return (page + 1) * self.block_size + group.size - 1
        return (page * self.block_size // group.size + 1) * group.size

    def extend(self, table: PageTable, num_tokens: int) -> list[list[int]]:
        """Blocks for the pages up to ``num_tokens``; the new ones by group, from the old end on."""
        pages = -(-num_tokens // self.block_size) - table.end
        if pages <= 0:
            return []
        assert pages * self.num_groups <= self.num_free, "extend without room"
        after, keys, evicted = self._next, self._keys, {}
        block = after[self.num_blocks]
        taken = []
        for g, held in enumerate(table.blocks):
            new = []
            for _ in range(pages):
                new.append(block)
                key = keys[block]
                if key is not None:
                    evicted[block] = key
                    del self._cached[key]
                    keys[block] = None
                self._references[block] = 1
                block = after[block]
            self.used[g] += pages
            held += new
            taken.append(new)
        self._next[self.num_blocks], self._prev[block] = block, self.num_blocks
        self.num_free -= pages * self.num_groups
        table.end += pages
        self.undo.append((self._retract, (table, pages, evicted)))
        return taken

    def release(self, table: PageTable) -> None:
        """Free everything, the last page first: the tail of a chain is of use to fewer requests."""
        for g, blocks in enumerate(table.blocks):
            for block in reversed(blocks):
                self._drop(g, block)

    # Steps in flight.

    def open_step(self) -> None:
        """A step has been planned: what is freed from now on stays parked until it is committed."""
        self._parked.append({})
        self.undo.append((self._parked.pop, ()))

    def close_step(self) -> None:
        """The oldest open step has been committed."""
        for block in self._parked.popleft():
            self.num_parked -= 1
            self._references[block] = 0
            self._free(block)

    # Transitions of one block. Each notes its inverse, which is exact if undone in reverse order.

    def _reference(self, group: int, block: int) -> None:
        references = self._references[block]
        self._references[block] = max(references, 0) + 1
        self.used[group] += references <= 0
        if references == PARKED:
            parked = next(blocks for blocks in self._parked if block in blocks)
            self.undo.append((self._repark, (group, block, parked, list(parked))))
            del parked[block]
            self.num_parked -= 1
        else:
            self.undo.append((self._unreference, (group, block, self._prev[block])))
            if references == 0:
                self._unlink(block)

    def _unreference(self, group: int, block: int, before: int) -> None:
        self._references[block] -= 1
        if self._references[block] == 0:
            self.used[group] -= 1
            self._insert(block, before)

    def _repark(self, group: int, block: int, parked: dict[int, None], order: list[int]) -> None:
        parked.clear()
        parked.update(dict.fromkeys(order))
        self.num_parked += 1
        self.used[group] -= 1
        self._references[block] = PARKED

    def _drop(self, group: int, block: int) -> None:
        self.undo.append((self._undrop, (group, block)))
        self._references[block] -= 1
        if self._references[block]:
            return
        self.used[group] -= 1
        if self._parked:
            self._references[block] = PARKED
            self._parked[-1][block] = None
            self.num_parked += 1
        else:
            self._free(block)

    def _undrop(self, group: int, block: int) -> None:
        references = self._references[block]
        self._references[block] = max(references, 0) + 1
        self.used[group] += references <= 0
        if references == 0:
            self._unlink(block)
        elif references == PARKED:
            del self._parked[-1][block]
            self.num_parked -= 1

    def _retract(self, table: PageTable, pages: int, evicted: dict[int, tuple[int, bytes]]) -> None:
        table.end -= pages
        for g in reversed(range(self.num_groups)):
            held = table.blocks[g]
            self.used[g] -= pages
            for _ in range(pages):
                block = held.pop()
                self._references[block] = 0
                self._insert(block, self.num_blocks)
        for block, key in evicted.items():
            self._keys[block] = key
            self._cached[key] = block

    def _free(self, block: int) -> None:
        """Into the free list: a known prefix to its tail, a blank block to its head."""
        known = self._keys[block] is not None
        self._insert(block, self._prev[self.num_blocks] if known else self.num_blocks)

    def _insert(self, block: int, before: int) -> None:
        """Into the free list, right behind ``before``."""
        after = self._next[before]
        self._prev[block], self._next[block] = before, after
        self._next[before] = self._prev[after] = block
        self.num_free += 1

    def _unlink(self, block: int) -> None:
        before, after = self._prev[block], self._next[block]
        self._next[before], self._prev[after] = after, before
        self.num_free -= 1

    # Audit.

    def free_list(self) -> list[int]:
        """Free blocks in the order in which they will be taken."""
        order: list[int] = []
        block = self._next[self.num_blocks]
        while block != self.num_blocks and len(order) <= self.num_blocks:
            assert self._prev[self._next[block]] == block, f"free list is broken at block {block}"
            order.append(block)
            block = self._next[block]
        return order

    def cached_keys(self) -> set[tuple[int, bytes]]:
        """What the prefix cache can find: (group, hash)."""
        return set(self._cached)

    def check(self, tables: Iterable[PageTable]) -> None:
        """Full audit against the tables of all live sequences. Raises AssertionError."""
        held: Counter[int] = Counter()
        owners: dict[int, int] = {}
        for table in tables:
            for g, blocks in enumerate(table.blocks):
                assert len(blocks) <= table.end, f"{len(blocks)} blocks for {table.end} pages"
                held.update(blocks)
                for block in blocks:
                    owner = owners.setdefault(block, g)
                    assert owner == g, f"block {block} serves groups {owner} and {g}"
        free = self.free_list()
        parked = [block for blocks in self._parked for block in blocks]
        assert self.num_free == len(free), f"num_free {self.num_free}, list has {len(free)}"
        assert self.num_parked == len(parked), f"num_parked {self.num_parked}, {len(parked)} parked"
        states = Counter([*free, *parked, *held])
        assert len(states) == self.num_blocks, f"{self.num_blocks - len(states)} blocks leaked"
        assert set(states.values()) == {1}, f"blocks in two states: {states.most_common(3)}"
        waiting = set(parked)
        for block in range(self.num_blocks):
            expected = PARKED if block in waiting else held[block]
            assert self._references[block] == expected, (
                f"block {block} has {self._references[block]} references, tables say {expected}"
            )
        by_group = Counter(owners.values())
        assert self.used == [by_group[g] for g in range(self.num_groups)], "used blocks by group"
        keyed = {key: block for block, key in enumerate(self._keys) if key is not None}
        assert keyed == self._cached, "prefix cache and blocks disagree"
        for block, owner in owners.items():
            key = self._keys[block]
            assert key is None or key[0] == owner, f"block {block} is cached for another group"
        blank = [self._keys[block] is None for block in free]
        assert blank == sorted(blank, reverse=True), "a prefix would be evicted before a blank"
