"""`make gpu-check`: the kernels' own check, then a served model with two sets of kernels.

A random gpt-oss checkpoint is served with `--kernels triton` and with `--kernels reference`. Greedy
tokens must be the same until the first one at which the two best logits are closer than rounding:
the difference of the two tokens' logits, from transformers in fp32 on a CPU, is at most ``MARGIN``.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from kernels import check
from kernels.check import Results
from kernels.proofs import Context, Figure
from tests.bench import load
from tests.bench.__main__ import moeray
from tests.bench.models import MEDIUM, VOCAB, build

MARGIN = 0.05  # of logits whose standard deviation is about 0.5
PROMPTS, LENGTH, TOKENS = 8, 200, 64
Gap = Callable[[Sequence[int], int, int], float]  # of two tokens' logits behind a prefix


def greedy(url: str, prompt: list[int]) -> list[int]:
    body = {
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        ids: list[int] = json.load(answer)["choices"][0]["token_ids"]
    return ids


def compare(
    prompts: list[list[int]], ours: list[list[int]], theirs: list[list[int]], gap: Gap
) -> Figure:
    """The largest gap at a first difference. Raises AssertionError where it is above MARGIN."""
    largest = 0.0
    for number, (prompt, mine, other) in enumerate(zip(prompts, ours, theirs, strict=True)):
        assert len(mine) == len(other), f"prompt {number}: {len(mine)} and {len(other)} tokens"
        at = next(
            (i for i, pair in enumerate(zip(mine, other, strict=True)) if len({*pair}) > 1), None
        )
        if at is not None:
            apart = gap([*prompt, *other[:at]], other[at], mine[at])
            assert apart <= MARGIN, f"prompt {number}, token {at}: logits {apart:.3g} apart"
            largest = max(largest, apart)
    return Figure(largest, f"logits apart at a first difference, at most {MARGIN}")


def gap_of(directory: Path) -> Gap:
    from transformers import GptOssForCausalLM

    model = GptOssForCausalLM.from_pretrained(directory, dtype=torch.float32)

    @torch.inference_mode()
    def gap(prefix: Sequence[int], one: int, other: int) -> float:
        logits = model(torch.tensor([prefix])).logits[0, -1]
        return float((logits[one] - logits[other]).abs())

    return gap


def served(results: Results) -> None:
    """Rows for both sets of kernels: tokens/s over HTTP, and whether their tokens agree."""
    prompts = [load.prompt(LENGTH, VOCAB, seed) for seed in range(PROMPTS)]
    tokens: dict[str, list[list[int]]] = {}

    def row(name: str, proof: Callable[[], Figure | None]) -> None:
        context = Context(torch.device("cpu"), {})
        results.write(check.run(f"served: {name}", lambda _: proof(), context))

    def rate(url: str, clients: int) -> Figure:
        found = asyncio.run(load.closed_loop(url, "bench", VOCAB, clients, 3 * clients))
        return Figure(found.tokens_per_second, "tokens/s")

    def serve(directory: Path, kernels: str) -> None:
        with moeray(directory, "--kernels", kernels, "--device", "cuda") as (url, _):
            tokens[kernels] = [greedy(url, prompt) for prompt in prompts]
            for clients in (1, 32):
                row(f"{kernels}, {clients} streams", partial(rate, url, clients))

    def agree(directory: Path) -> Figure:
        assert len(tokens) == 2, f"only {[*tokens]} answered"
        return compare(prompts, tokens["triton"], tokens["reference"], gap_of(directory))

    with tempfile.TemporaryDirectory(prefix="moeray-gpu-") as folder:
        directory = build(MEDIUM, Path(folder) / MEDIUM.name)
        for kernels in ("triton", "reference"):
            row(f"{kernels}, starts, answers and stops", partial(serve, directory, kernels))
        row("greedy tokens of triton and reference", partial(agree, directory))


def main() -> int:
    status = check.main([])
    if status == 2:
        return status
    with check.default_output().open("a") as file:
        results = Results(file, f"{MEDIUM.name} random gpt-oss, served")
        served(results)
    return 1 if status or results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
