"""Structured output on the bundled model: what was asked for is what comes, whatever it writes."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
import torch

from cluster import openai, structure
from cluster.harmony import splitter
from cluster.openai import Call
from cluster.schema import Refusal
from cluster.text import Text
from deploy.tiny_oss import tasks
from kernels.dispatch import Shapes, choose
from moeray import LLM, SamplingParams
from tests.engines import Engine
from tests.ranks import generate
from workers.grammar import Grammars
from workers.hub import BUNDLED
from workers.sampler import Sampler
from workers.wire import Join, Request, Sampling

QUESTIONS = ("Make a JSON object with name Tom and age 12.", "What is 17 + 25?", "hello")
WEATHER: dict[str, Any] = {
    "name": "weather",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 8},
            "unit": {"enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}
CLOCK: dict[str, Any] = {"name": "clock", "strict": True}
LOOSE: dict[str, Any] = {"name": "loose", "parameters": {"type": "object", "oneOf": []}}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(device="cpu", dtype="float32", kv_cache_memory=64 << 20, max_num_seqs=64)


def tools(*functions: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"type": "function", "function": function} for function in functions]


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def random_schema(draw: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema whose documents are of bounded length."""
    kinds = ["string", "integer", "enum", "boolean", "null", "pattern", "const"]
    kind = draw.choice([*kinds, *(["array", "object", "any"] * 3 if depth else [])])
    inner = depth - 1
    if kind == "string":
        return {"type": "string", "maxLength": draw.randint(0, 8)}
    if kind == "integer":
        low = draw.randint(-2000, 1000)
        return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 3000)}
    if kind == "enum":
        return {
            "enum": draw.sample(["red", "ok", "ö\n", "<|end|>", 7, -1.5, None, True, [1], {}], 4)
        }
    if kind == "pattern":
        return {"type": "string", "pattern": "^[a-f]{2,4}-[0-9]{1,3}$"}
    if kind == "const":
        return {"const": draw.choice(["x y", 12, [True, {"a": None}]])}
    if kind == "array":
        least = draw.randint(0, 1)
        most = draw.randint(1, 3)
        items = random_schema(draw, inner)
        return {"type": "array", "items": items, "minItems": least, "maxItems": most}
    if kind == "any":
        return {"anyOf": [random_schema(draw, inner), random_schema(draw, inner)]}
    if kind == "object":
        names = draw.sample(
            ["name", "age", "two words", 'quote"d', "ünï", "a", "b"], draw.randint(0, 3)
        )
        return {
            "type": "object",
            "properties": {name: random_schema(draw, inner) for name in names},
            "required": [name for name in names if draw.random() < 0.7],
            "additionalProperties": False,
        }
    return {"type": kind}


def understood(llm: LLM, content: str, **fields: Any) -> Call:
    """As ``LLM.chat`` understands it; to be run with others at once."""
    params = SamplingParams(**({"max_tokens": 1500} | fields.pop("params", {})))
    messages = [{"role": "user", "content": content}]
    return llm._understand(openai.chat, params, messages=messages, **fields)


def check_documents(llm: LLM, seeds: Sequence[int]) -> None:
    schemas = [random_schema(random.Random(seed)) for seed in seeds]
    answers = llm._finish(
        [
            understood(
                llm,
                QUESTIONS[seed % len(QUESTIONS)],
                response_format=schema_format(schema),
                params={"temperature": seed % 3 / 2, "seed": seed},
            )
            for seed, schema in zip(seeds, schemas, strict=True)
        ]
    )
    for schema, answer in zip(schemas, answers, strict=True):
        assert answer.finish_reason == "stop"
        jsonschema.validate(json.loads(answer.text), schema)


def test_random_schemas_give_valid_documents(llm: LLM) -> None:
    check_documents(llm, range(40))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_hundred_random_schemas_give_valid_documents(llm: LLM) -> None:
    check_documents(llm, range(40, 240))


