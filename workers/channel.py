"""The side channel between an ingress and an engine: requests one way, batched tokens the other.

One TCP connection per ingress and engine; frames are a length and msgpack. The engine listens, the
ingress dials and both prove that they know the service's key without sending it. Tokens do not
travel through Serve: a step's outputs are one frame per ingress, whatever the number of requests.

An ingress that vanishes has ``GRACE`` seconds to come back and say how many tokens it has seen of
each request; then its requests are aborted. An ingress that does not read is cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import time
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from workers.wire import Abort, Engine, Load, Logprobs, Output, Outputs, Request

BEAT = 1.0  # seconds between heartbeats, both ways
SILENCE = 5.0  # seconds without a frame after which the other side is taken for dead
GRACE = 5.0  # seconds a vanished ingress keeps its requests
MAX_FRAME = 64 << 20  # bytes
MAX_BACKLOG = 16 << 20  # unsent bytes after which an ingress is cut off

log = logging.getLogger(__name__)


class ChannelClosed(ConnectionError):
    """The other side is gone, or could not prove that it belongs to this service."""


class Challenge(msgspec.Struct, tag=True):
    nonce: bytes


class Proof(msgspec.Struct, tag=True):
    ingress: str
    nonce: bytes
    digest: bytes


class Welcome(msgspec.Struct, tag=True):
    digest: bytes
    engine: Engine
    epoch: int


class Submit(msgspec.Struct, tag=True):
    request: Request


class Cancel(msgspec.Struct, tag=True):
    abort: Abort


class Resume(msgspec.Struct, tag=True):
    """After a broken connection: the requests that still live, and how many of the generated tokens
    of each have arrived. Requests not named here are aborted."""

    seen: dict[str, int]


class Beat(msgspec.Struct, tag=True):
    pass


class Deliver(msgspec.Struct, tag=True):
    outputs: Outputs


Frame = Challenge | Proof | Welcome | Submit | Cancel | Resume | Beat | Deliver

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


def encode(frame: Frame) -> bytes:
    body = _encoder.encode(frame)
    return len(body).to_bytes(4, "little") + body


async def receive(reader: asyncio.StreamReader) -> Any:
    """The next frame. Raises ChannelClosed at the end, on nonsense and after ``SILENCE``."""
    try:
        async with asyncio.timeout(SILENCE):
            size = int.from_bytes(await reader.readexactly(4), "little")
            if size > MAX_FRAME:
                raise ChannelClosed(f"a frame of {size} bytes exceeds {MAX_FRAME}")
            return _decoder.decode(await reader.readexactly(size))
    except TimeoutError:
        raise ChannelClosed(f"no frame within {SILENCE:.0f} s") from None
    except EOFError:
        raise ChannelClosed("the other side has closed the connection") from None
    except (OSError, msgspec.DecodeError) as error:
        raise ChannelClosed(str(error)) from error


def prove(key: bytes, role: bytes, challenge: bytes, own: bytes) -> bytes:
    """HMAC-SHA256 over the role and both nonces: no side can reflect the other's proof."""
    return hmac.digest(key, role + challenge + own, "sha256")


class _Lease:
    """A request's outputs as the engine has given them, kept for an ingress that comes back."""

    __slots__ = (
        "cached", "end", "ended", "epoch", "first", "id", "ingress", "logprobs", "sent", "tokens",
    )  # fmt: skip

    def __init__(self, ingress: str, request: Request) -> None:
        self.ingress, self.id, self.epoch = ingress, request.id, request.epoch
        self.first = len(request.emitted)  # offset of tokens[0]
        self.sent = self.first  # offset of the first token that has not been sent
        self.tokens: list[int] = []
        self.logprobs: list[Logprobs] = []  # of all tokens, or none
        self.cached = 0
        self.end: Output | None = None
        self.ended = 0.0

    def due(self, interval: int) -> bool:
        """Whether what is not sent yet must be: the first tokens, ``interval`` of them, an end."""
        held = len(self.tokens) - (self.sent - self.first)
        return held >= interval or self.sent == self.first or self.end is not None

    def take(self) -> Output:
        """Everything from ``sent`` on, which is then sent."""
        start = self.sent
        self.sent = self.first + len(self.tokens)
        rest = self.tokens[start - self.first :]
        output = Output(self.id, self.epoch, start, rest, cached=self.cached)
        output.logprobs = self.logprobs[start - self.first :] or None
        if self.end is not None:
            end = self.end
            output.reason, output.detail, output.stop = end.reason, end.detail, end.stop
        return output


