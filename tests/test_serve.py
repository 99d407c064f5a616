"""The whole service: real processes, Ray, HAProxy and the official client."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import httpx
import msgspec
import psutil
import pytest
from openai import APIStatusError, BadRequestError, OpenAI, pydantic_function_tool
from pydantic import BaseModel, Field

from cluster.keys import sha256
from cluster.service import free_ports
from tests.front import head
from tests.service import DEADLINE, ROOT, START, Service, folders, told
from workers.hub import BUNDLED

QUESTION: list[Any] = [{"role": "user", "content": "What is 17 + 25?"}]
LONG = {"prompt": "hello", "max_tokens": 4000, "ignore_eos": True, "stream": True}


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


def test_choices_share_the_prompt(service: Service, client: OpenAI) -> None:
    """Through the official client, whole and streamed; seven find what the first has computed."""
    words = " ".join(f"word{i}" for i in range(60))
    how: dict[str, Any] = {"model": "tiny-oss", "max_tokens": 8, "seed": 3, "temperature": 1.2}
    hits = service.metric("moeray_prefix_cache_hits_total")
    whole = client.completions.create(prompt=words, n=8, logprobs=2, **how)
    assert [choice.index for choice in whole.choices] == [*range(8)]
    assert len({choice.text for choice in whole.choices}) > 1
    assert whole.usage is not None
    prompt = whole.usage.prompt_tokens
    found = service.metric("moeray_prefix_cache_hits_total") - hits
    assert found == 7 * ((prompt - 1) // 16 * 16)
    texts = [""] * 8
    logprobs: list[list[float]] = [[] for _ in texts]
    for chunk in client.completions.create(prompt=words, n=8, logprobs=2, stream=True, **how):
        choice = chunk.choices[0]
        texts[choice.index] += choice.text
        if choice.logprobs is not None:
            logprobs[choice.index] += choice.logprobs.token_logprobs or []
    assert texts == [choice.text for choice in whole.choices]
    for choice, streamed in zip(whole.choices, logprobs, strict=True):
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs == streamed
        assert "".join(choice.logprobs.tokens or []) == choice.text
    alone = client.completions.create(prompt=words, **how)
    assert alone.choices[0].text == texts[0]


def test_log_probabilities_and_penalties(client: OpenAI) -> None:
    how: dict[str, Any] = {"model": "tiny-oss", "messages": QUESTION, "temperature": 0}
    whole = client.chat.completions.create(logprobs=True, top_logprobs=3, n=2, **how)
    for choice in whole.choices:
        assert choice.logprobs is not None
        content = choice.logprobs.content
        assert content
        assert b"".join(bytes(token.bytes or []) for token in content) == b"42"
        for token in content:
            assert -0.5 < token.logprob <= 0
            assert token.top_logprobs[0].token == token.token
            assert len(token.top_logprobs) == 3
    stream = client.chat.completions.create(logprobs=True, top_logprobs=3, stream=True, **how)
    pieces = [chunk.choices[0].logprobs for chunk in stream]
    assert [t for p in pieces if p for t in p.content or []] == content
    assert client.chat.completions.create(**how).choices[0].logprobs is None
    (banned,) = {token.top_logprobs[0].token for token in content[:1]}
    ids = httpx.post(
        f"{client.base_url}completions",
        json={"prompt": banned, "max_tokens": 1, "return_token_ids": True},
        timeout=DEADLINE,
    ).json()["choices"][0]["prompt_token_ids"]
    biased = client.chat.completions.create(
        logit_bias={ids[-1]: -100}, max_completion_tokens=40,
        presence_penalty=0.1, frequency_penalty=0.1, **how,
    )  # fmt: skip
    assert biased.choices[0].message.content != "42"


def function(name: str, **parameters: str) -> dict[str, Any]:
    properties = {parameter: {"type": kind} for parameter, kind in parameters.items()}
    schema = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_tools_loop_with_the_official_client(client: OpenAI, stream: bool) -> None:
    """Call, result, answer, another question: with the answers sent back as they came."""
    tools = [function("get_weather", city="string"), function("set_timer", minutes="integer")]
    messages: list[Any] = []

    def ask() -> Any:
        asked: Any = {"model": "tiny-oss", "messages": messages, "tools": tools}
        if not stream:
            choice = client.chat.completions.create(**asked).choices[0]
        else:
            with client.chat.completions.stream(**asked) as events:
                choice = events.get_final_completion().choices[0]
        messages.append(choice.message.model_dump(exclude={"parsed"}))
        for call in messages[-1].get("tool_calls") or []:
            call["function"].pop("parsed_arguments", None)  # the client's own, for its users
        return choice

    messages.append({"role": "user", "content": "Call get_weather with city Bern."})
    choice = ask()
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Bern"}
    result = json.dumps({"temperature": 21})
    messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    choice = ask()
    assert (choice.finish_reason, choice.message.content) == ("stop", "The temperature is 21.")
    messages.extend(QUESTION)
    choice = ask()
    assert (choice.finish_reason, choice.message.content) == ("stop", "42")


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


class Person(BaseModel):
    name: Annotated[str, Field(max_length=8)]
    age: Annotated[int, Field(ge=0, le=150)]


class Weather(BaseModel):
    """The weather of a city."""

    city: Annotated[str, Field(max_length=8)]


def test_the_official_client_parses_documents_and_calls(client: OpenAI) -> None:
    ask: Any = [{"role": "user", "content": "Make a JSON object with name Tom and age 12."}]
    parsed = client.chat.completions.parse(model="tiny-oss", messages=ask, response_format=Person)
    person = parsed.choices[0].message.parsed
    assert person is not None
    assert (person.name, person.age) == ("Tom", 12)
    with client.chat.completions.stream(
        model="tiny-oss", messages=ask, response_format=Person
    ) as stream:
        streamed = [event.content for event in stream if event.type == "content.done"]
        assert stream.get_final_completion().choices[0].message.parsed == person
    assert streamed == [parsed.choices[0].message.content]

    tool = pydantic_function_tool(Weather)
    called = client.chat.completions.parse(
        model="tiny-oss", messages=QUESTION, tools=[tool], tool_choice="required"
    )
    assert called.choices[0].finish_reason == "tool_calls"
    (call,) = called.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Weather)
    chunks = list(
        client.chat.completions.create(
            model="tiny-oss",
            messages=QUESTION,
            tools=[tool],
            tool_choice={"type": "function", "function": {"name": "Weather"}},
            parallel_tool_calls=False,
            stream=True,
        )
    )
    pieces = [d.function for c in chunks for d in c.choices[0].delta.tool_calls or () if d.function]
    assert pieces[0].name == "Weather"
    arguments = "".join(piece.arguments or "" for piece in pieces)
    assert Weather.model_validate_json(arguments) == call.function.parsed_arguments

    with pytest.raises(BadRequestError, match="uniqueItems") as refused:
        client.chat.completions.create(
            model="tiny-oss",
            messages=ask,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": "array", "uniqueItems": True}},
            },
        )
    assert refused.value.param == "response_format"


def test_documents_and_free_answers_at_once(client: OpenAI, service: Service) -> None:
    """More than there are slots; a document that cannot be finished ends alone."""
    circle: Any = {"$ref": "#/$defs/a"}
    endless: Any = {
        "type": "array",
        "minItems": 2,
        "prefixItems": [{"enum": ["a", 1]}, circle],
        "$defs": {"a": circle},
    }
    schemas: list[Any] = [{"type": "integer", "minimum": n, "maximum": n + 7} for n in range(8)]

    def ask(n: int) -> str:
        form: Any = {}
        if n % 2 or n == 16:
            schema = schemas[n // 2] if n < 16 else endless
            named = {"name": "a", "schema": schema}
            form = {"response_format": {"type": "json_schema", "json_schema": named}}
        try:
            answer = client.chat.completions.create(model="tiny-oss", messages=QUESTION, **form)
        except APIStatusError as error:
            return f"{error.status_code}: {error.message}"
        return str(answer.choices[0].message.content)

    with ThreadPoolExecutor(17) as pool:
        answers = list(pool.map(ask, range(17)))
    assert answers[:16:2] == ["42"] * 8
    assert all(n <= int(answer) <= n + 7 for n, answer in enumerate(answers[1::2]))
    assert answers[16].startswith("400: ")
    assert "grammar" in answers[16]
    service.until(lambda: service.metric("moeray_kv_blocks_used") == 0)


def test_choices_of_documents_with_log_probabilities(client: OpenAI) -> None:
    """On two ranks, whole and streamed; the log probabilities are those of the document's bytes."""
    schema: Any = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y", "z"]}, "b": {"type": "integer", "maximum": 99}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    how: Any = {"model": "tiny-oss", "messages": QUESTION, "response_format": form}
    how |= {"n": 4, "logprobs": True, "top_logprobs": 2, "temperature": 2.0, "seed": 5}
    whole = client.chat.completions.create(**how).choices
    texts, pieces = [""] * 4, [b""] * 4
    for chunk in client.chat.completions.create(stream=True, **how):
        choice = chunk.choices[0]
        texts[choice.index] += choice.delta.content or ""
        for token in (choice.logprobs and choice.logprobs.content) or ():
            pieces[choice.index] += bytes(token.bytes or ())
    for at, one in enumerate(whole):
        assert (one.index, one.finish_reason) == (at, "stop")
        found = json.loads(one.message.content or "")
        assert found["a"] in "xyz"
        assert found["b"] <= 99
        assert one.message.content == texts[at] == pieces[at].decode()
    assert len({*texts}) > 1, "choices are drawn apart"


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


