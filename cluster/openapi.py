"""``/openapi.json``: what is served, made of the structs and tables that serve it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from cluster.exchange import JSON, SECONDS
from cluster.items import InputItems, ResponseBody
from cluster.reply import ChatChoice, TextChoice, Usage
from cluster.responses import INCLUDED, ResponsesBody
from cluster.schema import IGNORED, LATER, NEVER, ChatBody, CompletionsBody, DetokenizeBody, Kind
from cluster.store import NAME
from cluster.tokens import Detokenized, Tokenized

TEXT = "text/plain"
EVENTS = "text/event-stream"


class Completion(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionChunk(Completion, kw_only=True):
    usage: Usage | UnsetType | None = UNSET  # type: ignore[assignment]


class ChatCompletionChunk(ChatCompletion, kw_only=True):
    object: Literal["chat.completion.chunk"]  # type: ignore[assignment]
    usage: Usage | UnsetType | None = UNSET  # type: ignore[assignment]


class ResponseEvent(msgspec.Struct, kw_only=True):
    type: str
    sequence_number: int


class Deleted(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class Card(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class Cards(msgspec.Struct, kw_only=True):
    object: Literal["list"]
    data: list[Card]


class Failure(msgspec.Struct, kw_only=True):
    message: str
    type: str
    param: str | None
    code: str | None


class Failed(msgspec.Struct, kw_only=True):
    error: Failure


class Ready(msgspec.Struct, kw_only=True):
    ready: bool
    reason: str


class Version(msgspec.Struct, kw_only=True):
    version: str


class Status(msgspec.Struct, kw_only=True):
    ready: bool
    requests: int
    engines: list[dict[str, Any]]


STATUSES = {
    400: "The request is wrong; the error says how",
    401: "The API key is missing or unknown",
    404: "There is no such model or response",
    408: "The body, or the answer, was not there in time",
    413: "The body is too large",
    415: "The body is not plain JSON",
    429: "Too much is being asked; Retry-After says when to come again",
    503: "No engine could do it",
}
HEADERS = {401: "WWW-Authenticate", 429: "Retry-After", 503: "Retry-After"}
STRUCTS = (
    Completion,
    ChatCompletion,
    CompletionChunk,
    ChatCompletionChunk,
    ResponseBody,
    ResponseEvent,
    InputItems,
    Deleted,
    Card,
    Cards,
    Failed,
    Ready,
    Version,
    Status,
)
BODIES: dict[type, Kind] = {
    CompletionsBody: "completions",
    ChatBody: "chat",
    ResponsesBody: "responses",
}


@cache
def document(version: str) -> bytes:
    """The OpenAPI 3.1 document."""
    _, schemas = msgspec.json.schema_components(
        [*STRUCTS, Tokenized, Detokenized, DetokenizeBody, *BODIES],
        ref_template="#/components/schemas/{name}",
    )
    for struct, kind in BODIES.items():
        _complete(schemas[struct.__name__], kind)
    _complete(schemas[DetokenizeBody.__name__])
    found = {
        "openapi": "3.1.0",
        "info": {"title": "moeray", "version": version},
        "paths": {
            "/v1/completions": _post(
                "Continue a text", [CompletionsBody], Completion, CompletionChunk, Failed
            ),
            "/v1/chat/completions": _post(
                "Answer a conversation", [ChatBody], ChatCompletion, ChatCompletionChunk, Failed
            ),
            "/v1/responses": _post("Answer items", [ResponsesBody], ResponseBody, ResponseEvent),
            "/v1/responses/{id}": _get(
                "A stored response", _ref(ResponseBody), *STORED, parameters=[ID, *INCLUDE]
            )
            | {"delete": _get("Forget it", _ref(Deleted), *STORED, parameters=[ID])["get"]},
            "/v1/responses/{id}/input_items": _get(
                "What it was made from", _ref(InputItems), *STORED, parameters=[ID, *INCLUDE, *PAGE]
            ),
            "/tokenize": _post(
                "Ids of a prompt or of messages", [CompletionsBody, ChatBody], Tokenized
            ),
            "/detokenize": _post("Text of ids", [DetokenizeBody], Detokenized),
            "/v1/models": _get("What is served", _ref(Cards)),
            "/v1/models/{model}": _get("One of them", _ref(Card), 404, parameters=[MODEL]),
            "/health": _get("Whether the process lives", {"type": "object"}, open=True),
            "/ready": _get("Whether an engine makes progress", _ref(Ready), open=True),
            "/metrics": _get("For Prometheus", {"type": "string"}, open=True, kind=TEXT),
            "/status": _get("Engines, their ranks and their load", _ref(Status)),
            "/version": _get("Of moeray", _ref(Version)),
            "/openapi.json": _get("This document", {"type": "object"}),
        },
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
    return msgspec.json.encode(found)


ID = {
    "name": "id",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "pattern": f"^{NAME.pattern}$"},
}
INCLUDE = [
    {
        "name": name,
        "in": "query",
        "description": "changes nothing: a response is kept with what it was made with",
        "schema": {"type": "array", "items": {"enum": [*INCLUDED]}},
    }
    for name in ("include", "include[]")
]
PAGE = [
    {"name": name, "in": "query", "schema": schema}
    for name, schema in {
        "limit": {"type": "integer", "minimum": 1, "maximum": 100, "default": 20},
        "order": {"enum": ["asc", "desc"], "default": "desc"},
        "after": {"type": "string"},
    }.items()
]
STORED = (400, 404, 503)
MODEL = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
TIMEOUT = {
    "name": "X-Request-Timeout",
    "in": "header",
    "description": "Seconds that the answer may take",
    "schema": {"type": "string", "pattern": f"^{SECONDS.pattern}$"},
}


def _complete(schema: dict[str, Any], kind: Kind | None = None) -> None:
    """Add to a body's schema what is done before its struct is made: null is as good as not sent,
    and some fields are taken with certain values only."""
    properties = schema["properties"]
    for name in properties.keys() - {*schema["required"]}:
        default = properties[name].pop("default")
        properties[name] = {"anyOf": [properties[name], {"type": "null"}], "default": default}
    if kind is not None:
        for name, neutral in (LATER[kind] | NEVER[kind]).items():
            properties[name] = {"enum": [*neutral, None]}
        for name in IGNORED[kind]:
            properties[name] = {"description": "accepted and ignored"}


def _ref(struct: type) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{struct.__name__}"}


def _answer(description: str, schema: dict[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    return {
        "description": description,
        "headers": {"X-Request-Id": {"schema": {"type": "string"}}},
        "content": {kind: {"schema": schema} for kind in kinds},
    }


def _failures(*statuses: int) -> dict[str, Any]:
    found = {}
    for status in statuses:
        found[str(status)] = _answer(STATUSES[status], _ref(Failed), [JSON])
        if header := HEADERS.get(status):
            found[str(status)]["headers"][header] = {"schema": {"type": "string"}}
    return found


def _post(summary: str, bodies: Sequence[type], answer: type, *events: type) -> dict[str, Any]:
    """``events`` are those of a stream; where they may be ``Failed`` it has a last word."""
    responses = {"200": _answer("The answer", _ref(answer), [JSON])}
    if events:
        content = {"anyOf": [_ref(event) for event in events]}
        data = {"type": "string", "contentMediaType": JSON, "contentSchema": content}
        done = [{"const": "[DONE]"}] if Failed in events else []
        event = {"type": "object", "properties": {"data": {"anyOf": [*done, data]}}}
        responses["200"]["content"][EVENTS] = {"schema": event}
    schema = _ref(bodies[0]) if len(bodies) == 1 else {"anyOf": [_ref(body) for body in bodies]}
    return {
        "post": {
            "summary": summary,
            "security": [{}, {"key": []}],
            "parameters": [TIMEOUT],
            "requestBody": {"required": True, "content": {JSON: {"schema": schema}}},
            "responses": responses | _failures(*STATUSES),
        }
    }


def _get(
    summary: str,
    schema: dict[str, Any],
    *statuses: int,
    open: bool = False,
    kind: str = JSON,
    parameters: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    responses = {"200": _answer("The answer", schema, [kind])}
    if schema == _ref(Ready):
        responses["503"] = _answer("Not ready", schema, [kind])
    refused = _failures(*statuses, *(() if open else (401,)))
    return {
        "get": {
            "summary": summary,
            "security": [{}] if open else [{}, {"key": []}],
            "parameters": [*parameters],
            "responses": responses | refused,
        }
    }
