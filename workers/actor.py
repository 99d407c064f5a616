"""Ray shells: a Serve replica that owns one engine, and an actor for each of its ranks.

The replica leases, reports health and builds the group; rank 0 plans and talks to ingresses.
Neither torch nor the model is imported in the replica's process, so nothing blocks its event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util import placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from workers.channel import ChannelServer
from workers.config import ModelSpec
from workers.recording import Recording, numbered
from workers.wire import Engine

if TYPE_CHECKING:  # these import torch
    from workers.capacity import Capacity
    from workers.rank import RankReport

MEET = 120.0  # seconds for the ranks to start and find each other
LOAD = 3600.0  # seconds for the weights, and again for memory and graphs
PING = 10.0  # seconds a rank has to answer
STOP = 600.0  # seconds that the other engines of a gang may take to end; Serve's are fewer
POLL = 0.2  # seconds between two looks for an actor of another replica
LEASE = 86400.0  # seconds of a request without a deadline
RECORD = 60.0  # seconds between two writings of the experts' load

T = TypeVar("T")

log = logging.getLogger(__name__)


class EngineFailed(RuntimeError):
    """An engine could not start. The message is a sentence for the user."""


class _Compute:
    """The one thread of a rank that calls torch.

    libgomp keeps a team of threads for every thread that ever computed, and stops spinning once
    there are more of them than cores: steps took twice as long where another thread had loaded.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        threading.Thread(target=self._run, name="compute", daemon=True).start()

    def __call__(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """The call's result, for who wants to await it."""
        future: Future[T] = Future()
        self._calls.put((future, call))
        return asyncio.wrap_future(future)

    def _run(self) -> None:
        while True:
            future, call = self._calls.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)


class Meeting(msgspec.Struct, frozen=True):
    """Where all ranks of all engines find each other."""

    host: str
    store: int  # port of torch's store
    rounds: int  # port of the engines' coordinator; 0: there is one engine


