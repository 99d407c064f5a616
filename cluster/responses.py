"""The body of ``POST /v1/responses``, understood: its items as the messages of a chat.

What is asked goes the way of a chat (``cluster/openai.py``); this file says it in a chat's words,
and refusals in the words of the Responses API. The answer is the matter of ``cluster/items.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from cluster import openai
from cluster.openai import Call, Model
from cluster.schema import ChatBody, Refusal
from cluster.store import Turn

Json: TypeAlias = dict[str, Any]

LOGPROBS = "message.output_text.logprobs"
# Of what may be included; reasoning comes as it is, so nobody needs it encrypted.
INCLUDED = (LOGPROBS, "reasoning.encrypted_content")
MAX_METADATA = 16
# What a chat calls things, and what they are called here.
NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "logprobs=true": f"include={LOGPROBS}",
}
NAMED = re.compile(rf"\b({'|'.join(map(re.escape, NAMES))})\b(\[\d+\])?")


class EventOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_obfuscation: bool = False  # padding against traffic analysis; never sent


class Reasoning(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    effort: str | None = None
    context: Literal["auto", "current_turn"] | None = None  # the chat template decides
    mode: Literal["standard"] | None = None
    summary: str | None = None  # ignored, and so is its older name: the reasoning itself is sent
    generate_summary: str | None = None


class Format(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema: Json | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    format: Format | None = None
    verbosity: str | None = None  # ignored


class ResponsesBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    input: str | list[Json]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool = True
    metadata: dict[str, str] = {}
    include: list[str] = []
    stream: bool = False
    stream_options: EventOptions | None = None
    tools: list[Json] = []
    tool_choice: str | Json = "auto"
    parallel_tool_calls: bool = True
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    top_k: int | None = None
    seed: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    priority: int = 0
    cache_salt: str = ""

    @property
    def items(self) -> list[Json]:
        """The input of a body that has been read."""
        assert not isinstance(self.input, str)
        return self.input


class Part(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A piece of text; what an answer has beside it may be sent back and says nothing."""

    type: Literal["input_text", "output_text", "refusal", "reasoning_text", "summary_text"]
    text: str | None = None
    refusal: str | None = None
    annotations: list[Any] = []
    logprobs: list[Any] = []