@pytest.mark.parametrize("seed", range(12))
def test_whatever_a_grammar_allows_is_what_was_asked_for(llm: LLM, seed: int) -> None:
    """Tokens drawn at random from the masks, which no model does: control tokens, odd Unicode, a
    recipient on either side. What clients get of it is a valid document or a valid call."""
    draw = random.Random(seed)
    schema = random_schema(draw)
    call = understood(
        llm, "hello", response_format=schema_format(schema), tools=tools(WEATHER, CLOCK)
    )
    text, request = llm._model.text, call.requests[0]
    ends = [text.control[name] for name in ("<|end|>", "<|return|>", "<|call|>")]
    walk, tokens = llm._grammars.enter(request.grammar, []), [ends[0]]
    while tokens[-1] not in ends[1:]:
        bits = llm._grammars.masks([walk])[0].view(np.uint8)
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()
        assert allowed, walk.error
        # Else free text would go on and on.
        over = [token for token in allowed if token in ends]
        tokens.append(over[0] if over and draw.random() < 0.3 else draw.choice(allowed))
        walk.advance(tokens[-1:])
        assert not walk.error
        assert len(tokens) < 5000
    split = splitter(text, request.prompt)
    deltas = [*split.feed(tokens[1:-1]), *split.finish()]
    said = "".join(delta.text for delta in deltas if delta.kind == "content")
    if names := [delta.name for delta in deltas if delta.name]:
        assert not said
        (name,) = names
        arguments = json.loads("".join(delta.text for delta in deltas if delta.kind == "call"))
        jsonschema.validate(
            arguments, WEATHER["parameters"] if name == "weather" else structure.EMPTY
        )
    else:
        jsonschema.validate(json.loads(said), schema)


def called(llm: LLM, calls: Sequence[Call]) -> list[tuple[str, Any]]:
    """Names and arguments of the calls that are the answers, in the order they ended."""
    found = []
    for choice, _ in llm._run(calls):
        if choice.reason:
            assert choice.reason == "tool_calls"
            assert choice.content == ""
            ((name, pieces),) = choice.calls
            found.append((name, json.loads("".join(pieces))))
    return found


@pytest.mark.parametrize("function", [WEATHER, CLOCK, LOOSE], ids=lambda f: str(f["name"]))
def test_tool_choices_give_the_calls_they_ask_for(llm: LLM, function: dict[str, Any]) -> None:
    choice: Any = {"type": "function", "function": {"name": function["name"]}}
    subset = {"mode": "required", "tools": [choice]}
    calls = [
        understood(llm, question, tools=given, tool_choice=asked)
        for question in QUESTIONS[:2]
        for given, asked in (
            (tools(function), "required"),
            (tools(WEATHER, CLOCK, LOOSE), choice),
            (tools(WEATHER, CLOCK, LOOSE), {"type": "allowed_tools", "allowed_tools": subset}),
        )
    ]
    schema = {"weather": WEATHER["parameters"], "clock": structure.EMPTY, "loose": {}}
    for name, arguments in called(llm, calls):
        assert name == function["name"]
        assert isinstance(arguments, dict)
        jsonschema.validate(arguments, schema[name])


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"properties": {"a": {"type": "integer", "maximum": 9}}},
        {"type": ["string", "object"], "maxProperties": 0},
        {"anyOf": [{"type": "string"}, WEATHER["parameters"]]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"enum": ["a", {"b": 1}]}}},
    ],
)
def test_arguments_of_strict_tools_are_objects(llm: LLM, parameters: dict[str, Any]) -> None:
    function = {"name": "f", "strict": True, "parameters": parameters}
    call = understood(llm, "hello", tools=tools(function), tool_choice="required")
    grammar = call.requests[0].grammar
    start = [*tokens_of(llm, " to=functions.f", "<|channel|>"), *tokens_of(llm, "commentary")]
    walk = llm._grammars.enter(grammar, [*start, *tokens_of(llm, "", "<|message|>")])
    assert not walk.error
    bits = llm._grammars.masks([walk])[0].view(np.uint8)
    allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()
    assert allowed
    assert {llm._model.text.decode([token])[:1] for token in allowed} == {"{"}


def tokens_of(llm: LLM, text: str, *control: str) -> list[int]:
    return [*llm._model.text.encode_plain(text), *(llm._model.text.control[c] for c in control)]


@pytest.mark.parametrize("type", ["string", ["string", "null"], None])
def test_strict_tools_of_another_type_are_refused(llm: LLM, type: Any) -> None:
    function = {"name": "f", "strict": True, "parameters": {"type": type}}
    with pytest.raises(Refusal, match=r"tools\[0\].function.parameters: .* object"):
        understood(llm, "hello", tools=tools(function))


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_allowed_tools_bar_what_nobody_declared(llm: LLM, mode: str) -> None:
    """All of the tools are allowed, and no other."""
    named = [{"type": "function", "function": {"name": name}} for name in ("loose", "weather")]
    asked = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}
    function = {**WEATHER, "strict": False}
    call = understood(llm, "hello", tools=tools(LOOSE, function), tool_choice=asked)
    for name, error in (("weather", False), ("clock", True)):
        tokens = tokens_of(llm, f" to=functions.{name}", "<|channel|>")
        assert bool(llm._grammars.enter(call.requests[0].grammar, tokens).error) == error


