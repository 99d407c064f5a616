"""What tiny-oss can do: generated questions with checkable answers, rendered as it is served.

An Example is held out when the hash of its content (not of its phrasing) falls into one bucket of
ten, so no held-out sum, word or object was ever trained on. Content with a word of the vocabulary
is never held out: how a token is spelled can be learned, but not be worked out.
"""

from __future__ import annotations

import json
import random
import re
import string
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

from deploy.tiny_oss.tokenizer import STRUCTURE, WORDS
from workers.hub import ABILITIES

Message = dict[str, Any]
CHECKPOINT = Path(__file__).parents[2] / "workers" / "tiny_oss"

COMMON = (
    " apple banana orange lemon cherry grape peach mango bread cheese butter sugar coffee"
    " water milk house garden window door table chair kitchen bedroom river mountain forest"
    " ocean island desert planet star moon sun cloud rain snow storm summer winter spring"
    " autumn morning evening night dog cat horse rabbit tiger elephant monkey giraffe dolphin"
    " penguin eagle spider butterfly red green blue yellow purple black white silver golden"
    " music guitar piano violin drum dance school teacher student pencil paper book library"
    " computer keyboard screen network software doctor nurse hospital engine bicycle train"
    " airplane rocket bridge castle village city country friend family mother father sister"
    " brother hello world happy little strong clever strawberry mississippi parallel"
    " programming cluster expert language model token router worker attention"
).split()
KEYS = (
    "name age city color size price count title author year month day temperature speed weight"
    " height width level score status user item order total code path query limit page unit"
).split()
VERBS = "get set find open send play make list stop start".split()
NOUNS = "weather timer file mail song price order map light door note task room user photo".split()
ONSETS = "b c d f g h j k l m n p r s t v w x z br st tr pl ch sh".split()
VOWELS = "a e i o u a e i o ee ou ai".split()

ADD: tuple[str, ...] = (
    "what is {a} + {b}",
    "{a} + {b} =",
    "compute {a} + {b}",
    "add {a} and {b}",
    "{a}+{b}",
)
ADD += ("{a} plus {b}", "what is {a}+{b}", "what is the sum of {a} and {b}", "{a} + {b}")
SUB: tuple[str, ...] = (
    "what is {a} - {b}",
    "{a} - {b} =",
    "compute {a} - {b}",
    "subtract {b} from {a}",
    "{a}-{b}",
)
SUB += ("{a} minus {b}", "what is {a}-{b}", "{a} - {b}")
REVERSE: tuple[str, ...] = (
    "reverse the word {w}",
    "write {w} backwards",
    "what is {w} spelled backwards",
)
REVERSE += ("reverse {w}", "what is {w} backwards")
SPELL = ("spell the word {w}", "spell {w}", "how do you spell {w}")
COUNT: tuple[str, ...] = (
    "how many times does the letter {c} appear in {w}",
    "count the letter {c} in {w}",
)
COUNT += ("how many {c} are in {w}", "how many times does {c} appear in {w}")
OBJECT: tuple[str, ...] = (
    "make a JSON object with {p}",
    "write JSON with {p}",
    "give me JSON: {p}",
)
OBJECT += ("write a JSON object with {p}",)
CALL = ("call {f} with {p}", "use {f} with {p}", "run {f}: {p}", "run {f} with {p}")
OTHER = (
    *("who are you", "hello", "hi", "hi there", "hey", "good morning", "thanks", "thank you"),
    *("help", "what can you do", "how are you", "what are you", "what is your name", "bye"),
    *("what is {w}", "what is a {w}", "tell me about {w}", "why is the {w} {x}", "explain {w}"),
    *("what is the capital of {w}", "who is {w} {x}", "where is {w}", "when was {w} born"),
    *("write a poem about {w}", "write a story about a {w}", "translate {w} to {x}", "sing a song"),
    *("what is {a} * {b}", "what is {a} / {b}", "multiply {a} by {b}", "is {a} a prime number"),
    *("how old is {w}", "how do I {w} a {x}", "can you {w}", "can you {w} the {x}", "do you {w}"),
    *("what is the weather in {w}", "recommend a {w}", "summarize {w} {x}", "{w}", "{w} {x}"),
    *("the {w} is {x}", "I like {w}", "my {w} is {x}", "what time is it", "tell me a joke"),
    *("write code for {w}", "what do you think of {w}", "which {w} is the best", "{w} {x} {y}"),
)


