"""Outputs to a response of the Responses API: items, whole or as typed events.

As in ``cluster/reply.py`` a whole body is the fold of what a stream would have sent.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

from cluster.harmony import Delta, Kind, Token
from cluster.logprobs import chat_logprobs
from cluster.openai import Call
from cluster.reply import Choice
from cluster.responses import Format, ResponsesBody, conversation
from cluster.schema import Refusal
from cluster.store import Kept, Turn
from workers.wire import Output

Json: TypeAlias = dict[str, Any]
Status: TypeAlias = Literal["in_progress", "completed", "incomplete", "failed"]

TYPES: dict[Kind, tuple[str, str]] = {  # of an item, and what its id begins with
    "reasoning": ("reasoning", "rs"),
    "content": ("message", "msg"),
    "call": ("function_call", "fc"),
}
# Events about an item's text: what they are called, and the name of the whole.
TEXTS: dict[Kind, tuple[str, str]] = {
    "reasoning": ("response.reasoning_text", "text"),
    "content": ("response.output_text", "text"),
    "call": ("response.function_call_arguments", "arguments"),
}


class ResponseUsage(msgspec.Struct, kw_only=True):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class ResponseBody(msgspec.Struct, kw_only=True):
    """A response, as far as it has come."""

    id: str
    object: Literal["response"] = "response"
    created_at: int  # Unix seconds, as ``completed_at``
    completed_at: int | None = None
    status: Status
    error: dict[str, str] | None = None
    incomplete_details: dict[str, str] | None = None
    background: Literal[False] = False
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None = None
    metadata: dict[str, str]
    model: str
    output: list[Json]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: Json
    service_tier: Literal["default"] = "default"
    store: bool
    temperature: float
    text: Json
    tool_choice: str | Json
    tools: list[Json]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None


class InputItems(msgspec.Struct, kw_only=True):
    """A page of what a response was made from."""

    object: Literal["list"] = "list"
    data: list[Json]
    first_id: str | None
    last_id: str | None
    has_more: bool


class _TextDelta(msgspec.Struct, gc=False):
    """The one event that comes for every token."""

    type: str
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int | UnsetType
    delta: str
    logprobs: Any = UNSET


_encode = msgspec.json.Encoder().encode


class _Item:
    """An item of the answer while it is generated."""

    def __init__(self, kind: Kind, id: str, name: str, call_id: str) -> None:
        self.kind, self.id, self.name, self.call_id = kind, id, name, call_id
        self.pieces: list[str] = []
        self.tokens: list[Token] = []
        self.status: Status = "in_progress"

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Response:
    """The answer to a call of the Responses API; used as ``reply.Reply`` is, but for its end.

    ``feed`` gives all but the last event; ``end`` gives that one, once it is known whether the
    response could be kept.
    """

    def __init__(self, call: Call, asked: ResponsesBody) -> None:
        self.call = call
        self.done = False
        self._over = False  # its last event has been made
        self.failure: Refusal | None = None
        self.aborts: list[str] = []
        (request,) = call.requests
        self.choice = Choice(call, request)
        self._asked = asked
        self._items: list[_Item] = []
        self._said: set[Kind] = set()  # kinds that have an item
        self._number = 0  # of the next event
        self._status: Status = "in_progress"
        self._completed: int | None = None
        self._store = asked.store

    def feed(self, output: Output) -> bytes:
        """Take one output; bytes to send now."""
        if self.done:
            return b""
        try:
            deltas = self.choice.feed(output)
        except Refusal as failure:
            return self.fail(failure, engine_knows=bool(output.reason))
        events = [] if self._number else self._opening()
        for delta in deltas:
            events += self._take(delta)
        if self.choice.reason is not None:
            if output.reason is None:
                self.aborts.append(output.id)
            self.done = True
            self._status = "incomplete" if self.choice.reason == "length" else "completed"
            if self._status == "completed":
                self._completed = int(time.time())
            events += self._close(self._status)
        return self._sent(events)

    def fail(self, failure: Refusal, engine_knows: bool = False) -> bytes:
        """End the answer with an error; gives a stream's last events."""
        if self._over:
            return b""
        self.done = self._over = True
        self.failure, self._status = failure, "failed"
        if self._items and self._items[-1].status == "in_progress":
            self._items[-1].status = "incomplete"
        if self.choice.reason is None and not engine_knows:
            self.aborts.append(self.choice.request.id)
        error = {"code": failure.code, "message": failure.message, "param": failure.param}
        return self._sent([self._event("error", **error), self._lifecycle("failed")])

    def end(self, kept: bool) -> bytes:
        """The last event of a stream."""
        self._store, self._over = kept, True
        return self._sent([self._lifecycle(self._status)])

    def body(self) -> bytes:
        return _encode(self._body())

    def kept(self, owner: str) -> Kept:
        """What is kept of it, once it is done without failure."""
        body = self._body()
        name = body.id.removeprefix("resp_")
        asked = [
            {"id": f"in_{name}_{at}", "status": "completed", **item}
            for at, item in enumerate(self._asked.items)
        ]
        return Kept(
            id=body.id,
            owner=owner,
            previous=body.previous_response_id,
            input=_encode(asked),
            output=_encode(body.output),
            body=_encode(body),
        )

    # Items.

    def _take(self, delta: Delta) -> list[bytes]:
        events = []
        text = delta.text
        last = self._items[-1] if self._items else None
        if last is None or last.kind != delta.kind or delta.name:
            events += self._close("completed") + self._open(delta)
            if delta.kind != "call" and delta.kind in self._said:
                text = text.removeprefix("\n")  # between two messages of a chat's one text
            self._said.add(delta.kind)
        if text:
            events.append(self._grow(text, delta.tokens))
        return events

    def _open(self, delta: Delta) -> list[bytes]:
        number = len(self._items)
        name = f"{self.call.id.rpartition('_')[2]}_{number}"
        call_id = f"call_{name}" if delta.kind == "call" else ""
        item = _Item(delta.kind, f"{TYPES[delta.kind][1]}_{name}", delta.name, call_id)
        self._items.append(item)
        empty = self._shown(item)
        if delta.kind != "call":
            empty["content"] = []
        events = [self._event("response.output_item.added", output_index=number, item=empty)]
        if delta.kind != "call":
            events.append(self._about("response.content_part.added", part=self._part(item)))
        return events

    def _grow(self, text: str, tokens: Sequence[Token]) -> bytes:
        item = self._items[-1]
        item.pieces.append(text)
        item.tokens += tokens
        event = _TextDelta(
            f"{TEXTS[item.kind][0]}.delta",
            self._number,
            item.id,
            len(self._items) - 1,
            UNSET if item.kind == "call" else 0,
            text,
        )
        if item.kind == "content":
            event.logprobs = self._logprobs(tokens)
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (event.type.encode(), _encode(event))

    def _close(self, status: Status) -> list[bytes]:
        """The end of the last item, if there is one."""
        if not self._items:
            return []
        item = self._items[-1]
        item.status = status
        name, whole = TEXTS[item.kind]
        done: Json = {whole: item.text}
        if item.kind == "content":
            done["logprobs"] = self._logprobs(item.tokens)
        elif item.kind == "call":
            done["name"] = item.name
        events = [self._about(f"{name}.done", **done)]
        if item.kind != "call":
            events.append(self._about("response.content_part.done", part=self._part(item)))
        at = len(self._items) - 1
        shown = self._shown(item)
        return [*events, self._event("response.output_item.done", output_index=at, item=shown)]

    def _shown(self, item: _Item) -> Json:
        shown: Json = {"id": item.id, "type": TYPES[item.kind][0], "status": item.status}
        if item.kind == "call":
            return shown | {"call_id": item.call_id, "name": item.name, "arguments": item.text}
        if item.kind == "reasoning":
            return shown | {"summary": [], "content": [self._part(item)]}
        return shown | {"role": "assistant", "content": [self._part(item)]}

    def _part(self, item: _Item) -> Json:
        if item.kind == "reasoning":
            return {"type": "reasoning_text", "text": item.text}
        return {
            "type": "output_text",
            "text": item.text,
            "annotations": [],
            "logprobs": self._logprobs(item.tokens),
        }

    def _logprobs(self, tokens: Sequence[Token]) -> Sequence[Any]:
        return chat_logprobs(self.call.model.text, tokens).content if tokens else ()

    # Events.

    def _sent(self, events: Sequence[bytes]) -> bytes:
        return b"".join(events) if self.call.stream else b""

    def _opening(self) -> list[bytes]:
        return [self._lifecycle("created"), self._lifecycle("in_progress")]

    def _lifecycle(self, name: str) -> bytes:
        return self._event(f"response.{name}", response=self._body())

    def _about(self, name: str, /, **fields: Any) -> bytes:
        """An event about the last item's text."""
        at: Json = {"item_id": self._items[-1].id, "output_index": len(self._items) - 1}
        if self._items[-1].kind != "call":
            at["content_index"] = 0
        return self._event(name, **at, **fields)

    def _event(self, name: str, /, **fields: Any) -> bytes:
        event = {"type": name, "sequence_number": self._number} | fields
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (name.encode(), _encode(event))

    def _body(self) -> ResponseBody:
        asked, call, choice = self._asked, self.call, self.choice
        sampling = choice.request.sampling
        body = ResponseBody(
            id=call.id,
            created_at=call.created,
            completed_at=self._completed,
            status=self._status,
            instructions=asked.instructions,
            max_output_tokens=asked.max_output_tokens,
            metadata=asked.metadata,
            model=call.model.name,
            output=[self._shown(item) for item in self._items],
            parallel_tool_calls=asked.parallel_tool_calls,
            previous_response_id=asked.previous_response_id,
            reasoning={"effort": asked.reasoning and asked.reasoning.effort, "summary": None},
            store=self._store,
            temperature=sampling.temperature,
            text={"format": (asked.text and asked.text.format) or Format(type="text")},
            tool_choice=asked.tool_choice,
            tools=asked.tools,
            top_logprobs=asked.top_logprobs or 0,
            top_p=sampling.top_p,
        )
        if self._status == "incomplete":
            body.incomplete_details = {"reason": "max_output_tokens"}
        if self.failure is not None:
            code = "invalid_prompt" if self.failure.status == 400 else "server_error"
            body.error = {"code": code, "message": self.failure.message}
        if self.done:
            read, written = len(choice.request.prompt), len(choice.emitted)
            body.usage = ResponseUsage(
                input_tokens=read,
                # Prefixes are cached anyway; nothing is written because it was asked for.
                input_tokens_details={"cached_tokens": choice.cached, "cache_write_tokens": 0},
                output_tokens=written,
                output_tokens_details={"reasoning_tokens": choice.thoughts},
                total_tokens=read + written,
            )
        return body


def input_items(turns: Sequence[Turn], asked: Mapping[str, str]) -> bytes:
    """A page of all of a response's conversation but its own output.

    ``asked`` is OpenAI's query: ``limit``, ``order``, ``after``. Raises Refusal.
    """
    limit, order = asked.get("limit", "20"), asked.get("order", "desc")
    if not limit.isdecimal() or not 1 <= int(limit[:9]) <= 100:
        raise Refusal("limit must be from 1 to 100", param="limit")
    if order not in ("asc", "desc"):
        raise Refusal("order must be asc or desc", param="order")
    items = conversation([*turns[:-1], Turn(turns[-1].input, b"[]")])
    if order == "desc":
        items.reverse()
    if "after" in asked:
        places = [at for at, item in enumerate(items) if item["id"] == asked["after"]]
        if not places:
            raise Refusal("after names no item of this response", param="after")
        items = items[places[0] + 1 :]
    page = items[: int(limit)]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    more = len(items) > len(page)
    return _encode(InputItems(data=page, first_id=first, last_id=last, has_more=more))
