"""The way back: outputs of an engine as OpenAI's bodies and server-sent events.

One path for streams and whole bodies: a whole body is the fold of the deltas a stream would have
sent. Here too text ends: stop strings are matched where text is, not in the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from cluster.harmony import Delta, Plain, Splitter, Token, splitter
from cluster.logprobs import (
    Attribution,
    ChatLogprobs,
    TextLogprobs,
    chat_logprobs,
    text_logprobs,
)
from cluster.openai import Call, Model, find
from cluster.schema import Refusal, late, unavailable
from cluster.text import StopStrings
from workers.wire import Logprobs, Output, Request

DONE = b"data: [DONE]\n\n"


class AnswerFunction(msgspec.Struct, omit_defaults=True, gc=False):
    arguments: str | UnsetType = UNSET
    name: str | UnsetType = UNSET


class AnswerCall(msgspec.Struct, kw_only=True, gc=False):
    index: int | UnsetType = UNSET  # in a stream
    function: AnswerFunction
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class AnswerMessage(msgspec.Struct, omit_defaults=True, gc=False):
    """A message, or in a stream more of one."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[AnswerCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, gc=False):
    index: int
    delta: AnswerMessage | UnsetType = UNSET  # in a stream
    message: AnswerMessage | UnsetType = UNSET  # in a whole body
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType = UNSET
    token_ids: Sequence[int] | UnsetType = UNSET


class TextChoice(msgspec.Struct, gc=False):
    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | UnsetType = UNSET
    token_ids: Sequence[int] | UnsetType = UNSET
    prompt_token_ids: Sequence[int] | UnsetType = UNSET


class Usage(msgspec.Struct, gc=False):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    completion_tokens_details: dict[str, int]


