"""A model's Jinja chat template, run as transformers runs it, in a sandbox and with bounds."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils

RENDER_SECONDS = 5.0
RENDER_CHARACTERS = 16 << 20


class ChatTemplateError(ValueError):
    """A conversation could not be rendered; the message says why."""


class ChatTemplate:
    """A model's Jinja chat template, run as transformers runs it, in a sandbox and with bounds.

    ``render`` gives text in which control tokens of the template stand under their private names.
    """

    def __init__(self, source: str, named: Mapping[str, str], private: Mapping[str, str]) -> None:
        """``named``: bos_token and such; ``private``: control token -> its private name."""
        self._public = {name: token for token, name in private.items()}
        spelled = re.compile("|".join(map(re.escape, sorted(private, key=len, reverse=True))))

        def mark(text: str) -> str:
            return spelled.sub(lambda found: private[found[0]], text) if private else text

        self._context = {name: mark(value) for name, value in named.items()}
        environment = _environment()
        try:
            tree = environment.parse(source)
            for data in tree.find_all(jinja2.nodes.TemplateData):
                data.data = mark(data.data)
            for const in tree.find_all(jinja2.nodes.Const):
                if isinstance(const.value, str):
                    const.value = mark(const.value)
            for loop in tree.find_all(jinja2.nodes.For):
                call = jinja2.nodes.Call(jinja2.nodes.Name("_tick", "load"), [], [], None, None)
                loop.body.insert(0, jinja2.nodes.ExprStmt(call))
            for node in tree.find_all(jinja2.nodes.ExprStmt):
                node.set_lineno(1)
            tree.set_environment(environment)
            self._template = environment.from_string(tree)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the model's chat template is not valid: {error}") from error
        self._unusable = self._assembles(spelled) if private else ""

    def _assembles(self, spelled: re.Pattern[str]) -> str:
        """Control token that the template builds from parts (``'<|' + role + '|>'``), or nothing.

        Such a token cannot be told from a message's text.
        """
        for roles in (("user",), ("system", "user"), ("user", "assistant", "user")):
            with contextlib.suppress(ChatTemplateError):
                self._unusable = ""
                shown = self.render(
                    messages=[{"role": role, "content": "x"} for role in roles],
                    add_generation_prompt=True,
                )
                for name in self._public:
                    shown = shown.replace(name, "\0")
                if found := spelled.search(shown):
                    return found[0]
        return ""

    def render(self, **context: Any) -> str:
        """Raises ChatTemplateError: the template refused, failed or took too long."""
        if self._unusable:
            raise ChatTemplateError(
                f"the model's chat template builds control tokens such as {self._unusable!r} from "
                "parts, which moeray cannot tell from text: write it out in the template"
            )
        deadline = time.monotonic() + RENDER_SECONDS

        def tick() -> None:
            if time.monotonic() > deadline:
                raise ChatTemplateError(
                    f"rendering the conversation took more than {RENDER_SECONDS:g} s; shorten it"
                )

        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(**self._context, **context, _tick=tick):
                parts.append(part)
                size += len(part)
                tick()
                if size > RENDER_CHARACTERS:
                    raise ChatTemplateError(
                        f"the conversation renders to more than {RENDER_CHARACTERS} characters"
                    )
        except ChatTemplateError:
            raise
        except Exception as error:  # a template is a program: it may raise anything
            message = str(error)
            for name, token in self._public.items():
                message = message.replace(name, token)
            raise ChatTemplateError(
                f"the model's chat template refused the conversation: {message[:500]}"
            ) from error
        return "".join(parts)


class _Namespace(jinja2.utils.Namespace):  # type: ignore[misc,unused-ignore]
    """Jinja's namespace without private attributes, through which a sandbox has been left."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _public_name(name)
        jinja2.utils.Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _public_name(name)
        super().__setitem__(name, value)


def _public_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} is private")


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's tokens for training; here it marks nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML, which no model was trained on.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def strftime_now(form: str) -> str:
        return datetime.datetime.now().astimezone().strftime(form)

    make: Callable[..., dict[Any, Any]] = lambda *args, **kwargs: dict(*args, **kwargs)  # noqa: E731
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "dict": make,
        "namespace": _Namespace,
    }
    return environment
