"""The ingress over real sockets, before an engine whose model is a hash: no Ray, no torch step."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import uvicorn

from cluster import directory
from cluster.app import Ingress
from cluster.keys import Keys
from cluster.store import Shelf
from cluster.text import Text
from tests.fakes import FakeRunner
from workers.channel import ChannelServer
from workers.config import ApiKey, KVConfig, KVGroup, Limits, ModelSpec, SchedulerConfig
from workers.engine import EngineLoop
from workers.hub import BUNDLED
from workers.scheduler import Scheduler
from workers.wire import Batch, Engine, Output, Request

DEADLINE = 120.0
VOCAB = 400
LENGTH = 512
SEQUENCES = 4
LIMITS = Limits()
KEY = b"the key of this service"


def head(path: str, body: bytes, *headers: bytes, method: bytes = b"POST") -> bytes:
    lines = [method + b" " + path.encode() + b" HTTP/1.1", b"Host: x", b"Connection: close"]
    lines += [b"Content-Length: %d" % len(body), *headers, b"", b""]
    return b"\r\n".join(lines)


class Slow(FakeRunner):
    """Its steps take a while, or wait until they may begin, if they are told to."""

    pause = 0.0

    def __init__(self, config: SchedulerConfig, kv: KVConfig, vocab: int) -> None:
        super().__init__(config, kv, vocab)
        self.open = threading.Event()
        self.open.set()

    def launch(self, batch: Batch) -> int:
        assert self.open.wait(DEADLINE)
        time.sleep(self.pause)
        return super().launch(batch)


class Front:
    def __init__(
        self,
        limits: Limits = LIMITS,
        keys: tuple[ApiKey, ...] = (),
        key_file: str = "",
        store: Any = None,
    ) -> None:
        self.store = store
        config = SchedulerConfig(
            max_num_seqs=SEQUENCES,
            max_num_batched_tokens=64,
            max_model_len=LENGTH,
            eos_token_ids=(0,),
        )
        kv = KVConfig((KVGroup("full", (0,), 64),), num_blocks=4 * LENGTH // 16)
        self.runner = Slow(config, kv, VOCAB)
        self.scheduler = Scheduler(config, kv)
        self._engine = EngineLoop(self.scheduler, self.runner, self._publish)
        self._limits, self._keys = limits, Keys(keys, key_file)
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._sock.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Front:
        self._thread.start()
        threading.Thread(target=self._engine.run).start()
        assert self._up.wait(DEADLINE)
        self.until(lambda: self.get("/ready").status_code == 200)
        return self

    def __exit__(self, *error: object) -> None:
        self._engine.stop()
        self._server.should_exit = True
        self._thread.join(DEADLINE)
        assert not self._thread.is_alive()
        assert self._engine.trouble() == "the engine was shut down"

    async def _ask(self, what: str, *arguments: Any) -> Any:
        return await asyncio.to_thread(getattr(self.store, what), *arguments)

    def _publish(self, outputs: list[Output], load: Any) -> None:
        self._channel.publish(outputs, load)

    async def _run(self) -> None:
        name = f"replica-{self.port}"
        engine = Engine("moeray", "tiny-oss", name)
        self._channel = ChannelServer(
            engine, 1, KEY, self._engine.submit, self._engine.abort, self._engine.load
        )
        port = await self._channel.listen("127.0.0.1")
        about = {
            "engine": ["moeray", "tiny-oss", name, 0],
            "epoch": 1,
            "address": ["127.0.0.1", port],
            "max_model_len": LENGTH,
        }
        before = directory._replicas  # of a front that this one hides
        directory.update({name: about})

        async def lease(replica: str, request: Request) -> None:
            await asyncio.sleep(3600)

        self._ingress = Ingress(
            ModelSpec(seed=0),
            Text(BUNDLED),
            VOCAB,
            KEY,
            lease,
            "1",
            self._limits,
            self._keys,
            Shelf(self._ask),
        )
        self._server = uvicorn.Server(
            uvicorn.Config(self._ingress, log_config=None, ws="none", timeout_graceful_shutdown=1)
        )
        self._server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        self._up.set()
        try:
            await self._server.serve([self._sock])
        finally:
            await self._channel.close()
            directory.update(before)

    def until(self, ready: Callable[[], bool]) -> None:
        """Poll, with a deadline."""
        end = time.monotonic() + DEADLINE
        while not ready():
            assert time.monotonic() < end, "not in time"
            time.sleep(0.01)

    def idle(self) -> bool:
        """Nothing is live: in the ingress, in the engine or in its memory."""
        load = self._engine.load()
        return (
            not len(self._ingress._admission)
            and all(peer.link.idle.is_set() for peer in self._ingress._engines._peers.values())
            and not load.running + load.waiting
            and load.free == load.blocks
        )

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=DEADLINE, **more)

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=DEADLINE, **more)

    def complete(self, **fields: Any) -> httpx.Response:
        """A completion of known tokens; greedy would be the same, whatever the seed."""
        headers = fields.pop("headers", {})
        body = {"prompt": [5, 6, 7], "max_tokens": 8, "ignore_eos": True, "seed": 1} | fields
        return self.post("/v1/completions", body, headers=headers)

    def raw(self, *parts: bytes, timeout: float = DEADLINE) -> bytes:
        """Everything that is answered to ``parts``, sent one by one."""
        with socket.create_connection(("127.0.0.1", self.port), timeout) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for part in parts:
                sock.sendall(part)
            return b"".join(iter(lambda: sock.recv(1 << 16), b""))
