"""Responses that clients may come back to: one SQLite file, and how an ingress asks for it.

``Store`` does the work, in a Ray actor of the service's, so that any ingress answers for what
another one made. A conversation is a chain: each response is kept with what it was asked and the id
of the one it goes on from.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from cluster.schema import unavailable

MOST_BYTES = 1 << 30  # of all that is kept; what was used longest ago goes first
MOST_SECONDS = 30 * 86400.0  # without having been used
LONGEST, MOST_TURNS = 32 << 20, 10_000  # of a conversation; bytes
SECONDS = 10.0  # in which the store answers
NAME = re.compile("resp_[0-9a-zA-Z]{1,64}")

TABLE = """
CREATE TABLE IF NOT EXISTS responses (
  id TEXT PRIMARY KEY, owner TEXT NOT NULL, previous TEXT, used REAL NOT NULL,
  size INTEGER NOT NULL, input BLOB NOT NULL, output BLOB NOT NULL, body BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS by_use ON responses (used);
"""
CHAIN = """
WITH RECURSIVE chain (depth, id, previous, size) AS (
  SELECT 0, id, previous, size FROM responses WHERE id = :id AND owner = :owner
  UNION ALL
  SELECT depth + 1, one.id, one.previous, one.size + chain.size
  FROM chain JOIN responses AS one ON one.id = chain.previous AND one.owner = :owner
  WHERE chain.size <= :longest AND depth < :most
)
SELECT id, previous, size FROM chain ORDER BY depth
"""

log = logging.getLogger(__name__)

Ask: TypeAlias = Callable[..., Awaitable[Any]]  # a method of Store by its name, and its arguments


class BadStore(ValueError):
    """The file cannot be used; the message is a sentence."""


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A response as it is kept; ``input`` and ``output`` are JSON lists of items."""

    id: str
    owner: str  # name of the API key that it was made with; empty: none was needed
    previous: str | None
    input: bytes
    output: bytes
    body: bytes

    @property
    def size(self) -> int:
        return len(self.input) + len(self.output) + len(self.body)


class Turn(msgspec.Struct, frozen=True):
    """One response of a conversation: what was asked, and what was answered."""

    input: bytes
    output: bytes


class Store:
    """Responses in one file, which is its alone. Not for an event loop. ``now`` is Unix seconds."""

    def __init__(
        self, path: str | Path, most_bytes: int = MOST_BYTES, most_seconds: float = MOST_SECONDS
    ) -> None:
        """Opens the file, or makes it, for its owner's eyes only. Raises BadStore."""
        self._most_bytes, self._most_seconds = most_bytes, most_seconds
        try:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            self._file = sqlite3.connect(path, timeout=SECONDS / 2, check_same_thread=False)
            # What is committed outlives this process; a machine that dies may lose the last of it.
            for setting in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=NORMAL"):
                self._file.execute(f"PRAGMA {setting}")
            self._file.executescript(TABLE)
            (self._total,) = self._file.execute(
                "SELECT coalesce(sum(size), 0) FROM responses"
            ).fetchone()
        except (OSError, sqlite3.Error) as error:
            raise BadStore(f"responses cannot be kept in {path}: {error}") from error

    def close(self) -> None:
        self._file.close()

    def put(self, kept: Kept, now: float) -> bool:
        """Whether it is kept: one that is larger than the store is not."""
        if kept.size > self._most_bytes:
            return False
        with self._file:
            old = self._file.execute(
                "SELECT id FROM responses WHERE id = ? OR used < ?",
                (kept.id, now - self._most_seconds),
            )
            freed = self._drop(id for (id,) in old.fetchall())
            while self._total - freed + kept.size > self._most_bytes:
                oldest = "SELECT id FROM responses ORDER BY used, rowid LIMIT 1"
                freed += self._drop(self._file.execute(oldest).fetchone())
            row = (kept.id, kept.owner, kept.previous, now, kept.size)
            self._file.execute(
                "INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*row, kept.input, kept.output, kept.body),
            )
        self._total += kept.size - freed
        return True

    def get(self, id: str, owner: str) -> bytes | None:
        """The body of a response."""
        query = "SELECT body FROM responses WHERE id = ? AND owner = ?"
        found = self._file.execute(query, (id, owner)).fetchone()
        return None if found is None else bytes(found[0])

    def chain(self, id: str, owner: str, now: float) -> list[Turn] | None:
        """A conversation up to a response, its first turn first; None where a turn is missing or
        there is more of it than anybody could go on from."""
        asked = {"id": id, "owner": owner, "longest": LONGEST, "most": MOST_TURNS}
        found = self._file.execute(CHAIN, asked).fetchall()
        if not found or found[-1][1] is not None:
            return None
        turns = []
        with self._file:
            for one, _, _ in reversed(found):
                self._file.execute("UPDATE responses SET used = ? WHERE id = ?", (now, one))
                query = "SELECT input, output FROM responses WHERE id = ?"
                turns.append(Turn(*self._file.execute(query, (one,)).fetchone()))
        return turns

    def delete(self, id: str, owner: str) -> bool:
        """Whether there was such a response."""
        query = "SELECT id FROM responses WHERE id = ? AND owner = ?"
        with self._file:
            freed = self._drop(one for (one,) in self._file.execute(query, (id, owner)).fetchall())
        self._total -= freed
        return bool(freed)

    def _drop(self, ids: Iterable[str]) -> int:
        """Bytes that this frees."""
        freed = 0
        for id in ids:
            query = "DELETE FROM responses WHERE id = ? RETURNING size"
            freed += sum(size for (size,) in self._file.execute(query, (id,)).fetchall())
        return freed


class Shelf:
    """The store as an ingress sees it: every question has a deadline."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def keep(self, kept: Kept) -> bool:
        """Whether it is kept. An answer is worth more than its copy: this never raises."""
        try:
            async with asyncio.timeout(SECONDS):
                return bool(await self._ask("put", kept, time.time()))
        except Exception as error:  # Ray's, SQLite's, or the deadline's
            log.error("response %s is not stored: %r", kept.id, error)
            return False

    async def body(self, id: str, owner: str) -> bytes | None:
        """As ``Store.get``. Raises Refusal."""
        found: bytes | None = await self._find("get", id, owner)
        return found

    async def delete(self, id: str, owner: str) -> bool:
        """As ``Store.delete``. Raises Refusal."""
        return bool(await self._find("delete", id, owner))

    async def turns(self, id: str, owner: str) -> list[Turn] | None:
        """As ``Store.chain``. Raises Refusal."""
        found: list[Turn] | None = await self._find("chain", id, owner, time.time())
        return found

    async def _find(self, what: str, id: str, *arguments: Any) -> Any:
        if not NAME.fullmatch(id):
            return None
        try:
            async with asyncio.timeout(SECONDS):
                return await self._ask(what, id, *arguments)
        except Exception as error:  # Ray's, SQLite's, or the deadline's
            log.error("the store of responses does not answer: %r", error)
            raise unavailable(
                "the store of responses does not answer; it may be starting again: try in a few "
                "seconds"
            ) from error
