"""The side channel over real loopback connections: keys, batches, broken links, slow readers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from workers import channel
from workers.channel import Beat, ChannelClosed, ChannelServer, Link, Submit, encode
from workers.wire import Engine, FinishReason, Load, Logprobs, Output, Request, Sampling

KEY = b"the key of this service"
ENGINE = Engine("s", "m", "replica")
EPOCH = 7
DEADLINE = 120.0


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE):
            await work()

    asyncio.run(bounded())


def request(id: str, **fields: Any) -> Request:
    return Request(id=id, model="m", prompt=[1], sampling=Sampling(max_tokens=100), **fields)


class Fake:
    """An engine that does as it is told."""

    def __init__(self, interval: int = 1) -> None:
        self.requests: dict[str, Request] = {}
        self.aborted: list[str] = []
        self.changed = asyncio.Event()
        self.server = ChannelServer(
            ENGINE, EPOCH, KEY, self._submit, self._abort, lambda: Load(running=3), interval
        )
        self.port = 0

    def _submit(self, request: Request) -> None:
        self.requests[request.id] = request
        self.changed.set()

    def _abort(self, id: str) -> None:
        self.aborted.append(id)
        self.changed.set()

    async def until(self, ready: Callable[[], bool]) -> None:
        while not ready():
            self.changed.clear()
            await self.changed.wait()


class Client:
    """A link, and what has come over it."""

    def __init__(self, fake: Fake, port: int, key: bytes = KEY, epoch: int = EPOCH) -> None:
        self.loads: list[Load] = []
        self.outputs: dict[str, list[Output]] = {}
        self.changed = asyncio.Event()
        self.link = Link("ingress", "127.0.0.1", port, key, epoch, self._hear)

    def _hear(self, load: Load) -> None:
        self.loads.append(load)
        self.changed.set()

    def receive(self, output: Output) -> None:
        self.outputs.setdefault(output.id, []).append(output)
        self.changed.set()

    async def until(self, ready: Callable[[], bool]) -> None:
        while not ready():
            self.changed.clear()
            await self.changed.wait()

    def tokens(self, id: str) -> list[int]:
        """All that came, without gap or repeat."""
        tokens: list[int] = []
        for output in self.outputs.get(id, []):
            assert output.offset == len(tokens)
            tokens += output.tokens
        return tokens


class Proxy:
    """A connection in between that can break."""

    def __init__(self, port: int) -> None:
        self._to, self.port = port, 0
        self._writers: list[asyncio.StreamWriter] = []
        self.connections = 0

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        there, back = await asyncio.open_connection("127.0.0.1", self._to)
        self._writers += [writer, back]
        await asyncio.gather(pump(reader, back), pump(there, writer))

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def close(self) -> None:
        self._server.close()
        self.cut()
        await self._server.wait_closed()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def serving(interval: int = 1) -> AsyncIterator[Fake]:
    fake = Fake(interval)
    fake.port = await fake.server.listen("127.0.0.1")
    try:
        yield fake
    finally:
        await fake.server.close()


@contextlib.asynccontextmanager
async def connected(fake: Fake, port: int = 0) -> AsyncIterator[Client]:
    client = Client(fake, port or fake.port)
    await client.link.open()
    try:
        yield client
    finally:
        await client.link.close()


def test_a_step_is_one_frame_for_each_ingress() -> None:
    async def work() -> None:
        async with serving() as fake, connected(fake) as client:
            for n in range(3):
                client.link.submit(request(f"r{n}"), client.receive)
            await fake.until(lambda: len(fake.requests) == 3)
            frames: list[int] = []
            send = fake.server._send

            def counted(ingress: str, outputs: list[Output], load: Load | None) -> None:
                frames.extend([len(outputs)] if outputs else [])
                send(ingress, outputs, load)

            fake.server._send = counted  # type: ignore[method-assign]
            fake.server.publish([Output(f"r{n}", 0, 0, [n]) for n in range(3)], Load(running=1))
            await client.until(lambda: len(client.outputs) == 3)
            assert frames == [3]
            assert 1 in {load.running for load in client.loads}
            await client.until(lambda: client.loads[-1].running == 3)  # the heartbeat's
            fake.server.publish([Output("r0", 0, 1, [9], "stop"), Output("r0", 0, 2, [8])])
            await client.until(lambda: client.outputs["r0"][-1].reason == "stop")
            client.link.abort("r1")
            await fake.until(lambda: fake.aborted == ["r1"])

    run(work)


@pytest.mark.parametrize(
    ("key", "epoch", "why"),
    [(b"another key", EPOCH, "closed"), (KEY, EPOCH + 1, "another engine")],
)
def test_only_the_right_ones_meet(key: bytes, epoch: int, why: str) -> None:
    async def work() -> None:
        async with serving() as fake:
            with pytest.raises(ChannelClosed, match=why):
                await Client(fake, fake.port, key, epoch).link.open()

    run(work)


def test_an_engine_must_prove_itself_too() -> None:
    async def work() -> None:
        async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(encode(channel.Challenge(bytes(32))))
            proof = await channel.receive(reader)
            writer.write(encode(channel.Welcome(proof.digest, ENGINE, EPOCH)))  # reflected
            assert await reader.read() == b""
            writer.close()
            await writer.wait_closed()
            over.set()

        over = asyncio.Event()
        server = await asyncio.start_server(impostor, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(ChannelClosed, match="does not know"):
                await Client(Fake(), port).link.open()
            await over.wait()

    run(work)


def likely(*tokens: int) -> list[Logprobs]:
    return [Logprobs(-float(token), [token], [-0.5]) for token in tokens]


def test_a_broken_connection_loses_and_repeats_nothing() -> None:
    async def work() -> None:
        async with serving() as fake:
            proxy = Proxy(fake.port)
            await proxy.listen()
            async with connected(fake, proxy.port) as client:
                for id in ("goes on", "ends", "is dropped"):
                    client.link.submit(request(id), client.receive)
                await fake.until(lambda: len(fake.requests) == 3)
                fake.server.publish(
                    [Output(id, 0, 0, [1, 2], logprobs=likely(1, 2)) for id in fake.requests]
                )
                await client.until(lambda: len(client.outputs) == 3)
                proxy.cut()
                client.link.abort("is dropped")  # cannot be told now
                fake.server.publish([Output("goes on", 0, 2, [3], logprobs=likely(3))])
                fake.server.publish([Output("ends", 0, 2, [3], "stop", stop=3, logprobs=likely(3))])
                await client.until(lambda: client.outputs["ends"][-1].reason is not None)
                assert client.outputs["ends"][-1].stop == 3
                fake.server.publish([Output("goes on", 0, 3, [4], "length", logprobs=likely(4))])
                await client.until(lambda: client.outputs["goes on"][-1].reason is not None)
                assert client.tokens("goes on") == [1, 2, 3, 4]
                assert client.tokens("ends") == [1, 2, 3]
                for outputs in client.outputs.values():
                    for output in outputs:
                        assert output.logprobs == (likely(*output.tokens) or None)
                await fake.until(lambda: "is dropped" in fake.aborted)
                assert proxy.connections == 2
            await proxy.close()

    run(work)


def test_a_request_that_never_arrived_ends_with_an_error() -> None:
    async def work() -> None:
        async with serving() as fake:
            proxy = Proxy(fake.port)
            await proxy.listen()
            async with connected(fake, proxy.port) as client:
                client.link.submit(request("before"), client.receive)
                await fake.until(lambda: "before" in fake.requests)
                assert client.link._writer is not None
                client.link._writer.transport.abort()
                client.link.submit(request("lost", emitted=[5, 6]), client.receive)
                await client.until(lambda: "lost" in client.outputs)
                (lost,) = client.outputs["lost"]
                assert (lost.reason, lost.offset) == ("error", 2)
                fake.server.publish([Output("before", 0, 0, [1], "stop")])
                await client.until(lambda: bool(client.tokens("before")))
            await proxy.close()

    run(work)


def test_a_lost_engine_ends_every_request() -> None:
    async def work() -> None:
        async with serving() as fake, connected(fake) as client:
            client.link.submit(request("r"), client.receive)
            await fake.until(lambda: "r" in fake.requests)
            await fake.server.close()
            await client.link.lost.wait()
            (end,) = client.outputs["r"]
            assert end.reason == "error"
            with pytest.raises(ChannelClosed):
                client.link.submit(request("late"), client.receive)

    run(work)


def test_a_vanished_ingress_frees_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "GRACE", 0.2)

    async def work() -> None:
        async with serving() as fake:
            async with connected(fake) as client:
                client.link.submit(request("r"), client.receive)
                client.link.submit(request("over"), client.receive)
                await fake.until(lambda: len(fake.requests) == 2)
                fake.server.publish([Output("over", 0, 0, [1], "stop")])
                await client.until(lambda: "over" in client.outputs)
            await fake.until(lambda: bool(fake.aborted))
            assert fake.aborted == ["r"]
            fake.server.publish([Output("r", 0, 0, [1], "abort")])  # for nobody

    run(work)


def test_an_ingress_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "MAX_BACKLOG", 1 << 16)
    monkeypatch.setattr(channel, "SILENCE", 2 * DEADLINE)  # that is not why

    async def work() -> None:
        async with serving() as fake, connected(fake) as other:
            slow = Client(fake, fake.port)
            slow.link._ingress = "slow"
            await slow.link._dial()  # and nobody reads
            writer = slow.link._writer
            assert writer is not None
            writer.write(encode(Submit(request("slow"))))
            other.link.submit(request("other"), other.receive)
            await fake.until(lambda: len(fake.requests) == 2)
            ends = (writer, socket.SO_RCVBUF), (fake.server._writers["slow"], socket.SO_SNDBUF)
            for end, buffer in ends:  # the kernel's, else it takes megabytes
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, buffer, 4096)
            offset = 0
            while "slow" in fake.server._writers:
                fake.server.publish([Output("slow", 0, offset, [1] * 10_000)])
                fake.server.publish([Output("other", 0, offset, [1] * 10_000)])
                offset += 10_000
                await other.until(lambda end=offset: len(other.tokens("other")) == end)  # type: ignore[misc]
            assert not other.link.lost.is_set()
            writer.transport.abort()

    run(work)


def test_a_silent_peer_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "SILENCE", 0.3)

    async def work() -> None:
        async with serving() as fake:
            reader, writer = await asyncio.open_connection("127.0.0.1", fake.port)
            assert isinstance(await channel.receive(reader), channel.Challenge)
            assert await reader.read() == b""  # never proved who it is
            writer.write(encode(Beat()))
            writer.close()

    run(work)


def test_a_request_that_comes_twice_cuts_the_ingress_off() -> None:
    async def work() -> None:
        async with serving() as fake, connected(fake) as client:
            client.link.submit(request("r"), client.receive)
            await fake.until(lambda: "r" in fake.requests)
            client.link.submit(request("r"), client.receive)
            await client.until(lambda: "r" in client.outputs)  # by the next connection
            assert client.tokens("r") == []
            assert not client.link.lost.is_set()

    run(work)


@pytest.mark.parametrize("end", [6, 7, 8, 9])
@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_an_interval_sends_tokens_together_but_the_first_and_the_last_at_once(
    end: int, at_once: int
) -> None:
    async def work() -> None:
        async with serving(interval=3) as fake, connected(fake) as client:
            client.link.submit(request("a"), client.receive)
            await fake.until(lambda: "a" in fake.requests)
            for start in range(0, end, at_once):
                tokens = [*range(start, min(end, start + at_once))]
                reason: FinishReason | None = "length" if tokens[-1] == end - 1 else None
                fake.server.publish([Output("a", 0, start, tokens, reason, cached=4)])
            await client.until(
                lambda: bool(client.outputs) and client.tokens("a")[-1:] == [end - 1]
            )
            outputs = client.outputs["a"]
            assert client.tokens("a") == [*range(end)]
            assert [output.reason for output in outputs][:-1] == [None] * (len(outputs) - 1)
            assert (outputs[-1].reason, outputs[0].cached) == ("length", 4)
            assert len(outputs[0].tokens) == at_once
            middle = [len(output.tokens) for output in outputs[1:-1]]
            assert all(3 <= count < 3 + at_once for count in middle)

    run(work)


def test_held_tokens_survive_a_broken_connection() -> None:
    async def work() -> None:
        async with serving(interval=4) as fake:
            proxy = Proxy(fake.port)
            await proxy.listen()
            async with connected(fake, proxy.port) as client:
                client.link.submit(request("a"), client.receive)
                await fake.until(lambda: "a" in fake.requests)
                for token in range(3):
                    fake.server.publish([Output("a", 0, token, [token])])
                await client.until(lambda: client.tokens("a") == [0])
                proxy.cut()
                await client.until(lambda: client.tokens("a") == [0, 1, 2])
                for token in range(3, 7):
                    fake.server.publish([Output("a", 0, token, [token])])
                await client.until(lambda: client.tokens("a") == [*range(7)])
            await proxy.close()

    run(work)
