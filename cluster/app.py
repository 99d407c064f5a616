"""The ingress: HTTP in, one side-channel connection per engine, server-sent events out.

Each request holds a lease on its engine's replica (a Serve call that stays open), sends a Request
over the side channel, and watches its client while it waits: a queued request sends nothing, so a
client that leaves would not be noticed otherwise. Whatever way it ends, the engine is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import random
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

import msgspec

from cluster import directory, openai
from cluster.metrics import CONTENT_TYPE, Metrics
from cluster.openai import Call, Model, Refusal, unavailable
from cluster.reply import Reply, model_body, models_body
from cluster.routing import Belief, NoEngine, choose
from cluster.text import Text
from workers.channel import IngressSide
from workers.wire import Engine, Load, Output, Request

ENGINE_SECONDS = 30.0  # a request waits so long for an engine that starts again
STALL_SECONDS = 30.0  # without progress an engine is not ready
MAX_BODY = 32 << 20  # bytes
RETRY_AFTER = b"5"
THREAD_BYTES = 16 << 10  # bodies longer than this are understood in a thread

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Lease: TypeAlias = Callable[[str, Request], Awaitable[Any]]


class Disconnected(Exception):
    """The client has gone."""


class Inbox:
    """Outputs of a call's requests, in the order they came, and the moment its client left."""

    def __init__(self) -> None:
        self._outputs: list[Output] = []
        self._event = asyncio.Event()
        self._gone = False

    def put(self, output: Output) -> None:
        self._outputs.append(output)
        self._event.set()

    def leave(self) -> None:
        self._gone = True
        self._event.set()

    async def take(self) -> list[Output]:
        """Everything that has come, at least one. Raises Disconnected."""
        if not self._outputs and not self._gone:
            await self._event.wait()
        self._event.clear()
        if self._gone:
            raise Disconnected
        outputs, self._outputs = self._outputs, []
        return outputs


