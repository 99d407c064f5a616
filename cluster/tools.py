"""Commands that need neither Ray nor a GPU: kernels ahead of time, and where experts should lie."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from cluster.options import (
    Blocks,
    DType,
    Invariant,
    KVDType,
    Length,
    Sequences,
    Tokens,
    fail,
    model_spec,
    parse_size,
    say,
    show_json,
    show_table,
)
from parallelism.placement import (
    ExpertLoad,
    File,
    Placement,
    PlacementError,
    contiguous,
    imbalance,
    parse,
    place,
)
from workers.architecture import Architecture
from workers.config import ModelSpec

app = typer.Typer(rich_markup_mode="markdown")

Architectures = Annotated[
    str, typer.Option("--arch", metavar="LIST", help="GPU architectures, with commas between them.")
]
Configured = Annotated[
    str,
    typer.Option(
        metavar="MODEL", help="A directory, a hub id, a config.json, or nothing: tiny-oss."
    ),
]
Ranks = Annotated[
    int, typer.Option("--tensor-parallel-size", "-tp", help="Ranks that share the model.")
]
WholeExperts = Annotated[
    bool, typer.Option("--enable-expert-parallel", help="Each rank holds whole experts.")
]


@app.command("compile")
def compile_kernels(
    arch: Architectures = "sm_90,sm_100,sm_103",
    model: Configured = "",
    output: Annotated[
        str, typer.Option(metavar="DIR", help="Default: TRITON_CACHE_DIR, or Triton's own.")
    ] = "",
    tensor_parallel_size: Ranks = 1,
    enable_expert_parallel: WholeExperts = False,
    dtype: DType = "auto",
    kv_cache_dtype: KVDType = "auto",
    batch_invariant: Invariant = False,
    max_model_len: Length = None,
    max_num_seqs: Sequences = 256,
    max_num_batched_tokens: Tokens = None,
    block_size: Blocks = 16,
) -> None:
    """Compile the kernels that a model needs, without a GPU, so that serving compiles nothing.

    Give the flags that `moeray serve` will get, and serve with `TRITON_CACHE_DIR=DIR`.
    """
    spec = _bare_spec(
        tensor_parallel_size=tensor_parallel_size,
        enable_expert_parallel=enable_expert_parallel,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        batch_invariant=batch_invariant,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
    )
    from workers import dryrun

    try:
        architecture = dryrun.configuration(model)
    except ValueError as error:
        fail(error)
    for number, variants, directory in _compiled(arch, architecture, spec, output):
        say.print(f"sm_{number}: {len(variants)} kernels in {directory}")


@app.command()
def kernels(
    arch: Architectures = "sm_90,sm_100",
    model: Annotated[
        str,
        typer.Option(help="A directory, a hub id or a config.json. Default: gpt-oss-120b's shape."),
    ] = "",
    tensor_parallel_size: Ranks = 1,
    enable_expert_parallel: WholeExperts = False,
    kv_cache_dtype: KVDType = "auto",
    batch_invariant: Invariant = False,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Show what the kernels' machine code is made of, without a GPU."""
    import tempfile

    spec = _bare_spec(
        tensor_parallel_size=tensor_parallel_size,
        enable_expert_parallel=enable_expert_parallel,
        kv_cache_dtype=kv_cache_dtype,
        batch_invariant=batch_invariant,
    )
    from kernels import aot, traffic
    from workers import dryrun

    report: dict[str, list[dict[str, str | int]]] = {"code": [], "decode": []}
    try:
        architecture = dryrun.configuration(model) if model else dryrun.GPT_OSS_120B
        with tempfile.TemporaryDirectory() as scratch:
            for number, variants, _ in _compiled(arch, architecture, spec, scratch):
                report["code"] += [aot.row(variant, Path(scratch)) for variant in variants]
                if number not in traffic.GPUS:
                    continue
                for batch in (1, 64, 256):
                    for name, (launches, work) in dryrun.decode(
                        architecture, spec, number, batch, 1500
                    ).items():
                        report["decode"].append(
                            {
                                "kernel": name,
                                "GPU": traffic.GPUS[number][0],
                                "batch": batch,
                                "launches": launches,
                                "MB": f"{work.moved / 1e6:.1f}",
                                "least MB": f"{work.minimum / 1e6:.1f}",
                                "GF": f"{work.flops / 1e9:.1f}",
                                "roofline us": f"{1e6 * work.seconds(number):.0f}",
                            }
                        )
    except ValueError as error:
        fail(error)
    if as_json:
        show_json(report)
        return
    for title, rows in report.items():
        if rows:
            show_table(title, rows)