class ChannelServer:
    """The engine's end. Runs on one event loop; ``publish`` may be called from another thread.

    ``submit`` and ``abort`` hand requests to the engine and must not block. ``load`` gives the
    engine's state for heartbeats. A request's tokens are sent ``interval`` at a time, but the first
    ones at once and the last ones with its end: here, because what is not sent costs nobody.
    """

    def __init__(
        self,
        engine: Engine,
        epoch: int,
        key: bytes,
        submit: Callable[[Request], None],
        abort: Callable[[str], None],
        load: Callable[[], Load],
        interval: int = 1,
    ) -> None:
        self.engine, self.epoch = engine, epoch
        self._key, self._submit, self._abort, self._load = key, submit, abort, load
        self._interval = interval
        self._writers: dict[str, asyncio.StreamWriter] = {}
        self._leases: dict[str, _Lease] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def listen(self, host: str) -> int:
        """Accept ingresses on a free port of ``host``; returns the port."""
        self._loop = asyncio.get_running_loop()
        self._server = await asyncio.start_server(
            lambda reader, writer: self._spawn(self._serve(reader, writer)), host, 0
        )
        self._spawn(self._beat())
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop listening and hang up; what has been written is sent first."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers.values()):
            writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), BEAT)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def publish(self, outputs: list[Output], load: Load | None = None) -> None:
        """Send a step's outputs to whoever holds the requests. Thread-safe, does not block."""
        assert self._loop is not None, "listen first"
        self._loop.call_soon_threadsafe(self._deliver, outputs, load)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _deliver(self, outputs: list[Output], load: Load | None) -> None:
        shares: dict[str, list[Output]] = {}
        for output in outputs:
            lease = self._leases.get(output.id)
            if lease is None:
                continue  # its ingress is gone for good
            if output.cached:
                lease.cached = output.cached
            lease.tokens += output.tokens
            lease.logprobs += output.logprobs or ()
            if output.reason is not None:
                lease.end, lease.ended = output, time.monotonic()
            if lease.due(self._interval):
                shares.setdefault(lease.ingress, []).append(lease.take())
        for ingress, share in shares.items():
            self._send(ingress, share, load)
        if load is not None:
            for ingress in self._writers.keys() - shares.keys():
                self._send(ingress, [], load)

    def _send(self, ingress: str, outputs: list[Output], load: Load | None) -> None:
        writer = self._writers.get(ingress)
        if writer is None or writer.is_closing():
            return
        writer.write(encode(Deliver(Outputs(self.engine, self.epoch, outputs, load))))
        if writer.transport.get_write_buffer_size() > MAX_BACKLOG:
            log.warning("ingress %s does not read: cut off", ingress)
            writer.transport.abort()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT)
            self._deliver([], self._load())
            past = time.monotonic() - GRACE
            for id in [id for id, le in self._leases.items() if le.end and le.ended < past]:
                del self._leases[id]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ingress = ""
        try:
            nonce = secrets.token_bytes(32)
            writer.write(encode(Challenge(nonce)))
            proof = await receive(reader)
            if not isinstance(proof, Proof) or not hmac.compare_digest(
                proof.digest, prove(self._key, b"ingress", nonce, proof.nonce)
            ):
                raise ChannelClosed("the ingress does not know this service's key")
            digest = prove(self._key, b"engine", proof.nonce, nonce)
            writer.write(encode(Welcome(digest, self.engine, self.epoch)))
            ingress = proof.ingress
            if previous := self._writers.pop(ingress, None):
                previous.transport.abort()
            self._writers[ingress] = writer
            while True:
                self._take(ingress, await receive(reader))
        except ChannelClosed as closed:
            log.info("ingress %s: %s", ingress or "unknown", closed)
        finally:
            writer.close()
            if ingress and self._writers.get(ingress) is writer:
                del self._writers[ingress]
                if self._server is not None and self._server.is_serving():
                    self._spawn(self._abandon(ingress))

    def _take(self, ingress: str, frame: Frame) -> None:
        if isinstance(frame, Submit):
            request = frame.request
            if request.id in self._leases:
                raise ChannelClosed(f"request {request.id!r} came twice")
            self._leases[request.id] = _Lease(ingress, request)
            self._submit(request)
        elif isinstance(frame, Cancel):
            self._abort(frame.abort.id)
        elif isinstance(frame, Resume):
            for id, seen in frame.seen.items():
                self._resume(ingress, id, seen)
            for id, lease in self._leases.items():
                if lease.ingress == ingress and lease.end is None and id not in frame.seen:
                    self._abort(id)
        elif not isinstance(frame, Beat):
            raise ChannelClosed(f"unexpected {type(frame).__name__}")

    def _resume(self, ingress: str, id: str, seen: int) -> None:
        lease = self._leases.get(id)
        if lease is None or lease.ingress != ingress:
            missed = Output(id, 0, seen, [], "error", "the engine does not know the request")
        else:
            lease.sent = seen
            missed = lease.take()
        self._send(ingress, [missed], None)

    async def _abandon(self, ingress: str) -> None:
        await asyncio.sleep(GRACE)
        if ingress not in self._writers:
            for id in [id for id, lease in self._leases.items() if lease.ingress == ingress]:
                if self._leases.pop(id).end is None:
                    self._abort(id)


