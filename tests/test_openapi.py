"""``/openapi.json`` is true: schemathesis asks for what it says, and for what it does not say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema_rs
import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from cluster import openapi
from cluster.store import Store
from tests.front import DEADLINE, Front

# That all it describes can be served is not claimed: a prompt may be too long, a model unknown.
EXCLUDED = ("positive_data_acceptance",)
OPERATIONS = [
    *("POST /v1/completions", "POST /v1/chat/completions", "POST /tokenize", "POST /detokenize"),
    *("GET /v1/models", "GET /v1/models/{model}", "GET /health", "GET /ready", "GET /metrics"),
    *("POST /v1/responses", "GET /v1/responses/{id}", "DELETE /v1/responses/{id}"),
    *(
        "GET /v1/responses/{id}/input_items",
        "GET /status",
        "GET /version",
    ),  # it leaves out the document itself
]


def test_no_name_stands_for_two_things() -> None:
    """Clients made from the document would get whichever comes last."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        assert len({*names}) == len(names), sorted({n for n in names if names.count(n) > 1})
        return dict(pairs)

    found = json.loads(openapi.document("1"), object_pairs_hook=unique)
    assert not [name for name in found["components"]["schemas"] if name.startswith("_")]


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    store = Store(tmp_path_factory.mktemp("store") / "responses.db")
    with Front(store=store) as front:
        yield front
        front.until(front.idle)
    store.close()


@pytest.fixture(scope="module")
def operations(front: Front) -> dict[str, Any]:
    document = schemathesis.openapi.from_url(f"{front.url}/openapi.json")
    found: list[Any] = [*document.get_all_operations()]
    return {operation.ok().label: operation.ok() for operation in found}


def ask(operation: Any, examples: int) -> None:
    excluded = [schemathesis.checks.CHECKS.get_one(name) for name in EXCLUDED]
    cases = st.one_of(
        operation.as_strategy(GenerationMode.NEGATIVE),
        operation.as_strategy(GenerationMode.POSITIVE, headers={"X-Request-Timeout": "20"}),
    )

    @settings(
        max_examples=examples,
        database=None,
        derandomize=True,
        suppress_health_check=[*HealthCheck],
    )
    @given(cases)
    def each(case: Any) -> None:
        case.call_and_validate(excluded_checks=excluded, timeout=DEADLINE)

    each()


def test_every_operation_is_there(operations: dict[str, Any], front: Front) -> None:
    assert operations.keys() == {*OPERATIONS}
    assert front.get("/openapi.json").json()["openapi"] == "3.1.0"


@pytest.mark.parametrize("label", OPERATIONS)
def test_answers_are_as_the_document_says(operations: dict[str, Any], label: str) -> None:
    ask(operations[label], 60 if label.startswith("POST") else 5)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a", "max_tokens": 3, "return_token_ids": True}),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 3, "stop_token_ids": [1]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        (
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": "a"}],
                "max_tokens": 3,
                "return_token_ids": True,
                "temperature": 2,
            },
        ),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}]}),
        ("/detokenize", {"tokens": [5, 6]}),
    ],
)
def test_good_answers_are_as_it_says(front: Front, path: str, body: dict[str, Any]) -> None:
    """Whole ones and, where it has them, streams: chunk for chunk."""
    document = front.get("/openapi.json").json()
    kinds = document["paths"][path]["post"]["responses"]["200"]["content"]

    def valid(schema: dict[str, Any]) -> Any:
        return jsonschema_rs.validator_for(schema | {"components": document["components"]})

    whole = valid(kinds["application/json"]["schema"])
    answer = front.post(path, body)
    assert answer.status_code == 200
    whole.validate(answer.json())
    assert not whole.is_valid({"id": 1})
    if events := kinds.get("text/event-stream"):
        chunk = valid(events["schema"]["properties"]["data"]["anyOf"][1]["contentSchema"])
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        *chunks, last, done = front.post(path, body | usage).text.strip().split("\n\n")
        assert done == "data: [DONE]"
        for each in [*chunks, last]:
            chunk.validate(msgspec.json.decode(each.removeprefix("data: ")))
        assert not chunk.is_valid({"id": 1})


def test_a_response_is_as_it_says(front: Front) -> None:
    document = front.get("/openapi.json").json()

    def valid(path: str, method: str) -> Any:
        content = document["paths"][path][method]["responses"]["200"]["content"]
        schema = content["application/json"]["schema"]
        return jsonschema_rs.validator_for(schema | {"components": document["components"]})

    body = {"input": "a", "max_output_tokens": 3, "metadata": {"a": "b"}, "tool_choice": "none"}
    answer = front.post("/v1/responses", body).json()
    valid("/v1/responses", "post").validate(answer)
    one = f"/v1/responses/{answer['id']}"
    path = "/v1/responses/{id}"
    valid(path, "get").validate(front.get(one).json())
    valid(f"{path}/input_items", "get").validate(front.get(f"{one}/input_items?limit=1").json())
    valid(path, "delete").validate(httpx.delete(front.url + one, timeout=DEADLINE).json())
    assert not valid(path, "get").is_valid({"id": 1})
    events = front.post("/v1/responses", body | {"stream": True}).text.strip().split("\n\n")
    kinds = document["paths"]["/v1/responses"]["post"]["responses"]["200"]["content"]
    (data,) = kinds["text/event-stream"]["schema"]["properties"]["data"]["anyOf"]
    schema = data["contentSchema"] | {"components": document["components"]}
    for each in events:
        event = msgspec.json.decode(each.partition("\ndata: ")[2])
        jsonschema_rs.validator_for(schema).validate(event)


@pytest.mark.slow
@pytest.mark.parametrize("label", OPERATIONS)
def test_answers_are_as_the_document_says_for_longer(
    operations: dict[str, Any], label: str
) -> None:
    ask(operations[label], 1500 if label.startswith("POST") else 20)
