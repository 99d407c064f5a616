"""Log probabilities: what they are, against transformers; and which of them an answer shows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from cluster.reply import Reply
from cluster.text import Text
from tests import ranks, vocabularies
from tests.checkpoints import gpt_oss_config, oracle, tiny_gpt_oss
from tests.engines import Engine, greedy, prompts
from tests.test_openai import CALLING, SAYING, TOOLS, ask, complete, ids, outputs, run, text
from workers import sampler
from workers.architecture import parse
from workers.config import ModelSpec
from workers.device import Host
from workers.dryrun import Dry
from workers.runner import Runner
from workers.wire import Logprobs, Output, Request

TIGHT = {"kv_cache_memory": 130_000, "block_size": 4, "max_model_len": 72}
CHANGES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "top_k": 20},
    {"repetition_penalty": 1.5, "frequency_penalty": 0.5},
    {"temperature": 1.3, "logit_bias": {7: 5.0}, "min_tokens": 5},
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt_oss(tmp_path_factory.mktemp("tiny"))


def requests() -> list[Request]:
    """Three of four ask, for different numbers; logits are changed in all ways."""
    return [
        greedy(
            f"r{i}",
            prompt,
            20,
            seed=i,
            logprobs=(None, 0, 3, 300)[i % 4],
            **CHANGES[(i + i // 4) % 4],
        )
        for i, prompt in enumerate(prompts(12, longest=40, seed=1))
    ]


def assert_right(
    directory: Path, tokens: dict[str, list[int]], found: dict[str, list[Logprobs]]
) -> None:
    """Against transformers' logits of the whole sequence."""
    model = oracle(directory)
    for request in requests():
        mine, generated = found[request.id], tokens[request.id]
        most = request.sampling.logprobs
        if most is None:
            assert mine == []
            continue
        assert len(mine) == len(generated) == 20
        with torch.inference_mode():
            logits = model(torch.tensor([request.prompt + generated[:-1]])).logits[0]
        expected = logits[len(request.prompt) - 1 :].float().log_softmax(-1)
        for token, ours, theirs in zip(generated, mine, expected, strict=True):
            assert ours.chosen == pytest.approx(float(theirs[token]), abs=1e-3)
            assert len(ours.tokens) == len(ours.values) == min(most, 256)
            assert len({*ours.tokens}) == len(ours.tokens)
            assert ours.values == sorted(ours.values, reverse=True)
            best = theirs.topk(min(most, 256)).values.tolist()
            assert ours.values == pytest.approx(best, abs=1e-3)
            assert theirs[ours.tokens].tolist() == pytest.approx(ours.values, abs=1e-3)
            if most == 300:
                assert sum(map(math.exp, ours.values)) == pytest.approx(1, abs=1e-5)
            if request.sampling.temperature == 0 and not request.sampling.penalised:
                assert ours.tokens[:1] in ([], [token]), "greedy takes the likeliest"
                assert ours.values[:1] in ([], [ours.chosen])


def test_they_are_those_of_the_models_own_logits(tiny: Path) -> None:
    """Whatever sampling does to the logits; bit for bit the same preempted, chunked, with two
    steps on their way, or resumed."""
    calm = Engine(tiny)
    tokens = calm.generate(requests())
    expected = calm.logprobs
    assert_right(tiny, tokens, expected)

    tight = Engine(tiny, max_num_batched_tokens=24, **TIGHT)
    assert tight.generate(requests()) == tokens
    assert tight.scheduler.load().preemptions > 0
    assert tight.logprobs == expected

    class Early(Host):
        ahead = 2

    assert calm.rank._place is not None
    calm.runner = Runner(
        calm.model, calm.runner._cache, calm.plan.scheduler, calm.rank._place, Early()
    )
    resumed = [msgspec.structs.replace(r, emitted=tokens[r.id][:7]) for r in requests()]
    assert calm.generate(resumed) == tokens
    assert calm.logprobs == {id: found[7:] for id, found in expected.items()}


def test_two_ranks_find_them_too(tiny: Path) -> None:
    calm = Engine(tiny)
    calm.generate(requests())
    jobs: list[Any] = [(tiny, {}, requests()), (tiny, TIGHT, requests())]
    for tokens, _, found in ranks.generate(2, jobs):
        assert_right(tiny, tokens, found)