Receive = Callable[[Output], None]


class Link:
    """The ingress's end: one engine, and the requests it holds for us.

    ``receive`` of a request gets its Outputs until one has a reason. When the engine is lost, every
    live request gets an Output with reason ``error``; a broken connection alone is repaired.
    ``hear`` gets the engine's reports. ``lost`` is set when the engine is, ``idle`` while no
    request is live.
    """

    def __init__(
        self,
        ingress: str,
        host: str,
        port: int,
        key: bytes,
        epoch: int,
        hear: Callable[[Load], None],
    ) -> None:
        self.lost, self.idle = asyncio.Event(), asyncio.Event()
        self.idle.set()
        self._ingress, self._address, self._key = ingress, (host, port), key
        self._epoch, self._hear = epoch, hear
        self._live: dict[str, tuple[Receive, int]] = {}  # id -> (receive, generated tokens seen)
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Dial and prove. Raises ChannelClosed."""
        reader = await self._dial()
        self._task = asyncio.create_task(self._run(reader))

    async def close(self) -> None:
        """Hang up; live requests end with an error."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._lose("the ingress is closing")

    def submit(self, request: Request, receive: Receive) -> None:
        """Send a request. Raises ChannelClosed when the engine is lost."""
        if self.lost.is_set():
            raise ChannelClosed("the engine is gone")
        self._live[request.id] = (receive, len(request.emitted))
        self.idle.clear()
        self._write(Submit(request))

    def abort(self, id: str) -> None:
        """Stop a request and forget it: no further Output of it is delivered."""
        if id in self._live:
            self._forget(id)
            self._write(Cancel(Abort(id)))

    def _forget(self, id: str) -> None:
        del self._live[id]
        if not self._live:
            self.idle.set()

    def _write(self, frame: Frame) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode(frame))

    async def _dial(self) -> asyncio.StreamReader:
        try:
            async with asyncio.timeout(SILENCE):
                reader, writer = await asyncio.open_connection(*self._address)
        except (OSError, TimeoutError) as error:
            raise ChannelClosed(f"no engine at {self._address[0]}:{self._address[1]}") from error
        try:
            challenge = await receive(reader)
            if not isinstance(challenge, Challenge):
                raise ChannelClosed("no challenge")
            nonce = secrets.token_bytes(32)
            digest = prove(self._key, b"ingress", challenge.nonce, nonce)
            writer.write(encode(Proof(self._ingress, nonce, digest)))
            welcome = await receive(reader)
            if not isinstance(welcome, Welcome) or not hmac.compare_digest(
                welcome.digest, prove(self._key, b"engine", nonce, challenge.nonce)
            ):
                raise ChannelClosed("the engine does not know this service's key")
            if welcome.epoch != self._epoch:
                raise ChannelClosed("another engine answers at this address")
        except BaseException:
            writer.transport.abort()
            raise
        self._writer = writer
        return reader

    async def _run(self, reader: asyncio.StreamReader) -> None:
        beat = asyncio.create_task(self._beat())
        try:
            while True:
                try:
                    self._take(await receive(reader))
                except ChannelClosed as closed:
                    reader = await self._redial(closed)
        except ChannelClosed as closed:
            self._lose(str(closed))
        finally:
            beat.cancel()
            if self._writer is not None:
                self._writer.transport.abort()

    async def _redial(self, why: ChannelClosed) -> asyncio.StreamReader:
        """A new connection to the same engine, which then sends what was missed."""
        log.warning("side channel to %s broke (%s); dialling again", self._address, why)
        if self._writer is not None:
            self._writer.close()
        try:
            reader = await self._dial()
        except ChannelClosed:
            raise ChannelClosed(f"the engine is gone ({why}); send the request again") from why
        self._write(Resume({id: seen for id, (_, seen) in self._live.items()}))
        return reader

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT)
            self._write(Beat())

    def _take(self, frame: Frame) -> None:
        if not isinstance(frame, Deliver):
            raise ChannelClosed(f"unexpected {type(frame).__name__}")
        outputs = frame.outputs
        if outputs.epoch != self._epoch:
            return  # a zombie's late word
        if outputs.load is not None:
            self._hear(outputs.load)
        for output in outputs.outputs:
            live = self._live.get(output.id)
            if live is None:
                continue
            if output.reason is None:
                self._live[output.id] = (live[0], output.offset + len(output.tokens))
            else:
                self._forget(output.id)
            live[0](output)

    def fail(self, id: str, why: str) -> None:
        """End a live request with an error, and stop it if the engine is still there."""
        if live := self._live.get(id):
            self.abort(id)
            live[0](Output(id, 0, live[1], [], "error", why))

    def _lose(self, why: str) -> None:
        self.lost.set()
        for id in list(self._live):
            self.fail(id, why)
