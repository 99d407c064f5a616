"""Flags that several commands have, what becomes of them, and how commands say what is wrong."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from workers.config import ModelSpec

say = Console(stderr=True, highlight=False)

T = TypeVar("T")
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}

Device = Annotated[str, typer.Option(help="auto, cuda or cpu.")]
DType = Annotated[str, typer.Option(help="auto (bfloat16), bfloat16 or float32.")]
Kernels = Annotated[str, typer.Option(help="auto, reference, cpu or triton.")]
Invariant = Annotated[
    bool,
    typer.Option(
        "--batch-invariant",
        help="No token depends on the batch it ran in: always so on CPU in float32; on CUDA it "
        "costs speed.",
    ),
]
Memory = Annotated[
    str,
    typer.Option(
        metavar="BYTES",
        help="KV cache of each rank, e.g. 512MiB. Default: a quarter of the free memory and at "
        "most 1 GiB on CPU; on CUDA what --gpu-memory-utilization leaves.",
    ),
]
KVDType = Annotated[
    str,
    typer.Option(
        help="auto (as --dtype) or fp8: e4m3 without scales, half of bfloat16's bytes; values "
        "beyond 448 saturate."
    ),
]
Length = Annotated[
    int | None,
    typer.Option(
        help="Tokens of the longest sequence. Default: the model's, if the KV cache fits."
    ),
]
Sequences = Annotated[int, typer.Option(help="Most sequences in one step.")]
Tokens = Annotated[
    int | None,
    typer.Option(
        help="Most tokens in one step; longer prompts go in chunks. Default: 2048, on CPU 512."
    ),
]
Blocks = Annotated[int, typer.Option(help="Tokens in a KV block.")]
Caching = Annotated[
    bool,
    typer.Option(
        "--enable-prefix-caching/--no-enable-prefix-caching", help="Reuse KV of common prefixes."
    ),
]


def parse_size(text: str) -> int:
    """Bytes of "512MiB", "4G" or "1000000"."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([KMGT]?)(i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no size; write 512MiB, 4GiB or a number of bytes")
    return int(float(match[1]) * (1 << _UNITS[match[2].upper()]))


def fail(error: object) -> NoReturn:
    """End with a sentence instead of a traceback."""
    say.print(f"[bold red]moeray:[/] {escape(str(error))}")
    raise typer.Exit(1)


def show_size(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def model_spec(kv_cache_memory: str, **fields: Any) -> ModelSpec:
    """Flags as a model and how to run it."""
    memory = parse_size(kv_cache_memory) if kv_cache_memory else None
    # Serving changes into a folder of its own; a relative path would lose its meaning.
    if fields["model"] and Path(fields["model"]).expanduser().exists():
        fields["model"] = str(Path(fields["model"]).expanduser().resolve())
    return convert(ModelSpec, kv_cache_memory=memory, **fields)


def convert(kind: type[T], **fields: Any) -> T:
    """Flags as the configuration they are named after."""
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        name = re.search(r"\$\.(\w+)", str(error))
        flag = f"--{name[1].replace('_', '-')}: " if name else ""
        raise typer.BadParameter(f"{flag}{error}") from error


def show_json(found: object) -> None:
    """For scripts."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(found)).decode() + "\n")


def show_table(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """For people; wide, as a table squeezed into 80 columns cannot be read."""
    table = Table(*rows[0], title=title)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 180).print(table)
