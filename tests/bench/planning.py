"""Microseconds per planning step: ``python -m tests.bench.planning``.

Every sequence decodes; their lengths are spread over a block, so each step has its share of block
boundaries. Encoding is msgpack, as the engine sends it: the Batch to the ranks, one Outputs message
to an ingress. Figures are medians over steps; "best" is the lowest mean over one block's worth of
consecutive steps, which is what a machine with other work to do shows most reliably.
"""

from __future__ import annotations

import statistics
from time import perf_counter

import msgspec
import numpy as np

from workers.config import KVConfig, KVGroup, SchedulerConfig
from workers.engine import settle_garbage_collection
from workers.scheduler import Scheduler
from workers.wire import Engine, Outputs, Request, Sampling, StepResult

SIZES = (256, 1024, 2048)
WARMUP, STEPS, BLOCK_SIZE = 160, 320, 16


def measure(num_seqs: int) -> dict[str, list[float]]:
    """Seconds per step of plan, commit and encode with ``num_seqs`` decoding sequences."""
    tokens = 256 + WARMUP + STEPS
    groups = (KVGroup("full", (1,), 4096), KVGroup("window", (0,), 4096, 128))
    num_blocks = num_seqs * (tokens // BLOCK_SIZE + 12)
    config = SchedulerConfig(num_seqs, num_seqs * 64, 8 * tokens, (0,))
    scheduler = Scheduler(config, KVConfig(groups, num_blocks, BLOCK_SIZE))
    for i in range(num_seqs):
        prompt = [(7 * i + j) % 1000 + 1 for j in range(32 + i % BLOCK_SIZE)]
        sampling = Sampling(max_tokens=4 * tokens)
        scheduler.add(Request(id=f"cmpl-{i:024x}", model="m", prompt=prompt, sampling=sampling), 0)
    engine = Engine("moeray", "model", "replica")
    encoder = msgspec.msgpack.Encoder()
    random = np.random.default_rng(0)
    times: dict[str, list[float]] = {"plan": [], "commit": [], "encode": [], "sum": []}
    batch = scheduler.plan(0.0)
    while len(times["sum"]) < WARMUP + STEPS:
        ids = random.integers(1, 1000, sum(batch.samples)).tolist()
        result = StepResult(batch.step, ids)
        started = perf_counter()
        outputs = scheduler.commit(batch, result, 0.0)
        committed = perf_counter()
        batch = scheduler.plan(0.0)
        planned = perf_counter()
        encoder.encode(batch)
        encoder.encode(Outputs(engine, 1, outputs))
        encoded = perf_counter()
        if len(outputs) == num_seqs:
            times["commit"].append(committed - started)
            times["plan"].append(planned - committed)
            times["encode"].append(encoded - planned)
            times["sum"].append(encoded - started)
    scheduler.check()
    return {name: values[WARMUP:] for name, values in times.items()}


def report() -> list[str]:
    """A Markdown table: microseconds per step by number of decoding sequences."""
    settle_garbage_collection()
    lines = [
        f"Microseconds per step: medians over {STEPS} steps, block size {BLOCK_SIZE}, one full "
        "group and one of window 128. Best: the lowest mean over one block's worth of steps.",
        "",
        "| sequences | plan | commit | encode | sum | best |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for num_seqs in SIZES:
        times = measure(num_seqs)
        medians = [statistics.median(values) for values in times.values()]
        windows = [times["sum"][i : i + BLOCK_SIZE] for i in range(0, STEPS, BLOCK_SIZE)]
        best = min(statistics.fmean(window) for window in windows)
        cells = " | ".join(f"{1e6 * seconds:.0f}" for seconds in (*medians, best))
        lines.append(f"| {num_seqs} | {cells} |")
    return lines


if __name__ == "__main__":
    print("\n".join(report()))
