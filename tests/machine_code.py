"""Writes what the kernels compile to, and what a step must move, into docs/kernels.md.

``make kernels`` runs it behind the machine code's tests.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import triton

from kernels import aot, traffic
from kernels.configurations import family
from workers import dryrun
from workers.config import ModelSpec

DOCUMENT = Path(__file__).parents[1] / "docs" / "kernels.md"
BEGIN, END = "<!-- written by make kernels -->\n", "<!-- end -->\n"
BATCHES = (1, 64, 256)
CONTEXT = 1500
COLUMNS = (
    *("tile", "form", "warps", "registers", "shared", "tensor memory", "blocks"),
    *("products", "copies"),
)


def code(arch: int) -> list[str]:
    """Rows of the machine code's table."""
    launches = dryrun.launches(dryrun.GPT_OSS_120B, ModelSpec(), arch)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for variant in aot.compile(launches, arch, Path(scratch)):
            row = aot.row(variant, Path(scratch))
            assert not row["spilled"], row
            rows.append(f"| {row['kernel']} | " + " | ".join(str(row[c]) for c in COLUMNS) + " |")
    return rows


def step(arch: int) -> list[str]:
    """Rows of one decode step's table: MB, least MB and microseconds for each batch size."""
    found = {
        batch: dryrun.decode(dryrun.GPT_OSS_120B, ModelSpec(), arch, batch, CONTEXT)
        for batch in BATCHES
    }
    names = list(dict.fromkeys(name for kernels in found.values() for name in kernels))
    rows = []
    for name in names:
        cells = []
        for batch in BATCHES:
            if name in found[batch]:
                _, work = found[batch][name]
                moved, least = round(work.moved / 1e6), round(work.minimum / 1e6)
                cells.append(f"{moved} / {least} / {1e6 * work.seconds(arch):.0f}")
            else:
                cells.append("")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    totals = [1e3 * sum(w.seconds(arch) for _, w in found[b].values()) for b in BATCHES]
    rows.append(f"| **sum** | {' | '.join(f'{total:.2f} ms' for total in totals)} |")
    return rows


def main() -> None:
    lines = [f"gpt-oss-120b on one GPU, bf16, compiled by Triton {triton.__version__}.", ""]
    for arch, (name, bandwidth, peak) in traffic.GPUS.items():
        lines += [
            f"### {name} (sm_{arch}, {family(arch)})",
            f"| kernel | {' | '.join(COLUMNS)} |",
            "|---" * (1 + len(COLUMNS)) + "|",
            *code(arch),
            "",
            f"One decode step, context {CONTEXT:,}: MB moved / least MB / roofline us of all of a "
            f"kernel's launches, at {bandwidth / 1e12:.2f} TB/s and {peak / 1e12:,.0f} TF.",
            "",
            f"| kernel | {' | '.join(f'batch {batch}' for batch in BATCHES)} |",
            "|---" * (1 + len(BATCHES)) + "|",
            *step(arch),
            "",
        ]
    text = DOCUMENT.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    DOCUMENT.write_text(before + BEGIN + "\n".join(lines) + END + after)


if __name__ == "__main__":
    main()
