"""The form an answer must have: response formats and tool choices as a grammar for the engine.

The grammar covers the answer from its first token. For harmony that is the rest of a header, so the
whole frame is written out: any thoughts, then the message that was asked for, with control tokens
where they belong and nowhere else. Texts of grammars are explained in ``workers/grammar.py``.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

import msgspec

from cluster.schema import (
    AllowedTools,
    ChatBody,
    FunctionSchema,
    JsonSchema,
    NamedTool,
    Refusal,
)
from cluster.text import Text
from workers.grammar import trouble

MAX_SCHEMAS = 64 << 10  # characters of JSON, all of a request's together
MAX_MULTIPLE = 10_000  # a number in a document has as many states: some KiB and microseconds each
# Control tokens of an answer, in the order of ``_harmony``.
FRAME = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
OBJECT: Mapping[str, Any] = {"type": "object"}
EMPTY: Mapping[str, Any] = {**OBJECT, "properties": {}, "additionalProperties": False}
# Between the parts of a document: one space, or a line break with indentation. Free whitespace
# would let a model write nothing else for ever.
WHITESPACE = r"[ ]|\n[ ]{0,32}"


class Form(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer must be: a document or a call."""

    document: Mapping[str, Any] | None  # the JSON schema of the final message; None: any text
    calls: Mapping[str, Mapping[str, Any]] = {}  # schemas of the arguments of what may be called
    must_call: bool = False
    schemas: tuple[tuple[str, str], ...]  # what the client wrote: (where, grammar of it alone)


def understand(asked: ChatBody) -> Form | None:
    """The form that a request asks for; None: its answer may be anything. Raises Refusal."""
    called, must_call, restricted = _choice(asked)
    schemas: list[tuple[str, str]] = []
    given: list[Any] = []
    calls: dict[str, Mapping[str, Any]] = {}
    for at, tool in enumerate(asked.tools):
        function = tool.function
        if function.name not in called:
            continue
        calls[function.name] = OBJECT
        if function.strict:
            calls[function.name] = schema = _parameters(function, f"tools[{at}]")
            schemas.append((f"tools[{at}]", _alone(schema, f"tools[{at}]")))
            given.append(schema)
    document = None
    if (format := asked.response_format) is not None and format.type != "text":
        document = OBJECT
        if format.type == "json_schema":
            document = _json_schema(format.json_schema)
            schemas.append(("response_format", _alone(document, "response_format")))
            given.append(document)
    if document is None and not (must_call or restricted or schemas):
        return None
    if (size := sum(len(text) for _, text in schemas)) > MAX_SCHEMAS:
        raise Refusal(
            f"the request's JSON schemas have {size} characters; at most {MAX_SCHEMAS} are taken",
            param=schemas[-1][0],
        )
    for (where, _), multiple in zip(schemas, _multiples(given), strict=True):
        if multiple > MAX_MULTIPLE:
            raise Refusal(
                f"{where}: multipleOf cannot be enforced: the least common multiple of all there "
                f"are must be at most {MAX_MULTIPLE}, without decimal point and zeros at the end",
                param=where,
            )
    if asked.ignore_eos:
        raise Refusal(
            "ignore_eos=true does not go with a response_format or with enforced tool calls: the "
            "answer ends where its form does",
            param="ignore_eos",
        )
    return Form(
        document=None if must_call else document,
        calls=calls,
        must_call=must_call,
        schemas=tuple(schemas),
    )


def check(schemas: Sequence[tuple[str, str]]) -> None:
    """Try the schemas of a form. Not for an event loop. Raises Refusal."""
    if found := _trouble(tuple(alone for _, alone in schemas)):
        where, why = schemas[found[0]][0], found[1]
        raise Refusal(f"{where}: the JSON schema cannot be enforced: {why}", param=where)


_trouble = functools.lru_cache(maxsize=256)(trouble)


def grammar(form: Form, text: Text, prompt: Sequence[int]) -> str:
    """What an answer to ``prompt`` must follow. Raises Refusal where the model cannot."""
    if text.control.keys() >= set(FRAME):
        return _harmony(form, text, prompt)
    if form.document is None:
        raise Refusal(
            "this model's format of tool calls is not known: only tool_choice none or auto without "
            "strict tools can be served",
            param="tool_choice",
        )
    return f"start: document\ndocument: {_json(form.document)}\n"