class RankActor:
    """One rank's process. Work runs in a thread, so that ``ping`` is answered meanwhile.

    Rank 0 is a named actor: (service)/(gang or replica)/(engine).
    """

    def __init__(self, spec: ModelSpec, rank: int, engine: int, key: bytes, threads: int) -> None:
        # Ray gives actors without whole CPUs one thread. libgomp reads this when torch comes.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        self._spec, self._rank, self._number, self._key = spec, rank, engine, key
        self._world = spec.data_parallel_size * spec.tensor_parallel_size
        self._loaded = (0, 0)
        self._failure: str | None = None
        self._engine: Any = None
        self._meeting: Meeting | None = None
        self._store: Any = None
        self._coordinator: Any = None
        self._leader: Any = None
        self._member: Any = None
        self._compute = _Compute()
        self._recorder: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    async def meet(self, host: str) -> Meeting:
        """Rank 0 of engine 0: where the others find it. ``host`` empty: the node's own address."""
        if self._meeting is not None:  # it may be loading: then it waits for who asks this
            return self._meeting

        def listen() -> Meeting:
            from torch.distributed import TCPStore

            from workers.gang import Coordinator

            if self._meeting is None:
                engines, at, rounds = self._spec.data_parallel_size, _address(host), 0
                self._store = TCPStore(at, 0, self._world, is_master=True, wait_for_workers=False)
                if engines > 1:
                    ranks = self._spec.tensor_parallel_size
                    self._coordinator = Coordinator(at, self._key, engines, ranks, meet=MEET)
                    rounds = self._coordinator.port
                self._meeting = Meeting(at, self._store.port, rounds)
            return self._meeting

        return await self._compute(listen)

    async def lead(self, host: str) -> tuple[str, int]:
        """Rank 0: where the engine's other ranks hear its plans."""

        def listen() -> tuple[str, int]:
            from workers.plans import Leader

            self._host = _address(host)
            if self._spec.tensor_parallel_size > 1:
                self._leader = Leader(self._host, self._key)
            return self._host, self._leader.port if self._leader else 0

        return await self._compute(listen)

    async def load(self, meeting: Meeting, plans: tuple[str, int]) -> RankReport:
        """Join the other ranks and read this one's share of the weights."""

        def load() -> RankReport:
            from torch.distributed import TCPStore

            from workers.gang import Member
            from workers.plans import Follower
            from workers.rank import Rank

            core = self._core = Rank(self._spec, self._rank, self._number)
            if meeting.rounds:
                self._member = Member(
                    (meeting.host, meeting.rounds),
                    self._key,
                    (self._number, self._rank),
                    core.facts(),
                    lambda: core.progress,
                    core.abort,
                    meet=MEET,
                )
            if self._store is None:
                self._store = TCPStore(meeting.host, meeting.store, self._world, is_master=False)
            if self._rank > 0:
                self._follower = Follower(*plans, self._rank, self._key)
            elif self._leader is not None:
                self._leader.accept(self._spec.tensor_parallel_size - 1, MEET)
            return core.load(self._store, self._advance)

        return await self._together(load)

    def _together(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """What all engines wait for: where it fails, they hear why."""

        def told() -> T:
            try:
                return call()
            except Exception as error:
                if self._member is None:
                    raise
                raise self._member.explain(error) from None

        return self._compute(told)

    def _advance(self, done: int, size: int) -> None:
        self._loaded = done, size

    async def loaded(self) -> tuple[int, int]:
        """Bytes of weights that were read, of so many."""
        return self._loaded

    async def plan(self, free: int) -> Capacity:
        """The KV pool where every rank has ``free`` bytes for it."""
        return await self._together(lambda: self._core.plan(free))

    async def start(
        self, plan: Capacity, engine: Engine, epoch: int, interval: int, expert_load: str
    ) -> tuple[str, int]:
        """Allocate the KV cache and begin; rank 0 returns the address of its side channel, and
        writes the experts' load to a file where it is given one."""
        from workers.engine import EngineLoop, settle_garbage_collection

        runner = await self._together(lambda: self._core.allocate(plan))
        if self._rank > 0:
            self._compute(lambda: self._follow(runner))
            return "", 0
        here = asyncio.get_running_loop()
        recording = Recording(expert_load, self._core.nothing()) if expert_load else None

        def ended() -> None:
            asyncio.run_coroutine_threadsafe(self._channel.close(), here)
            self._core.abort()

        loop = EngineLoop(
            self._core.scheduler(plan),
            runner,
            lambda outputs, load: self._channel.publish(outputs, load),
            self._leader,
            self._member,
            ended=ended,
            compile=self._core.grammars.compile,
        )
        self._channel = ChannelServer(
            engine, epoch, self._key, loop.submit, loop.abort, loop.load, interval
        )
        port = await self._channel.listen(self._host)
        settle_garbage_collection()
        self._compute(loop.run)
        self._engine = loop
        if recording is not None:
            self._recorder = asyncio.create_task(self._record(recording))
        return self._host, port

    async def _record(self, recording: Recording) -> None:
        """Now and then, and at the end."""
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), RECORD)
            if self._engine.experts:
                try:
                    await asyncio.to_thread(recording.write, self._engine.experts)
                except OSError as error:
                    log.warning("the experts' load could not be written: %s", error)

    def _follow(self, runner: Any) -> None:
        from workers.engine import follow

        try:
            follow(self._follower, runner, self._member)
        except Exception as error:
            log.exception("rank %d failed", self._rank)
            self._failure = f"rank {self._rank} failed: {type(error).__name__}: {error}"
            self._core.abort()

    async def ping(self) -> str | None:
        """None, or why this rank cannot go on."""
        return self._failure or (self._engine.trouble() if self._engine else None)

    async def stop(self) -> None:
        """Rank 0: end the loop after the step that runs; the other ranks then end theirs.

        Where engines share experts, this returns when all of them have been stopped.
        """
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop, _patience(self._spec))
            self._stopping.set()
            if self._recorder is not None:
                await self._recorder
            await self._channel.close()
        if self._coordinator is not None:
            await asyncio.to_thread(self._coordinator.close)


