"""``LLM``: the engine in this process, without Ray or HTTP, for scripts and debugging.

Requests are understood and answers are made by the very code that serves them over HTTP.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import msgspec

from cluster import openai, structure
from cluster.harmony import Delta, Token
from cluster.openai import Call, Model
from cluster.reply import Choice
from cluster.text import Text
from workers.config import ModelSpec
from workers.engine import Steps
from workers.hub import resolve
from workers.rank import Rank

Prompt = str | Sequence[int]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to generate; names and meaning are those of the HTTP API. None: the default there."""

    max_tokens: int | None = None  # None: 16 in ``generate``, what the context holds in ``chat``
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    min_tokens: int = 0
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    n: int = 1  # answers to each prompt; only in ``generate``
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None  # how many likeliest tokens come with each; None: nothing


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """One answer to a prompt."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str
    reasoning: str  # the analysis channel of a harmony answer to ``chat``
    finish_reason: str  # "stop", "length" or "tool_calls"
    tokens: list[Token]  # tokens of ``text`` with their log probabilities, where asked for


class LLM:
    """A model, loaded here and now.

    ``model`` is a directory in Hugging Face layout, a hub id, or empty for the bundled tiny-oss;
    ``options`` are the fields of ``workers.config.ModelSpec``, named as on the command line.
    Raises ValueError with a sentence for anything that cannot be.
    """

    def __init__(
        self,
        model: str = "",
        *,
        progress: Callable[[int, int], None] = lambda done, of: None,
        **options: Any,
    ) -> None:
        spec = msgspec.convert({"model": model, **options}, ModelSpec)
        if spec.tensor_parallel_size != 1 or spec.data_parallel_size != 1:
            raise ValueError("LLM runs in one process; `moeray serve` runs several ranks")
        directory = resolve(spec.model, spec.revision)
        spec = msgspec.structs.replace(spec, model=str(directory))
        self._seed = spec.seed
        rank = Rank(spec)
        self.report = rank.load(None, progress)
        self.capacity = rank.plan(self.report.free_bytes)
        self._scheduler = rank.scheduler(self.capacity)
        self._grammars = rank.grammars
        self._steps = Steps(self._scheduler, rank.allocate(self.capacity))
        name = spec.served_model_name or directory.name
        self._models = {
            name: Model(
                name=name,
                text=Text(directory),
                max_model_len=self.capacity.scheduler.max_model_len,
                vocab_size=rank.architecture.vocab_size,
            )
        }
        self._calls = itertools.count()

    @property
    def has_chat_template(self) -> bool:
        """Whether ``chat`` can render messages."""
        return self._model.text.has_chat_template

    @property
    def _model(self) -> Model:
        return next(iter(self._models.values()))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
    ) -> list[Completion]:
        """Continue one prompt or many, each a text or token ids, each ``params.n`` times.

        Raises cluster.schema.Refusal.
        """
        several: Sequence[Any] = prompts
        if isinstance(prompts, str) or all(isinstance(part, int) for part in prompts):
            several = [prompts]
        calls = [self._understand(openai.completions, params, prompt=p) for p in several]
        return self._finish(calls)

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        params: SamplingParams | None = None,
        tools: Sequence[dict[str, Any]] = (),
        **fields: Any,
    ) -> Completion:
        """Answer a conversation, rendered with the model's chat template.

        ``fields`` are others of the HTTP API: ``response_format``, ``tool_choice`` ...
        """
        _single(params)
        fields |= {"messages": list(messages), "tools": list(tools)}
        call = self._understand(openai.chat, params, **fields)
        return self._finish([call])[0]

    def stream(
        self, prompt: Prompt | Sequence[dict[str, Any]], params: SamplingParams | None = None
    ) -> Generator[Delta]:
        """The deltas of one answer as they come: to a text or token ids, or to messages."""
        _single(params)
        if prompt and isinstance(prompt[0], dict):
            call = self._understand(openai.chat, params, messages=list(prompt))
        else:
            call = self._understand(openai.completions, params, prompt=prompt)
        for _, deltas in self._run([call]):
            yield from deltas

    def _understand(
        self, parse: Callable[..., Call], params: SamplingParams | None, **body: Any
    ) -> Call:
        asked = msgspec.structs.asdict(params or SamplingParams())
        if parse is openai.chat:
            asked["top_logprobs"] = asked["logprobs"]
            asked["logprobs"] = asked["logprobs"] is not None
        body |= {name: value for name, value in asked.items() if value is not None}
        call = parse(
            msgspec.json.encode(body),
            self._models,
            id=str(next(self._calls)),
            seed=random.getrandbits(62) if self._seed is None else self._seed,
            now=0,
        )
        structure.check(call.schemas)
        return call

    def _finish(self, calls: Sequence[Call]) -> list[Completion]:
        choices: dict[str, Choice] = {}
        for choice, _ in self._run(calls):
            choices[choice.request.id] = choice
        ordered = [choices[request.id] for call in calls for request in call.requests]
        return [
            Completion(
                prompt_token_ids=choice.request.prompt,
                token_ids=choice.emitted,
                text=choice.content,
                reasoning=choice.reasoning,
                finish_reason=choice.reason or "",
                tokens=choice.tokens,
            )
            for choice in ordered
        ]

    def _run(self, calls: Sequence[Call]) -> Generator[tuple[Choice, list[Delta]]]:
        """Every choice and what each step added to it, until all have ended."""
        scheduler = self._scheduler
        choices = {request.id: Choice(call, request) for call in calls for request in call.requests}
        try:
            outputs = [
                output
                for choice in choices.values()
                for output in scheduler.add(choice.request, time.monotonic())
            ]
            for choice in choices.values():
                if choice.request.grammar:
                    self._grammars.compile(choice.request.grammar)
                    scheduler.resolve(choice.request.id, "grammar", time.monotonic())
            while True:
                for output in outputs:
                    choice = choices[output.id]
                    deltas = choice.feed(output)
                    yield choice, deltas
                    if choice.reason is not None and output.reason is None:
                        scheduler.abort(output.id, time.monotonic())
                if not scheduler.has_work():
                    break
                outputs = self._steps.next()
        finally:  # also when the caller stops listening
            for id in choices:
                scheduler.abort(id, time.monotonic())


def _single(params: SamplingParams | None) -> None:
    if params is not None and params.n != 1:
        raise ValueError(f"this gives one answer, not n={params.n}; generate takes n")
