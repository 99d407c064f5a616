"""Engines that share experts, in real processes, against one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import tiny_gpt_oss
from tests.engines import Engine, greedy, prompts
from tests.gangs import Gang
from tests.test_parallel import TIGHT, assert_same, requests
from workers.wire import Request

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt_oss(tmp_path_factory.mktemp("tiny"))


def test_one(checkpoint: Path) -> None:
    expected = Engine(checkpoint).generate(requests())
    with Gang(checkpoint, 2, 1, **TIGHT) as gang:
        gang.submit(0, requests())
        gang.finish(requests())
        assert_same(checkpoint, {r: a.tokens for r, a in gang.answers.items()}, expected)
        gang.stop()
        print(gang.ends, gang.loads)
