"""The whole service: real processes, Ray, HAProxy and the official client."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest
from openai import OpenAI

from cluster.keys import sha256
from tests.front import head
from tests.service import DEADLINE, ROOT, Service, free_port
from workers.hub import BUNDLED

QUESTION: list[Any] = [{"role": "user", "content": "What is 17 + 25?"}]
LONG = {"prompt": "hello", "max_tokens": 4000, "ignore_eos": True, "stream": True}


@pytest.fixture
def client(service: Service) -> OpenAI:
    return OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=DEADLINE)


def test_the_official_client_gets_an_answer(client: OpenAI) -> None:
    (model,) = client.models.list()
    assert model.id == client.models.retrieve(model.id).id == "tiny-oss"
    whole = client.chat.completions.create(model=model.id, messages=QUESTION)
    assert whole.choices[0].message.content == "42"
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.completion_tokens > 1


def test_a_stream_adds_up_to_the_whole(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="tiny-oss",
            messages=QUESTION,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    deltas = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(filter(None, deltas)) == "42"
    assert chunks[-1].usage is not None
    text = {"model": "tiny-oss", "prompt": "hello", "max_tokens": 12, "seed": 5}
    one = client.completions.create(**text)  # type: ignore[call-overload]
    several = client.completions.create(**text, stream=True)  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].text for chunk in several) == one.choices[0].text


def test_many_at_once_get_what_each_gets_alone(service: Service) -> None:
    """More than there are slots, through a pool that they overflow."""

    def ask(n: int) -> list[int]:
        body = {
            "prompt": [1 + (n * 7 + i) % 200 for i in range(20 + n)],
            "max_tokens": 30,
            "seed": n,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = httpx.post(f"{service.url}/v1/completions", json=body, timeout=DEADLINE)
        assert answer.status_code == 200, answer.text
        ids: list[int] = answer.json()["choices"][0]["token_ids"]
        return ids

    alone = [ask(n) for n in range(0, 24, 6)]
    with ThreadPoolExecutor(24) as pool:
        together = list(pool.map(ask, range(24)))
    assert together[::6] == alone
    assert service.metric("moeray_expert_calls_total", rank="0") > 0
    assert service.metric("moeray_expert_calls_total", rank="1") > 0
    service.until(lambda: service.metric("moeray_kv_blocks_used") == 0)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("POST", "/v1/completions", "{", 400, "not valid JSON"),
        ("POST", "/v1/completions", '{"prompt": "a", "max_tokens": 0}', 400, "max_tokens"),
        ("POST", "/v1/completions", '{"prompt": "a", "model": "nope"}', 404, "does not exist"),
        ("POST", "/v1/chat/completions", '{"messages": [], "stream": true}', 400, "messages"),
        ("GET", "/v1/models/nope", "", 404, "does not exist"),
        ("GET", "/nope", "", 404, "does not exist"),
        ("DELETE", "/v1/models", "", 405, "does not take DELETE"),
        ("BREW", "/v1/models", "", 405, "no such method"),
    ],
)
def test_refusals_keep_their_status(
    service: Service, method: str, path: str, body: str, status: int, says: str
) -> None:
    answer = httpx.request(method, service.url + path, content=body, timeout=DEADLINE)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]


def test_what_people_and_machines_look_at(service: Service) -> None:
    for path in ("/health", "/ready", "/version", "/metrics"):
        assert httpx.get(service.url + path, timeout=DEADLINE).status_code == 200, path
    said = subprocess.run(
        [sys.executable, str(ROOT / "moeray.py"), "status", "--json", "--url", service.url],
        capture_output=True,
        check=True,
    )
    found = msgspec.json.decode(said.stdout)
    assert found["ready"]
    assert [rank["rank"] for rank in found["engines"][0]["ranks"]] == [0, 1]


def test_every_answer_has_a_request_id(service: Service) -> None:
    """The client's, if it is short and printable."""

    def named(path: str, *ids: bytes) -> str:
        headers = [(b"x-request-id", id) for id in ids]
        answer = httpx.get(service.url + path, headers=headers, timeout=DEADLINE)
        (found,) = answer.headers.get_list("x-request-id")
        assert answer.status_code == (200 if path == "/health" else 404)
        return str(found)

    for path in ("/health", "/nope"):
        assert named(path, b"mine-1") == "mine-1"
        assert named(path, b"x" * 128) == "x" * 128
        made = [named(path, *ids) for ids in ([], [b"x" * 129], [b"a b"], [b"\xff"], [b"a", b"b"])]
        assert len({*made}) == 5
        assert all(id.isascii() and len(id) == 36 for id in made)


