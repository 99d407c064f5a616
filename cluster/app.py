"""The ingress: routes, who may come in, and an answer from its request to its last token.

Each request watches its client while it waits: a queued request sends nothing, so a client that
leaves would not be noticed otherwise. Whatever way it ends, the engine is told.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import msgspec

from cluster import openai, openapi, structure, tokens
from cluster.admission import Admission, Full, Ticket
from cluster.engines import Engines, Held, Lease
from cluster.exchange import Disconnected, Exchange, Receive, Scope, Send
from cluster.keys import Keys
from cluster.metrics import CONTENT_TYPE, Metrics
from cluster.openai import Call, Model
from cluster.reply import Reply, model_body, models_body
from cluster.schema import Refusal, late
from cluster.text import Text
from workers.config import ApiKey, Limits, ModelSpec
from workers.wire import Output, Request

THREAD_BYTES = 16 << 10  # bodies longer than this are understood in a thread
OPEN = ("/health", "/ready", "/metrics")  # no API key is needed for these
MODEL = "/v1/models/"  # and a name

log = logging.getLogger(__name__)

T = TypeVar("T")


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
class Asked:
    """A body that has come in, and when it must be answered."""

    ticket: Ticket
    body: bytes
    began: float
    deadline: float | None

    def timed(self, request: Request) -> Request:
        """The request with the time it has left, so that its engine drops it when it is late."""
        if self.deadline is None:
            return request
        left = math.ceil(1000 * max(0.0, self.deadline - time.monotonic()))
        return msgspec.structs.replace(request, deadline_ms=left)


Answer: TypeAlias = Callable[[Exchange, Asked], Awaitable[None]]


class Ingress:
    """The ASGI application of one service. ``lease`` holds a replica's lease for a request.

    It follows the engines between ASGI's ``lifespan.startup`` and ``lifespan.shutdown``.
    """

    def __init__(
        self,
        spec: ModelSpec,
        text: Text,
        vocab_size: int,
        key: bytes,
        lease: Lease,
        version: str,
        limits: Limits,
        keys: Keys,
    ) -> None:
        self._seed, self._version = spec.seed, version
        self._limits, self._keys = limits, keys
        self._engines = Engines(text, vocab_size, key, lease)
        self._admission = Admission(limits)
        self._metrics = Metrics(self._engines.loads)
        self._gets: Mapping[str, Callable[[Exchange], Awaitable[None]]] = {
            "/health": self._health,
            "/ready": self._ready,
            "/version": self._say_version,
            "/metrics": self._show_metrics,
            "/status": self._status,
            "/openapi.json": self._openapi,
            "/v1/models": self._models,
        }
        self._posts: Mapping[str, Answer] = {
            "/v1/completions": self._completions,
            "/v1/chat/completions": self._chat,
            "/tokenize": self._tokenize,
            "/detokenize": self._detokenize,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._live(receive, send)
        if scope["type"] == "websocket":  # there are none: a 403
            return await send({"type": "websocket.close"})
        exchange = Exchange(scope, receive, send)
        try:
            try:
                await self._route(exchange)
            except Refusal as refusal:
                await exchange.refuse(refusal)
            except Disconnected:
                raise
            except Exception:
                log.exception("%s failed (%s)", exchange.path, exchange.header("x-request-id"))
                message = "an internal error; see the log"
                await exchange.refuse(Refusal(message, status=500, type="server_error"))
        except Disconnected:
            pass
        finally:
            if exchange.status:
                self._metrics.responses.labels(exchange.status).inc()
        return None

    async def _live(self, receive: Receive, send: Send) -> None:
        """ASGI's lifespan: connected to the engines from its start to its end."""
        assert (await receive())["type"] == "lifespan.startup"
        leave = self._engines.follow()
        await send({"type": "lifespan.startup.complete"})
        try:
            await receive()
        finally:
            leave()
        await send({"type": "lifespan.shutdown.complete"})

    async def _route(self, exchange: Exchange) -> None:
        key, path = None, exchange.path
        if path not in OPEN:
            key = self._keys.allow(exchange.header("authorization"), time.monotonic())
        get = self._model if path.startswith(MODEL) else self._gets.get(path)
        post = self._posts.get(path)
        if get is not None and exchange.method in ("GET", "HEAD"):
            await get(exchange)
        elif post is not None and exchange.method == "POST":
            await self._post(exchange, key, post)
        elif get is not None or post is not None:
            raise Refusal(
                f"{path[:256]} does not take {exchange.method[:32]}",
                status=405,
                code="method_not_allowed",
                headers={"allow": "POST" if post is not None else "GET, HEAD"},
            )
        else:
            raise Refusal(f"{path[:256]} does not exist", status=404, code="not_found")

    # What people and machines look at.

    async def _health(self, exchange: Exchange) -> None:
        await exchange.answer(200, b"{}")

    async def _ready(self, exchange: Exchange) -> None:
        reason = self._engines.unready()
        body = {"ready": not reason, "reason": reason}
        await exchange.answer(503 if reason else 200, msgspec.json.encode(body))

    async def _say_version(self, exchange: Exchange) -> None:
        await exchange.answer(200, msgspec.json.encode({"version": self._version}))

    async def _show_metrics(self, exchange: Exchange) -> None:
        await exchange.answer(200, self._metrics.text(), CONTENT_TYPE)

    async def _status(self, exchange: Exchange) -> None:
        found = {
            "ready": not self._engines.unready(),
            "requests": len(self._admission),
            "engines": self._engines.about(),
        }
        await exchange.answer(200, msgspec.json.encode(found))

    async def _openapi(self, exchange: Exchange) -> None:
        await exchange.answer(200, openapi.document(self._version))

    async def _models(self, exchange: Exchange) -> None:
        await exchange.answer(200, models_body(self._engines.models))

    async def _model(self, exchange: Exchange) -> None:
        name = exchange.path.removeprefix(MODEL)
        await exchange.answer(200, model_body(name, self._engines.models))

    # What is asked.

    async def _post(self, exchange: Exchange, key: ApiKey | None, answer: Answer) -> None:
        """A place, a body and a deadline: nothing is done for a request before it has these."""
        began = time.monotonic()
        seconds = exchange.timeout(self._limits.request_timeout)
        try:
            ticket = self._admission.enter(key, began)
        except Full as full:
            raise _crowded(full) from None
        try:
            async with asyncio.timeout(seconds):
                body = await exchange.json(self._limits.max_body_size)
                deadline = None if seconds is None else began + seconds
                await answer(exchange, Asked(ticket, body, began, deadline))
        except TimeoutError:
            raise late(f"the request was not done within {seconds:g} s") from None
        finally:
            self._admission.leave(ticket, time.monotonic())

    async def _understand(self, body: bytes, read: Callable[[bytes, Mapping[str, Model]], T]) -> T:
        """What ``read`` makes of a body, and of the models there are. Raises Refusal."""
        models = await self._engines.known()
        if len(body) > THREAD_BYTES:
            return await asyncio.to_thread(read, body, models)
        return read(body, models)

    async def _tokenize(self, exchange: Exchange, asked: Asked) -> None:
        await exchange.answer(200, await self._understand(asked.body, tokens.tokenize))

    async def _detokenize(self, exchange: Exchange, asked: Asked) -> None:
        await exchange.answer(200, await self._understand(asked.body, tokens.detokenize))

    async def _completions(self, exchange: Exchange, asked: Asked) -> None:
        await self._generate(exchange, asked, openai.completions)

    async def _chat(self, exchange: Exchange, asked: Asked) -> None:
        await self._generate(exchange, asked, openai.chat)

    async def _generate(
        self, exchange: Exchange, asked: Asked, understand: Callable[..., Call]
    ) -> None:
        named = {
            "id": uuid.uuid4().hex,
            "seed": random.getrandbits(62) if self._seed is None else self._seed,
            "now": int(time.time()),
        }
        call = await self._understand(
            asked.body, lambda body, models: understand(body, models, **named)
        )
        try:
            size = sum(len(request.prompt) for request in call.requests)
            self._admission.weigh(asked.ticket, len(call.requests), size, time.monotonic())
        except Full as full:
            raise _crowded(full) from None
        if call.schemas:
            await asyncio.to_thread(structure.check, call.schemas)
        inbox = Inbox()
        watch = asyncio.create_task(exchange.watch(inbox.leave))
        held: dict[str, Held] = {}
        try:
            for request in call.requests:
                held[request.id] = await self._engines.submit(asked.timed(request), inbox.put)
            await self._deliver(exchange, Reply(call), inbox, held, asked)
        finally:
            watch.cancel()
            for each in held.values():
                each.release()
            leases = [each.lease for each in held.values()]
            await asyncio.gather(watch, *leases, return_exceptions=True)

    async def _deliver(
        self, exchange: Exchange, reply: Reply, inbox: Inbox, held: dict[str, Held], asked: Asked
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
                        self._admission.start(asked.ticket, now)
                        self._metrics.first_token.observe(now - asked.began)
                    else:
                        self._metrics.between_tokens.observe((now - before) / len(output.tokens))
                    last[output.id] = now
                if output.reason is not None:
                    held[output.id].release()
                chunks.append(reply.feed(output))
            for id in reply.aborts:
                held[id].release()
            reply.aborts.clear()
            if reply.failure is not None and not exchange.status:
                raise reply.failure
            if any(chunks):
                await exchange.stream(b"".join(chunks), last=reply.done)
        self._metrics.whole.observe(time.monotonic() - asked.began)
        if not exchange.status:
            await exchange.answer(200, reply.body())


def _crowded(full: Full) -> Refusal:
    return Refusal(
        f"{full}; try again in {full.seconds} s",
        status=429,
        type=full.kind,
        code="rate_limit_exceeded",
        headers={"retry-after": str(full.seconds)},
    )


class IngressReplica:
    """The ingress as a Serve deployment. Wrapped by ``serve.ingress``, which asks for the app."""

    def __init__(
        self,
        spec: ModelSpec,
        vocab_size: int,
        key: bytes,
        version: str,
        limits: Limits,
        keys: tuple[ApiKey, ...],
        key_file: str,
        engines: Any,
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

        text = Text(spec.model)
        self._app = Ingress(
            spec, text, vocab_size, key, lease, version, limits, Keys(keys, key_file)
        )
        # Makes the handle's router, which tells cluster/directory.py of replicas before any call.
        engines._init()

    def __serve_build_asgi_app__(self) -> Ingress:
        return self._app
