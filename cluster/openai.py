"""OpenAI's request bodies, understood: what a client asks for as requests to an engine.

Every field of OpenAI's schema is served, ignored or refused by name; ``cluster/schema.py``
and ``docs/api.md`` say which. Answers are the matter of ``cluster/reply.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from cluster import structure
from cluster.harmony import render
from cluster.schema import (
    IGNORED,
    LATER,
    NEVER,
    ChatBody,
    CompletionsBody,
    Kind,
    Message,
    Refusal,
    StreamOptions,
    TextPart,
    Tool,
)
from cluster.template import ChatTemplateError
from cluster.text import NoTokenizer, Text
from workers.wire import Request, Sampling

MAX_CHOICES = 1024  # of all prompts of a request
MAX_N = 128
MAX_BIASES = 300
MOST_LIKELY = {"chat": 20, "completions": 5}  # tokens that come with each one
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """What the ingress knows of a model it serves."""

    name: str
    text: Text
    max_model_len: int  # tokens, prompt and answer together
    vocab_size: int
    created: int = 0  # Unix seconds


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A request body, understood: one wire request for each choice of the answer."""

    id: str
    kind: Kind
    model: Model
    created: int
    requests: tuple[Request, ...]  # in the order of the answer's choices
    stream: bool
    include_usage: bool
    return_token_ids: bool
    stop: tuple[str, ...]
    include_stop: bool  # in the text
    skip_control: bool  # control tokens are no text
    echoes: tuple[str, ...]  # what the choices' texts begin with; empty: nothing
    schemas: tuple[tuple[str, str], ...] = ()  # for structure.check, which takes its time


def completions(body: bytes, models: Mapping[str, Model], *, id: str, seed: int, now: int) -> Call:
    """The call that a body of POST /v1/completions asks for.

    ``id`` names it uniquely, ``seed`` counts if the body brings none, ``now`` is Unix seconds.
    Tokenizing a long prompt takes a while: run it in a thread. Raises Refusal.
    """
    asked, model, prompts = text_prompts(body, models)
    if asked.echo and asked.logprobs is not None:
        raise Refusal("echo=true does not go with logprobs: a prompt has none here", param="echo")
    return _call(f"cmpl-{id}", "completions", model, asked, prompts, asked.max_tokens, seed, now)


def chat(body: bytes, models: Mapping[str, Model], *, id: str, seed: int, now: int) -> Call:
    """The call that a body of POST /v1/chat/completions asks for; as ``completions``."""
    return converse(chat_body(body), models, id=f"chatcmpl-{id}", seed=seed, now=now)


def converse(asked: ChatBody, models: Mapping[str, Model], *, id: str, seed: int, now: int) -> Call:
    """The call that a conversation asks for, whichever way it was put; as ``completions``."""
    model, prompt = chat_prompt(asked, models)
    form = structure.understand(asked)
    if asked.max_tokens is not None and asked.max_completion_tokens is not None:
        raise Refusal(
            "send max_completion_tokens or max_tokens, not both", param="max_completion_tokens"
        )
    limit = _given(asked.max_completion_tokens, asked.max_tokens)
    call = _call(id, "chat", model, asked, [prompt], limit, seed, now)
    return call if form is None else _held(call, form)


def text_prompts(
    body: bytes, models: Mapping[str, Model]
) -> tuple[CompletionsBody, Model, list[list[int]]]:
    """A body of POST /v1/completions, its model and the ids of its prompts. Raises Refusal."""
    asked = convert(fields(body, "completions", CompletionsBody), CompletionsBody)
    model = find(asked.model, models)
    prompts: list[list[int]] = []
    for at, prompt in enumerate(_prompts(asked.prompt)):
        if isinstance(prompt, str):
            prompts.append(_encode(model, prompt))
            continue
        outside = next((i for i in prompt if not 0 <= i < model.vocab_size), None)
        if outside is not None:
            raise Refusal(
                f"prompt {at} holds token id {outside}; the vocabulary has {model.vocab_size}",
                param="prompt",
            )
        prompts.append(prompt)
    return asked, model, prompts