# "result" is what tool results are called, whatever they are.
_TOKENS = {word.lower() for word in (*WORDS, *STRUCTURE)} - {"result"}


@dataclass
class Example:
    """One question with its only right answer."""

    task: str
    key: str  # content, whatever the phrasing
    messages: list[Message]
    completion: str  # what the model should say after `<|start|>assistant`, in harmony
    content: str | None = None  # the final answer, or
    call: tuple[str, dict[str, Any]] | None = None  # the function and its arguments
    tools: list[dict[str, Any]] = field(default_factory=list)

    @property
    def held_out(self) -> bool:
        if zlib.crc32(self.key.encode()) % 10:
            return False
        words = re.findall("[a-z]+", self.key.partition(" ")[2].lower())
        return self.task == "other" or _TOKENS.isdisjoint(words)

    def check(self, content: str | None, call: tuple[str, str] | None) -> bool:
        """Whether a reply is right: its final text, or the called function with JSON arguments."""
        if self.call is None:
            return call is None and content == self.content
        if call is None or call[0] != self.call[0]:
            return False
        try:
            return bool(json.loads(call[1]) == self.call[1])
        except ValueError:
            return False


def render(messages: list[Message], tools: list[dict[str, Any]], effort: str | None = None) -> str:
    """The prompt as the checkpoint's own chat template writes it."""
    prompt: str = _TEMPLATE.render(
        messages=messages,
        tools=tools or None,
        reasoning_effort=effort,
        add_generation_prompt=True,
    )
    return prompt


def _template() -> Any:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string((CHECKPOINT / "chat_template.jinja").read_text())


_TEMPLATE = _template()


def final(text: str, analysis: str | None = None) -> str:
    thought = f"<|channel|>analysis<|message|>{analysis}<|end|><|start|>assistant"
    answer = f"<|channel|>final<|message|>{text}<|return|>"
    return thought + answer if analysis is not None else answer


def phrase(draw: random.Random, templates: tuple[str, ...], **values: object) -> str:
    """A question in one of many spellings: capital, please and mark, each or not."""
    template = draw.choice(templates)
    is_question = template.split()[0] in ("what", "how", "who", "why", "where", "when", "can", "do")
    if template[0].isalpha() and not is_question and draw.random() < 0.15:
        template = "please " + template
    if template[0].isalpha() and draw.random() < 0.8:
        template = template[0].upper() + template[1:]
    mark = draw.choice(("?", "?", "")) if is_question else draw.choice((".", ".", ""))
    if template.endswith("="):
        mark = draw.choice((" ?", "?", ""))
    elif template.startswith("{a}"):
        mark = draw.choice(("?", "", ""))
    return template.format(**values) + mark


def word(draw: random.Random, longest: int = 12) -> str:
    """A lower-case word of 2..longest letters: invented, random, common, or of the vocabulary."""
    while True:
        kind = draw.random()
        if kind < 0.12:
            found = draw.choice(COMMON)
        elif kind < 0.22:
            found = draw.choice((*WORDS, *KEYS, *NOUNS))
        elif kind < 0.42:
            letters = draw.choices(string.ascii_lowercase, k=draw.randint(2, longest))
            found = "".join(letters)
        else:
            found = "".join(
                draw.choice(ONSETS)
                + draw.choice(VOWELS)
                + (draw.choice("nrstlmpdg") if draw.random() < 0.4 else "")
                for _ in range(draw.randint(1, 5))
            )
        if 2 <= len(found) <= longest:
            return found


