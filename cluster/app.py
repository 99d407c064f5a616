"""The ingress: HTTP in, one side-channel connection per engine, server-sent events out.

Each request holds a lease on its engine's replica (a Serve call that stays open), sends a Request
over the side channel, and watches its client while it waits: a queued request sends nothing, so a
client that leaves would not be noticed otherwise. Whatever way it ends, the engine is told.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import Context
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec

from cluster import directory, openai, structure
from cluster.metrics import CONTENT_TYPE, Metrics
from cluster.openai import Call, Model
from cluster.reply import Reply, model_body, models_body
from cluster.routing import Belief, choose
from cluster.schema import Refusal, unavailable
from cluster.text import Text
from workers.channel import BEAT, ChannelClosed, Link
from workers.config import ModelSpec
from workers.wire import Engine, Load, Output, Request

ENGINE_SECONDS = 30.0  # a request waits so long for an engine that starts again
STALL_SECONDS = 30.0  # without progress an engine is not ready
MAX_BODY = 32 << 20  # bytes
RETRY_AFTER = b"5"
THREAD_BYTES = 16 << 10  # bodies longer than this are understood in a thread

log = logging.getLogger(__name__)

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
        await self._event.wait()
        self._event.clear()
        if self._gone:
            raise Disconnected
        outputs, self._outputs = self._outputs, []
        return outputs


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine this ingress is connected to."""

    belief: Belief
    link: Link
    about: dict[str, Any]  # what its replica says of itself


@dataclass(frozen=True, slots=True)
class Held:
    """A request that an engine works on, and its lease."""

    engine: Engine
    peer: Peer
    lease: asyncio.Task[None]