class EngineReplica:
    """One engine as a Serve replica, in a bundle of a placement group: all its ranks on one node.

    Engines that share experts are a gang, with one placement group. ``host`` is where an engine's
    channels listen; empty: the node's own address. ``interval`` tokens of a request are sent
    together. ``expert_load`` is a file of rank 0's node, or empty; each engine has its own.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, spec: ModelSpec, service: str, key: bytes, host: str, interval: int, expert_load: str
    ) -> None:
        self._spec = spec
        self._ranks: list[Any] = []
        try:
            await self._start(spec, service, key, host, interval, expert_load)
        except Exception as error:
            raise EngineFailed(_sentence(error)) from None

    async def _start(
        self, spec: ModelSpec, service: str, key: bytes, host: str, interval: int, expert_load: str
    ) -> None:
        from ray import serve

        context, group = serve.get_replica_context(), ray.util.get_current_placement_group()
        gang = context.gang_context
        bundle, group_id = (gang.rank, gang.gang_id) if gang else (0, context.replica_tag)
        nodes: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
        number = by_node(nodes).index(bundle)
        neighbours = spec.tensor_parallel_size * [*nodes.values()].count(nodes[bundle])
        threads = max(1, len(os.sched_getaffinity(0)) // neighbours)
        self._ranks = [
            ray.remote(RankActor)
            .options(
                name=f"{service}/{group_id}/{number}" if rank == 0 else None,
                num_cpus=0.01,
                num_gpus=1 if spec.device == "cuda" else 0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle),
            )
            .remote(spec, rank, number, key, threads)
            for rank in range(spec.tensor_parallel_size)
        ]
        async with asyncio.timeout(MEET):
            first = self._ranks[0] if number == 0 else await _named(f"{service}/{group_id}/0")
            meeting, plans = await asyncio.gather(
                first.meet.remote(host), self._ranks[0].lead.remote(host)
            )
        async with asyncio.timeout(LOAD):
            self._reports: list[RankReport] = await asyncio.gather(
                *[rank.load.remote(meeting, plans) for rank in self._ranks]
            )
        async with asyncio.timeout(LOAD):  # graphs are captured, kernels perhaps compiled
            self._capacity: Capacity = await self._ranks[0].plan.remote(self._reports[0].free_bytes)
            replica = context.replica_id.unique_id
            self._engine = Engine(service, spec.served_model_name, replica, number)
            self._epoch = time.time_ns() // 1_000_000
            file = numbered(expert_load, number)
            start = self._capacity, self._engine, self._epoch, interval, file
            addresses = await asyncio.gather(*[rank.start.remote(*start) for rank in self._ranks])
            self._address = addresses[0]

    def record_replica_metadata(self) -> dict[str, Any]:
        """What an ingress needs to find the engine, and people to see it."""
        plan = self._capacity
        return {
            "engine": msgspec.to_builtins(self._engine),
            "epoch": self._epoch,
            "address": list(self._address),
            "max_model_len": plan.scheduler.max_model_len,
            "kv_tokens": plan.tokens,
            "kv_blocks": plan.kv.num_blocks,
            "kv_bytes": plan.bytes_per_rank,
            "concurrency": plan.concurrency,
            "reduced": plan.reduced,
            "ranks": [msgspec.structs.asdict(report) for report in self._reports],
        }

    async def lease(
        self, replica: str, id: str, tokens: int, priority: int, deadline_ms: int | None
    ) -> None:
        """Open while the request ``id`` of at most ``tokens`` tokens lives; the ingress cancels it.

        So Serve sees an ongoing request: it counts for scaling, holds back draining, and fails
        when this replica dies. ``replica`` is for the router.
        """
        # The engine and the ingress are to say first that the time is over.
        await asyncio.sleep(LEASE if deadline_ms is None else deadline_ms / 1000 + PING)

    async def check_health(self) -> None:
        """Every rank must answer. A lost one makes Serve replace the replica at once."""
        try:
            async with asyncio.timeout(PING):
                troubles = await asyncio.gather(*[rank.ping.remote() for rank in self._ranks])
        except TimeoutError:
            raise RayActorError(error_msg=f"a rank was silent for {PING:.0f} s") from None
        for trouble in troubles:
            if trouble:
                raise RayActorError(error_msg=trouble)

    async def __del__(self) -> None:
        """Serve calls this after draining."""
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_patience(self._spec)):
                await self._ranks[0].stop.remote()
        for rank in self._ranks:
            ray.kill(rank)


def _patience(spec: ModelSpec) -> float:
    """Seconds that an engine may take to stop: one of a gang waits for the others; one that is
    alone and does not answer must free its devices for the next."""
    return STOP if spec.data_parallel_size > 1 else PING


def _address(host: str) -> str:
    return host or str(ray.util.get_node_ip_address())


def by_node(nodes: Mapping[int, str]) -> list[int]:
    """Bundles in the order of their engines: node by node, so that neighbours have neighbouring
    ranks; that of bundle 0 is the first."""
    return sorted(nodes, key=lambda bundle: (nodes[bundle] != nodes[0], nodes[bundle], bundle))


async def _named(name: str) -> Any:
    """An actor that another replica makes."""
    while True:
        with contextlib.suppress(ValueError):
            return await asyncio.to_thread(ray.get_actor, name)
        await asyncio.sleep(POLL)


def _sentence(error: Exception) -> str:
    """Of what went wrong on a rank, without Ray's traceback."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    text = " ".join(str(cause).split()) or type(cause).__name__
    return text if isinstance(cause, ValueError) else f"{type(cause).__name__}: {text}"
