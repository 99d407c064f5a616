"""One HTTP request and its answer, over ASGI. Whatever waits for a client has a deadline."""

from __future__ import annotations

import asyncio
import re
import urllib.parse
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from cluster.schema import Refusal, late

BODY_SECONDS = 60.0  # a whole body must arrive within
SEND_SECONDS = 60.0  # a client that takes nothing for so long has gone
SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
JSON = "application/json"

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Disconnected(Exception):
    """The client has gone."""


class Exchange:
    """One HTTP request and its answer.

    Serve has named the request by the time it comes here (``X-Request-Id``), and puts that name on
    every answer.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query = urllib.parse.parse_qs(
            scope["query_string"].decode("latin-1"), keep_blank_values=True
        )
        self.status = 0  # once the answer has begun
        # The last words of a stream that fails.
        self.failing: Callable[[Refusal], bytes] = lambda refusal: b""
        self._streams = self._ended = False
        self._headers: dict[bytes, bytes] = dict(scope["headers"])
        self._receive, self._send = receive, send

    def header(self, name: str) -> str | None:
        """A header's value, by its name in lower case."""
        value = self._headers.get(name.encode())
        return None if value is None else value.decode("latin-1").strip()

    def timeout(self, most: float | None) -> float | None:
        """Seconds that the request may take, of which its header asks for. Raises Refusal."""
        asked = self.header("x-request-timeout")
        if asked is None:
            return most
        seconds = float(asked) if SECONDS.fullmatch(asked) else 0.0
        if not seconds:
            raise Refusal(
                "X-Request-Timeout must be a number of seconds above 0", param="X-Request-Timeout"
            )
        return seconds if most is None else min(seconds, most)

    async def json(self, most: int) -> bytes:
        """The request's body of at most ``most`` bytes. Raises Refusal, Disconnected."""
        kind = (self.header("content-type") or JSON).partition(";")[0].strip().lower()
        if kind != JSON and not (kind.startswith("application/") and kind.endswith("+json")):
            raise Refusal(
                f"the body must be {JSON}, not {kind[:64]!r}: send that content-type",
                status=415,
                code="unsupported_media_type",
            )
        coding = self.header("content-encoding") or "identity"
        if coding.lower() != "identity":
            raise Refusal(
                f"the body must come as it is, not with the Content-Encoding {coding[:64]!r}",
                status=415,
                code="unsupported_media_type",
                headers={"accept-encoding": "identity"},
            )
        if (length := self.header("content-length") or "").isdecimal() and int(length[:20]) > most:
            raise _too_large(most)
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise Disconnected
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise _too_large(most)
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise late(f"the body did not arrive within {BODY_SECONDS:.0f} s") from None

    async def watch(self, gone: Callable[[], None]) -> None:
        """Call ``gone`` when the client leaves."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        gone()

    async def refuse(self, refusal: Refusal) -> None:
        """The answer to a request that cannot be served; the last event of a stream that has
        begun."""
        if not self.status:
            await self.answer(refusal.status, refusal.body, headers=refusal.headers)
        elif not self._ended:
            await self.stream(self.failing(refusal) if self._streams else b"", last=True)

    async def answer(
        self, status: int, body: bytes, kind: str = JSON, headers: dict[str, str] | None = None
    ) -> None:
        """The whole answer at once."""
        named = {"content-type": kind, "content-length": str(len(body))} | (headers or {})
        await self._begin(status, named)
        self._ended = True
        body = b"" if self.method == "HEAD" else body
        await self._put({"type": "http.response.body", "body": body})

    async def stream(self, events: bytes, last: bool) -> None:
        """Server-sent events; the first call begins the answer."""
        if not self.status:
            self._streams = True
            await self._begin(
                200,
                {
                    "content-type": "text/event-stream; charset=utf-8",
                    "cache-control": "no-cache",
                    "x-accel-buffering": "no",
                },
            )
        self._ended = last
        await self._put({"type": "http.response.body", "body": events, "more_body": not last})

    async def _begin(self, status: int, headers: dict[str, str]) -> None:
        self.status = status
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._put({"type": "http.response.start", "status": status, "headers": pairs})

    async def _put(self, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(SEND_SECONDS):
                await self._send(message)
        except TimeoutError:
            raise Disconnected from None


def _too_large(most: int) -> Refusal:
    return Refusal(f"the body is larger than {most:,} bytes", status=413, code="body_too_large")
