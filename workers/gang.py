"""Engines that share experts, together: one coordinator, and a member in every rank's process.

Each member has a connection to the coordinator, beside engine 0's first rank, and a thread that
reads it and tells how far the rank is: a rank that hangs is told from one that waits. Whoever is
lost or silent ends the group on every rank within the deadline. What is agreed: ``workers.rounds``.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

import msgspec

from workers.rounds import (
    Beat,
    Call,
    Ended,
    FromRank,
    Hello,
    Leave,
    Made,
    Met,
    Rank,
    Retire,
    RoundLost,
    Rounds,
    ToRank,
    name,
)
from workers.wire import Round

DEADLINE = 120.0  # seconds of a round, and of a rank's silence; as long as a collective's
MEET = 120.0  # seconds for all ranks to come
BEAT = 1.0  # seconds between signs of life, at most
HANDSHAKE = 5.0  # seconds a connection has to say who it is
GRACE = 3.0  # seconds in which others are known to be lost, when a step fails because of them
MAX_FRAME = 1 << 20  # bytes

log = logging.getLogger(__name__)

_encode = msgspec.msgpack.Encoder().encode


def _frame(message: FromRank | ToRank) -> bytes:
    body = _encode(message)
    return len(body).to_bytes(4, "little") + body


def _beat(deadline: float) -> float:
    return min(BEAT, deadline / 5)


class Coordinator:
    """Listens from the start, in a thread of its own, until ``close``."""

    def __init__(
        self,
        host: str,
        key: bytes,
        engines: int,
        ranks: int,
        deadline: float = DEADLINE,
        meet: float = MEET,
    ) -> None:
        self._key = key
        # So often it looks for who is overdue: all must hear of it before they lose patience.
        self._beat = _beat(min(deadline, meet))
        self._rounds = Rounds(engines, ranks, deadline, meet)
        self._members: dict[Rank, asyncio.StreamWriter] = {}
        self._ended: Ended | None = None
        self._decode = msgspec.msgpack.Decoder(FromRank).decode
        self._listener = socket.create_server((host, 0))
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="coordinator", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def close(self) -> None:
        """End the group, if it has not ended, and the thread."""
        with contextlib.suppress(RuntimeError):  # closed before
            self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(HANDSHAKE)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._talk, sock=self._listener)
        async with server:
            while not self._closing.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), self._beat)
                if why := self._rounds.overdue(time.monotonic()):
                    self._end(why)
                self._tell(Beat())
            self._end("the coordinator was closed")
            for writer in self._members.values():
                writer.close()
            talks = asyncio.all_tasks() - {asyncio.current_task()}
            if talks:
                await asyncio.wait(talks, timeout=GRACE)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rank: Rank | None = None
        try:
            async with asyncio.timeout(HANDSHAKE):
                hello = await self._identify(reader, writer)
            if hello is None:
                return
            why = self._rounds.meet(hello, time.monotonic())
            if self._ended is None and why is None:
                rank = (hello.engine, hello.rank)
                self._members[rank] = writer
                if not self._rounds.missing:
                    self._tell(Met())
                while True:
                    self._take(rank, self._decode(await _read(reader)))
            if why:
                self._end(why)
            assert self._ended is not None
            writer.write(_frame(self._ended))
            await writer.drain()
        except (OSError, EOFError, TimeoutError, msgspec.DecodeError) as error:
            if rank is not None:
                log.info("%s: %r", name(rank), error)
        finally:
            if rank is not None:
                del self._members[rank]
                self._end(f"{name(rank)} is gone")
            writer.close()

    async def _identify(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Hello | None:
        """Who comes, if it knows the key."""
        nonce = secrets.token_bytes(32)
        writer.write(nonce)
        digest = await reader.readexactly(32)
        body = await _read(reader)
        if not hmac.compare_digest(digest, hmac.digest(self._key, nonce + body, "sha256")):
            return None
        hello = self._decode(body)
        return hello if isinstance(hello, Hello) else None

    def _take(self, rank: Rank, message: FromRank) -> None:
        now = time.monotonic()
        if isinstance(message, Beat):
            self._rounds.heard(rank, message.progress, now)
        elif isinstance(message, Leave):
            self._end(message.why)
        elif isinstance(message, Retire):
            if why := self._rounds.retire(rank[0]):
                self._end(why)
        elif isinstance(message, Call):
            self._rounds.say(rank[0], message.tokens)
            if self._ended is None and (made := self._rounds.make(now)) is not None:
                frame = _frame(Made(made))
                for (_, number), writer in self._members.items():
                    if number == 0:
                        writer.write(frame)

    def _end(self, why: str) -> None:
        if self._ended is None:
            self._ended = Ended(why)
            self._tell(self._ended)

    def _tell(self, message: ToRank) -> None:
        frame = _frame(message)
        for writer in self._members.values():
            writer.write(frame)


async def _read(reader: asyncio.StreamReader) -> bytes:
    size = int.from_bytes(await reader.readexactly(4), "little")
    if size > MAX_FRAME:
        raise ConnectionError(f"a message of {size} bytes exceeds {MAX_FRAME}")
    return await reader.readexactly(size)


class Member:
    """A rank's part. ``progress`` says how far it is in what it does with all others; ``abort``
    ends what waits for them. Both are called from the member's thread.

    Raises RoundLost where ``facts`` differ from those of other ranks, or not all come in time.
    """

    def __init__(
        self,
        address: tuple[str, int],
        key: bytes,
        rank: Rank,
        facts: dict[str, str],
        progress: Callable[[], int] = lambda: 0,
        abort: Callable[[], object] = lambda: None,
        deadline: float = DEADLINE,
        meet: float = MEET,
    ) -> None:
        self.engine, self._rank = rank[0], rank
        self.failure: str | None = None
        self._progress, self._abort, self._deadline = progress, abort, deadline
        self._notify: Callable[[], object] = lambda: None
        self._rounds: SimpleQueue[Round | None] = SimpleQueue()
        self._resting = False
        self._met, self._over = threading.Event(), threading.Event()
        self._lock = threading.Lock()  # of writing
        self._decode = msgspec.msgpack.Decoder(ToRank).decode
        self._data = bytearray()
        try:
            self._sock = socket.create_connection(address, meet)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            nonce = self._sock.recv(32, socket.MSG_WAITALL)
            hello = _encode(Hello(*rank, facts))
            proof = hmac.digest(key, nonce + hello, "sha256")
            self._sock.sendall(proof + len(hello).to_bytes(4, "little") + hello)
        except OSError as error:
            raise RoundLost(f"{name(rank)} cannot reach engine 0, rank 0: {error}") from error
        threading.Thread(target=self._listen, name="member", daemon=True).start()
        if not self._met.wait(meet + HANDSHAKE):  # the coordinator says first who is missing
            self._lose(f"{name(rank)} has waited {meet:.1f} s for the others to come")
        if self.failure is not None:
            self.close()
            raise RoundLost(self.failure)

    def notify(self, notify: Callable[[], object]) -> None:
        """Call this when a round is made or the group has ended, from the member's thread."""
        self._notify = notify
        if self.failure is not None:
            notify()

    def call(self, tokens: int) -> None:
        """Bring tokens to a round. ``wait`` gives it, and those that were made before."""
        self._resting = False
        self._send(Call(tokens))

    def rest(self) -> None:
        """Bring nothing, until the next call."""
        if not self._resting:
            self._resting = True
            self._send(Call(0))

    def wait(self, timeout: float) -> Round | None:
        """The next round, if it is made in time. Raises RoundLost: by the coordinator's deadline
        or, if that is gone, by the member's own."""
        try:
            round = self._rounds.get(timeout > 0, timeout)
        except Empty:
            return None
        if round is None:
            self._rounds.put(None)
            raise RoundLost(self.failure)
        return round

    def retire(self) -> None:
        """Bring nothing any more. The group ends when all engines have said so."""
        self.rest()
        self._send(Retire())

    def explain(self, error: Exception) -> Exception:
        """Why a step failed: the loss of another rank, if it was that. Else the group ends because
        of this one."""
        self._over.wait(GRACE)
        if self.failure is not None:
            return RoundLost(self.failure)
        self._send(Leave(f"{name(self._rank)} failed: {type(error).__name__}: {error}"))
        return error

    def close(self) -> None:
        self._lose("this rank has left")
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # closing would not wake the thread

    def _send(self, message: FromRank) -> None:
        with self._lock, contextlib.suppress(OSError):  # the thread will see it, too
            self._sock.sendall(_frame(message))

    def _listen(self) -> None:
        heard = beaten = time.monotonic()
        beat = _beat(self._deadline)
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        try:
            while self.failure is None:
                readable = poll.poll(beat * 1000)
                now = time.monotonic()
                if readable:
                    part = self._sock.recv(1 << 16)
                    if not part:
                        raise ConnectionError("it closed the connection")
                    heard = now
                    self._data += part
                    while (message := self._next()) is not None:
                        self._take(message)
                elif now - heard > self._deadline:
                    raise TimeoutError(f"silent for {now - heard:.1f} s")
                if now - beaten >= beat:
                    beaten = now
                    self._send(Beat(self._progress()))
        except (OSError, msgspec.DecodeError) as error:
            self._lose(f"engine 0, rank 0 is gone: {error}")
        finally:
            self._sock.close()

    def _next(self) -> ToRank | None:
        size = int.from_bytes(self._data[:4], "little")
        if len(self._data) < 4 + size or len(self._data) < 4:
            return None
        body = bytes(self._data[4 : 4 + size])
        del self._data[: 4 + size]
        message: ToRank = self._decode(body)
        return message

    def _take(self, message: ToRank) -> None:
        if isinstance(message, Met):
            self._met.set()
        elif isinstance(message, Made):
            self._rounds.put(message.round)
            self._notify()
        elif isinstance(message, Ended):
            self._lose(message.why)

    def _lose(self, why: str) -> None:
        if self.failure is None:
            self.failure = why
            self._rounds.put(None)
            self._met.set()
            self._over.set()
            self._abort()
            self._notify()