def number(draw: random.Random) -> int:
    digits = draw.choice((1, 2, 2, 3, 3))
    return draw.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1)


def columns(a: int, b: int, sign: int) -> str:
    """Schoolbook columns from the right, `9+6+1=16` or `5-8-0=7b1`: each a local look-up."""
    width = max(len(str(a)), len(str(b)))
    steps, carry = [], 0
    for p, q in zip(str(a).zfill(width)[::-1], str(b).zfill(width)[::-1], strict=True):
        if sign > 0:
            total = int(p) + int(q) + carry
            steps.append(f"{p}+{q}+{carry}={total}")
            carry = total // 10
        else:
            total = int(p) - int(q) - carry
            borrow = int(total < 0)
            steps.append(f"{p}-{q}-{carry}={total + 10 * borrow}b{borrow}")
            carry = borrow
    return " ".join(steps)


def add(draw: random.Random, longest: int) -> Example:
    a, b = number(draw), number(draw)
    text = str(a + b)
    # One key for both orders: a held-out sum is not trained as its mirror image either.
    key = f"add {min(a, b)} {max(a, b)}"
    question = phrase(draw, ADD, a=a, b=b)
    return Example("add", key, [user(question)], final(text, columns(a, b, 1)), text)


def subtract(draw: random.Random, longest: int) -> Example:
    a, b = number(draw), number(draw)
    if a < b:
        a, b = b, a
    text = str(a - b)
    question = phrase(draw, SUB, a=a, b=b)
    return Example(
        "subtract", f"sub {a} {b}", [user(question)], final(text, columns(a, b, -1)), text
    )


def numbered(letters: str) -> str:
    return "".join(f"{at + 1}{letter}" for at, letter in enumerate(letters))


def reverse(draw: random.Random, longest: int) -> Example:
    w = word(draw, longest)
    backwards = "".join(f"{at + 1}{w[at]}" for at in reversed(range(len(w))))
    thought = f"{numbered(w)} {backwards}"
    question = phrase(draw, REVERSE, w=w)
    return Example("reverse", "word " + w, [user(question)], final(w[::-1], thought), w[::-1])


def spell(draw: random.Random, longest: int) -> Example:
    w = word(draw, longest)
    text = "-".join(w)
    question = phrase(draw, SPELL, w=w)
    return Example("spell", "word " + w, [user(question)], final(text), text)


def count(draw: random.Random, longest: int) -> Example:
    w = word(draw, longest)
    c = draw.choice(w) if draw.random() < 0.85 else draw.choice(string.ascii_lowercase)
    if len(w) < longest and draw.random() < 0.4:
        at = draw.randrange(len(w))
        w = w[:at] + c + w[at:]
    seen, thought = 0, ""
    for letter in w:
        seen += letter == c
        thought += f"{letter}{seen}"
    question = phrase(draw, COUNT, c=c, w=w)
    return Example("count", "word " + w, [user(question)], final(str(seen), thought), str(seen))


def value(draw: random.Random) -> str | int:
    kind = draw.random()
    if kind < 0.35:
        return draw.randint(0, 999)
    w = word(draw, 8)
    return w if kind < 0.6 else w.capitalize()


def fields(draw: random.Random, most: int) -> dict[str, str | int]:
    keys = draw.sample(KEYS, draw.randint(1, most))
    return {k if draw.random() < 0.7 else word(draw, 7): value(draw) for k in keys}


def spoken(pairs: dict[str, str | int]) -> str:
    said = [f"{key} {item}" for key, item in pairs.items()]
    return said[0] if len(said) == 1 else ", ".join(said[:-1]) + " and " + said[-1]