def test_nothing_of_serves_own_answers_without_a_key(service: Service) -> None:
    """However the path is written: its replicas read it decoded."""
    for path in ("/-/routes", "/-/healthz", "/-/Routes", "/%2d/routes", "/%2D%2fhealthz"):
        with socket.create_connection(("127.0.0.1", service.port), DEADLINE) as sock:
            sock.sendall(head(path, b"", method=b"GET"))
            answer = b"".join(iter(lambda sock=sock: sock.recv(1 << 16), b""))  # type: ignore[misc]
        assert answer.startswith(b"HTTP/1.1 404 "), answer
        error = msgspec.json.decode(answer.partition(b"\r\n\r\n")[2])["error"]
        assert error["code"] == "not_found"


def test_a_client_that_closes_its_side_is_told_so(service: Service) -> None:
    body = b'{"prompt": "hello", "max_tokens": 400, "ignore_eos": true}'
    with socket.create_connection(("127.0.0.1", service.port), DEADLINE) as sock:
        sock.sendall(head("/v1/completions", body) + body)
        sock.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
    assert answer.startswith(b"HTTP/1.1 400 "), answer
    error = msgspec.json.decode(answer.partition(b"\r\n\r\n")[2])["error"]
    assert "open both ways" in error["message"]
    service.until(lambda: service.status()["requests"] == 0)


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
    family = service.family()
    lines = told(family, lambda p: (p, p.cmdline()[:1]))
    (ingress,) = [p for p, line in lines if line == ["ray::ServeReplica:moeray:ingress"]]
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
    service.until(lambda: httpx.get(f"{service.url}/ready", timeout=DEADLINE).status_code == 200)