class Item(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What all items have. Nobody asks for the id and the status of one that is sent back."""

    id: str | None = None
    status: str | None = None


class Said(Item, tag="message", forbid_unknown_fields=True):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Json]
    phase: str | None = None


class Thought(Item, tag="reasoning", forbid_unknown_fields=True):
    summary: list[Json] = []
    content: list[Json] = []


class Called(Item, tag="function_call", forbid_unknown_fields=True):
    call_id: str
    name: str
    arguments: str


class Returned(Item, tag="function_call_output", forbid_unknown_fields=True):
    call_id: str
    output: str | list[Json]


KINDS: Mapping[str, type[Said | Thought | Called | Returned]] = {
    "message": Said,
    "reasoning": Thought,
    "function_call": Called,
    "function_call_output": Returned,
}


class FunctionTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None
    defer_loading: Literal[False] = False


def read(body: bytes) -> ResponsesBody:
    """What a body says, before anything is looked up for it. Raises Refusal."""
    asked = openai.convert(openai.fields(body, "responses", ResponsesBody), ResponsesBody)
    if isinstance(asked.input, str):
        asked.input = [{"role": "user", "content": asked.input}]
    asked.input = [_given(item) for item in asked.input]
    for at, item in enumerate(asked.items):
        if "role" in item:
            item.setdefault("type", "message")
        known = _item(f"input[{at}]", item)
        if isinstance(known, Said) and isinstance(known.content, str):
            type = "output_text" if known.role == "assistant" else "input_text"
            item["content"] = [{"type": type, "text": known.content}]
    check_included(asked.include)
    if len(asked.metadata) > MAX_METADATA or any(
        len(name) > 64 or len(value) > 512 for name, value in asked.metadata.items()
    ):
        raise Refusal(
            f"metadata takes {MAX_METADATA} pairs of up to 64 and 512 characters", param="metadata"
        )
    return asked


def check_included(names: Sequence[str]) -> None:
    """Raises Refusal where something cannot be included."""
    for name in names:
        if name not in INCLUDED:
            raise Refusal(
                f"include={name[:64]!r} is not supported ({' and '.join(INCLUDED)} are)",
                param="include",
            )


def understand(
    asked: ResponsesBody,
    turns: Sequence[Turn],
    models: Mapping[str, Model],
    *,
    id: str,
    seed: int,
    now: int,
) -> Call:
    """The call that a body asks for after the earlier ``turns`` of its conversation; as
    ``openai.chat``."""
    earlier = conversation(turns)
    items = [_item("input", item) for item in [*earlier, *asked.items]]
    try:
        chat = openai.convert(_chat(asked, _messages(items, -len(earlier))), ChatBody)
        call = openai.converse(chat, models, id=f"resp_{id}", seed=seed, now=now)
    except Refusal as refusal:
        raise _renamed(refusal) from None
    schemas = tuple((_rename(where), schema) for where, schema in call.schemas)
    return msgspec.structs.replace(call, schemas=schemas)


def conversation(turns: Sequence[Turn]) -> list[Json]:
    """The items of turns that were kept."""
    found: list[Json] = []
    for turn in turns:
        found += msgspec.json.decode(turn.input) + msgspec.json.decode(turn.output)
    return found


def _given(fields: Json) -> Json:
    """Without what is null, which counts as not sent."""
    return {name: value for name, value in fields.items() if value is not None}


def _item(where: str, item: Json) -> Said | Thought | Called | Returned:
    type = str(item.get("type", "item_reference"))
    if type not in KINDS:
        raise Refusal(
            f"{where}: items of type {type[:64]!r} are not supported ({', '.join(KINDS)} are)",
            param=where,
        )
    return openai.convert({**item, "type": type}, KINDS[type], where)


def _text(where: str, content: str | Sequence[Json], *types: str) -> str:
    """The text of content, whose parts are joined as a chat joins them."""
    if isinstance(content, str):
        return content
    texts = []
    for at, part in enumerate(content):
        type = str(part.get("type"))
        if type not in types:
            raise Refusal(
                f"{where}[{at}]: parts of type {type[:64]!r} are not supported here "
                f"({', '.join(types)} are)",
                param=where,
            )
        known = openai.convert(_given(part), Part, f"{where}[{at}]")
        text = known.refusal if type == "refusal" else known.text
        if text is None:
            raise Refusal(f"{where}[{at}] needs its text", param=where)
        texts.append(text)
    return "\n".join(texts)


def _messages(items: Sequence[Said | Thought | Called | Returned], first: int) -> list[Json]:
    """Items as messages: what an assistant thinks, says and then calls is one message of a chat.

    ``first`` is the number of the first one, below 0 for those of earlier turns.
    """
    out: list[Json] = []
    called: set[str] = set()
    for at, item in enumerate(items, first):
        where = f"input[{at}]"
        last = out[-1] if out and out[-1]["role"] == "assistant" else None
        if isinstance(item, Called):
            if last is None:
                out.append(last := {"role": "assistant"})
            function = {"name": item.name, "arguments": item.arguments}
            last.setdefault("tool_calls", []).append({"id": item.call_id, "function": function})
            called.add(item.call_id)
        elif isinstance(item, Returned):
            if item.call_id not in called:
                raise Refusal(
                    f"No tool call found for function call output with call_id "
                    f"{item.call_id[:64]}.",
                    param="input",
                )
            content = _text(f"{where}.output", item.output, "input_text")
            out.append({"role": "tool", "tool_call_id": item.call_id, "content": content})
        elif isinstance(item, Said) and item.role != "assistant":
            content = _text(f"{where}.content", item.content, "input_text")
            out.append({"role": item.role, "content": content})
        else:
            if last is None or "content" in last or "tool_calls" in last:
                out.append(last := {"role": "assistant"})
            if isinstance(item, Said):
                types = ("output_text", "input_text", "refusal")
                last["content"] = _text(f"{where}.content", item.content, *types)
            else:
                _text(f"{where}.summary", item.summary, "summary_text")
                text = _text(f"{where}.content", item.content, "reasoning_text")
                before = last.get("reasoning_content")
                last["reasoning_content"] = text if before is None else f"{before}\n{text}"
    # Thoughts that came to nothing, as those of an answer that was cut off, are not told again.
    return [message for message in out if message.keys() != {"role", "reasoning_content"}]


def _chat(asked: ResponsesBody, messages: list[Json]) -> Json:
    """The body of a chat that asks for the same."""
    if asked.instructions is not None:
        messages.insert(0, {"role": "system", "content": asked.instructions})
    chat: Json = {
        "model": asked.model,
        "messages": messages,
        "stream": asked.stream,
        "max_completion_tokens": asked.max_output_tokens,
        "tools": [_tool(f"tools[{at}]", tool) for at, tool in enumerate(asked.tools)],
        "tool_choice": _choice(asked.tool_choice),
        "parallel_tool_calls": asked.parallel_tool_calls,
        "reasoning_effort": asked.reasoning.effort if asked.reasoning else None,
        "response_format": _format(asked.text.format if asked.text else None),
        "logprobs": LOGPROBS in asked.include,
        "top_logprobs": asked.top_logprobs,
    }
    for name in SAME:
        chat[name] = getattr(asked, name)
    return _given(chat)


SAME = (
    *("temperature", "top_p", "top_k", "seed", "min_tokens", "ignore_eos"),
    *("priority", "cache_salt"),
)


def _tool(where: str, tool: Json) -> Json:
    if tool.get("type") != "function":
        raise Refusal(
            f"{where}.type {str(tool.get('type'))[:64]!r} is not supported (function is)",
            param=where,
        )
    known = openai.convert(_given(tool), FunctionTool, where)
    names = ("name", "description", "parameters", "strict")
    return {
        "type": "function",
        "function": _given({name: getattr(known, name) for name in names}),
    }


def _choice(choice: str | Json) -> str | Json:
    """A function is named one level deeper in a chat."""
    if isinstance(choice, str):
        return choice
    rest = {name: value for name, value in choice.items() if name != "type"}
    if choice.get("type") == "function":
        return {"type": "function", "function": rest}
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
        tools = [_choice(tool) if isinstance(tool, dict) else tool for tool in choice["tools"]]
        return {"type": "allowed_tools", "allowed_tools": rest | {"tools": tools}}
    return choice


def _format(format: Format | None) -> Json | None:
    if format is None:
        return None
    if format.type != "json_schema":
        return {"type": format.type}
    names = ("name", "description", "schema", "strict")
    return {
        "type": "json_schema",
        "json_schema": _given({name: getattr(format, name) for name in names}),
    }


def _rename(text: str) -> str:
    """A chat's words in those of this API."""
    return NAMED.sub(lambda found: NAMES[found[1]], text)


def _renamed(refusal: Refusal) -> Refusal:
    return Refusal(
        _rename(refusal.message),
        status=refusal.status,
        param=refusal.param and _rename(refusal.param),
        code=refusal.code,
        type=refusal.type,
        headers=refusal.headers,
    )
