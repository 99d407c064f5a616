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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

import msgspec

from cluster import openai, openapi, responses, structure, tokens
from cluster.admission import Admission, Full, Ticket
from cluster.engines import Engines, Held, Lease
from cluster.exchange import Disconnected, Exchange, Receive, Scope, Send
from cluster.items import Response, input_items
from cluster.keys import Keys
from cluster.metrics import CONTENT_TYPE, Metrics
from cluster.openai import Call, Model
from cluster.reply import Reply, model_body, models_body
from cluster.schema import Refusal, late
from cluster.store import Shelf, Turn
from cluster.text import Text
from workers.config import ApiKey, Limits, ModelSpec
from workers.wire import Output, Request

THREAD_BYTES = 16 << 10  # bodies longer than this are understood in a thread
OPEN = ("/health", "/ready", "/metrics")  # no API key is needed for these
MODEL = "/v1/models/"  # and a name
RESPONSE = "/v1/responses/"  # and an id
PAGE = ("after", "limit", "order")  # in queries
INCLUDE = ("include", "include[]")  # likewise; the second is how OpenAI's clients write a list
ABSENT = {  # below /v1/responses
    "cancel": "there are no responses in the background",
    "compact": "no context is compacted",
    "input_tokens": "POST /tokenize counts those of a chat",
}

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
        shelf: Shelf,
    ) -> None:
        self._shelf = shelf
        self._seed, self._version = spec.seed, version
        self._limits, self._keys = limits, keys
        self._engines = Engines(text, vocab_size, key, lease)
        self._admission = Admission(limits)
        self._metrics = Metrics(self._engines.loads)
        self._trials = ThreadPoolExecutor(1, "schemas")
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
            "/v1/responses": self._responses,
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
            self._trials.shutdown(wait=False, cancel_futures=True)
        await send({"type": "lifespan.shutdown.complete"})

    async def _route(self, exchange: Exchange) -> None:
        key, path = None, exchange.path
        if path not in OPEN:
            key = self._keys.allow(exchange.header("authorization"), time.monotonic())
        if path.startswith(RESPONSE):
            return await self._response(exchange, key.name if key else "")
        get = self._model if path.startswith(MODEL) else self._gets.get(path)
        post = self._posts.get(path)
        if get is not None and exchange.method in ("GET", "HEAD"):
            await get(exchange)
        elif post is not None and exchange.method == "POST":
            await self._post(exchange, key, post)
        elif get is not None or post is not None:
            raise _not_taken(exchange, "POST" if post is not None else "GET, HEAD")
        else:
            raise Refusal(f"{path[:256]} does not exist", status=404, code="not_found")
        return None

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

    async def _understand(self, size: int, read: Callable[..., T], *arguments: Any) -> T:
        """What ``read`` makes of ``size`` bytes. Raises Refusal."""
        if size > THREAD_BYTES:
            return await asyncio.to_thread(read, *arguments)
        return read(*arguments)

    async def _tokenize(self, exchange: Exchange, asked: Asked) -> None:
        await self._convert(exchange, asked, tokens.tokenize)

    async def _detokenize(self, exchange: Exchange, asked: Asked) -> None:
        await self._convert(exchange, asked, tokens.detokenize)

    async def _convert(
        self, exchange: Exchange, asked: Asked, read: Callable[[bytes, Mapping[str, Model]], bytes]
    ) -> None:
        models = await self._engines.known()
        body = await self._understand(len(asked.body), read, asked.body, models)
        await exchange.answer(200, body)

    async def _completions(self, exchange: Exchange, asked: Asked) -> None:
        call = await self._call(len(asked.body), openai.completions, asked.body)
        await self._generate(exchange, asked, Reply(call))

    async def _chat(self, exchange: Exchange, asked: Asked) -> None:
        call = await self._call(len(asked.body), openai.chat, asked.body)
        await self._generate(exchange, asked, Reply(call))

    async def _responses(self, exchange: Exchange, asked: Asked) -> None:
        size, owner = len(asked.body), asked.ticket.key
        body = await self._understand(size, responses.read, asked.body)
        turns: list[Turn] = []
        if body.previous_response_id is not None:
            missing = Refusal(
                f"Previous response with id '{body.previous_response_id[:64]}' not found.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
            turns = await self._turns(body.previous_response_id, owner, missing)
            size += sum(len(turn.input) + len(turn.output) for turn in turns)
        reply = Response(await self._call(size, responses.understand, body, turns), body)

        async def end() -> bytes:
            return reply.end(body.store and await self._shelf.keep(reply.kept(owner)))

        await self._generate(exchange, asked, reply, end)

    async def _turns(self, id: str, owner: str, missing: Refusal) -> list[Turn]:
        """A conversation up to a response that was kept. Raises Refusal."""
        if (turns := await self._shelf.turns(id, owner)) is not None:
            return turns
        if await self._shelf.body(id, owner) is None:
            raise missing
        raise Refusal(
            f"The response with id '{id[:64]}' is there, but not all of its earlier turns: one was "
            "deleted, or has gone unused for too long, or they are too many.",
            status=missing.status,
            param=missing.param,
            code="earlier_turn_not_found",
        )

    async def _response(self, exchange: Exchange, owner: str) -> None:
        """A response that was kept. Those of other API keys are not there."""
        id, _, part = exchange.path.removeprefix(RESPONSE).partition("/")
        if why := ABSENT.get(part or id):
            message = f"{exchange.path[:256]} is not supported: {why}"
            raise Refusal(message, status=404, code="not_found")
        missing = Refusal(
            f"Response with id '{id[:64]}' not found.", status=404, code="response_not_found"
        )
        if part not in ("", "input_items"):
            raise missing
        if exchange.method == "DELETE" and not part:
            if not await self._shelf.delete(id, owner):
                raise missing
            said = {"id": id, "object": "response", "deleted": True}
            return await exchange.answer(200, msgspec.json.encode(said))
        if exchange.method not in ("GET", "HEAD"):
            raise _not_taken(exchange, "GET, HEAD" if part else "GET, HEAD, DELETE")
        asked = exchange.query
        if unknown := asked.keys() - {*INCLUDE, *(PAGE if part else ("stream",))}:
            name = min(unknown)[:64]
            raise Refusal(f"the query {name!r} is not supported", param=name)
        if asked.get("stream", ["false"]) != ["false"]:
            raise Refusal("a stored response is not streamed: leave out stream", param="stream")
        for name in INCLUDE:
            responses.check_included(asked.get(name, ()))
        if part:
            turns = await self._turns(id, owner, missing)
            page = {name: asked[name][-1] for name in PAGE if name in asked}
            return await exchange.answer(200, input_items(turns, page))
        if (body := await self._shelf.body(id, owner)) is None:
            raise missing
        return await exchange.answer(200, body)

    async def _call(self, size: int, understand: Callable[..., Call], *arguments: Any) -> Call:
        """What ``size`` bytes ask for. Raises Refusal."""
        named = {
            "id": uuid.uuid4().hex,
            "seed": random.getrandbits(62) if self._seed is None else self._seed,
            "now": int(time.time()),
        }
        models = await self._engines.known()
        return await self._understand(size, partial(understand, *arguments, models, **named))

    async def _generate(
        self,
        exchange: Exchange,
        asked: Asked,
        reply: Reply | Response,
        end: Callable[[], Awaitable[bytes]] | None = None,
    ) -> None:
        """``end``, where it is given, makes the last bytes of a stream."""
        call = reply.call
        exchange.failing = reply.fail
        try:
            size = sum(len(request.prompt) for request in call.requests)
            self._admission.weigh(asked.ticket, len(call.requests), size, time.monotonic())
        except Full as full:
            raise _crowded(full) from None
        inbox = Inbox()
        watch = asyncio.create_task(exchange.watch(inbox.leave))
        held: dict[str, Held] = {}
        try:
            if call.schemas:
                await self._check(call, watch)
            for request in call.requests:
                held[request.id] = await self._engines.submit(asked.timed(request), inbox.put)
            await self._deliver(exchange, reply, inbox, held, asked, end)
        finally:
            watch.cancel()
            for each in held.values():
                each.release()
            leases = [each.lease for each in held.values()]
            await asyncio.gather(watch, *leases, return_exceptions=True)

    async def _check(self, call: Call, watch: asyncio.Task[None]) -> None:
        """Try the call's schemas when it is their turn. Raises Refusal, and Disconnected."""
        loop = asyncio.get_running_loop()
        checked = loop.run_in_executor(self._trials, structure.check, call.schemas)
        try:
            await asyncio.wait((checked, watch), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone = checked.cancel()  # false where it is done; one that waits never runs
        if gone:
            raise Disconnected
        checked.result()

    async def _deliver(
        self,
        exchange: Exchange,
        reply: Reply | Response,
        inbox: Inbox,
        held: dict[str, Held],
        asked: Asked,
        end: Callable[[], Awaitable[bytes]] | None,
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
            if reply.done and reply.failure is None and end is not None:
                chunks.append(await end())
            if any(chunks):
                await exchange.stream(b"".join(chunks), last=reply.done)
        self._metrics.whole.observe(time.monotonic() - asked.began)
        if not exchange.status:
            await exchange.answer(200, reply.body())


def _not_taken(exchange: Exchange, methods: str) -> Refusal:
    return Refusal(
        f"{exchange.path[:256]} does not take {exchange.method[:32]}",
        status=405,
        code="method_not_allowed",
        headers={"allow": methods},
    )


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
        store: Any,
        engines: Any,
    ) -> None:
        async def ask(what: str, *arguments: Any) -> Any:
            return await getattr(store, what).remote(*arguments)

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
            spec, text, vocab_size, key, lease, version, limits, Keys(keys, key_file), Shelf(ask)
        )
        # Makes the handle's router, which tells cluster/directory.py of replicas before any call.
        engines._init()

    def __serve_build_asgi_app__(self) -> Ingress:
        return self._app
