"""Who may come in: limits on what is live, and when to come again. Pure; ``now`` is in seconds.

Nothing is counted up and down: what is live is a set. How fast it leaves is learnt while it lives:
a service that has nothing to do is not a slow one.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Literal

from workers.config import ApiKey, Limits

WINDOW = 60.0  # busy seconds in which a rate forgets two thirds of what it has learnt
UNKNOWN = 5.0  # seconds to come again where nothing has left yet
LONGEST = 120.0


class Full(Exception):
    """No room for a request; ``seconds`` until there may be some."""

    def __init__(self, message: str, kind: Literal["requests", "tokens"], seconds: int) -> None:
        super().__init__(message)
        self.kind, self.seconds = kind, seconds


class Rate:
    """How much leaves in a busy second; what is long ago counts less."""

    def __init__(self) -> None:
        self._left = self._seconds = 0.0

    def spend(self, seconds: float) -> None:
        """So long there was something that could leave."""
        kept = math.exp(-seconds / WINDOW)
        self._left *= kept
        self._seconds = self._seconds * kept + WINDOW * (1 - kept)

    def note(self, amount: int) -> None:
        self._left += amount

    def seconds(self, amount: int) -> int:
        """Until ``amount`` more have left: whole seconds, at least 1 and at most ``LONGEST``."""
        if not self._left:
            return math.ceil(UNKNOWN)
        return math.ceil(min(max(amount * self._seconds / self._left, 1.0), LONGEST))


@dataclass(slots=True, eq=False)
class Ticket:
    """A call that has come in. ``requests`` and ``tokens`` are known once it is understood, and
    from then on it waits: who is slow to say what is wanted keeps nobody from the queue."""

    key: str  # the API key's name; empty: none is needed
    requests: int = 1
    tokens: int = 0
    waiting: bool = False  # for its first token


class Admission:
    """The calls that are live in one ingress, and the limits on them."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._live: set[Ticket] = set()
        self._arrivals: dict[str, deque[float]] = {}  # by key: of the last minute
        self._started, self._prefilled, self._ended = Rate(), Rate(), Rate()
        self._now = 0.0

    def __len__(self) -> int:
        return len(self._live)

    def enter(self, key: ApiKey | None, now: float) -> Ticket:
        """Let a call in before anything is done for it. Raises Full."""
        self._pass(now)
        if key is not None:
            self._check_key(key, now)
        most = self._limits.max_concurrent_requests
        if most is not None and len(self._live) >= most:
            raise Full(
                f"{most} requests are being served, which is the most",
                "requests",
                self._ended.seconds(len(self._live) - most + 1),
            )
        ticket = Ticket(key.name if key else "")
        self._check_queue(ticket)
        if key is not None:
            self._arrivals.setdefault(key.name, deque()).append(now)
        self._live.add(ticket)
        return ticket

    def weigh(self, ticket: Ticket, requests: int, tokens: int, now: float) -> None:
        """What a call turns out to be, before an engine hears of it. Raises Full."""
        self._pass(now)
        ticket.requests, ticket.tokens = requests, tokens
        try:
            self._check_queue(ticket)
        except Full:
            self._live.remove(ticket)  # what was never served does not count as having left
            raise
        ticket.waiting = True

    def start(self, ticket: Ticket, now: float) -> None:
        """It has its first token."""
        self._pass(now)
        if ticket.waiting:
            ticket.waiting = False
            self._started.note(ticket.requests)
            self._prefilled.note(ticket.tokens)

    def leave(self, ticket: Ticket, now: float) -> None:
        """It is over, however it ended."""
        self._pass(now)
        if ticket in self._live:
            self._live.remove(ticket)
            self._ended.note(1)

    def _pass(self, now: float) -> None:
        """Whatever has been there since the last change had the time since then to leave."""
        spent, self._now = now - self._now, now
        if self._live:
            self._ended.spend(spent)
        if any(ticket.waiting for ticket in self._live):
            self._started.spend(spent)
            self._prefilled.spend(spent)

    def _check_key(self, key: ApiKey, now: float) -> None:
        own = [ticket for ticket in self._live if ticket.key == key.name]
        most = key.max_concurrent_requests
        if most is not None and len(own) >= most:
            raise Full(
                f"the API key {key.name!r} has {len(own)} requests running; {most} are allowed",
                "requests",
                self._ended.seconds(len(own) - most + 1),
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

    def _check_queue(self, ticket: Ticket) -> None:
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
                self._started.seconds(requests - most),
            )
        most = self._limits.max_num_queued_tokens
        if most is not None and tokens > most:
            raise Full(
                f"the queue is full: {tokens - ticket.tokens:,} prompt tokens wait, {most:,} may",
                "tokens",
                self._prefilled.seconds(tokens - most),
            )