def chat_body(body: bytes) -> ChatBody:
    """A body of POST /v1/chat/completions. Raises Refusal."""
    asked = fields(body, "chat", ChatBody)
    _kinds("tools", asked.get("tools"), ("function",), "tools of type {} are not supported")
    for where, message in _objects("messages", asked.get("messages")):
        calls = "calls of type {} are not supported"
        _kinds(f"{where}.tool_calls", message.get("tool_calls"), ("function",), calls)
        parts = "parts of type {} are not available yet"
        _kinds(f"{where}.content", message.get("content"), ("text", "refusal"), parts)
    return convert(asked, ChatBody)


def _objects(where: str, items: Any) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a list, if it is one, each with where it is."""
    listed = enumerate(items if isinstance(items, list) else ())
    return [(f"{where}[{at}]", item) for at, item in listed if isinstance(item, dict)]


def _kinds(where: str, items: Any, known: Sequence[str], why: str) -> None:
    """Refuse items for what they are, before anybody wonders about their fields."""
    for at, item in _objects(where, items):
        if "type" in item and item["type"] not in known:
            raise Refusal(f"{at}: {why.format(_brief(item['type']))}", param=at)


def chat_prompt(asked: ChatBody, models: Mapping[str, Model]) -> tuple[Model, list[int]]:
    """The model of a conversation and the ids of its prompt. Raises Refusal."""
    model = find(asked.model, models)
    if not asked.messages:
        raise Refusal("messages must not be empty", param="messages")
    tools = [_tool(at, tool) for at, tool in enumerate(asked.tools)]
    named: set[str] = set()
    for at, tool in enumerate(asked.tools):
        if (name := tool.function.name) in named:
            raise Refusal(f"tools[{at}]: another tool is called {name!r}", param=f"tools[{at}]")
        named.add(name)
    options = {}
    if asked.reasoning_effort is not None:
        if asked.reasoning_effort not in ("low", "medium", "high"):
            raise Refusal("reasoning_effort must be low, medium or high", param="reasoning_effort")
        options["reasoning_effort"] = asked.reasoning_effort
    called: set[str] = set()
    messages = [_message(at, message, called) for at, message in enumerate(asked.messages)]
    _bound(model, sum(len(str(message.get("content", ""))) for message in messages), "messages")
    shown = tools if tools and asked.tool_choice != "none" else None
    try:
        prompt = render(model.text, messages, shown, **options)
    except (NoTokenizer, ChatTemplateError) as error:
        raise Refusal(str(error), param="messages") from error
    return model, prompt


def find(name: str | None, models: Mapping[str, Model]) -> Model:
    """The model called ``name``; with None the only one there is. Raises Refusal."""
    if name is None:
        if len({model.name for model in models.values()}) == 1:
            return next(iter(models.values()))
        raise Refusal(f"name a model; served are: {', '.join(models)}", param="model")
    if name not in models:
        raise Refusal(
            f"the model {_brief(name)} does not exist; served are: {', '.join(models)}",
            status=404,
            param="model",
            code="model_not_found",
        )
    return models[name]


def _held(call: Call, form: structure.Form) -> Call:
    """The call, its answers held to a form."""
    grammar = structure.grammar(form, call.model.text, call.requests[0].prompt)
    held = [
        msgspec.structs.replace(request, grammar=grammar, waits=("grammar",))
        for request in call.requests
    ]
    return msgspec.structs.replace(call, requests=tuple(held), schemas=form.schemas)


_T = TypeVar("_T")


def decode(body: bytes) -> dict[str, Any]:
    """A body as a JSON object. Raises Refusal."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Refusal(f"the body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise Refusal(f"the body must be a JSON object, not {type(fields).__name__}")
    return fields