def test_headers_that_serve_trips_over_do_no_harm(service: Service) -> None:
    headers = {
        b"x-request-timeout-seconds": b"\xff",
        b"x-request-disconnect-disabled": b"\xff",
        b"x-session-id": b"\xff",
        b"serve_multiplexed_model_id": b"\xff",
        b"connection": b"upgrade",
        b"upgrade": b"websocket",
        b"sec-websocket-key": b"dGhlIHNhbXBsZSBub25jZQ==",
        b"sec-websocket-version": b"13",
    }
    answer = httpx.get(f"{service.url}/v1/models", headers=headers, timeout=DEADLINE)
    assert answer.status_code == 200


def test_a_client_that_leaves_frees_its_blocks(service: Service) -> None:
    """While its answer comes, and while it waits in the queue behind eight others."""
    clients: list[Any] = []
    streams: list[Iterator[bytes]] = []
    try:
        for _ in range(8):
            stream = httpx.stream("POST", f"{service.url}/v1/completions", json=LONG, timeout=60)
            answer = stream.__enter__()
            clients.append(stream)
            streams.append(answer.iter_bytes())  # httpx hangs up once it is forgotten
            next(streams[-1])
        service.until(lambda: service.metric("moeray_num_requests_running") == 8)
        assert service.metric("moeray_kv_blocks_used") > 0
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{service.url}/v1/completions", json=LONG, timeout=httpx.Timeout(60, read=1)
            )
        service.until(lambda: service.metric("moeray_num_requests_waiting") == 0)
        assert service.metric("moeray_num_requests_running") == 8
    finally:
        for stream in clients:
            stream.__exit__(None, None, None)
    service.until(lambda: service.metric("moeray_num_requests_running") == 0)
    service.until(lambda: service.metric("moeray_kv_blocks_used") == 0)
    assert service.metric("moeray_request_success_total", finished_reason="abort") >= 9


def test_a_raw_client_that_drips_or_leaves_at_any_point(service: Service) -> None:
    body = msgspec.json.encode(LONG)
    request = head("/v1/completions", body) + body

    def leave(after: int) -> None:
        with socket.create_connection(("127.0.0.1", service.port), DEADLINE) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for at in range(len(request)):
                sock.sendall(request[at : at + 1])
            seen = 0
            while seen < after:
                seen += len(sock.recv(after - seen))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(leave, [0, 1, 9, 100, 300, 301, 700, 2000]))
    service.until(lambda: service.metric("moeray_num_requests_running") == 0)
    service.until(lambda: service.metric("moeray_num_requests_waiting") == 0)
    service.until(lambda: service.metric("moeray_kv_blocks_used") == 0)
    service.until(lambda: service.status()["requests"] == 0)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_streams_and_comes_back(service: Service, rank: int) -> None:
    before = service.ranks()
    ends: list[str] = []
    begun = threading.Barrier(4)

    def stream() -> None:
        with httpx.stream(
            "POST", f"{service.url}/v1/completions", json=LONG, timeout=DEADLINE
        ) as answer:
            lines = answer.iter_lines()
            last = next(lines)
            begun.wait(DEADLINE)
            for line in lines:
                last = line or last
        ends.append(last)

    threads = [threading.Thread(target=stream) for _ in range(3)]
    for thread in threads:
        thread.start()
    begun.wait(DEADLINE)
    os.kill(before[rank], signal.SIGKILL)
    for thread in threads:
        thread.join(DEADLINE)
    assert len(ends) == 3
    for end in ends:
        error = msgspec.json.decode(end.removeprefix("data: "))["error"]
        assert error["code"] == "unavailable", end
        assert "again" in error["message"], end
    answers: list[httpx.Response] = []

    def answered() -> bool:
        body = {"prompt": "hello", "max_tokens": 4}
        answer = httpx.post(f"{service.url}/v1/completions", json=body, timeout=DEADLINE)
        if answer.status_code == 503:
            assert int(answer.headers["retry-after"]) > 0
        answers.append(answer)
        return answer.status_code == 200

    service.until(answered)
    assert {answer.status_code for answer in answers} <= {200, 503}
    service.until(lambda: len(service.ranks()) == 2)
    assert not {*before} & {*service.ranks()}, "every rank is a new process"
    service.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in before))


