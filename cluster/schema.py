"""The fields of OpenAI's request bodies and their fate: served, ignored, not yet, never; and the
refusal that says so. ``docs/api.md`` lists the same for people.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Kind = Literal["completions", "chat", "responses"]
RETRY_AFTER = "5"  # seconds in which an engine may have started again

COMMON_IGNORED = frozenset({"user", "metadata", "service_tier", "safety_identifier"})
IGNORED = {
    "completions": COMMON_IGNORED,
    "chat": COMMON_IGNORED
    | {"store", "verbosity", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"},
    "responses": (COMMON_IGNORED - {"metadata"})
    | {"max_tool_calls", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"},
}
# Refused unless null or one of these values, which mean what is done anyway.
_LATER: dict[str, tuple[Any, ...]] = {
    "structured_outputs": (),
    "add_special_tokens": (True,),
}
_NEVER: dict[str, tuple[Any, ...]] = {"moderation": ()}
LATER = {
    "completions": _LATER | {"prompt_logprobs": (), "response_format": ()},
    "chat": _LATER
    | {
        "add_special_tokens": (False,),
        "skip_special_tokens": (True,),
        "chat_template_kwargs": ({},),
        "continue_final_message": (False,),
        "add_generation_prompt": (True,),
    },
    "responses": {
        "background": (False,),
        "background_options": (),
        "conversation": (),
        "truncation": ("disabled",),
    },
}
NEVER = {
    "completions": _NEVER | {"best_of": (1,), "suffix": ("",)},
    "chat": _NEVER
    | {
        "audio": (),
        "modalities": (["text"],),
        "prediction": (),
        "function_call": ("none",),
        "functions": ([],),
        "web_search_options": (),
        "chat_template": (),
        "documents": ([],),
        "echo": (False,),
    },
    "responses": _NEVER
    | {"access_programs": (), "context_management": ([],), "image": (), "prompt": ()},
}


class Refusal(ValueError):
    """An answer other than 200, as OpenAI sends it: HTTP ``status``, ``headers`` and an error
    ``body``."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        type: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.headers = message, status, headers or {}
        self.param, self.code, self.type = param, code, type
        self.body = msgspec.json.encode(
            {"error": {"message": message, "type": type, "param": param, "code": code}}
        )


def unavailable(message: str) -> Refusal:
    """The service, not the request, is at fault."""
    return Refusal(
        message,
        status=503,
        type="server_error",
        code="unavailable",
        headers={"retry-after": RETRY_AFTER},
    )


def late(message: str) -> Refusal:
    """The time that a request had is over."""
    return Refusal(message, status=408, type="timeout_error", code="timeout")


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding against traffic analysis; never sent


class Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields that both requests share."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    n: int = 1
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] = {}
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    min_tokens: int = 0
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    return_token_ids: bool = False
    priority: int = 0
    cache_salt: str = ""


class CompletionsBody(Body, kw_only=True, forbid_unknown_fields=True):
    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool = False
    skip_special_tokens: bool = True


class TextPart(msgspec.Struct, tag_field="type", tag="text", forbid_unknown_fields=True):
    text: str
    prompt_cache_breakpoint: Any = None  # ignored


class RefusalPart(msgspec.Struct, tag_field="type", tag="refusal", forbid_unknown_fields=True):
    refusal: str


class FunctionCall(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    arguments: str


class ToolCall(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


# Fields of messages that belong to one role.
ROLES = {
    "tool_call_id": "tool",
    "tool_calls": "assistant",
    "reasoning_content": "assistant",
    "reasoning": "assistant",
    "refusal": "assistant",
    "annotations": "assistant",
}


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A message of any role; answers of this API can be sent back as they came."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart | RefusalPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    # Null in what the official client sends back.
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None  # ignored

    def __post_init__(self) -> None:
        for name, role in ROLES.items():
            if role != self.role and getattr(self, name) not in (None, []):
                raise ValueError(f"{name} belongs to {role} messages, not to {self.role} messages")
        parts = self.content if isinstance(self.content, list) else ()
        if self.role != "assistant" and any(isinstance(part, RefusalPart) for part in parts):
            raise ValueError(f"parts of type 'refusal' are not for {self.role} messages")
        if len({self.reasoning_content, self.reasoning} - {None}) > 1:
            raise ValueError("reasoning_content and reasoning differ: send one of them")


class FunctionSchema(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["function"]
    function: FunctionSchema


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None  # enforced either way


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def __post_init__(self) -> None:
        if self.json_schema is not None and self.type != "json_schema":
            raise ValueError(f"json_schema does not go with type {self.type!r}")


class FunctionName(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class NamedTool(msgspec.Struct, tag_field="type", tag="function", forbid_unknown_fields=True):
    function: FunctionName


class Allowed(msgspec.Struct, forbid_unknown_fields=True):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedTools(
    msgspec.Struct, tag_field="type", tag="allowed_tools", forbid_unknown_fields=True
):
    allowed_tools: Allowed


class ChatBody(Body, kw_only=True, forbid_unknown_fields=True):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: list[Tool] = []
    tool_choice: Literal["auto", "none", "required"] | NamedTool | AllowedTools = "auto"
    parallel_tool_calls: bool = True  # harmony ends an answer with its first call
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    tokens: list[int]