def test_sigterm_drains_and_leaves_nothing_without_haproxy(tmp_path: Path) -> None:
    """With API keys, which nobody gets to see."""
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[[key]]\nname = "c"\nsha256 = "{sha256("sesame-3")}"\n')
    service = Service(
        tmp_path,
        *(
            "--device",
            "cpu",
            "--stream-interval",
            "16",
            "--api-key-file",
            str(keys),
        ),
        RAY_SERVE_ENABLE_HA_PROXY="0",
        MOERAY_API_KEY="sesame-1,sesame-2",
    )
    try:
        service.wait_until_ready()
        assert "without HAProxy" in service.said()
        driver = psutil.Process(service.process.pid)
        family = service.family()
        commands = told([driver, *family], psutil.Process.cmdline)
        assert not [command for command in commands if "sesame" in " ".join(command)]
        environments = told(family, psutil.Process.environ)
        assert environments
        assert not [each for each in environments if "sesame" in str(each)]
        (home,) = {cwd.parent for cwd in folders(family) if "moeray-" in str(cwd)}
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
            *chunks, end = [line for line in lines if line]
            assert end == "data: [DONE]"
            assert len(chunks) == 399 // 16 + (399 % 16 > 0), "after the first, 16 at a time"
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
        assert service.process.wait(START) == 1
    finally:
        service.stop()
    assert says in service.said()
    assert "Traceback" not in service.said()


def test_preflight_refuses_before_ray_starts(tmp_path: Path, monkeypatch: Any) -> None:
    from cluster import service
    from workers.config import ModelSpec, ServiceConfig
    from workers.hub import CheckpointError, NoModel

    port = free_ports(1)[0]
    spec, vocab_size = service.preflight(ServiceConfig(models=(ModelSpec(),), port=port))
    assert (spec.model, spec.served_model_name) == (str(BUNDLED), "tiny-oss")
    assert vocab_size > 0
    with pytest.raises(NoModel):
        service.preflight(ServiceConfig(models=(ModelSpec(model="/nowhere"),), port=port))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
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


def test_a_service_is_given_up_only_when_it_has_been_gone_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Serve's controller may die, and start again."""
    from ray import serve as ray_serve
    from ray.exceptions import RayActorError

    from cluster import service
    from cluster.service import StartupError

    monkeypatch.setattr(service, "WATCH", 0.01)
    there = SimpleNamespace(applications={"moeray": None})
    stop, looks = threading.Event(), 0

    def status() -> SimpleNamespace:
        nonlocal looks
        looks += 1
        if looks % 2:
            raise RayActorError
        if looks > 40:
            stop.set()
        return there

    monkeypatch.setattr(ray_serve, "status", status)
    service._watch("moeray", stop)
    assert looks > 40
    monkeypatch.setattr(service, "GONE", 0.0)
    with pytest.raises(StartupError, match="has been gone"):
        service._watch("another", threading.Event())
