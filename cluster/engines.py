"""The engines that an ingress knows: a side channel to each, and the requests they work on.

Each request holds a lease on its engine's replica (a Serve call that stays open), so that Serve
knows of it. Whatever way a request ends, its engine is told.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextvars import Context
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec

from cluster import directory
from cluster.openai import Model
from cluster.routing import Belief, choose
from cluster.schema import unavailable
from cluster.text import Text
from workers.channel import BEAT, ChannelClosed, Link
from workers.wire import Engine, Load, Output, Request

ENGINE_SECONDS = 30.0  # a request waits so long for an engine that starts again
STALL_SECONDS = 30.0  # without progress an engine is not ready

Lease: TypeAlias = Callable[[str, Request], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine this ingress is connected to."""

    belief: Belief
    link: Link
    about: dict[str, Any]  # what its replica says of itself


@dataclass(frozen=True, slots=True)
class Held:
    """A request that an engine works on, and its lease."""

    id: str
    peer: Peer
    lease: asyncio.Task[None]

    def release(self) -> None:
        """The request has ended, or must; telling it twice does no harm."""
        self.peer.link.abort(self.id)
        self.peer.belief.release(self.id)
        self.lease.cancel()


class Engines:
    """Connections to the engines that Serve lists, between ``follow`` and ``leave``.

    ``lease`` holds a replica's lease for a request.
    """

    def __init__(self, text: Text, vocab_size: int, key: bytes, lease: Lease) -> None:
        self.models: dict[str, Model] = {}
        self._text, self._vocab_size = text, vocab_size
        self._lease, self._key = lease, key
        self._id = f"ingress-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._peers: dict[Engine, Peer] = {}
        # By replica: what keeps its link, and whether Serve has taken it off its list.
        self._links: dict[str, tuple[asyncio.Task[None], asyncio.Event]] = {}
        self._changed = asyncio.Event()

    def follow(self) -> Callable[[], None]:
        """Connect to what Serve lists, from now on; call what this returns to leave."""
        loop = asyncio.get_running_loop()

        def changed(found: directory.Replicas) -> None:
            loop.call_soon_threadsafe(self._update, found)

        def leave() -> None:
            directory.unwatch(changed)
            for task, _ in self._links.values():
                task.cancel()

        directory.watch(changed)
        return leave

    def loads(self) -> Iterable[tuple[Engine, Load]]:
        return [(engine, peer.belief.load) for engine, peer in self._peers.items()]

    def about(self) -> list[dict[str, Any]]:
        """What each engine's replica says of it, and its load; in the order of their ranks."""
        peers = sorted(self._peers.items(), key=lambda peer: (peer[0].model, peer[0].dp_rank))
        return [peer.about | {"load": msgspec.to_builtins(peer.belief.load)} for _, peer in peers]

    def unready(self) -> str:
        """Why no engine makes progress; empty if one does."""
        if not self._peers:
            return "no engine is connected"
        ages = [load.progress_ms / 1000 for _, load in self.loads()]
        if min(ages) > STALL_SECONDS:
            return f"no engine has ended a step for {min(ages):.0f} s"
        return ""

    async def known(self) -> Mapping[str, Model]:
        """The models, once there is one. Raises Refusal."""
        await self._until(lambda: bool(self.models))
        return self.models

    async def submit(self, request: Request, receive: Callable[[Output], None]) -> Held:
        """Send a request to an engine of its model. Raises Refusal."""
        await self._until(lambda: any(engine.model == request.model for engine in self._peers))
        now = time.monotonic()
        beliefs = {engine: peer.belief for engine, peer in self._peers.items()}
        engine = choose(request, beliefs, now).engine
        peer = self._peers[engine]
        try:
            peer.link.submit(request, receive)
        except ChannelClosed:  # lost a moment ago, and still on the list
            raise unavailable("the engine was lost; send the request again") from None
        peer.belief.reserve(request, now)
        # In a context of its own: Serve knows a call by an id that it finds in the HTTP request's,
        # and its router would never place a second call of that id, nor let anyone else run.
        hold = self._hold(engine, peer, request)
        return Held(request.id, peer, asyncio.create_task(hold, context=Context()))

    async def _hold(self, engine: Engine, peer: Peer, request: Request) -> None:
        """Keep the lease; when the replica dies the request ends here, if not sooner."""
        try:
            await self._lease(engine.replica, request)
            why = "its lease ran out"
        except Exception as error:
            why = f"its engine was lost ({type(error).__name__})"
        peer.link.fail(request.id, f"the request was ended: {why}; send it again")

    def _update(self, found: directory.Replicas) -> None:
        for replica in self._links.keys() - found.keys():
            self._links[replica][1].set()
        for replica, about in found.items():
            if replica in self._links:
                self._links[replica][1].clear()  # it may be back before its last request ended
            elif "address" in about:
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
                self.models[engine.model] = Model(
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


async def _first(*events: asyncio.Event) -> None:
    """Wait for any of them."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
