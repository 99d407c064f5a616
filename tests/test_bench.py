"""The benchmarks' own parts."""

from __future__ import annotations

import inspect

from tests.bench.streams import PacedEngine
from workers.actor import EngineReplica


def test_the_paced_engine_is_bound_like_the_real_one() -> None:
    real = inspect.signature(EngineReplica.__init__)
    assert inspect.signature(PacedEngine.__init__) == real
