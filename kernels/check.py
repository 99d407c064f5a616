"""``python -m kernels.check``: what only a GPU can prove, in under 8 minutes.

Needs torch and triton, and nothing else. Every result is a row of a Markdown table, written as it
comes. Checks run in a process of their own: one that hangs, or takes the device's context with it,
is recorded as failed, and the next process goes on behind it. Status: 0; 1 if any check failed; 2
without a GPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
import triton

from kernels import proofs, rates, roofline
from kernels.proofs import Check, Context, Figure

BUDGET = 420.0  # seconds, after which nothing new is begun
NOTES = """256 MiB are written between replays of one kernel, so that
it finds nothing in the L2 cache; not between those of a step. Fractions: of the least time under
the measured ceilings (the larger of the two bandwidths; the fp8 product where MXFP4 meets mxfp8,
else the bf16 product)."""
PATIENCE = 150.0  # for one check, its compilation included


@dataclass(frozen=True, slots=True)
class Row:
    check: str
    result: str  # "ok", "FAILED: ..." or "skipped: ..."
    figure: Figure | None = None

    def __str__(self) -> str:
        value = unit = fraction = ""
        if self.figure is not None:
            value, unit = f"{self.figure.value:.4g}", self.figure.unit
            fraction = "" if self.figure.fraction is None else f"{self.figure.fraction:.0%}"
            fraction += f" (target {self.figure.target})" if self.figure.target else ""
        cells = (self.check, self.result, value, unit, fraction)
        return "| " + " | ".join(" ".join(c.replace("|", "/").split()) for c in cells) + " |"


def checks() -> list[tuple[str, Check]]:
    """Sections 0 to 5."""
    return [
        *rates.ceilings(),
        *proofs.kernel_checks(torch.bfloat16, torch.float16, torch.float32),
        *proofs.invariance_checks(),
        *rates.invariance_costs(),
        *proofs.graph_checks(),
        *rates.kernel_times(),
        *rates.steps(),
    ]


def run(name: str, check: Check, context: Context) -> Row:
    """One check's row; its figure becomes known to later ones."""
    torch.manual_seed(0)
    try:
        figure = check(context)
        if context.device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # whatever it is, it is this check's result
        first = next(iter(str(error).strip().splitlines()), "")
        return Row(name, f"FAILED: {type(error).__name__}: {first[:300]}")
    if figure is not None:
        context.figures[name] = figure.value
    return Row(name, "ok", figure)


Send = Callable[[tuple[Row, bool]], None]


def work(send: Send, first: int, figures: dict[str, float], deadline: float) -> None:
    """In a process of its own: checks from the first on. Sends rows, and with each whether the
    device still answers; ends where it does not."""
    context = Context(torch.device("cuda"), figures)
    for name, check in checks()[first:]:
        if time.monotonic() > deadline:
            send((Row(name, f"skipped: {BUDGET:.0f} s have gone"), True))
            continue
        row = run(name, check, context)
        answers = True
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            answers = False
        send((row, answers))
        if not answers:
            os._exit(1)


def supervise(
    work: Callable[[Send, int, dict[str, float], float], None],
    names: Sequence[str],
    write: Callable[[Row], None],
    deadline: float,
    patience: float = PATIENCE,
) -> None:
    """Run ``work`` in processes until every name has its row, one process after another's death."""
    spawn = multiprocessing.get_context("spawn")
    figures: dict[str, float] = {}
    done = 0
    while done < len(names):
        ours, theirs = spawn.Pipe(duplex=False)
        process = spawn.Process(target=work, args=(theirs.send, done, figures, deadline))
        process.start()
        theirs.close()
        answers = True
        while answers and done < len(names):
            try:
                why = f"no result in {patience:.0f} s"
                if not ours.poll(patience):
                    raise EOFError
                why = "the process died"
                row, answers = ours.recv()
            except EOFError:
                row, answers = Row(names[done], f"FAILED: {why}"), False
            if row.figure is not None:
                figures[row.check] = row.figure.value
            write(row)
            done += 1
        if not answers:
            process.kill()
        process.join()


class Results:
    """A table that holds what is known at any time."""

    def __init__(self, file: TextIO, title: str) -> None:
        self._file, self.failed = file, 0
        self._line(f"\n## {title}\n")
        self._line("| check | result | figure | unit | fraction of ceiling |")
        self._line("| --- | --- | --- | --- | --- |")

    def write(self, row: Row) -> None:
        self.failed += row.result.startswith("FAILED")
        self._line(str(row))

    def _line(self, line: str) -> None:
        print(line, flush=True)
        self._file.write(line + "\n")
        self._file.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.check", description=__doc__)
    parser.add_argument("--output", type=Path, metavar="FILE", help="Markdown to append to.")
    output: Path | None = parser.parse_args(arguments).output
    if not torch.cuda.is_available():
        print("kernels.check needs a CUDA device, and torch sees none here", file=sys.stderr)
        return 2
    begin = time.monotonic()
    device = torch.cuda.get_device_properties(0)
    output = output or default_output()
    output.parent.mkdir(parents=True, exist_ok=True)
    title = (
        f"{time.strftime('%Y-%m-%d %H:%M')}: {device.name}, sm_{device.major}{device.minor}, "
        f"{device.total_memory / 2**30:.0f} GiB, driver {_driver()}, CUDA {torch.version.cuda}, "
        f"torch {torch.__version__}, triton {triton.__version__}"
    )
    title += f"\n\nTimes: medians of {roofline.REPLAYS} graph replays. {NOTES}"
    with output.open("a") as file:
        results = Results(file, title)
        supervise(work, [name for name, _ in checks()], results.write, begin + BUDGET)
    print(f"{results.failed} failed; results are in {output}")
    return 1 if results.failed else 0


def default_output() -> Path:
    """docs/gpu-results/<gpu>.md beside the folder of this file."""
    name = torch.cuda.get_device_name(0).lower().replace(" ", "-").replace("/", "-")
    return Path(__file__).parents[1] / "docs" / "gpu-results" / f"{name}.md"


def _driver() -> str:
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
