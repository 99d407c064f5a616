"""What several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from openai import OpenAI

from tests.service import DEADLINE, Service

# Triton reads the variable when it is imported, so interpreter tests have a process of their own.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]

# How long an example takes says how busy the machine is, and nothing else.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The real service: the bundled model on two ranks, each with whole experts, behind HAProxy."""
    service = Service(
        tmp_path_factory.mktemp("service"),
        *("--tensor-parallel-size", "2", "--enable-expert-parallel", "--device", "cpu"),
        # float32: the one dtype whose tokens may not depend on the batch.
        *("--kv-cache-memory", "3MiB", "--max-num-seqs", "8", "--dtype", "float32"),
    )
    try:
        service.wait_until_ready()
        yield service
    finally:
        assert service.stop() == 0, service.said()


@pytest.fixture
def client(service: Service) -> Iterator[OpenAI]:
    url = f"{service.url}/v1"
    with OpenAI(base_url=url, api_key="none", max_retries=0, timeout=DEADLINE) as client:
        yield client