def _harmony(form: Form, text: Text, prompt: Sequence[int]) -> str:
    start, channel, message, end, over, call = (f"<[{text.control[name]}]>" for name in FRAME)
    at = max((i for i, token in enumerate(prompt) if token == text.control["<|start|>"]), default=0)
    if text.decode(prompt[at + 1 :], skip_control=False) != "assistant":
        raise Refusal(
            "the model's chat template does not end with <|start|>assistant: its answers cannot be "
            "held to a form",
            param="response_format",
        )
    # The next message of the same answer starts where this one did.
    again = f'{end} {start} "assistant"'
    kind = '" json"'
    if "<|constrain|>" in text.control:
        kind += f' | " " <[{text.control["<|constrain|>"]}]> "json"'
    rules = [
        "start: before* answer",
        r"TEXT: /(.|\n)*/",
        f'thought: {channel} "analysis" {message} TEXT {again}',
        f"kind: ({kind})?",
    ]
    if form.calls and form.document is None:
        # Not before a document: a client reads all content as that.
        rules.append(f'before: thought | {channel} "commentary" {message} TEXT {again}')
    else:
        rules.append("before: thought")
    answers = [f"call_{n}" for n in range(len(form.calls))]
    for n, (name, schema) in enumerate(form.calls.items()):
        to = json.dumps(f" to=functions.{name}")
        rules += [
            # Models write the recipient on either side of the channel.
            f'call_{n}: ({to} {channel} "commentary" | {channel} "commentary" {to}) kind '
            f"{message} arguments_{n} {call}",
            f"arguments_{n}: {_json(schema)}",
        ]
    if not form.must_call:
        answers.append("final")
        body = "TEXT" if form.document is None else "document"
        rules.append(f'final: {channel} "final" {message} {body} {over}')
    if form.document is not None:
        rules.append(f"document: {_json(form.document)}")
    return "\n".join([*rules, "answer: " + " | ".join(answers), ""])


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}})


def _multiples(schemas: Sequence[Any]) -> Iterator[int]:
    """The least common multiple of every ``multipleOf`` up to each schema, decimals as integers,
    without zeros at its end, which cost nothing.

    Whatever of them meet in one place of a document, alone or in ``allOf`` and ``anyOf``, their
    automaton counts modulo a divisor of that.
    """
    digits, multiple = 0, 1
    for schema in schemas:
        queue = [schema]
        while queue and multiple.bit_length() < 4096:
            at = queue.pop()
            queue += at.values() if isinstance(at, dict) else at if isinstance(at, list) else ()
            number = at.get("multipleOf") if isinstance(at, dict) else None
            if isinstance(number, int | float) and number > 0:
                exact = Decimal(repr(number)).normalize()
                more = max(0, -int(exact.as_tuple().exponent) - digits)
                digits += more
                multiple = math.lcm(multiple * 10**more, int(exact.scaleb(digits)))
        yield int(str(multiple).rstrip("0"))


def _parameters(function: FunctionSchema, where: str) -> Mapping[str, Any]:
    """The schema of a strict tool's arguments, which are an object whatever it says."""
    schema = function.parameters or EMPTY
    kinds = schema.get("type", "object")
    if kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
        raise Refusal(f"{where}.function.parameters: the type of arguments is object", param=where)
    return {**schema, **OBJECT}


def _alone(schema: Mapping[str, Any], where: str) -> str:
    if "x-guidance" in schema:  # llguidance's own; it could switch off what is promised
        raise Refusal(f"{where}: x-guidance is not supported in a JSON schema", param=where)
    try:
        return f"start: document\ndocument: {_json(schema)}\n"
    except RecursionError:
        raise Refusal(f"{where}: the JSON schema is nested too deeply", param=where) from None


def _json_schema(given: JsonSchema | None) -> Mapping[str, Any]:
    where = "response_format.json_schema"
    if given is None or given.schema is None:
        raise Refusal(f"{where} needs a name and a schema", param=where)
    if not NAME.fullmatch(given.name):
        raise Refusal(f"{where}.name must be 1 to 64 letters, digits, _ or -", param=where)
    return given.schema


def _choice(asked: ChatBody) -> tuple[set[str], bool, bool]:
    """Names that may be called, whether one must be, and whether all others are barred."""
    choice = asked.tool_choice
    known = {tool.function.name for tool in asked.tools}
    must_call, names = choice == "required", known
    if choice == "none":
        names = set()
    elif isinstance(choice, NamedTool):
        must_call, names = True, {choice.function.name}
    elif isinstance(choice, AllowedTools):
        must_call = choice.allowed_tools.mode == "required"
        names = {tool.function.name for tool in choice.allowed_tools.tools}
    if unknown := names - known:
        raise Refusal(f"tool_choice: no tool is called {min(unknown)[:64]!r}", param="tool_choice")
    if must_call and not names:
        raise Refusal("tool_choice asks for a call and there are no tools", param="tool_choice")
    return names, must_call, isinstance(choice, AllowedTools)