def test_nothing_is_computed_where_nobody_asks(tiny: Path, monkeypatch: Any) -> None:
    engine = Engine(tiny)
    monkeypatch.delattr(sampler, "log_softmax")
    engine.generate([greedy("r", [1, 2, 3], 5)])
    with pytest.raises(NameError):
        engine.generate([greedy("r2", [1, 2, 3], 5, logprobs=0)])


def test_they_make_no_host_wait() -> None:
    arch = parse(gpt_oss_config("gpt-oss-20b"))
    arch = msgspec.structs.replace(arch, num_layers=2, windows=arch.windows[:2])
    dry = Dry(arch, ModelSpec(), 90, 0)
    dry.sample(dry.step([(1500, 1)] * 64).logits)


def test_many_rows_are_computed_in_parts() -> None:
    logits = torch.randn(70, 100_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows, tokens = torch.arange(0, 70, 2), torch.arange(70) * 1000
    found = sampler.read_logprobs(
        rows.numpy(), rows.numpy() * 0 + 2, sampler.log_softmax(logits, rows, tokens, 2)
    )
    expected = logits.float().log_softmax(-1)
    assert list(found) == rows.tolist()
    for row, ours in found.items():
        assert ours.chosen == float(expected[row, row * 1000])
        assert ours.values == expected[row].topk(2).values.tolist()
        assert expected[row, ours.tokens].tolist() == ours.values


# ---- Which tokens an answer shows


WORDS = [*ids("hello world there"), *ids("assistant analysis commentary final to=functions.f json")]
FOX = [*text().encode_plain("🦊"), *text().encode_plain("é")]
CONTROL = sorted(text().control.values())
ANSWERS = st.one_of(
    st.lists(st.sampled_from(WORDS + FOX * 3 + CONTROL * 2), max_size=40),
    st.tuples(
        st.sampled_from([CALLING, SAYING + "hello 🦊 wor", SAYING + "b-a-n 🦊é<|return|>"]).map(
            ids
        ),
        st.integers(0, 40),
        st.lists(st.sampled_from(FOX + CONTROL), max_size=3),
    ).map(lambda t: [*t[0][: t[1]], *t[2], *t[0][t[1] :]]),
)


def marked(made: list[Output], most: int) -> list[Output]:
    """Every token's log probability names its place in the answer."""
    for output in made:
        output.logprobs = [
            Logprobs(-1.0 - output.offset - i, [token, 300, 301][:most], [-0.5, -9.0, -9.5][:most])
            for i, token in enumerate(output.tokens)
        ]
    return made


def spoken(choice: dict[str, Any]) -> list[tuple[bytes, float]]:
    """Bytes and log probabilities of the tokens in a chat choice."""
    return [
        (bytes(each["bytes"]), each["logprob"])
        for each in (choice["logprobs"] or {"content": []})["content"]
    ]


@settings(max_examples=800)
@given(
    tokens=ANSWERS,
    cuts=st.lists(st.integers(0, 40), max_size=20),
    stop=st.sampled_from([[], [], ["wor"], ["🦊"], ["o w", "a 🦊é"]]),
    include=st.booleans(),
    ended=st.booleans(),
    most=st.integers(0, 3),
)
def test_a_chats_tokens_are_its_contents(
    tokens: list[int], cuts: list[int], stop: list[str], include: bool, ended: bool, most: int
) -> None:
    """Those of a stream are those of the whole body, and their bytes are the content."""
    how: dict[str, Any] = {
        "logprobs": True, "top_logprobs": most, "tools": TOOLS,
        "stop": stop, "include_stop_str_in_output": include,
    }  # fmt: skip
    last = tokens[-1] if ended and tokens else None
    cuts = cuts if tokens else []
    made = [marked(outputs("chatcmpl-1", tokens, c, "stop", last), most) for c in ([], cuts)]
    whole, _ = run(ask(**how), made[0])
    body = json.loads(whole.body())
    ChatCompletion.model_validate(body)
    _, sent = run(ask(stream=True, **how), made[1])
    assert sent.pop() == "data: [DONE]"
    pieces = []
    for chunk in sent:
        ChatCompletionChunk.model_validate(chunk)
        (part,) = chunk["choices"]
        assert part["logprobs"] is None or part["delta"]["content"]
        pieces += spoken(part)
    choice = body["choices"][0]
    assert pieces == spoken(choice)
    places = [place for _, place in pieces]
    assert places == sorted({*places}, reverse=True)
    assert all(bytes(text().piece(tokens[int(-1 - at)])) == piece for piece, at in pieces)
    for each in choice["logprobs"]["content"]:
        assert [top["logprob"] for top in each["top_logprobs"]] == [-0.5, -9.0, -9.5][:most]
        assert not most or each["top_logprobs"][0]["bytes"] == each["bytes"]
    said = b"".join(piece for piece, _ in pieces)
    content = (choice["message"]["content"] or "").replace("\n", "")
    if "\ufffd" not in content:  # else characters broke off between messages
        if choice.get("stop_reason") in stop:
            assert content.startswith(said.decode(errors="ignore"))
        else:
            assert said.decode() == content


@settings(max_examples=300)
@given(
    tokens=ANSWERS,
    cuts=st.lists(st.integers(0, 40), max_size=20),
    stop=st.sampled_from([[], ["wor"], ["🦊"]]),
    special=st.booleans(),
    most=st.integers(0, 3),
)
def test_completions_tokens_are_their_text(
    tokens: list[int], cuts: list[int], stop: list[str], special: bool, most: int
) -> None:
    how: dict[str, Any] = {"logprobs": most, "stop": stop, "skip_special_tokens": special}
    cuts = cuts if tokens else []
    made = [marked(outputs("cmpl-1", tokens, c, "length"), most) for c in ([], cuts)]
    whole, _ = run(complete(**how), made[0])
    body = json.loads(whole.body())
    Completion.model_validate(body)
    _, sent = run(complete(stream=True, **how), made[1])
    choice = body["choices"][0]
    found = choice["logprobs"]
    parts = [c["choices"][0]["logprobs"] for c in sent[:-1] if c["choices"][0]["logprobs"]]
    for name, values in found.items():
        assert [each for part in parts for each in part[name]] == values
    names, offsets, shown = found["tokens"], found["text_offset"], choice["text"]
    assert offsets == sorted(offsets)
    chosen = zip(names, found["token_logprobs"], found["top_logprobs"], strict=True)
    for name, value, top in chosen:
        assert top[name] in (value, -0.5)
        assert len(top) <= most + 1
    if "\ufffd" in shown:
        return
    for name, offset in zip(names, offsets, strict=True):
        assert name.startswith("bytes:\\x") or shown[offset:].startswith(name)
    if choice.get("stop_reason") is None:
        whole_text = "".join(names) if not any(n.startswith("bytes:") for n in names) else shown
        assert whole_text == shown
    if special is False and not stop:
        assert shown == text().decode(tokens, skip_control=False)


def test_nobody_gets_what_was_not_asked_for() -> None:
    (hello,) = ids("h")
    plain, _ = run(complete(), outputs("cmpl-1", [hello], [], "length"))
    assert json.loads(plain.body())["choices"][0]["logprobs"] is None
    # An engine's logprobs of tokens that a client has are skipped with them.
    answer = Reply(complete(logprobs=0))
    for output in marked(outputs("cmpl-1", [hello] * 5, [3], "length"), 0):
        answer.feed(msgspec.structs.replace(output, reason=None))
    answer.feed(*marked(outputs("cmpl-1", [hello] * 7, [], "length"), 0))
    found = json.loads(answer.body())["choices"][0]["logprobs"]["token_logprobs"]
    assert found == [-1.0 - at for at in range(7)]


@pytest.mark.parametrize("kind", [vocabularies.byte_fallback, vocabularies.metaspace])
def test_pieces_of_other_vocabularies(kind: Any, tmp_path: Path) -> None:
    other = Text(vocabularies.save(tmp_path, kind()))
    said = "hello the world" + ("é 你🦊" if kind is vocabularies.byte_fallback else "")
    pieces = b"".join(map(other.piece, other.encode_plain(said)))
    assert pieces.decode().lstrip(" ") == said
    assert other.piece(2) == b"</s>"
    assert other.piece(10**6) == b""