def _compiled(
    archs: str, architecture: Architecture, spec: ModelSpec, output: str
) -> Iterator[tuple[int, list[Any], Path]]:
    """(architecture, its kernels, where they are) of each; ends with a sentence where it cannot."""
    try:
        numbers = [int(each.strip().removeprefix("sm_")) for each in archs.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--arch {archs!r}: write sm_90,sm_100") from None
    from kernels import configurations

    try:
        for number in numbers:
            configurations.family(number or -1)
        from kernels import aot
        from workers import dryrun

        directory = Path(output).expanduser() if output else aot.triton_directory()
        for number in numbers:
            launches = dryrun.launches(architecture, spec, number)
            yield number, aot.compile(launches, number, directory), directory
    except (ValueError, OSError) as error:
        fail(error)


@app.command()
def experts(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Of --expert-load; several are added.")
    ],
    ranks: Annotated[int, typer.Option(help="Ranks that share the experts.")],
    redundant: Annotated[
        int, typer.Option(help="Experts that each rank may hold beyond its share, in every layer.")
    ] = 1,
    ranks_per_node: Annotated[
        int, typer.Option(help="Copies of an expert stay on its node. Default: one node.")
    ] = 0,
    memory: Annotated[
        str,
        typer.Option(
            metavar="BYTES",
            help="For the experts of each rank; a placement with --redundant that needs more, in "
            "the form they were recorded in, is refused.",
        ),
    ] = "",
    placement: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Show this placement, too.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the placement with --redundant.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Show what a placement of experts would gain, from their recorded load.

    Imbalance is what the busiest rank of a layer has to do over the mean, averaged over layers.
    """
    try:
        loads = [_parsed(ExpertLoad, file) for file in files]
        load = reduce(ExpertLoad.plus, loads)
        if not any(map(any, load.calls)):
            raise PlacementError("no tokens have been recorded yet")
        found = {"contiguous": contiguous(load, ranks, ranks_per_node)}
        if placement is not None:
            known = found[str(placement)] = _parsed(Placement, placement)
            known.check(load.config, len(load.calls), load.experts, ranks)
        share = found["contiguous"].slots
        for extra in dict.fromkeys((0, redundant, 2 * redundant)):
            if extra <= max(redundant, load.experts - share):
                found[f"balanced, {extra} redundant"] = place(load, ranks, extra, ranks_per_node)
        chosen = found[f"balanced, {redundant} redundant"]
        if memory:
            chosen.fit(load.expert_bytes, parse_size(memory))
        if output is not None:
            output.write_bytes(msgspec.json.encode(chosen))
            say.print(f"{output}: the placement with {redundant} redundant experts on each rank")
    except (OSError, PlacementError) as error:
        fail(error)
    per_node = ranks_per_node or ranks
    rows: list[dict[str, Any]] = [
        {
            "placement": name,
            "imbalance": round(imbalance(each.loads(load)), 4),
            "worst layer": round(max(imbalance([of]) for of in each.loads(load)), 4),
            "between nodes": round(imbalance(each.loads(load, per_node)), 4),
            "expert bytes": each.bytes(load.expert_bytes),
        }
        for name, each in found.items()
    ]
    if as_json:
        show_json(rows)
        return
    for row in rows:
        row["expert bytes"] = f"{row['expert bytes']:,}"
        if per_node == ranks:
            del row["between nodes"]
    show_table(f"{load.model} on {ranks} ranks", rows)


def _parsed(kind: type[File], file: Path) -> File:
    """Raises OSError, PlacementError."""
    try:
        return parse(kind, file.read_bytes())
    except PlacementError as error:
        raise PlacementError(f"{file}: {error}") from error


def _bare_spec(**flags: Any) -> ModelSpec:
    """How a model would run on GPUs; its weights are not needed."""
    return model_spec(model="", kv_cache_memory="", device="cuda", **flags)
