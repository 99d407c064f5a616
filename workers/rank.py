"""STAND-IN rank: replaced when runner/weights are there."""

from __future__ import annotations

import os
import time

import msgspec

from workers.architecture import Architecture
from workers.capacity import Capacity
from workers.config import ModelSpec


class RankReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank is and holds; shown at start-up and by ``moeray status``."""

    rank: int
    pid: int
    node: str
    device: str
    threads: int
    weight_bytes: int
    free_bytes: int  # of the device, after the weights
    kv_dtype_bytes: int
    seconds: float
    notes: list[str] = []


class Rank:
    def __init__(self, spec: ModelSpec, rank: int, world: int) -> None:
        import json
        from pathlib import Path

        from workers.architecture import parse
        self.spec, self.rank, self.world = spec, rank, world
        self.architecture = parse(json.loads((Path(spec.model) / "config.json").read_text()))

    def load(self, store: object) -> RankReport:
        t = time.monotonic()
        import torch  # noqa
        return RankReport(
            rank=self.rank, pid=os.getpid(), node="127.0.0.1", device="cpu", threads=1,
            weight_bytes=0, free_bytes=8 << 30, kv_dtype_bytes=4, seconds=time.monotonic() - t,
        )

    def plan(self, free):
        from workers.capacity import capacity, default_kv_bytes
        return capacity(self.architecture, self.spec, default_kv_bytes(free, self.spec, False), 4)

    def scheduler(self, plan):
        from workers.scheduler import Scheduler
        return Scheduler(plan.scheduler, plan.kv)

    def allocate(self, capacity: Capacity):
        from tests.fakes import FakeRunner
        return FakeRunner(capacity.scheduler, capacity.kv, self.architecture.vocab_size)
