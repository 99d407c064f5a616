"""The front door over raw sockets: slow, broken, greedy and hostile clients."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import msgspec
import psutil
import pytest

from cluster import directory, exchange, structure
from cluster.keys import sha256
from cluster.reply import Reply
from tests.front import DEADLINE, LENGTH, Front, head
from workers.channel import ChannelClosed, Link
from workers.config import ApiKey, Limits
from workers.wire import Output

LONG = {"prompt": [9, 8, 7], "max_tokens": 400, "ignore_eos": True, "seed": 2, "stream": True}


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    with Front() as front:
        yield front


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test did, the engine has forgotten it."""
    yield
    if "front" in request.fixturenames:
        front: Front = request.getfixturevalue("front")
        front.runner.pause = 0.0
        front.until(front.idle)


def split(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a raw answer; chunks are put together."""
    top, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = top.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    if headers.get("transfer-encoding") == "chunked":
        parts = b""
        while body:
            size, _, body = body.partition(b"\r\n")
            parts, body = parts + body[: int(size, 16)], body[int(size, 16) + 2 :]
        body = parts
    return int(status.split()[1]), headers, body


def refused(answer: httpx.Response, status: int, says: str = "", code: str | None = None) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert says in error["message"]
    if code:
        assert error["code"] == code


# ---- Clients that are slow or leave


def test_every_byte_may_come_alone(front: Front) -> None:
    body = msgspec.json.encode(LONG | {"max_tokens": 5})
    whole = front.raw(head("/v1/completions", body) + body)
    bytewise = front.raw(*[bytes([b]) for b in head("/v1/completions", body) + body])
    status, headers, events = split(bytewise)
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert events.endswith(b"data: [DONE]\n\n")

    def texts(events: bytes) -> list[str]:
        data = [line[6:] for line in events.decode().split("\n\n") if line]
        return [msgspec.json.decode(d)["choices"][0]["text"] for d in data if d != "[DONE]"]

    assert texts(events) == texts(split(whole)[2])


def test_a_body_that_stalls_is_given_up(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "BODY_SECONDS", 0.2)
    status, _, body = split(front.raw(head("/v1/completions", b"x" * 100), b'{"prompt": '))
    assert status == 408
    assert msgspec.json.decode(body)["error"]["code"] == "timeout"


def test_half_a_body_and_gone(front: Front) -> None:
    for sent in (1, 50, 99):
        with socket.create_connection(("127.0.0.1", front.port), DEADLINE) as sock:
            sock.sendall(head("/v1/completions", b"x" * 100) + b"x" * sent)
    front.until(front.idle)


def test_a_client_may_leave_at_every_point_of_a_stream(front: Front) -> None:
    """Its engine then has nothing left of it; some leave in the queue, some by a reset."""
    front.runner.pause = 0.002
    body = msgspec.json.encode(LONG)
    request = head("/v1/completions", body) + body
    aborted = front.scheduler.load().finished.get("abort", 0)

    def leave(after: int) -> None:
        with socket.create_connection(("127.0.0.1", front.port), DEADLINE) as sock:
            sock.sendall(request)
            seen = 0
            while seen < after:
                seen += len(sock.recv(min(64, after - seen)))
            if after % 2:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(leave, [0, 1, 2, 17, 60, 150, 151, 200, 333, 500, 777, 1024, 2000, 3001]))
    front.until(front.idle)
    assert front.scheduler.load().finished["abort"] > aborted


def test_schemas_whose_clients_have_left_are_never_tried(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, ready = [], threading.Event()

    def check(schemas: tuple[tuple[str, str], ...]) -> None:
        tried.append(schemas[0][1])
        assert ready.wait(DEADLINE)

    monkeypatch.setattr(structure, "check", check)

    def ask(number: int, *headers: bytes) -> bytes:
        named = {"name": "a", "schema": {"const": number}}
        body = msgspec.json.encode(
            {
                "messages": [{"role": "user", "content": "hello"}],
                "max_tokens": 5,
                "response_format": {"type": "json_schema", "json_schema": named},
            }
        )
        return head("/v1/chat/completions", body, *headers) + body

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(front.raw, ask(0))
        front.until(lambda: len(tried) == 1)
        assert split(front.raw(ask(1, b"X-Request-Timeout: 0.1")))[0] == 408
        for number in range(2, 40):
            with socket.create_connection(("127.0.0.1", front.port), DEADLINE) as sock:
                sock.sendall(ask(number))
        body = b'{"prompt": "a"' + b" " * 20_000 + b"}"  # long enough for a thread
        assert split(front.raw(head("/tokenize", body) + body))[0] == 200
        front.until(lambda: len(front._ingress._admission) == 1)
        ready.set()
        assert split(first.result())[0] == 200
        assert split(front.raw(ask(40)))[0] == 200
    assert len(tried) == 2
    front.until(front.idle)


def test_a_client_that_takes_nothing_is_hung_up_on(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange, "SEND_SECONDS", 0.2)
    body = msgspec.json.encode(LONG | {"return_token_ids": True, "prompt": [[9, 8]] * 200})
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(DEADLINE)
        sock.connect(("127.0.0.1", front.port))
        sock.sendall(head("/v1/completions", body) + body)
        assert sock.recv(1) == b"H"
        front.until(front.idle)
    assert front.scheduler.load().finished.get("length", 0) < 200 * 400


# ---- Deadlines


@pytest.mark.parametrize("asked", ["0", "-1", "nan", "inf", "1_0", "soon", "", "1e3", "9" * 40])
def test_a_timeout_must_be_a_number_of_seconds(front: Front, asked: str) -> None:
    refused(front.complete(headers={"x-request-timeout": asked}), 400, "X-Request-Timeout")


def test_what_is_late_ends_as_such(front: Front) -> None:
    front.runner.pause = 0.05
    answer = front.complete(max_tokens=400, headers={"x-request-timeout": "0.3"})
    refused(answer, 408, code="timeout")
    said = answer.json()["error"]["message"]  # by the ingress, or by the engine if that is first
    assert "not done within 0.3 s" in said or "the deadline passed" in said
    answer = front.complete(max_tokens=400, stream=True, headers={"x-request-timeout": "3"})
    assert answer.status_code == 200
    events = [line for line in answer.text.split("\n\n") if line]
    assert len(events) > 2
    error = msgspec.json.decode(events[-1].removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("timeout_error", "timeout")
    assert front.complete(headers={"x-request-timeout": "20"}).status_code == 200


def test_what_expires_in_the_queue_is_never_computed(front: Front) -> None:
    """The engine itself drops it: nobody is left to tell it when its ingress is late."""
    front.runner.pause = 0.05
    before = front.scheduler.load()
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(front.complete, max_tokens=400) for _ in range(4)]
        front.until(lambda: front.scheduler.load().running == 4)
        prompts = front.scheduler.load().prompt_tokens
        queued = [
            pool.submit(front.complete, prompt=[1] * 50, headers={"x-request-timeout": "0.3"})
            for _ in range(4)
        ]
        for each in queued:
            refused(each.result(), 408)
        assert front.scheduler.load().prompt_tokens == prompts
        front.runner.pause = 0.0
        assert {each.result().status_code for each in running} == {200}
    front.until(front.idle)
    after = front.scheduler.load()
    assert after.prompt_tokens == prompts
    ended = {"abort", "timeout"}
    assert sum(after.finished.get(r, 0) - before.finished.get(r, 0) for r in ended) == 4


# ---- Limits


def test_too_much_at_once_is_told_when_to_come_again() -> None:
    limits = Limits(max_concurrent_requests=6, max_num_queued_reqs=2, max_body_size=1000)
    with Front(limits) as front, ThreadPoolExecutor(16) as pool:
        front.runner.open.clear()  # so that all are there at once
        asked = [pool.submit(front.complete, max_tokens=20) for _ in range(16)]
        front.until(lambda: sum(each.done() for each in asked) == 14)
        front.runner.open.set()
        answers = [each.result() for each in asked]
        assert sorted(answer.status_code for answer in answers) == [200] * 2 + [429] * 14
        for answer in answers:
            if answer.status_code == 429:
                refused(answer, 429, "try again in", "rate_limit_exceeded")
                assert 1 <= int(answer.headers["retry-after"]) <= 120
                assert answer.json()["error"]["type"] == "requests"
        front.until(front.idle)
        assert front.complete().status_code == 200, "nothing counts what has gone"
        refused(front.complete(prompt="a" * 1000), 413, "larger than 1,000 bytes")
        chunked = front.raw(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n3e8\r\n" + b" " * 1000 + b"\r\n1\r\n{\r\n"
        )
        assert split(chunked)[0] == 413


def test_bodies_that_stall_keep_nobody_from_the_queue() -> None:
    with Front(Limits(max_num_queued_reqs=2)) as front:
        socks = [socket.create_connection(("127.0.0.1", front.port), DEADLINE) for _ in range(8)]
        for path, sock in zip(["/v1/completions", "/tokenize"] * 4, socks, strict=True):
            sock.sendall(head(path, b"x" * 100) + b"{")
        front.until(lambda: len(front._ingress._admission) == 8)
        assert front.complete().status_code == 200
        assert front.post("/tokenize", {"prompt": "a"}).status_code == 200
        for sock in socks:
            sock.close()
        front.until(front.idle)


def test_keys_open_the_door_and_limit_who_has_them() -> None:
    keys = (
        ApiKey(name="a", sha256=sha256("sesame")),
        ApiKey(name="b", sha256=sha256("other"), requests_per_minute=1),
    )
    with Front(keys=keys) as front:
        for path in ("/health", "/ready", "/metrics"):
            assert front.get(path).status_code == 200
        for path in ("/status", "/version", "/v1/models", "/openapi.json", "/nope"):
            answer = front.get(path)
            refused(answer, 401, "API key", "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        refused(front.complete(headers={"authorization": "Bearer wrong"}), 401, "not known")
        assert front.complete(headers={"authorization": "Bearer sesame"}).status_code == 200
        assert front.complete(headers={"authorization": "Bearer other"}).status_code == 200
        refused(front.complete(headers={"authorization": "Bearer other"}), 429, "'b'")
        text = front.get("/status", headers={"authorization": "Bearer sesame"}).text
        assert "sesame" not in text
        assert sha256("sesame") not in text


# ---- Requests that are none


def test_methods_paths_and_kinds(front: Front) -> None:
    answer = httpx.request("DELETE", f"{front.url}/v1/models", timeout=DEADLINE)
    refused(answer, 405, "does not take DELETE")
    assert answer.headers["allow"] == "GET, HEAD"
    answer = front.get("/v1/completions")
    refused(answer, 405)
    assert answer.headers["allow"] == "POST"
    refused(front.get("/v1/models/"), 404)
    refused(front.post("/v1/nope"), 404, "does not exist", "not_found")
    for path in ("/health", "/v1/models", "/openapi.json"):
        whole, top = front.get(path), httpx.head(front.url + path, timeout=DEADLINE)
        assert (top.status_code, top.content) == (200, b"")
        assert top.headers["content-length"] == str(len(whole.content))
    body = b'{"prompt": "a", "max_tokens": 1}'
    for kind in ("application/json", "application/json; charset=utf-8", "application/x+json"):
        assert front.post(
            "/v1/completions", content=body, headers={"content-type": kind}
        ).is_success
    assert split(front.raw(head("/v1/completions", body) + body))[0] == 200, "and none"
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/xml", "json"):
        answer = front.post("/v1/completions", content=body, headers={"content-type": kind})
        refused(answer, 415, "application/json")
    for coding in ("gzip", "br", "zstd", "identity, gzip"):
        answer = front.post("/v1/completions", content=body, headers={"content-encoding": coding})
        refused(answer, 415, repr(coding), "unsupported_media_type")
        assert answer.headers["accept-encoding"] == "identity"
    plain = {"content-encoding": "Identity"}
    assert front.post("/v1/completions", content=body, headers=plain).is_success


def test_tokens_there_and_back(front: Front) -> None:
    found = front.post("/tokenize", {"prompt": "What is 17 + 25?"}).json()
    assert found["count"] == len(found["tokens"]) > 3
    assert found["max_model_len"] == LENGTH
    back = front.post("/detokenize", {"tokens": found["tokens"], "model": "tiny-oss"})
    assert back.json() == {"prompt": "What is 17 + 25?"}
    messages = [{"role": "user", "content": "hi <|start|>"}]
    chat = front.post("/tokenize", {"messages": messages}).json()["tokens"]
    text = front.post("/detokenize", {"tokens": chat}).json()["prompt"]
    assert text.startswith("<|start|>"), "control tokens show"
    asked = front.post(
        "/v1/chat/completions",
        {"messages": messages, "max_tokens": 1, "return_token_ids": True},
    )
    assert asked.json()["prompt_token_ids"] == chat
    assert front.post("/tokenize", {"prompt": "a " * LENGTH}).json()["count"] >= LENGTH
    refused(front.post("/tokenize", {"prompt": ["a", "b"]}), 400, "send one")
    refused(front.post("/tokenize", {"text": "a"}), 400, "text")
    refused(front.post("/detokenize", {"tokens": [400]}), 400, "vocabulary")
    refused(front.post("/detokenize", {"tokens": [1] * (LENGTH + 1)}), 400, "context")
    refused(front.post("/detokenize", {"tokens": [1], "model": "x"}), 404, code="model_not_found")


def corpus() -> list[tuple[str, bytes, int]]:
    """(path, body, status): what people and fuzzers send."""
    text, chat = "/v1/completions", "/v1/chat/completions"
    deep = 5000
    bodies: list[tuple[str, bytes]] = [
        (text, b""),
        (text, b"null"),
        (text, b"[]"),
        (text, b"{"),
        (text, b'{"prompt": "a",}'),
        (text, b'{"prompt": NaN}'),
        (text, b'{"prompt": "\xff\xfe"}'),
        (text, b"\xef\xbb\xbf{}"),
        (text, b"\0" * 1000),
        (text, b'{"prompt": "a"}{"prompt": "b"}'),
        (text, b'{"prompt": ' + b"[" * deep + b"]" * deep + b"}"),
        (text, b'{"a":' * deep + b"1" + b"}" * deep),
        (text, b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}"),
        (text, b'{"prompt": "a", "max_tokens": 1e400}'),
        (text, b'{"prompt": "a", "max_tokens": -1}'),
        (text, b'{"prompt": "a", "max_tokens": 1.5}'),
        (text, b'{"prompt": "a", "max_tokens": true}'),
        (text, b'{"prompt": "a", "seed": 1e30}'),
        (text, b'{"prompt": "a", "seed": 18446744073709551616}'),
        (text, b'{"prompt": "a", "temperature": 1e999}'),
        (text, b'{"prompt": "a", "temperature": -0.1}'),
        (text, b'{"prompt": [99999999999999999999]}'),
        (text, b'{"prompt": [-1]}'),
        (text, b'{"prompt": []}'),
        (text, b'{"prompt": ""}'),
        (text, b'{"prompt": [[]]}'),
        (text, b'{"prompt": [1, "a"]}'),
        (text, b'{"prompt": ' + msgspec.json.encode([[1]] * 5000) + b"}"),
        (text, b'{"prompt": "' + b"x" * (10 << 20) + b'"}'),
        (text, b'{"prompt": ' + msgspec.json.encode([1] * 1_000_000) + b"}"),
        (text, msgspec.json.encode({"prompt": "a", "stop": ["a"] * 5000})),
        (text, msgspec.json.encode({"prompt": "a", "stop": "s" * 1_000_000})),
        (text, msgspec.json.encode({"prompt": "a", "stop": [""]})),
        (text, msgspec.json.encode({"prompt": "a", "stop_token_ids": [10**12]})),
        (text, msgspec.json.encode({"prompt": "a", "x" * 1_000_000: 1})),
        (text, msgspec.json.encode({"prompt": "a", "model": "m" * 1_000_000})),
        (text, msgspec.json.encode({f"field{n}": n for n in range(20_000)})),
        (chat, b'{"messages": []}'),
        (chat, b'{"messages": [{}]}'),
        (chat, b'{"messages": [{"role": "user"}]}'),
        (chat, b'{"messages": [{"role": "user", "content": null}]}'),
        (chat, b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}'),
        (chat, b'{"messages": [{"role": "\\ud800", "content": "a"}]}'),
        (chat, msgspec.json.encode({"messages": [{"role": "user", "content": "a"}] * 50_000})),
        (
            chat,
            b'{"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function", '
            b'"function": {"name": "f", "parameters": '
            + b'{"a":' * deep
            + b"1"
            + b"}" * deep
            + b"}}]}",
        ),
        (chat, b'{"messages": [{"role": "user", "content": "' + b"x" * (10 << 20) + b'"}]}'),
        ("/tokenize", b'{"messages": 1, "prompt": 1}'),
        ("/detokenize", b'{"tokens": ' + msgspec.json.encode([1] * 1_000_000) + b"}"),
    ]
    return [
        *[(path, body, 404 if b'"mmm' in body else 400) for path, body in bodies],
        (text, b"x" * ((32 << 20) + 1), 413),
    ]


def test_the_fuzz_corpus_disturbs_nobody(front: Front) -> None:
    """Each gets its 4xx in bounded time and memory, and a stream beside them its every byte."""

    def stream() -> str:
        answer = front.post("/v1/completions", LONG)
        assert answer.status_code == 200
        return "".join(
            msgspec.json.decode(line[6:])["choices"][0]["text"]
            for line in answer.text.split("\n\n")
            if line and line != "data: [DONE]"
        )

    alone = stream()
    before = psutil.Process().memory_info().rss
    front.runner.pause = 0.005
    over = threading.Event()

    def again() -> list[str]:
        found = [stream()]
        while not over.is_set():
            found.append(stream())
        return found

    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(again)
        try:
            for path, body, status in corpus():
                began = time.monotonic()
                answer = front.post(path, content=body)
                assert answer.status_code == status, (body[:80], answer.text[:200])
                refused(answer, status)
                assert len(answer.content) < 1000, "an answer is short, whatever was asked"
                assert time.monotonic() - began < DEADLINE
        finally:
            over.set()
        assert set(beside.result()) == {alone}
    assert psutil.Process().memory_info().rss - before < 400 << 20


def test_text_that_is_odd_is_still_text(front: Front) -> None:
    """A lone surrogate is no character; NUL is one."""
    body = b'{"prompt": "a\\u0000b", "max_tokens": 1}'
    assert front.post("/v1/completions", content=body).status_code == 200
    body = b'{"prompt": "a\\ud800b", "max_tokens": 1}'
    refused(front.post("/v1/completions", content=body), 400, "JSON")
    message = b'{"messages": [{"role": "user", "content": "\\udfff"}], "max_tokens": 1}'
    refused(front.post("/v1/chat/completions", content=message), 400)


# ---- What goes wrong here


def test_a_bug_of_ours_ends_a_stream_with_an_error(
    front: Front, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No trace of it reaches the client, before the first token or after it."""
    feed = Reply.feed
    monkeypatch.setattr(front.runner, "pause", 0.002)

    def broken(self: Reply, output: Output) -> bytes:
        if output.offset > 5:
            raise ZeroDivisionError("secret")
        return feed(self, output)

    monkeypatch.setattr(Reply, "feed", broken)
    *tokens, last = front.post("/v1/completions", LONG).text.strip().split("\n\n")
    assert len(tokens) > 1
    error = msgspec.json.decode(last.removeprefix("data: "))["error"]
    assert error["type"] == "server_error"
    assert "secret" not in last
    refused(front.complete(max_tokens=20), 500, "see the log")
    assert "secret" in caplog.text


def test_an_engine_that_was_lost_a_moment_ago(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: object) -> None:
        raise ChannelClosed("gone")

    monkeypatch.setattr(Link, "submit", lost)
    answer = front.complete()
    refused(answer, 503, "send the request again", "unavailable")
    assert int(answer.headers["retry-after"]) > 0


def test_a_replica_that_is_listed_again_is_used_again(front: Front) -> None:
    """Even where a request of its first time has not ended yet."""
    front.runner.pause = 0.05
    replicas = directory._replicas
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(front.post, "/v1/completions", LONG)
        front.until(lambda: front.scheduler.load().running == 1)
        directory.update({})
        front.until(lambda: front.get("/ready").status_code == 503)
        directory.update(replicas)
        front.runner.pause = 0.0
        assert long.result().text.endswith("data: [DONE]\n\n")
    assert front.complete().status_code == 200


def test_there_are_no_websockets(front: Front) -> None:
    sent: list[Any] = []

    async def ask() -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message["type"])

        await front._ingress({"type": "websocket", "path": "/"}, receive, send)

    asyncio.run(ask())
    assert sent == ["websocket.close"]
