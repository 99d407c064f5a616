"""Ray shells: a Serve replica that owns one engine, and an actor for each of its ranks.

The replica only leases, reports health and builds the group; rank 0 plans and talks to ingresses.
Neither torch nor the model is imported in the replica's process, so nothing blocks its event loop.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

import msgspec
import ray
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from workers.capacity import Capacity
from workers.config import ModelSpec
from workers.wire import Engine

if TYPE_CHECKING:
    from workers.rank import RankReport

CONNECT_SECONDS = 120.0  # for all ranks to find each other
LOAD_SECONDS = 3600.0  # for the weights
PING_SECONDS = 10.0
HEALTH_PERIOD_SECONDS = 1.0
SPIN_COUNT = 1000  # GOMP: how long idle threads spin


class StartupError(RuntimeError):
    """An engine could not start. The message is a sentence for the user."""


class RankActor:
    """One rank's process. Its loop runs in a thread, so that ``ping`` is answered during steps."""

    def __init__(self, spec: ModelSpec, rank: int, world: int, key: bytes, threads: int) -> None:
        # Ray gives actors without whole CPUs one thread. libgomp reads this when torch is imported.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
        self._spec, self._rank, self._world, self._key = spec, rank, world, key
        self._host = "127.0.0.1"
        self._failure: str | None = None
        self._engine: Any = None
        self._channel: Any = None

    def rendezvous(self, local: bool) -> tuple[str, int, tuple[str, int]]:
        """Rank 0: where the others find the store and the plan channel."""
        from torch.distributed import TCPStore

        from workers.plans import PlanSender

        self._host = "127.0.0.1" if local else ray.util.get_node_ip_address()
        self._store = TCPStore(self._host, 0, self._world, is_master=True, wait_for_workers=False)
        self._plans = PlanSender(self._host, self._key)
        return self._host, self._store.port, self._plans.address

    def load(self, host: str, port: int, plans: tuple[str, int]) -> RankReport:
        """Join the group and read this rank's share of the weights."""
        from torch.distributed import TCPStore

        from workers.plans import PlanReceiver
        from workers.rank import Rank

        if self._rank == 0:
            self._plans.accept(self._world - 1, CONNECT_SECONDS)
        else:
            self._store = TCPStore(host, port, self._world, is_master=False)
            self._orders = PlanReceiver(plans, self._key, self._rank, CONNECT_SECONDS)
        self._core = Rank(self._spec, self._rank, self._world)
        return self._core.load(self._store)

    def plan(self, free: int) -> Capacity:
        """The KV pool, where every rank has ``free`` bytes for it."""
        plan: Capacity = self._core.plan(free)
        return plan

    def start(self, plan: Capacity, engine: Engine, epoch: int) -> tuple[str, int] | None:
        """Allocate the KV cache and begin; rank 0 returns the address of its side channel."""
        from workers.engine import EngineLoop, follow

        runner = self._core.allocate(plan)
        if self._rank > 0:

            def run() -> None:
                try:
                    follow(self._orders, runner)
                except Exception as error:
                    traceback.print_exc()
                    self._failure = f"rank {self._rank} failed: {type(error).__name__}: {error}"

            threading.Thread(target=run, name="follow", daemon=True).start()
            return None
        from workers.channel import EngineSide

        self._engine = EngineLoop(
            self._core.scheduler(plan),
            runner,
            lambda outputs: self._channel.publish(outputs),
            self._plans if self._world > 1 else None,
        )
        self._channel = EngineSide(
            engine, epoch, self._key, self._engine.submit, self._engine.abort, self._engine.load
        )
        address: tuple[str, int] = self._channel.start(self._host)
        self._engine.start()
        return address

    def ping(self) -> str | None:
        """None, or why this rank cannot go on."""
        return self._failure or (self._engine.trouble() if self._engine else None)

    def stop(self) -> None:
        """End the loops after the step that runs."""
        if self._engine is not None:
            self._engine.stop()
            self._channel.close()


class EngineReplica:
    """One engine as a Serve replica, in a placement group with one bundle for each rank."""

    async def __init__(self, spec: ModelSpec, service: str, key: bytes, local: bool) -> None:
        self._ranks: list[Any] = []
        self._leases = 0
        try:
            await self._start(spec, service, key, local)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            raise StartupError(_sentence(cause)) from error
        except Exception as error:
            raise StartupError(_sentence(error)) from error

    async def _start(self, spec: ModelSpec, service: str, key: bytes, local: bool) -> None:
        replica = serve.get_replica_context().replica_id.unique_id
        world = spec.tensor_parallel_size
        group = ray.util.get_current_placement_group()
        threads = max(1, len(os.sched_getaffinity(0)) // world)
        cuda = spec.device == "cuda"
        self._ranks = [
            ray.remote(RankActor)
            .options(
                num_cpus=0.01,
                num_gpus=1 if cuda else 0,
                max_concurrency=4,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank),
            )
            .remote(spec, rank, world, key, threads)
            for rank in range(world)
        ]
        where = await asyncio.wait_for(self._ranks[0].rendezvous.remote(local), CONNECT_SECONDS)
        self.reports: list[RankReport] = await asyncio.wait_for(
            asyncio.gather(*[rank.load.remote(*where) for rank in self._ranks]), LOAD_SECONDS
        )
        free = min(report.free_bytes for report in self.reports)
        self.capacity: Capacity = await self._ranks[0].plan.remote(free)
        self._engine = Engine(service, spec.served_model_name, replica)
        self._epoch = time.time_ns() // 1_000_000
        addresses = await asyncio.wait_for(
            asyncio.gather(
                *[r.start.remote(self.capacity, self._engine, self._epoch) for r in self._ranks]
            ),
            CONNECT_SECONDS,
        )
        self._address = addresses[0]

    def record_replica_metadata(self) -> dict[str, Any]:
        """What an ingress needs to find the engine, and people to see it."""
        plan = self.capacity
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
            "ranks": [msgspec.structs.asdict(report) for report in self.reports],
        }

    def record_routing_stats(self) -> dict[str, Any]:
        return {"leases": self._leases}

    async def lease(
        self, replica: str, id: str, tokens: int, priority: int, deadline_ms: int | None
    ) -> None:
        """Open while the request ``id`` of at most ``tokens`` tokens lives; the ingress cancels it.

        So Serve sees an ongoing request: it counts for scaling, holds back draining, and fails
        when this replica dies.
        """
        self._leases += 1
        try:
            await asyncio.sleep(deadline_ms / 1000 if deadline_ms else LOAD_SECONDS * 24)
        finally:
            self._leases -= 1

    async def check_health(self) -> None:
        """Every rank must answer. A lost one makes Serve replace the replica at once."""
        try:
            troubles = await asyncio.wait_for(
                asyncio.gather(*[rank.ping.remote() for rank in self._ranks]), PING_SECONDS
            )
        except TimeoutError:
            raise RayActorError(error_msg=f"a rank was silent for {PING_SECONDS} s") from None
        for trouble in troubles:
            if trouble:
                raise RayActorError(error_msg=trouble)

    async def __del__(self) -> None:
        await asyncio.wait(
            [asyncio.ensure_future(rank.stop.remote()) for rank in self._ranks], timeout=5
        )


def _sentence(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def key() -> bytes:
    """A service's key for its channels."""
    return secrets.token_bytes(32)