class Ingress:
    """The ASGI application of one service."""

    def __init__(
        self, text: Text, name: str, vocab_size: int, lease: Lease, key: bytes,
        seed: int, api_key: str = "", version: str = "",
    ) -> None:
        self._text, self._name, self._vocab_size = text, name, vocab_size
        self._lease, self._key, self._seed = lease, key, seed
        self._api_key, self._version = api_key, version
        self._id = f"ingress-{uuid.uuid4().hex[:12]}"
        self._created = int(time.time())
        self._engines: dict[Engine, Belief] = {}
        self._links: dict[Engine, IngressSide] = {}
        self._about: dict[str, Any] = {}  # replica -> its metadata
        self._tasks: dict[str, asyncio.Task[None]] = {}  # replica -> its link
        self._models: dict[str, Model] = {}
        self._changed = asyncio.Event()
        self._metrics = Metrics(
            lambda: [(engine, belief.load) for engine, belief in self._engines.items()]
        )

    def start(self) -> None:
        """Begin to follow the engines; on the running loop."""
        loop = asyncio.get_running_loop()
        directory.watch(lambda found: loop.call_soon_threadsafe(self._follow, found) and None)

    # Engines.

    def _follow(self, found: directory.Replicas) -> None:
        for replica in self._tasks.keys() - found.keys():
            self._tasks.pop(replica).cancel()
        for replica, about in found.items():
            if replica not in self._tasks and "address" in about:
                task = asyncio.get_running_loop().create_task(self._link(replica, dict(about)))
                self._tasks[replica] = task

    async def _link(self, replica: str, about: dict[str, Any]) -> None:
        engine = msgspec.convert(about["engine"], Engine)

        def heard(load: Load) -> None:
            now = time.monotonic()
            if engine in self._engines:
                self._engines[engine].hear(load, now)
                return
            self._engines[engine], self._links[engine] = Belief(load, now), side
            self._about[replica] = about
            self._models[engine.model] = Model(
                name=engine.model,
                text=self._text,
                max_model_len=about["max_model_len"],
                vocab_size=self._vocab_size,
                created=self._created,
            )
            self._changed.set()

        host, port = about["address"]
        side = IngressSide((host, port), self._key, self._id, heard)
        try:
            await side.run()
        finally:
            self._engines.pop(engine, None)
            self._links.pop(engine, None)
            self._about.pop(replica, None)

    async def _choose(self, request: Request) -> Engine:
        """An engine for the request, waiting for one that starts again. Raises Refusal."""
        try:
            async with asyncio.timeout(ENGINE_SECONDS):
                while True:
                    with contextlib.suppress(NoEngine):
                        return choose(request, self._engines, time.monotonic()).engine
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise unavailable(
                "no engine is ready; it may be starting again: try in a few seconds"
            ) from None

    # HTTP.

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            assert scope["type"] == "lifespan", "no websockets here"
            return await _lifespan(receive, send)
        exchange = Exchange(scope, receive, send)
        try:
            await self._route(exchange)
        except Refusal as refusal:
            await exchange.answer(refusal.status, refusal.body)
        except Disconnected:
            pass
        finally:
            if exchange.status:
                self._metrics.responses.labels(exchange.status).inc()
        return None

    async def _route(self, exchange: Exchange) -> None:
        method, path = exchange.scope["method"], exchange.scope["path"]
        if path.startswith("/v1/") or path == "/status":
            self._authorise(exchange)
        if (method, path) == ("POST", "/v1/completions"):
            await self._generate(exchange, openai.completions)
        elif (method, path) == ("POST", "/v1/chat/completions"):
            await self._generate(exchange, openai.chat)
        elif method in ("GET", "HEAD"):
            await self._get(exchange, path)
        else:
            raise Refusal(f"{method} {path} does not exist", status=404)

    async def _get(self, exchange: Exchange, path: str) -> None:
        if path == "/health":
            await exchange.answer(200, b"{}")
        elif path == "/ready":
            reason = self._unready()
            body = {"ready": not reason, "reason": reason}
            await exchange.answer(503 if reason else 200, msgspec.json.encode(body))
        elif path == "/version":
            await exchange.answer(200, msgspec.json.encode({"version": self._version}))
        elif path == "/metrics":
            await exchange.answer(200, self._metrics.text(), CONTENT_TYPE)
        elif path == "/status":
            await exchange.answer(200, self._status())
        elif path == "/v1/models":
            await exchange.answer(200, models_body(self._models))
        elif path.startswith("/v1/models/"):
            await exchange.answer(200, model_body(path.removeprefix("/v1/models/"), self._models))
        else:
            raise Refusal(f"GET {path} does not exist", status=404)

    def _authorise(self, exchange: Exchange) -> None:
        if self._api_key:
            given = exchange.header(b"authorization").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self._api_key.encode()):
                raise Refusal(
                    "the API key is missing or wrong: send it as Authorization: Bearer KEY",
                    status=401,
                    code="invalid_api_key",
                )

    def _unready(self) -> str:
        if not self._engines:
            return "no engine is connected"
        ages = [belief.load.progress_ms / 1000 for belief in self._engines.values()]
        if min(ages) > STALL_SECONDS:
            return f"no engine has ended a step for {min(ages):.0f} s"
        return ""

    def _status(self) -> bytes:
        engines = [
            self._about[engine.replica] | {"load": msgspec.to_builtins(belief.load)}
            for engine, belief in self._engines.items()
        ]
        return msgspec.json.encode({"ready": not self._unready(), "engines": engines})

    # Generation.

    async def _generate(self, exchange: Exchange, parse: Callable[..., Call]) -> None:
        began = time.monotonic()
        if not self._models:
            await self._choose(Request(id="", model=self._name, prompt=[], sampling=None))
        body = await exchange.body()
        arguments = {
            "id": uuid.uuid4().hex,
            "seed": self._seed or random.getrandbits(62),
            "now": int(time.time()),
        }
        if len(body) > THREAD_BYTES:
            call = await asyncio.to_thread(parse, body, self._models, **arguments)
        else:
            call = parse(body, self._models, **arguments)
        inbox = Inbox()
        watch = asyncio.create_task(exchange.watch(inbox.leave))
        held: dict[str, tuple[Engine, asyncio.Task[None]]] = {}
        try:
            for request in call.requests:
                engine = await self._choose(request)
                self._links[engine].submit(request, inbox.put)
                self._engines[engine].reserve(request, time.monotonic())
                held[request.id] = (engine, asyncio.create_task(self._hold(engine, request)))
            await self._deliver(exchange, Reply(call), inbox, held, began)
        finally:
            watch.cancel()
            for id in held:
                self._release(held, id)
            await asyncio.gather(
                watch, *[task for _, task in held.values()], return_exceptions=True
            )

    async def _hold(self, engine: Engine, request: Request) -> None:
        """Keep the lease; when the replica dies the request fails here, if not sooner."""
        try:
            await self._lease(engine.replica, request)
            reason = "its lease ran out"
        except asyncio.CancelledError:
            raise
        except Exception as error:
            reason = f"its engine was lost ({type(error).__name__})"
        side = self._links.get(engine)
        if side is not None:
            side.fail(request.id, f"the request was ended: {reason}; send it again")

    def _release(self, held: dict[str, tuple[Engine, asyncio.Task[None]]], id: str) -> None:
        engine, task = held[id]
        if side := self._links.get(engine):
            side.cancel(id)
        if belief := self._engines.get(engine):
            belief.release(id)
        task.cancel()

    async def _deliver(
        self,
        exchange: Exchange,
        reply: Reply,
        inbox: Inbox,
        held: dict[str, tuple[Engine, asyncio.Task[None]]],
        began: float,
    ) -> None:
        """Outputs to the client until the answer is over."""
        last: dict[str, float] = {}
        while not reply.done:
            outputs = await inbox.take()
            now = time.monotonic()
            chunks = []
            for output in outputs:
                if output.tokens:
                    before = last.get(output.id)
                    if before is None:
                        self._metrics.first_token.observe(now - began)
                    else:
                        self._metrics.between_tokens.observe(now - before)
                    last[output.id] = now
                if output.reason is not None:
                    self._release(held, output.id)
                chunks.append(reply.feed(output))
            for id in reply.aborts:
                self._release(held, id)
            reply.aborts.clear()
            if reply.failure is not None and not exchange.status:
                raise reply.failure
            if any(chunks):
                await exchange.stream(b"".join(chunks), last=reply.done)
        self._metrics.whole.observe(time.monotonic() - began)
        if not exchange.status:
            await exchange.answer(200, reply.body())