def test_a_killed_ingress_is_replaced_and_what_comes_meanwhile_gets_a_typed_answer(
    service: Service,
) -> None:
    family = psutil.Process(service.process.pid).children(recursive=True)
    (ingress,) = [p for p in family if p.cmdline()[:1] == ["ray::ServeReplica:moeray:ingress"]]
    ingress.kill()
    statuses: list[int] = []

    def answered() -> bool:
        try:
            answer = httpx.get(f"{service.url}/v1/models", timeout=DEADLINE)
        except httpx.RemoteProtocolError:  # it was on its way over the connection that broke
            return False
        statuses.append(answer.status_code)
        if answer.status_code == 503:
            assert answer.json()["error"]["code"] == "unavailable"
            assert int(answer.headers["retry-after"]) > 0
        return answer.status_code == 200 and bool(answer.json()["data"])

    service.until(answered)
    assert {*statuses} <= {200, 503}
    service.until(lambda: httpx.get(f"{service.url}/ready").status_code == 200)


def test_sigterm_drains_and_leaves_nothing_without_haproxy(tmp_path: Path) -> None:
    """With API keys, which nobody gets to see."""
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[[key]]\nname = "c"\nsha256 = "{sha256("sesame-3")}"\n')
    service = Service(
        tmp_path,
        *("--device", "cpu", "--api-key", "sesame-1", "--api-key-file", str(keys)),
        RAY_SERVE_ENABLE_HA_PROXY="0",
        MOERAY_API_KEY="sesame-2",
    )
    try:
        service.wait_until_ready()
        assert "without HAProxy" in service.said()
        driver = psutil.Process(service.process.pid)
        family = driver.children(recursive=True)
        assert not [p for p in [driver, *family] if "sesame" in " ".join(p.cmdline())]
        assert not [p for p in family if "sesame" in str(p.environ())]
        (home,) = {Path(p.cwd()).parent for p in family if "moeray-" in p.cwd()}
        written = [path for path in home.rglob("*") if path.is_file()]
        assert written
        assert not [path for path in written if b"sesame" in path.read_bytes()]
        assert httpx.get(f"{service.url}/health", timeout=DEADLINE).status_code == 200
        assert httpx.get(f"{service.url}/status", timeout=DEADLINE).status_code == 401
        for n in (1, 2, 3):
            key = {"authorization": f"Bearer sesame-{n}"}
            assert httpx.get(f"{service.url}/status", headers=key, timeout=DEADLINE).is_success
        body = {"prompt": "hello", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream(
            "POST", f"{service.url}/v1/completions", json=body, headers=key, timeout=DEADLINE
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            done = ThreadPoolExecutor(1).submit(service.stop)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert done.result(2 * DEADLINE) == 0
    finally:
        service.stop()
    assert "sesame" not in service.said()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--tensor-parallel-size", "3"], "does not divide"),
        (["--kv-cache-memory", "5K"], "too little"),
    ],
)
def test_an_engine_that_cannot_start_says_why(tmp_path: Path, flags: list[str], says: str) -> None:
    service = Service(tmp_path, "--device", "cpu", *flags)
    try:
        assert service.process.wait(DEADLINE) == 1
    finally:
        service.stop()
    assert says in service.said()
    assert "Traceback" not in service.said()


def test_preflight_refuses_before_ray_starts(tmp_path: Path, monkeypatch: Any) -> None:
    from cluster import service
    from workers.config import ModelSpec, ServiceConfig
    from workers.hub import NoModel

    port = free_port()
    spec, vocab_size = service.preflight(ServiceConfig(models=(ModelSpec(),), port=port))
    assert (spec.model, spec.served_model_name) == (str(BUNDLED), "tiny-oss")
    assert vocab_size > 0
    with pytest.raises(NoModel):
        service.preflight(ServiceConfig(models=(ModelSpec(model="/nowhere"),), port=port))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(service.StartupError, match="cannot be read"):
        service.preflight(ServiceConfig(models=(ModelSpec(model=str(tmp_path)),), port=port))
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(service.StartupError, match="another --port"),
    ):
        service.preflight(ServiceConfig(models=(ModelSpec(),), port=port))
    (tmp_path / "kernels-1.dist-info").mkdir()
    (tmp_path / "kernels-1.dist-info" / "METADATA").write_text("Name: kernels\nVersion: 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(service.StartupError, match="'kernels' is installed"):
        service.preflight(ServiceConfig(models=(ModelSpec(),), port=port))