def test_strict_tools_leave_the_choice_to_the_model(llm: LLM) -> None:
    """Where what it wants to write is valid it writes that."""
    free, held, expected = [], [], []
    for seed in range(4):
        example = tasks.call(random.Random(seed), 0)
        content = example.messages[0]["content"]
        expected.append(example.call)
        strict = [
            {**tool["function"], "strict": True}
            for tool in msgspec.json.decode(msgspec.json.encode(example.tools))
        ]
        for function in strict:
            function["parameters"] |= {"additionalProperties": False}
        free.append(understood(llm, content, tools=example.tools))
        fields = {"tools": tools(*strict), "parallel_tool_calls": seed % 2 == 0}
        held.append(understood(llm, content, **fields))
    assert {call.requests[0].grammar for call in free} == {""}
    assert all(call.requests[0].grammar for call in held)
    assert called(llm, held) == expected
    answers = llm._finish([*held, *free])
    assert [a.token_ids for a in answers[:4]] == [a.token_ids for a in answers[4:]]


def test_a_document_may_spell_a_control_token(llm: LLM) -> None:
    """And anything else that means something to a grammar."""
    values = ["<|end|>", "<|return|>", "<[1]>", "// x\n# y", '%json {"a": 1}', "/", "TEXT", '\\"']
    (answer,) = llm._finish(
        [understood(llm, "hello", response_format=schema_format({"const": values}))]
    )
    assert json.loads(answer.text) == values
    assert "<|end|>" in answer.text


def test_a_json_object_and_a_cut_one(llm: LLM) -> None:
    form = {"type": "json_object"}
    whole = llm.chat([{"role": "user", "content": QUESTIONS[0]}], response_format=form)
    assert json.loads(whole.text) == {"name": "Tom", "age": 12}
    params = SamplingParams(max_tokens=6)
    cut = llm.chat([{"role": "user", "content": QUESTIONS[0]}], params, response_format=form)
    assert cut.finish_reason == "length"
    assert whole.token_ids[:6] == cut.token_ids


# ---- Beside everything else an engine does


def requests(llm: LLM, bound: int) -> tuple[list[Request], list[Request]]:
    """Constrained and free ones, some drawn, some of several choices, priorities and biases."""
    held: list[Request] = []
    free: list[Request] = []
    for seed in range(8):
        params = {"temperature": seed % 2 * 1.0, "seed": seed, "max_tokens": bound}
        form = schema_format(random_schema(random.Random(100 + seed)))
        for to, fields in ((held, {"response_format": form}), (free, {})):
            call = understood(llm, QUESTIONS[seed % 3], params=params, **fields)
            (request,) = call.requests
            sampling = msgspec.structs.replace(
                request.sampling,
                max_tokens=request.sampling.max_tokens if to is held else 60,
                repetition_penalty=1.3 if seed == 5 else 1.0,
                logit_bias={40: 5.0, 41: -100.0} if seed == 3 else {},
            )
            to.append(
                msgspec.structs.replace(
                    request,
                    id=f"{'held' if to is held else 'free'}{seed}",
                    sampling=sampling,
                    choice=seed % 4 // 2,
                    priority=-(seed % 2),
                    waits=(),
                )
            )
    return held, free


def check_held(llm: LLM, held: Sequence[Request], tokens: dict[str, list[int]]) -> None:
    for seed, request in enumerate(held):
        split = splitter(llm._model.text, request.prompt)
        deltas = [*split.feed(tokens[request.id][:-1]), *split.finish()]
        said = "".join(delta.text for delta in deltas if delta.kind == "content")
        jsonschema.validate(json.loads(said), random_schema(random.Random(100 + seed)))


TIGHT: dict[str, Any] = {"kv_cache_memory": 520_000, "block_size": 4, "max_model_len": 330}


