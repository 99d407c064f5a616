"""Which engine gets a request. Pure: beliefs and the time come in, a placement comes out."""

from __future__ import annotations

from collections.abc import Mapping
from zlib import crc32

import msgspec

from workers.wire import Engine, Load, Request

STALE_SECONDS = 3.0  # three missed heartbeats
SETTLE_SECONDS = 0.05  # a report may have left the engine before a request sent this recently came


class NoEngine(ValueError):
    """No engine of the request's model is known."""


class Placement(msgspec.Struct, frozen=True):
    """Where a request runs."""

    engine: Engine
    prefill: Engine | None = None  # another engine computes the prompt's KV
    expected_hit: int = 0  # prompt tokens believed to be in its prefix cache


class Belief(msgspec.Struct):
    """What an ingress knows of one engine: its last report, and what it has sent there since.

    Reservations are keyed by request, so an end that is told twice, or never, cannot make them
    drift; a report newer than a reservation already counts it.
    """

    load: Load
    heard: float  # seconds, when ``load`` arrived
    reserved: dict[str, tuple[float, int]] = {}  # request id -> (when sent, prompt tokens)

    def hear(self, load: Load, now: float) -> None:
        """Take a new report; what was sent well before it is in it."""
        self.load, self.heard = load, now
        self.reserved = {
            id: (sent, tokens)
            for id, (sent, tokens) in self.reserved.items()
            if now - sent < SETTLE_SECONDS
        }

    def reserve(self, request: Request, now: float) -> None:
        """Count a request as waiting there until the engine itself reports it."""
        self.reserved[request.id] = (now, len(request.prompt) + len(request.emitted))

    def release(self, id: str) -> None:
        """The request has ended, or was not accepted."""
        self.reserved.pop(id, None)


def choose(request: Request, engines: Mapping[Engine, Belief], now: float) -> Placement:
    """The engine of the request's model with the fewest sequences, then the fewest prompt tokens
    still to compute; equals are told apart by the request's id, so that several ingresses do not
    all pick the same one.

    Engines not heard for ``STALE_SECONDS`` count only when there is no other. Raises NoEngine.
    """
    known = {engine: b for engine, b in engines.items() if engine.model == request.model}
    if not known:
        raise NoEngine(f"no engine serves {request.model!r} at the moment; try again shortly")
    fresh = {engine: b for engine, b in known.items() if now - b.heard <= STALE_SECONDS}

    def cost(engine: Engine) -> tuple[int, int, int]:
        belief = known[engine]
        load = belief.load
        tokens = sum(tokens for _, tokens in belief.reserved.values())
        spread = crc32(f"{request.id}/{engine.replica}/{engine.dp_rank}".encode())
        sequences = load.running + load.waiting + len(belief.reserved)
        return sequences, load.queued_tokens + tokens, spread

    return Placement(min(fresh or known, key=cost))
