"""Score the exported checkpoint on held-out examples: `python -m deploy.tiny_oss.evaluate`.

The engine is transformers on the dequantised MXFP4 file, or with ``--kv-cache-dtype`` moeray's own
model on a KV cache of that dtype. Every completion is compared token by token with the only right
one; a completion's own prefix being right, that is greedy decoding.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer

from deploy.tiny_oss.tasks import CHECKPOINT, TASKS, Example, example, render, with_history

Chooser = Callable[[list[int], list[int]], list[int]]


def held_out(
    task: str, count: int, turns: tuple[int, int] = (0, 0), seed: int = 7
) -> list[Example]:
    """``count`` examples never trained on, each after a number of earlier turns."""
    draw = random.Random(f"{task} {seed} {turns}")
    return [
        with_history(draw, example(draw, task, held_out=True), draw.randint(*turns))
        for _ in range(count)
    ]


def chooser(checkpoint: Path, dtype: torch.dtype = torch.float32) -> Chooser:
    """A function (prompt, completion) -> the greedy choice at every token of the completion."""
    from transformers import GptOssForCausalLM, Mxfp4Config

    model: Any = GptOssForCausalLM.from_pretrained(
        checkpoint,
        dtype=dtype,
        quantization_config=Mxfp4Config(dequantize=True),
        attn_implementation="eager",
    )

    @torch.inference_mode()
    def choose(prompt: list[int], completion: list[int]) -> list[int]:
        ids = torch.tensor([prompt + completion[:-1]])
        logits = model(ids, logits_to_keep=len(completion)).logits[0]
        choice: list[int] = logits.argmax(-1).tolist()
        return choice

    return choose


def likelihoods(checkpoint: Path, **options: Any) -> Callable[[list[int], list[int]], torch.Tensor]:
    """A function (prompt, completion) -> log-probabilities fp32 [completion, vocabulary] of every
    next token, by moeray's model on CPU; ``options`` are ModelSpec's."""
    from kernels.reference import Rows
    from workers.config import ModelSpec
    from workers.kvcache import KVCache
    from workers.rank import Rank

    rank = Rank(ModelSpec(model=str(checkpoint), device="cpu", **options))
    plan = rank.plan(rank.load(None).free_bytes)
    runner = rank.allocate(plan)
    model, cache = runner._model, runner._cache
    assert isinstance(cache, KVCache)

    @torch.inference_mode()
    def predict(prompt: list[int], completion: list[int]) -> torch.Tensor:
        ids = torch.tensor(prompt + completion[:-1])
        positions = torch.arange(len(ids))
        size = plan.kv.block_size
        pages = -(-len(ids) // size)
        plans = []
        for nth, group in enumerate(plan.kv.groups):
            table = torch.arange(nth * pages, (nth + 1) * pages, dtype=torch.int32)[None]
            rows = Rows(
                starts=torch.tensor([0]),
                counts=torch.tensor([len(ids)]),
                lines=torch.tensor([0]),
                tables=table,
                resident=table,
                tokens=len(ids),
                block_size=size,
                zero_block=cache.zero_block,
                window=group.size if group.kind == "window" else 0,
            )
            plans.append(model.ops.plan(rows, lambda tensor: tensor))
        logits, _ = model(ids, positions, plans, cache, positions[-len(completion) :])
        return torch.log_softmax(logits.float(), -1)

    return predict


def surprise(
    predict: Callable[[list[int], list[int]], torch.Tensor],
    tokenizer: Tokenizer,
    examples: list[Example],
) -> tuple[float, float]:
    """(share of examples answered exactly, mean nats per token of the right answers)."""
    right, nats, tokens = 0, 0.0, 0
    for one in examples:
        prompt = tokenizer.encode(render(one.messages, one.tools), add_special_tokens=False).ids
        target = tokenizer.encode(one.completion, add_special_tokens=False).ids
        found = predict(prompt, target)
        right += found.argmax(-1).tolist() == target
        nats -= float(found.gather(1, torch.tensor(target)[:, None]).sum())
        tokens += len(target)
    return right / len(examples), nats / tokens


def score(choose: Chooser, tokenizer: Tokenizer, examples: list[Example]) -> tuple[float, float]:
    """(share of examples answered exactly, mean prompt tokens)."""
    right, tokens = 0, 0
    for one in examples:
        prompt = tokenizer.encode(render(one.messages, one.tools), add_special_tokens=False).ids
        target = tokenizer.encode(one.completion, add_special_tokens=False).ids
        right += choose(prompt, target) == target
        tokens += len(prompt)
    return right / len(examples), tokens / len(examples)


def main(
    checkpoint: Annotated[Path, typer.Option(help="an exported folder")] = CHECKPOINT,
    count: Annotated[int, typer.Option(help="examples per task")] = 300,
    long: Annotated[int, typer.Option(help="examples per task after 10 to 20 turns")] = 60,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto or fp8: of moeray's own model")] = "",
    dtype: Annotated[str, typer.Option(help="of moeray's own model")] = "bfloat16",
) -> None:
    """Print the share of right answers per task: alone, after two turns, after many."""
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    if kv_cache_dtype:
        predict = likelihoods(checkpoint, dtype=dtype, kv_cache_dtype=kv_cache_dtype)
        several = [one for task in TASKS for one in held_out(task, count, (0, 2))]
        share, nats = surprise(predict, tokenizer, several)
        print(f"{len(several)} examples: {100 * share:.2f} % right, {nats:.5f} nats per token")
        return
    choose = chooser(checkpoint)
    settings = {"alone": (count, (0, 0)), "2 turns": (count // 2, (2, 2)), "long": (long, (10, 20))}
    results: dict[str, dict[str, tuple[float, float]]] = {}
    for task in TASKS:
        results[task] = {
            name: score(choose, tokenizer, held_out(task, items, turns))
            for name, (items, turns) in settings.items()
        }
        if not as_json:
            cells = (f"{100 * s:5.1f} % ({t:.0f} tokens)" for s, t in results[task].values())
            print(f"| {task} | " + " | ".join(cells) + " |", flush=True)
    if as_json:
        print(json.dumps(results))


if __name__ == "__main__":
    typer.run(main)