class _Body(msgspec.Struct, gc=False):
    """A whole answer, or one chunk of a stream."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[ChatChoice | TextChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: Sequence[int] | UnsetType = UNSET


_encode = msgspec.json.Encoder().encode


class Choice:
    """One choice of an answer while it is generated.

    ``request`` with ``emitted`` is what another engine needs to go on. ``feed`` gives the deltas to
    show; ``content``, ``reasoning`` and ``calls`` are their fold. Also used by ``LLM``.
    """

    def __init__(self, call: Call, request: Request) -> None:
        self.request = request
        self.emitted: list[int] = []  # token ids, those that ended the answer included
        self.cached = 0  # prompt tokens taken from the prefix cache
        self.reason: str | None = None  # once finished: OpenAI's finish_reason
        self.stop_reason: str | int | None = None  # the stop string or stop token that ended it
        self.calls: list[tuple[str, list[str]]] = []  # (name, pieces of the arguments)
        self.tokens: list[Token] = []  # tokens of the content, where log probabilities are asked
        self._texts: dict[str, list[str]] = {"content": [], "reasoning": []}
        text = call.model.text
        self._splitter: Splitter
        if call.kind == "chat":
            self._splitter = splitter(text, request.prompt)
        else:
            self._splitter = Plain(text, call.skip_control)
        self._stop = StopStrings(call.stop, call.include_stop)
        self._watch = bool(call.stop)
        self._attribution: Attribution | None = None
        if request.sampling.logprobs is not None:
            self._attribution = Attribution(text, self._splitter, call.skip_control)
        if request.emitted:
            self._show(request.emitted, ())

    @property
    def thoughts(self) -> int:
        """Tokens of the reasoning."""
        return self._splitter.thoughts

    @property
    def content(self) -> str:
        return "".join(self._texts["content"])

    @property
    def reasoning(self) -> str:
        return "".join(self._texts["reasoning"])

    def feed(self, output: Output) -> list[Delta]:
        """What ``output`` adds; tokens already seen are skipped, and nothing follows an end.

        ``reason`` is set when the answer is over; if a stop string ended it (``output`` itself has
        no reason then) the engine does not know yet and the caller aborts the request. Raises
        Refusal where the engine refused or failed, or tokens are missing.
        """
        if self.reason is not None:
            return []
        if output.reason == "timeout":
            raise late(output.detail or "the deadline passed")
        if output.reason == "refused":
            raise Refusal(output.detail or "the request cannot be served")
        if output.reason in ("error", "abort"):
            raise unavailable(output.detail or "the engine gave up the request; send it again")
        seen = len(self.emitted) - output.offset
        if seen < 0:
            raise unavailable("tokens of the answer were lost on their way; send it again")
        if output.offset == 0:
            self.cached = output.cached
        fresh = output.tokens[seen:] if seen else output.tokens
        logprobs = (output.logprobs or ())[seen:]
        # The token that ends an answer counts, but has no text.
        ended = output.stop is not None and fresh[-1:] == [output.stop]
        deltas = self._show(fresh[:-1] if ended else fresh, logprobs)
        if self._stop.matched is None:
            if ended:
                self.emitted.append(fresh[-1])
            if output.reason is not None:
                deltas += self._finish(output)
        return deltas

    def _show(self, tokens: Sequence[int], logprobs: Sequence[Logprobs]) -> list[Delta]:
        """Token by token where a stop string may end the answer at any of them, or where each has
        its log probabilities."""
        deltas: list[Delta] = []
        if self._attribution is not None:
            for token, of in zip_longest(tokens, logprobs[: len(tokens)]):
                self.emitted.append(token)
                deltas += self._speak(self._take(self._attribution.feed(token, of)))
                if self._stop.matched is not None:
                    break
            return deltas
        for group in [[token] for token in tokens] if self._watch else [tokens]:
            self.emitted.extend(group)
            deltas += self._take(self._splitter.feed(group))
            if self._stop.matched is not None:
                break
        return deltas

    def _finish(self, output: Output) -> list[Delta]:
        source = self._attribution or self._splitter
        deltas = self._take(source.finish())
        if self._stop.matched is not None:
            return self._speak(deltas)
        rest = self._stop.flush()
        if rest:
            deltas.append(Delta("content", rest))
            self._texts["content"].append(rest)
        self.reason = "tool_calls" if self.calls and output.reason == "stop" else output.reason
        if output.stop in self.request.sampling.stop_token_ids:
            self.stop_reason = output.stop
        return self._speak(deltas)

    def _speak(self, deltas: list[Delta]) -> list[Delta]:
        """The same with the tokens whose text they complete, where log probabilities are asked."""
        if self._attribution is not None:
            self._attribution.show(deltas)
            for delta in deltas:
                self.tokens += delta.tokens
        return deltas

    def _take(self, deltas: Sequence[Delta]) -> list[Delta]:
        """Apply stop strings and keep the fold."""
        shown: list[Delta] = []
        for delta in deltas:
            if delta.kind == "call":
                if delta.name:
                    self.calls.append((delta.name, []))
                self.calls[delta.call][1].append(delta.text)
            else:
                text = self._stop.feed(delta.text) if delta.kind == "content" else delta.text
                if text:
                    self._texts[delta.kind].append(text)
                if text != delta.text:
                    delta = Delta(delta.kind, text)
            if delta.text or delta.name:
                shown.append(delta)
            if self._stop.matched is not None:
                self.reason, self.stop_reason = "stop", self._stop.matched
                break
        return shown


class Reply:
    """The answer to a call: feed it the engine's outputs, send what it gives.

    For a stream ``feed`` gives the events to send at once; else it gives nothing and ``body`` is
    sent when ``done``. ``aborts`` fills with ids of requests the engine should stop; the caller
    empties it. ``failure``, once set, is what to answer if nothing has been sent yet; a stream has
    the same as its last event.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.done = False
        self.failure: Refusal | None = None
        self.aborts: list[str] = []
        self.choices = {request.id: Choice(call, request) for request in call.requests}
        self._index = {id: index for index, id in enumerate(self.choices)}
        self._opened: set[str] = set()
        self._object = "chat.completion" if call.kind == "chat" else "text_completion"

    def feed(self, output: Output) -> bytes:
        """Take one output; bytes to send now."""
        choice = self.choices.get(output.id)
        if choice is None or self.done or choice.reason is not None:
            return b""
        before = len(choice.emitted)
        try:
            deltas = choice.feed(output)
        except Refusal as failure:
            return self.fail(failure, engine_knows=output.id if output.reason else "")
        if choice.reason is not None:
            if output.reason is None:
                self.aborts.append(output.id)
            self.done = all(c.reason is not None for c in self.choices.values())
        if not self.call.stream:
            return b""
        events = self._events(output.id, choice, deltas, choice.emitted[before:])
        if self.done:
            if self.call.include_usage:
                events.append(self._event([], usage=self._usage()))
            events.append(DONE)
        return b"".join(events)

    def fail(self, failure: Refusal, engine_knows: str = "") -> bytes:
        """End the answer with an error; gives a stream's last event."""
        if self.done:
            return b""
        self.done, self.failure = True, failure
        self.aborts += [
            id
            for id, choice in self.choices.items()
            if choice.reason is None and id != engine_knows
        ]
        return b"data: " + failure.body + b"\n\n" if self.call.stream else b""

    def body(self) -> bytes:
        """The whole answer, when ``done`` without ``failure``."""
        assert self.done
        assert self.failure is None
        body = self._shell([self._whole(i, c) for i, c in enumerate(self.choices.values())])
        body.usage = self._usage()
        if self.call.return_token_ids and self.call.kind == "chat":
            body.prompt_token_ids = self.call.requests[0].prompt
        return _encode(body)

    def _whole(self, index: int, choice: Choice) -> ChatChoice | TextChoice:
        out: ChatChoice | TextChoice
        if self.call.kind == "chat":
            content = choice.content
            message = AnswerMessage(
                role="assistant", content=content or (None if choice.calls else "")
            )
            if choice.reasoning:
                message.reasoning_content = choice.reasoning
            if choice.calls:
                message.tool_calls = [
                    AnswerCall(
                        function=AnswerFunction("".join(arguments), name),
                        id=self._call_id(index, at),
                        type="function",
                    )
                    for at, (name, arguments) in enumerate(choice.calls)
                ]
            out = ChatChoice(index, message=message)
            if choice.request.sampling.logprobs is not None:
                out.logprobs = chat_logprobs(self.call.model.text, choice.tokens)
        else:
            out = TextChoice(index, self._echo(index) + choice.content)
            if choice.request.sampling.logprobs is not None:
                out.logprobs = text_logprobs(self.call.model.text, choice.tokens)
            if self.call.return_token_ids:
                out.prompt_token_ids = choice.request.prompt
        return self._ended(out, choice, choice.emitted)

    def _events(
        self, id: str, choice: Choice, deltas: Sequence[Delta], tokens: Sequence[int]
    ) -> list[bytes]:
        index = self._index[id]
        ids = tokens if self.call.return_token_ids and tokens else UNSET
        opening = id not in self._opened
        self._opened.add(id)
        prompt = choice.request.prompt if opening and self.call.return_token_ids else UNSET
        if self.call.kind == "completions":
            text = "".join([delta.text for delta in deltas])
            if opening:
                text = self._echo(index) + text
            if not text and choice.reason is None and ids is UNSET:
                return []
            said = [token for delta in deltas for token in delta.tokens]
            out = TextChoice(index, text, prompt_token_ids=prompt, token_ids=ids)
            if said:
                out.logprobs = text_logprobs(self.call.model.text, said)
            return [self._event([self._ended(out, choice, ids)])]
        events = []
        if opening:
            first = ChatChoice(index, delta=AnswerMessage(role="assistant", content=""))
            events.append(self._event([first], prompt=prompt))
        for delta in deltas:
            chunk = ChatChoice(index, delta=self._delta(index, delta), token_ids=ids)
            if delta.tokens:
                chunk.logprobs = chat_logprobs(self.call.model.text, delta.tokens)
            ids = UNSET
            events.append(self._event([chunk]))
        if choice.reason is not None:
            last = ChatChoice(index, delta=AnswerMessage())
            events.append(self._event([self._ended(last, choice, ids)]))
        elif ids is not UNSET:
            events.append(self._event([ChatChoice(index, delta=AnswerMessage(), token_ids=ids)]))
        return events

    def _echo(self, index: int) -> str:
        return self.call.echoes[index] if self.call.echoes else ""

    def _delta(self, index: int, delta: Delta) -> AnswerMessage:
        if delta.kind == "content":
            return AnswerMessage(content=delta.text)
        if delta.kind == "reasoning":
            return AnswerMessage(reasoning_content=delta.text)
        call = AnswerCall(index=delta.call, function=AnswerFunction(delta.text))
        if delta.name:
            call.function.name = delta.name
            call.id, call.type = self._call_id(index, delta.call), "function"
        return AnswerMessage(tool_calls=[call])

    def _ended(
        self,
        out: ChatChoice | TextChoice,
        choice: Choice,
        ids: Sequence[int] | UnsetType,
    ) -> ChatChoice | TextChoice:
        out.finish_reason = choice.reason
        if choice.stop_reason is not None:
            out.stop_reason = choice.stop_reason
        if self.call.return_token_ids:
            out.token_ids = ids
        return out

    def _call_id(self, index: int, at: int) -> str:
        return f"call_{self.call.id.rpartition('-')[2]}_{index}_{at}"

    def _shell(self, choices: Sequence[ChatChoice | TextChoice]) -> _Body:
        call = self.call
        return _Body(call.id, self._object, call.created, call.model.name, choices)

    def _event(
        self,
        choices: Sequence[ChatChoice | TextChoice],
        usage: Usage | None = None,
        prompt: Sequence[int] | UnsetType = UNSET,
    ) -> bytes:
        chunk = self._shell(choices)
        if self.call.kind == "chat":
            chunk.object = "chat.completion.chunk"
        if self.call.include_usage:
            chunk.usage = usage
        chunk.prompt_token_ids = prompt
        return b"data: " + _encode(chunk) + b"\n\n"

    def _usage(self) -> Usage:
        # Of several choices the first one pays for the prompt; the others find it in the cache.
        first = [choice for choice in self.choices.values() if choice.request.choice == 0]
        prompt = sum(len(choice.request.prompt) for choice in first)
        answer = sum(len(choice.emitted) for choice in self.choices.values())
        cached = sum(choice.cached for choice in first)
        thoughts = sum(choice.thoughts for choice in self.choices.values())
        return Usage(
            prompt,
            answer,
            prompt + answer,
            {"cached_tokens": cached},
            {"reasoning_tokens": thoughts},
        )


def models_body(models: Mapping[str, Model]) -> bytes:
    """The answer of GET /v1/models."""
    unique = {model.name: model for model in models.values()}
    return _encode({"object": "list", "data": [_card(model) for model in unique.values()]})


def model_body(name: str, models: Mapping[str, Model]) -> bytes:
    """The answer of GET /v1/models/{name}. Raises Refusal."""
    return _encode(_card(find(name, models)))


def _card(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "moeray",
        "root": model.name,
        "parent": None,
        "max_model_len": model.max_model_len,
    }