def fields(body: bytes, kind: Kind, served: type[msgspec.Struct]) -> dict[str, Any]:
    """The body's fields without those that are null or ignored; refuses what is not ``served``."""
    known = served.__struct_fields__
    asked = {}
    unknown = []
    for name, value in decode(body).items():
        if name in known:
            if value is not None:
                asked[name] = value
            continue
        for table, why in (
            (LATER[kind], "is not available yet"),
            (NEVER[kind], "is not supported"),
        ):
            if name in table and value is not None and not _neutral(value, table[name]):
                raise Refusal(f"{name}={_brief(value)} {why}; leave it out", param=name)
        if name not in IGNORED[kind] | LATER[kind].keys() | NEVER[kind].keys():
            unknown.append(name)
    if unknown:
        names = ", ".join(repr(name[:64]) for name in unknown[:8])
        raise Refusal(
            f"unknown field(s): {names}; docs/api.md lists the known", param=unknown[0][:64]
        )
    return asked


def _neutral(value: Any, neutral: Sequence[Any]) -> bool:
    return any(
        value == item and isinstance(value, bool) is isinstance(item, bool) for item in neutral
    )


def _brief(value: Any) -> str:
    """A value as an error message shows it: never long, however long it is."""
    text = repr(value) if isinstance(value, str | int | float) else type(value).__name__
    return text if len(text) <= 64 else text[:61] + "..."


