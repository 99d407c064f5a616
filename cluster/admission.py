"""Who may come in: limits on what is live, and when to come again. Pure; ``now`` is in seconds.

Nothing is counted up and down: what is live is a set, and what left is remembered for a while.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Literal

from workers.config import ApiKey, Limits

WINDOW = 60.0  # seconds that departures are remembered
UNKNOWN = 5.0  # seconds to come again where nothing has left yet
LONGEST = 120.0


class Full(Exception):
    """No room for a request; ``seconds`` until there may be some."""

    def __init__(self, message: str, kind: Literal["requests", "tokens"], seconds: int) -> None:
        super().__init__(message)
        self.kind, self.seconds = kind, seconds


class Rate:
    """How much leaves in a second, over the last ``WINDOW``."""

    def __init__(self) -> None:
        self._left: deque[tuple[float, int]] = deque(maxlen=1024)

    def note(self, amount: int, now: float) -> None:
        self._left.append((now, amount))

    def seconds(self, amount: int, now: float) -> int:
        """Until ``amount`` more have left: whole seconds, at least 1 and at most ``LONGEST``."""
        while self._left and self._left[0][0] < now - WINDOW:
            self._left.popleft()
        total = sum(amount for _, amount in self._left)
        if not total:
            return math.ceil(UNKNOWN)
        span = max(now - self._left[0][0], 0.001)
        return math.ceil(min(max(amount * span / total, 1.0), LONGEST))


@dataclass(slots=True, eq=False)
class Ticket:
    """A call that has come in. ``requests`` and ``tokens`` are known once it is understood."""

    key: str  # the API key's name; empty: none is needed
    requests: int = 1
    tokens: int = 0
    waiting: bool = True  # for its first token


class Admission:
    """The calls that are live in one ingress, and the limits on them."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._live: set[Ticket] = set()
        self._arrivals: dict[str, deque[float]] = {}  # by key: of the last minute
        self._started, self._prefilled, self._ended = Rate(), Rate(), Rate()

    def __len__(self) -> int:
        return len(self._live)

    def enter(self, key: ApiKey | None, now: float) -> Ticket:
        """Let a call in before anything is done for it. Raises Full."""
        if key is not None:
            self._check_key(key, now)
        most = self._limits.max_concurrent_requests
        if most is not None and len(self._live) >= most:
            raise Full(
                f"{most} requests are being served, which is the most",
                "requests",
                self._ended.seconds(len(self._live) - most + 1, now),
            )
        ticket = Ticket(key.name if key else "")
        self._check_queue(ticket, now)
        if key is not None:
            self._arrivals.setdefault(key.name, deque()).append(now)
        self._live.add(ticket)
        return ticket

    def weigh(self, ticket: Ticket, requests: int, tokens: int, now: float) -> None:
        """What a call turns out to be, before an engine hears of it. Raises Full."""
        ticket.requests, ticket.tokens = requests, tokens
        try:
            self._check_queue(ticket, now)
        except Full:
            self._live.remove(ticket)  # what was never served does not count as having left
            raise

    def start(self, ticket: Ticket, now: float) -> None:
        """It has its first token."""
        if ticket.waiting:
            ticket.waiting = False
            self._started.note(ticket.requests, now)
            self._prefilled.note(ticket.tokens, now)

    def leave(self, ticket: Ticket, now: float) -> None:
        """It is over, however it ended."""
        if ticket in self._live:
            self._live.remove(ticket)
            self._ended.note(1, now)

    def _check_key(self, key: ApiKey, now: float) -> None:
        own = [ticket for ticket in self._live if ticket.key == key.name]
        most = key.max_concurrent_requests
        if most is not None and len(own) >= most:
            raise Full(
                f"the API key {key.name!r} has {len(own)} requests running; {most} are allowed",
                "requests",
                self._ended.seconds(len(own) - most + 1, now),
            )
        past, most = self._arrivals.get(key.name, deque()), key.requests_per_minute
        while past and past[0] <= now - 60:
            past.popleft()
        if most is not None and len(past) >= most:
            raise Full(
                f"the API key {key.name!r} is allowed {most} requests a minute",
                "requests",
                math.ceil(max(past[len(past) - most] + 60 - now, 1.0)),
            )

    def _check_queue(self, ticket: Ticket, now: float) -> None:
        """Whether ``ticket`` may wait, too. One that waits alone always may."""
        queue = [other for other in self._live if other.waiting and other is not ticket]
        if not queue:
            return
        requests = sum(other.requests for other in queue) + ticket.requests
        tokens = sum(other.tokens for other in queue) + ticket.tokens
        most = self._limits.max_num_queued_reqs
        if most is not None and requests > most:
            raise Full(
                f"the queue is full: {requests - ticket.requests} sequences wait, {most} may",
                "requests",
                self._started.seconds(requests - most, now),
            )
        most = self._limits.max_num_queued_tokens
        if most is not None and tokens > most:
            raise Full(
                f"the queue is full: {tokens - ticket.tokens:,} prompt tokens wait, {most:,} may",
                "tokens",
                self._prefilled.seconds(tokens - most, now),
            )