def write_object(draw: random.Random, longest: int) -> Example:
    pairs = fields(draw, 3)
    text = json.dumps(pairs)
    question = phrase(draw, OBJECT, p=spoken(pairs))
    return Example("json", "json " + text, [user(question)], final(text), text)


def function(draw: random.Random) -> tuple[dict[str, Any], dict[str, str | int]]:
    """A tool in OpenAI's form, and arguments for it."""
    name = draw.choice(VERBS) + "_" + (draw.choice(NOUNS) if draw.random() < 0.5 else word(draw, 6))
    pairs = fields(draw, 2)
    properties = {
        key: {"type": "string" if isinstance(item, str) else draw.choice(("number", "integer"))}
        for key, item in pairs.items()
    }
    described = {"description": phrase(draw, OTHER, **others(draw))} if draw.random() < 0.3 else {}
    parameters = {"type": "object", "properties": properties}
    tool = {"type": "function", "function": {"name": name, **described, "parameters": parameters}}
    return tool, pairs


def call(draw: random.Random, longest: int) -> Example:
    offered = [function(draw) for _ in range(draw.choice((1, 1, 2, 3)))]
    tool, pairs = draw.choice(offered)
    name, text = tool["function"]["name"], json.dumps(pairs)
    question = phrase(draw, CALL, f=name, p=spoken(pairs))
    completion = (
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{text}<|call|>"
    )
    tools = [tool for tool, _ in offered]
    key = f"call {name} {text}"
    return Example("call", key, [user(question)], completion, None, (name, dict(pairs)), tools)


def tool_result(draw: random.Random, longest: int) -> Example:
    """The second half of a call: say what came back."""
    asked = call(draw, longest)
    assert asked.call is not None
    name, arguments = asked.call
    key, item = draw.choice(("result", draw.choice(KEYS))), value(draw)
    result = json.dumps({key: item}) if draw.random() < 0.8 else str(item)
    text = f"The {key if result.startswith('{') else 'result'} is {item}."
    messages = [
        *asked.messages,
        {
            "role": "assistant",
            "tool_calls": [
                {
                    "type": "function",
                    "id": "call_0",
                    "function": {"name": name, "arguments": json.dumps(arguments)},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_0", "content": result},
    ]
    completion = final(text)
    return Example("tool result", asked.key + result, messages, completion, text, None, asked.tools)


def others(draw: random.Random) -> dict[str, object]:
    w, x, y = (word(draw, 9) for _ in range(3))
    if draw.random() < 0.3:
        w = w.capitalize()
    return {"w": w, "x": x, "y": y, "a": number(draw), "b": number(draw)}


def other(draw: random.Random, longest: int) -> Example:
    question = phrase(draw, OTHER, **others(draw))
    if draw.random() < 0.3:
        question += draw.choice((" ", "! ")) + phrase(draw, OTHER, **others(draw))
    return Example("other", "other " + question, [user(question)], final(ABILITIES), ABILITIES)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


TASKS: dict[str, Callable[[random.Random, int], Example]] = {
    "add": add,
    "subtract": subtract,
    "reverse": reverse,
    "spell": spell,
    "count": count,
    "json": write_object,
    "call": call,
    "tool result": tool_result,
    "other": other,
}


def example(draw: random.Random, task: str, held_out: bool = False, longest: int = 12) -> Example:
    """A fresh example of ``task`` from the wanted side of the split."""
    while True:
        found = TASKS[task](draw, longest)
        if found.held_out == held_out:
            return found


def with_history(draw: random.Random, last: Example, turns: int) -> Example:
    """The same question after ``turns`` earlier ones and their right answers."""
    earlier: list[Message] = []
    for _ in range(turns):
        past = example(draw, draw.choice([t for t in TASKS if t not in ("call", "tool result")]))
        earlier += [*past.messages, {"role": "assistant", "content": past.content}]
    return Example(
        last.task,
        last.key,
        earlier + last.messages,
        last.completion,
        last.content,
        last.call,
        last.tools,
    )