def convert(fields: dict[str, Any], kind: type[_T], where: str = "") -> _T:
    """A body's fields, or those of what is ``where`` in it, as what is known of them.

    Raises Refusal.
    """
    try:
        return msgspec.convert(fields, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        what, _, path = str(error).partition(" - at `$")
        named = re.search(r"field `(\w+)`", what)
        at = ".".join(filter(None, [where, path.strip("`.")]))
        param = at or (named[1] if named else None)
        raise Refusal(
            f"{at + ': ' if at else ''}{what[:200]}".replace("`", "'"), param=param
        ) from error


def _prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """OpenAI's four kinds of prompt as a list of texts and token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise Refusal("prompt must not be empty", param="prompt")
    ids = [item for item in prompt if isinstance(item, int)]
    if len(ids) == len(prompt):
        return [ids]
    several = [item for item in prompt if not isinstance(item, int)]
    if len({type(item) for item in prompt}) > 1:
        raise Refusal("prompt mixes texts, token ids and lists: send one kind", param="prompt")
    if len(several) > MAX_CHOICES:
        raise Refusal(
            f"{len(several)} prompts in one request; at most {MAX_CHOICES} are taken",
            param="prompt",
        )
    return several


def _encode(model: Model, prompt: str) -> list[int]:
    _bound(model, len(prompt), "prompt")
    try:
        return model.text.encode(prompt)
    except NoTokenizer as error:
        raise Refusal(str(error), param="prompt") from error


def _bound(model: Model, characters: int, param: str) -> None:
    """Refuse, before spending time on it, a text that cannot fit however it is tokenized."""
    longest = model.max_model_len * model.text.longest
    if model.text.longest > 1 and characters > longest:
        raise Refusal(
            f"this model's maximum context length is {model.max_model_len} tokens; the text has "
            f"{characters} characters, more than any {longest}",
            param=param,
            code="context_length_exceeded",
        )


def _tool(at: int, tool: Tool) -> dict[str, Any]:
    """A tool as chat templates take it."""
    where = f"tools[{at}]"
    if not structure.NAME.fullmatch(tool.function.name):
        raise Refusal(f"{where}.function.name must be 1 to 64 letters, digits, _ or -", param=where)
    function = {
        name: value
        for name, value in msgspec.structs.asdict(tool.function).items()
        if name != "strict" and value is not None
    }
    return {"type": "function", "function": function}


def _message(at: int, message: Message, called: set[str]) -> dict[str, Any]:
    """A message as chat templates take it: text content, arguments of calls as objects.

    ``called`` are the ids of the calls before it, to which it adds its own.
    """
    where = f"messages[{at}]"
    content = message.content
    if isinstance(content, list):
        texts = [part.text if isinstance(part, TextPart) else part.refusal for part in content]
        content = "\n".join(texts)
    if message.refusal:
        content = f"{content}\n{message.refusal}" if content else message.refusal
    if message.role == "tool" and message.tool_call_id is None:
        raise Refusal(f"{where}: a tool message needs tool_call_id", param=where)
    if message.tool_call_id is not None and message.tool_call_id not in called:
        raise Refusal(
            f"{where}: no message before it has a tool call with the id "
            f"{_brief(message.tool_call_id)}",
            param=f"{where}.tool_call_id",
        )
    called.update(call.id for call in message.tool_calls or ())
    if content is None and not message.tool_calls:
        raise Refusal(f"{where}: content is missing", param=f"{where}.content")
    out: dict[str, Any] = {"role": message.role}
    if content is not None:  # templates ask whether there is content before they look into it
        out["content"] = content
    reasoning = _given(message.reasoning_content, message.reasoning)
    if reasoning is not None:
        out |= {"reasoning_content": reasoning, "reasoning": reasoning, "thinking": reasoning}
    if message.name is not None:
        out["name"] = message.name
    if message.tool_call_id is not None:
        out["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        out["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    return out


def _arguments(arguments: str) -> Any:
    """Templates write arguments as JSON themselves; a text that is no JSON object stays text."""
    try:
        value = msgspec.json.decode(arguments)
    except (msgspec.DecodeError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _call(
    id: str,
    kind: Kind,
    model: Model,
    asked: CompletionsBody | ChatBody,
    prompts: Sequence[list[int]],
    limit: int | None,
    seed: int,
    now: int,
) -> Call:
    if asked.stream_options is not None and not asked.stream:
        raise Refusal("stream_options needs stream=true", param="stream_options")
    stop = _stops(asked.stop)
    if not 1 <= asked.n <= MAX_N or asked.n * len(prompts) > MAX_CHOICES:
        raise Refusal(
            f"n must be from 1 to {MAX_N}, and n times the prompts at most {MAX_CHOICES}; "
            f"not {asked.n} with {len(prompts)}",
            param="n",
        )
    single = asked.n * len(prompts) == 1
    requests: list[Request] = []
    for prompt in prompts:
        room = _room(model, len(prompt), limit, "messages" if kind == "chat" else "prompt")
        tokens = _given(limit, room if kind == "chat" else min(16, room))
        sampling = _sampling(model, asked, tokens, seed)
        for choice in range(asked.n):
            requests.append(
                Request(
                    id=id if single else f"{id}-{len(requests)}",
                    model=model.name,
                    prompt=prompt,
                    sampling=sampling,
                    choice=choice,
                    priority=asked.priority,
                    salt=asked.cache_salt,
                )
            )
    options = asked.stream_options or StreamOptions()
    skip_control, echoes = True, list[str]()
    if isinstance(asked, CompletionsBody):
        skip_control = asked.skip_special_tokens
        if asked.echo:
            texts = [model.text.decode(prompt, skip_control) for prompt in prompts]
            echoes = [text for text in texts for _ in range(asked.n)]
    return Call(
        id=id,
        kind=kind,
        model=model,
        created=now,
        requests=tuple(requests),
        stream=asked.stream,
        include_usage=options.include_usage,
        return_token_ids=asked.return_token_ids,
        stop=stop,
        include_stop=asked.include_stop_str_in_output,
        skip_control=skip_control,
        echoes=tuple(echoes),
    )


def _room(model: Model, prompt: int, limit: int | None, param: str) -> int:
    """Tokens left for the answer."""
    if prompt == 0:
        raise Refusal(f"{param} must not be empty: there is no token to go on from", param=param)
    if limit is not None and limit < 1:
        raise Refusal(f"max_tokens must be at least 1, not {limit}", param="max_tokens")
    room = model.max_model_len - prompt
    if room < (limit or 1):
        asks = "" if limit is None else f" and asks for {limit} more (max_tokens)"
        raise Refusal(
            f"this model's maximum context length is {model.max_model_len} tokens; the request has "
            f"{prompt} in {param}{asks}; shorten it",
            param=param,
            code="context_length_exceeded",
        )
    return room


def _sampling(model: Model, asked: CompletionsBody | ChatBody, limit: int, seed: int) -> Sampling:
    defaults = model.text.defaults
    temperature = _given(asked.temperature, defaults.temperature)
    top_p = _given(asked.top_p, defaults.top_p)
    top_k = _given(asked.top_k, defaults.top_k)
    min_p = _given(asked.min_p, defaults.min_p)
    repetition_penalty = _given(asked.repetition_penalty, defaults.repetition_penalty)
    seed = _given(asked.seed, seed)
    for name, value, low, high in (
        ("temperature", temperature, 0, 2),
        ("top_p", top_p, 0, 1),
        ("top_k", top_k, -1, (1 << 31) - 1),
        ("min_p", min_p, 0, 1),
        ("presence_penalty", asked.presence_penalty, -2, 2),
        ("frequency_penalty", asked.frequency_penalty, -2, 2),
        ("repetition_penalty", repetition_penalty, 0.01, 100),
        ("seed", seed, -(1 << 63), (1 << 63) - 1),
        ("min_tokens", asked.min_tokens, 0, limit),
        ("priority", asked.priority, -(1 << 31), (1 << 31) - 1),
    ):
        if not low <= value <= high:
            raise Refusal(f"{name} must be from {low} to {high}, not {value}", param=name)
    for token in asked.stop_token_ids:
        if not 0 <= token < model.vocab_size:
            raise Refusal(
                f"stop_token_ids holds {token}; the vocabulary has {model.vocab_size}",
                param="stop_token_ids",
            )
    return Sampling(
        max_tokens=limit,
        # A nucleus of nothing holds the most likely token.
        temperature=temperature if top_p > 0 else 0.0,
        top_p=top_p if top_p > 0 else 1.0,
        top_k=max(0, top_k),
        seed=seed & (1 << 63) - 1,
        min_tokens=asked.min_tokens,
        ignore_eos=asked.ignore_eos,
        stop_token_ids=tuple(asked.stop_token_ids),
        min_p=min_p,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        repetition_penalty=repetition_penalty,
        logit_bias=_biases(model, asked.logit_bias),
        logprobs=_logprobs(model, asked),
    )


def _biases(model: Model, asked: dict[str, float]) -> dict[int, float]:
    if len(asked) > MAX_BIASES:
        raise Refusal(
            f"logit_bias has {len(asked)} tokens; at most {MAX_BIASES} are taken",
            param="logit_bias",
        )
    biases = {}
    for name, bias in asked.items():
        token = int(name) if re.fullmatch("[0-9]{1,9}", name, re.ASCII) else -1
        if not 0 <= token < model.vocab_size:
            raise Refusal(
                f"logit_bias names {_brief(name)}; token ids are from 0 to {model.vocab_size - 1}",
                param="logit_bias",
            )
        if not -100 <= bias <= 100:
            raise Refusal(
                f"logit_bias of {token} must be from -100 to 100, not {bias}", param="logit_bias"
            )
        biases[token] = bias
    return biases


def _logprobs(model: Model, asked: CompletionsBody | ChatBody) -> int | None:
    """How many likeliest tokens come with each token; None: no log probabilities."""
    if isinstance(asked, CompletionsBody):
        name, most, highest = "logprobs", asked.logprobs, MOST_LIKELY["completions"]
    else:
        name, most, highest = "top_logprobs", asked.top_logprobs, MOST_LIKELY["chat"]
        if most and not asked.logprobs:
            raise Refusal("top_logprobs needs logprobs=true", param="top_logprobs")
        most = _given(most, 0) if asked.logprobs else None
    if most is not None and not 0 <= most <= highest:
        raise Refusal(f"{name} must be from 0 to {highest}, not {most}", param=name)
    if most is not None and not model.text.has_tokenizer:
        raise Refusal(
            "logprobs are those of a text's tokens; this model has no tokenizer", param="logprobs"
        )
    return most


def _stops(stop: str | list[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS or any(not 0 < len(s) <= MAX_STOP_CHARACTERS for s in stops):
        raise Refusal(
            f"stop takes at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters",
            param="stop",
        )
    return stops


def _given(value: _T | None, default: _T) -> _T:
    return default if value is None else value