class Ingress:
    """The ASGI application of one service. ``lease`` holds a replica's lease for a request.

    It follows the engines between ASGI's ``lifespan.startup`` and ``lifespan.shutdown``.
    """

    def __init__(
        self, spec: ModelSpec, text: Text, vocab_size: int, key: bytes, lease: Lease, version: str
    ) -> None:
        self._text, self._vocab_size = text, vocab_size
        self._lease, self._key, self._seed = lease, key, spec.seed
        self._version = version
        self._id = f"ingress-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._peers: dict[Engine, Peer] = {}
        self._models: dict[str, Model] = {}
        # By replica: what keeps its link, and whether Serve has taken it off its list.
        self._links: dict[str, tuple[asyncio.Task[None], asyncio.Event]] = {}
        self._changed = asyncio.Event()
        self._metrics = Metrics(
            lambda: [(engine, peer.belief.load) for engine, peer in self._peers.items()]
        )

    # Engines.

    async def _live(self, receive: Receive, send: Send) -> None:
        """ASGI's lifespan: connected to the engines from its start to its end."""
        loop = asyncio.get_running_loop()

        def changed(found: directory.Replicas) -> None:
            loop.call_soon_threadsafe(self._follow, found)

        assert (await receive())["type"] == "lifespan.startup"
        directory.watch(changed)
        await send({"type": "lifespan.startup.complete"})
        try:
            await receive()
        finally:
            directory.unwatch(changed)
            for task, _ in self._links.values():
                task.cancel()
        await send({"type": "lifespan.shutdown.complete"})

    def _follow(self, found: directory.Replicas) -> None:
        for replica in self._links.keys() - found.keys():
            self._links[replica][1].set()
        for replica, about in found.items():
            if replica not in self._links and "address" in about:
                unlisted = asyncio.Event()
                connect = self._connect(replica, dict(about), unlisted)
                self._links[replica] = asyncio.get_running_loop().create_task(connect), unlisted

    async def _connect(self, replica: str, about: dict[str, Any], unlisted: asyncio.Event) -> None:
        """Keep a link to one engine until Serve takes its replica off the list.

        Then it gets no new requests, and those it has may end.
        """
        engine = msgspec.convert(about["engine"], Engine)
        host, port = about["address"]
        while not unlisted.is_set():
            belief = Belief(Load(), time.monotonic())

            def hear(load: Load, belief: Belief = belief) -> None:
                belief.hear(load, time.monotonic())

            link = Link(self._id, host, port, self._key, about["epoch"], hear)
            try:
                await link.open()
                self._models[engine.model] = Model(
                    name=engine.model,
                    text=self._text,
                    max_model_len=about["max_model_len"],
                    vocab_size=self._vocab_size,
                    created=self._created,
                )
                self._peers[engine] = Peer(belief, link, about)
                self._changed.set()
                await _first(link.lost, unlisted)
                del self._peers[engine]
                await link.idle.wait()
            except ChannelClosed:
                await asyncio.sleep(BEAT)
            finally:
                self._peers.pop(engine, None)
                await link.close()
        del self._links[replica]

    async def _until(self, ready: Callable[[], bool]) -> None:
        """Wait for an engine that starts again. Raises Refusal."""
        try:
            async with asyncio.timeout(ENGINE_SECONDS):
                while not ready():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise unavailable(
                "no engine is ready; it may be starting again: try in a few seconds"
            ) from None

    # HTTP.

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._live(receive, send)
        assert scope["type"] == "http", "no websockets here"
        exchange = Exchange(scope, receive, send)
        try:
            await self._route(exchange)
        except Refusal as refusal:
            await exchange.answer(refusal.status, refusal.body)
        except Disconnected:
            pass
        except Exception:
            log.exception("%s failed", exchange.scope["path"])
            failure = Refusal("an internal error; see the log", status=500, type="server_error")
            await exchange.answer(failure.status, failure.body)
        finally:
            if exchange.status:
                self._metrics.responses.labels(exchange.status).inc()
        return None

    async def _route(self, exchange: Exchange) -> None:
        method, path = exchange.scope["method"], exchange.scope["path"]
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

    def _unready(self) -> str:
        if not self._peers:
            return "no engine is connected"
        ages = [peer.belief.load.progress_ms / 1000 for peer in self._peers.values()]
        if min(ages) > STALL_SECONDS:
            return f"no engine has ended a step for {min(ages):.0f} s"
        return ""

    def _status(self) -> bytes:
        engines = [
            peer.about | {"load": msgspec.to_builtins(peer.belief.load)}
            for peer in self._peers.values()
        ]
        return msgspec.json.encode({"ready": not self._unready(), "engines": engines})

    # Generation.

    async def _generate(self, exchange: Exchange, understand: Callable[..., Call]) -> None:
        began = time.monotonic()
        body = await exchange.body()
        await self._until(lambda: bool(self._models))
        arguments = {
            "id": uuid.uuid4().hex,
            "seed": random.getrandbits(62) if self._seed is None else self._seed,
            "now": int(time.time()),
        }
        if len(body) > THREAD_BYTES:
            call = await asyncio.to_thread(understand, body, self._models, **arguments)
        else:
            call = understand(body, self._models, **arguments)
        if call.schemas:
            await asyncio.to_thread(structure.check, call.schemas)
        inbox = Inbox()
        watch = asyncio.create_task(exchange.watch(inbox.leave))
        held: dict[str, Held] = {}
        try:
            for request in call.requests:
                held[request.id] = await self._submit(request, inbox.put)
            await self._deliver(exchange, Reply(call), inbox, held, began)
        finally:
            watch.cancel()
            for id, holding in held.items():
                _release(id, holding)
            leases = [holding.lease for holding in held.values()]
            await asyncio.gather(watch, *leases, return_exceptions=True)

    async def _submit(self, request: Request, receive: Callable[[Output], None]) -> Held:
        await self._until(lambda: any(engine.model == request.model for engine in self._peers))
        now = time.monotonic()
        beliefs = {engine: peer.belief for engine, peer in self._peers.items()}
        engine = choose(request, beliefs, now).engine
        peer = self._peers[engine]
        peer.link.submit(request, receive)
        peer.belief.reserve(request, now)
        # In a context of its own: Serve knows a call by an id that it finds in the HTTP request's,
        # and its router would never place a second call of that id, nor let anyone else run.
        hold = self._hold(engine, peer, request)
        return Held(engine, peer, asyncio.create_task(hold, context=Context()))

    async def _hold(self, engine: Engine, peer: Peer, request: Request) -> None:
        """Keep the lease; when the replica dies the request ends here, if not sooner."""
        try:
            await self._lease(engine.replica, request)
            why = "its lease ran out"
        except Exception as error:
            why = f"its engine was lost ({type(error).__name__})"
        peer.link.fail(request.id, f"the request was ended: {why}; send it again")

    async def _deliver(
        self,
        exchange: Exchange,
        reply: Reply,
        inbox: Inbox,
        held: dict[str, Held],
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
                        self._metrics.between_tokens.observe((now - before) / len(output.tokens))
                    last[output.id] = now
                if output.reason is not None:
                    _release(output.id, held[output.id])
                chunks.append(reply.feed(output))
            for id in reply.aborts:
                _release(id, held[id])
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
        await self._send({"type": "http.response.start", "status": status, "headers": headers})


async def _first(*events: asyncio.Event) -> None:
    """Wait for any of them."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _release(id: str, holding: Held) -> None:
    """The request has ended, or must; telling it twice does no harm."""
    holding.peer.link.abort(id)
    holding.peer.belief.release(id)
    holding.lease.cancel()


class IngressReplica:
    """The ingress as a Serve deployment. Wrapped by ``serve.ingress``, which asks for the app."""

    def __init__(
        self, spec: ModelSpec, vocab_size: int, key: bytes, version: str, engines: Any
    ) -> None:
        async def lease(replica: str, request: Request) -> None:
            tokens = len(request.prompt) + request.sampling.max_tokens
            held = engines.lease.remote(
                replica, request.id, tokens, request.priority, request.deadline_ms
            )
            try:
                await held
            finally:
                held.cancel()

        self._app = Ingress(spec, Text(spec.model), vocab_size, key, lease, version)
        # Makes the handle's router, which tells cluster/directory.py of replicas before any call.
        engines._init()

    def __serve_build_asgi_app__(self) -> Ingress:
        return self._app
