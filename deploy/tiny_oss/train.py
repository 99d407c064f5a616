"""Train tiny-oss: `python -m deploy.tiny_oss.train --minutes 30`.

Two processes of one thread each average their gradients over gloo; every example is fresh. Stop it
at any time (Ctrl-C or SIGTERM saves), go on with the same command. Tasks that are still wrong are
drawn more often; experts are quantised in the forward pass for the last third.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from deploy.tiny_oss.model import Decoder, Size
from deploy.tiny_oss.tasks import TASKS, Example, example, render, with_history
from deploy.tiny_oss.tokenizer import build, padded_vocabulary

LENGTHS = (64, 96, 128, 192, 256, 384, 512, 1024, 2048)
TOKENS = 2048  # per step and process
RATE, WARM_UP = 2e-3, 100
QUANTISED = 0.65  # of the run: from here on experts are rounded in the forward pass
Item = tuple[str, list[int], list[int]]  # task, prompt ids, completion ids


class Stream:
    """Fresh examples in batches of nearly equal token count."""

    def __init__(self, seed: int, tokenizer: Tokenizer) -> None:
        self.draw = random.Random(seed)
        self.tokenizer = tokenizer
        self.error = dict.fromkeys(TASKS, 1.0)  # running share of wrong answers
        self.waiting: dict[int, list[Item]] = defaultdict(list)
        self.ready: list[tuple[int, list[Item]]] = []

    def one(self, task: str, progress: float) -> Example:
        longest = 5 if progress < 0.08 else 8 if progress < 0.3 else 12
        found = example(self.draw, task, longest=longest)
        chance = self.draw.random()
        if progress > 0.2 and chance < 0.15:
            return with_history(self.draw, found, self.draw.randint(1, 3))
        if progress > 0.4 and chance > 0.975:
            return with_history(self.draw, found, self.draw.randint(4, 28))
        return found

    def fill(self, progress: float) -> None:
        weights = [0.15 + min(error, 0.6) for error in self.error.values()]
        tasks = self.draw.choices(list(self.error), weights, k=64)
        examples = [self.one(task, progress) for task in tasks]
        texts = []
        for one in examples:
            effort = (
                self.draw.choice(("low", "medium", "high")) if self.draw.random() < 0.3 else None
            )
            messages = one.messages
            if self.draw.random() < 0.05:
                messages = [
                    {"role": "system", "content": "You are a helpful assistant."},
                    *messages,
                ]
            texts += [render(messages, one.tools, effort), one.completion]
        ids = [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]
        for task, prompt, completion in zip(tasks, ids[::2], ids[1::2], strict=True):
            size = len(prompt) + len(completion) - 1
            if size > LENGTHS[-1]:
                continue
            length = next(bound for bound in LENGTHS if bound >= size)
            batch = self.waiting[length]
            batch.append((task, prompt, completion))
            if len(batch) == max(1, TOKENS // length):
                self.ready.append((length, self.waiting.pop(length)))

    def batch(self, progress: float) -> tuple[int, list[Item]]:
        while not self.ready:
            self.fill(progress)
        return self.ready.pop(0)


def tensors(length: int, items: list[Item]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids [B, length]; of every completion token: its flat position, its id, its item."""
    ids = torch.zeros(len(items), length, dtype=torch.long)
    at: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    for row, (_, prompt, completion) in enumerate(items):
        whole = prompt + completion[:-1]
        ids[row, : len(whole)] = torch.tensor(whole)
        first = row * length + len(prompt) - 1
        at += range(first, first + len(completion))
        targets += completion
        owner += [row] * len(completion)
    return ids, torch.tensor(at), torch.tensor(targets), torch.tensor(owner)


def average(model: Decoder, world: int) -> None:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def run(rank: int, world: int, port: int, seconds: float, out: Path, seed: int) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    store = dist.TCPStore("127.0.0.1", port, world, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    tokenizer = build()
    torch.manual_seed(seed)
    model = Decoder(Size(vocab=padded_vocabulary(tokenizer)))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    stream = Stream(1000 * seed + rank, tokenizer)
    step, spent, tokens = 0, 0.0, 0
    saved = out.with_suffix(f".rank{rank}.pt")
    if saved.exists():
        state: dict[str, Any] = torch.load(saved, weights_only=False)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        stream.draw.setstate(state["draw"])
        stream.error, step, spent = state["error"], state["step"], state["spent"]
        tokens = state["tokens"]

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "draw": stream.draw.getstate(),
            "error": stream.error,
            "step": step,
            "spent": spent,
            "tokens": tokens,
            "size": asdict(model.size),
        }
        torch.save(state, saved.with_suffix(".tmp"))
        saved.with_suffix(".tmp").replace(saved)

    started = last = time.monotonic()
    before = spent
    while True:
        spent = before + time.monotonic() - started
        # All processes agree on the clock and on stopping, or their steps would differ.
        shared = torch.tensor([spent if rank == 0 else 0.0, float(stopping)])
        dist.all_reduce(shared)
        spent, asked = shared.tolist()
        progress = spent / seconds
        if progress >= 1 or asked:
            break
        model.quantise(progress > QUANTISED)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARM_UP) * min(1, (1 - progress) / 0.5)
        length, items = stream.batch(progress)
        ids, at, targets, owner = tensors(length, items)
        losses: list[Tensor] = []
        logits = model(ids, at, losses)
        loss = F.cross_entropy(logits, targets)
        optimizer.zero_grad()
        torch.stack((loss, *losses)).sum().backward()
        average(model, world)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        wrong = set(owner[logits.argmax(-1) != targets].tolist())
        for row, (task, _, _) in enumerate(items):
            stream.error[task] += 0.02 * ((row in wrong) - stream.error[task])
        step += 1
        tokens += ids.numel() * world
        if time.monotonic() - last > 30:
            last = time.monotonic()
            save()
            if rank == 0:
                right = " ".join(f"{task}:{1 - error:.2f}" for task, error in stream.error.items())
                print(
                    f"{spent:.0f}s step {step} {tokens / 1e6:.1f}M tokens {tokens / spent:.0f}/s"
                    f" loss {loss.item():.3f} {right}",
                    flush=True,
                )
    save()
    dist.barrier()
    dist.destroy_process_group()


def main(
    out: Annotated[Path, typer.Option(help="training state, one file per process")] = Path(
        "build/tiny-oss"
    ),
    minutes: Annotated[float, typer.Option(help="of training, pauses not counted")] = 30,
    processes: Annotated[int, typer.Option(help="one core each")] = 2,
    seed: int = 0,
) -> None:
    """Train, or go on with, tiny-oss; `deploy.tiny_oss.export` then writes the checkpoint."""
    out.parent.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    store = dist.TCPStore("127.0.0.1", 0, processes, is_master=True, wait_for_workers=False)
    arguments = (processes, store.port, minutes * 60, out, seed)
    mp.spawn(run, arguments, nprocs=processes)


if __name__ == "__main__":
    typer.run(main)