def test_nobody_can_tell_what_else_an_engine_does(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone or together, two steps in the air, preempted, resumed: the same tokens."""
    held, free = requests(llm, 200)
    engine = Engine(BUNDLED)
    undisturbed = engine.generate(free)
    alone = {r.id: engine.generate([r])[r.id] for r in held}
    check_held(llm, held, alone)
    mixed = [request for pair in zip(held, free, strict=True) for request in pair]
    assert engine.generate(mixed) == alone | undisturbed

    monkeypatch.setattr(type(engine.runner), "ahead", 2)
    assert engine.generate(mixed) == alone | undisturbed
    tight = Engine(BUNDLED, **TIGHT)
    assert tight.generate(mixed) == alone | undisturbed
    assert tight.scheduler.load().preemptions > 0

    resumed = [msgspec.structs.replace(r, emitted=alone[r.id][: 1 + n]) for n, r in enumerate(held)]
    assert engine.generate([r for r in resumed if r.emitted != alone[r.id]]) == {
        r.id: alone[r.id] for r in resumed if r.emitted != alone[r.id]
    }


def test_two_ranks(llm: LLM) -> None:
    held, free = requests(llm, 200)
    expected = Engine(BUNDLED).generate(free)
    ((tokens, *_),) = generate(2, [(BUNDLED, TIGHT, [*held, *free])])
    check_held(llm, held, tokens)
    assert {request.id: tokens[request.id] for request in free} == expected


def test_an_end_is_put_off_where_the_grammar_leaves_it_open() -> None:
    """As ``min_tokens`` says; one that the grammar commands comes. Rows without one are as ever."""
    grammars = Grammars(BUNDLED, 416, (1, 0, 7))
    ops = choose("reference", torch.device("cpu"), Shapes(torch.float32, 8, 2, 16))
    sampler = Sampler(4, (1, 0, 7), ops, grammars=grammars)
    (a,) = Text(BUNDLED).encode_plain("a")
    how = Sampling(max_tokens=9, temperature=0.0, min_tokens=3, logit_bias={1: 50.0, a: -50.0})
    texts = ("start: /[a-f]*/ <[1]>", 'start: "a" <[1]>', "", "start: <[9]>")
    for slot, grammar in enumerate(texts):
        sampler.join(Join(slot, how, 0, 10, [5] * 10 + [a] * (grammar != ""), grammar))
    logits = torch.zeros(4, 416)
    logits[:, 1], logits[:, 300] = 60, 70
    slots = np.arange(4)

    def draw(position: int) -> list[int]:
        drawn: list[int] = sampler(logits.clone(), slots, np.full(4, position)).tolist()
        return drawn

    early, late = draw(12), draw(13)
    assert early[0] not in (1, a)
    assert set(Text(BUNDLED).decode(early[:1])) <= set("abcdef")
    assert early[1:3] == [1, 300]
    assert late[:3] == [1, 1, 1]
    walks = dict(sampler.walks(slots))
    assert walks.keys() == {0, 1, 3}
    assert [bool(walks[row].error) for row in (0, 1, 3)] == [False, False, True]


def test_stop_tokens_end_a_document_early(llm: LLM) -> None:
    params = {"stop_token_ids": llm._model.text.encode_plain(","), "min_tokens": 2}
    form = {"type": "json_object"}
    (answer,) = llm._finish([understood(llm, QUESTIONS[0], params=params, response_format=form)])
    assert (answer.text, answer.finish_reason) == ('{"name": "Tom"', "stop")


def test_a_grammar_that_leads_nowhere_ends_its_request_alone(llm: LLM) -> None:
    """It cannot be found before: one value in, nothing can follow."""
    circle = {
        "prefixItems": [{"enum": ["a", 1]}, {"$ref": "#/$defs/a"}],
        "minItems": 2,
        "type": "array",
        "$defs": {"a": {"$ref": "#/$defs/a"}},
    }
    free = understood(llm, "Spell the word banana.")
    bad = understood(llm, "hello", response_format=schema_format(circle))
    with pytest.raises(Refusal, match="the grammar cannot go on"):
        llm._finish([bad, free])
    (answer,) = llm._finish([free])
    assert answer.text == "b-a-n-a-n-a"
    load = llm._scheduler.load()
    assert (load.running, load.waiting, load.free) == (0, 0, load.blocks)


def test_more_grammars_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.grammar.KEPT", 2)
    grammars = Grammars(BUNDLED, 416, (1, 0, 7))
    for n in (0, 1, 2, 0):
        walk = grammars.enter(f'start: "{n}"', [])
        walk.advance([21 + n])
    assert len(grammars._compiled) == 2


def test_without_a_tokenizer_a_walk_is_an_error(tmp_path: Path) -> None:
    walk = Grammars(tmp_path, 416, ()).enter("start: /x/", [])
    assert walk.error


# ---- What cannot be enforced is refused by name


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"not": {"type": "string"}}, 'Unimplemented keys: ["not"]'),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"if": {}, "then": {}}, '["if", "then"]'),
        ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"propertyNames": {}}, "propertyNames"),
        ({"unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "oneOf"),
        ({"type": "string", "format": "colour"}, "Unknown format: colour"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "cannot be enforced"),
        ({"multipleOf": 99991, "type": "integer"}, "multipleOf"),
        ({"items": {"multipleOf": 0.99991}}, "multipleOf"),
        ({"allOf": [{"multipleOf": n, "type": "integer"} for n in (9973, 7)]}, "multipleOf"),
        ({"anyOf": [{"multipleOf": n, "type": "integer"} for n in (997, 9.91)]}, "multipleOf"),
        ({"patternProperties": {f"^{n}": {} for n in range(1000, 3000)}}, "to compile"),
        ({"allOf": [{"type": "string", "pattern": str(n)} for n in range(1000)]}, "to compile"),
        ({"type": "strng"}, "Invalid type: strng"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "Unsatisfiable"),
        ({"$ref": "http://127.0.0.1/x"}, "not present"),
        ({"properties": {"a": {"not": {}}}}, '["not"]'),
        ({"x-guidance": {"lenient": True}, "not": {}}, "x-guidance"),
        ({"enum": ["x" * (structure.MAX_SCHEMAS + 1)]}, "65536"),
        ({"type": ["string", "object", 3]}, ""),
    ],
)
def test_what_cannot_be_enforced_is_refused(llm: LLM, schema: Any, says: str) -> None:
    # Arguments are objects, whatever they hold.
    inside = schema
    if schema.keys() & {"type", "oneOf", "allOf"}:
        inside = {"properties": {"a": schema}, "required": ["a"]}
    function = {"name": "f", "strict": True, "parameters": inside}
    forms: list[Any] = [
        ("response_format", {"response_format": schema_format(schema)}),
        ("tools[1]", {"tools": tools(CLOCK, function)}),
    ]
    for param, fields in forms:
        with pytest.raises(Refusal) as caught:
            understood(llm, "hello", **fields)
        error = json.loads(caught.value.body)["error"]
        assert caught.value.status == 400
        assert error["param"] == param
        assert says in error["message"]
        assert len(error["message"]) < 500
    loose = tools({**function, "strict": False})
    assert understood(llm, "hello", tools=loose).requests[0].grammar == ""


@pytest.mark.parametrize("multiples", [[0.01, 1000, 7], [1e6, 0.25], [9973], [64, 125, 0.5]])
def test_multiples_that_can_be_counted_are_enforced(llm: LLM, multiples: list[float]) -> None:
    schema = {"items": {"anyOf": [{"multipleOf": n, "type": "number"} for n in multiples]}}
    understood(llm, "hello", response_format=schema_format(schema))


def test_the_multiples_of_a_requests_schemas_count_together(llm: LLM) -> None:
    functions = [
        {"name": f"f{n}", "strict": True, "parameters": {"properties": {"a": {"multipleOf": n}}}}
        for n in (97, 101, 103)
    ]
    with pytest.raises(Refusal, match=r"tools\[2\]: multipleOf"):
        understood(llm, "hello", tools=tools(*functions))
    understood(llm, "hello", tools=tools(*functions[:2]))


def test_the_stacks_of_other_threads_stay_as_they_are(llm: LLM) -> None:
    before = threading.stack_size()

    def compile(n: int) -> None:
        llm._grammars.compile(f'start: "{n}"')

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(compile, range(400)))
    assert threading.stack_size() == before


def test_too_many_choices_are_refused(llm: LLM) -> None:
    schema = {"type": "object", "properties": {str(n): {} for n in range(1000)}}
    with pytest.raises(Refusal, match="items; max is 2000"):
        understood(llm, "hello", response_format=schema_format(schema))
    schema["required"] = [str(n) for n in range(1000)]
    understood(llm, "hello", response_format=schema_format(schema))


@pytest.mark.parametrize("kind", ["properties", "anyOf", "$ref", "allOf"])
def test_no_schema_exhausts_the_stack(llm: LLM, kind: str) -> None:
    """Nested as deep as the size allows: that would end the process, and with it all answers."""
    schema: Any = {"type": "null"}
    if kind == "$ref":
        links: Any = {f"d{n}": {"items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(1400)}
        schema = {"$ref": "#/$defs/d0", "$defs": links | {"d1400": schema}}
    else:
        for _ in range(60):
            inner = schema
            schema = {kind: {"a": inner} if kind == "properties" else [inner, inner][:1]}
    call = openai.chat(
        json.dumps(
            {
                "messages": [{"role": "user", "content": "hello"}],
                "response_format": schema_format(schema),
            }
        ).encode(),
        llm._models,
        id="1",
        seed=0,
        now=0,
    )
    try:
        structure.check(call.schemas)
    except Refusal as refusal:
        assert refusal.status == 400  # noqa: PT017
    llm._grammars.enter(call.requests[0].grammar, [])
