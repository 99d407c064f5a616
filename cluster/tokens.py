"""``/tokenize`` and ``/detokenize``, as vLLM has them: prompts and messages to ids, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from cluster.openai import Model, chat_body, chat_prompt, convert, decode, find, text_prompts
from cluster.schema import DetokenizeBody, Refusal


class Tokenized(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: Sequence[int]


class Detokenized(msgspec.Struct):
    prompt: str


def tokenize(body: bytes, models: Mapping[str, Model]) -> bytes:
    """The ids of the prompt that a body of either generating endpoint makes. Raises Refusal."""
    if "messages" in decode(body):
        model, ids = chat_prompt(chat_body(body), models)
    else:
        _, model, prompts = text_prompts(body, models)
        if len(prompts) > 1:
            raise Refusal(f"{len(prompts)} prompts at once: send one", param="prompt")
        (ids,) = prompts
    return msgspec.json.encode(Tokenized(len(ids), model.max_model_len, ids))


def detokenize(body: bytes, models: Mapping[str, Model]) -> bytes:
    """The text of ids, with its control tokens. Raises Refusal."""
    asked = convert(decode(body), DetokenizeBody)
    model = find(asked.model, models)
    if not model.text.has_tokenizer:
        raise Refusal("the model has no tokenizer.json: its tokens have no text")
    if len(asked.tokens) > model.max_model_len:
        raise Refusal(
            f"{len(asked.tokens)} tokens are more than the model's context of "
            f"{model.max_model_len}",
            param="tokens",
        )
    outside = next((i for i in asked.tokens if not 0 <= i < model.vocab_size), None)
    if outside is not None:
        raise Refusal(
            f"tokens holds {outside}; the vocabulary has {model.vocab_size}", param="tokens"
        )
    text = model.text.decode(asked.tokens, skip_control=False)
    return msgspec.json.encode(Detokenized(text))