class Exchange:
    """One HTTP request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.status = 0  # once the answer has begun
        self._receive, self._send = receive, send
        given = self.header(b"x-request-id")
        self._id = given if given.isprintable() and 0 < len(given) <= 200 else uuid.uuid4().hex

    def header(self, name: bytes) -> str:
        return next((v.decode("latin-1") for k, v in self.scope["headers"] if k == name), "")

    async def body(self) -> bytes:
        """The request's body. Raises Refusal where it is too large, Disconnected."""
        parts, size = [], 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > MAX_BODY:
                raise Refusal(f"the body is larger than {MAX_BODY >> 20} MiB", status=413)
            if not message.get("more_body"):
                return b"".join(parts)

    async def watch(self, gone: Callable[[], None]) -> None:
        """Call ``gone`` when the client leaves."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        gone()

    async def answer(
        self, status: int, body: bytes, content_type: str = "application/json"
    ) -> None:
        """The whole answer at once; after a stream has begun, only its end."""
        if self.status:
            await self._send({"type": "http.response.body", "body": b""})
            return
        headers = [
            (b"content-type", content_type.encode()),
            (b"content-length", str(len(body)).encode()),
        ]
        if status == 503:
            headers.append((b"retry-after", RETRY_AFTER))
        await self._begin(status, headers)
        if self.scope["method"] == "HEAD":
            body = b""
        await self._send({"type": "http.response.body", "body": body})

    async def stream(self, events: bytes, last: bool) -> None:
        """Server-sent events; the first call begins the answer."""
        if not self.status:
            await self._begin(
                200,
                [
                    (b"content-type", b"text/event-stream; charset=utf-8"),
                    (b"cache-control", b"no-cache"),
                    (b"x-accel-buffering", b"no"),
                ],
            )
        await self._send({"type": "http.response.body", "body": events, "more_body": not last})

    async def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        headers.append((b"x-request-id", self._id.encode("latin-1")))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
