"""The command ``moeray``: flags to a configuration, and what people see at start-up."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn
from rich.table import Table

from workers.architecture import Architecture
from workers.config import ApiKey, Limits, ModelSpec, ServiceConfig

app = typer.Typer(
    help="Serve mixture-of-experts language models on Ray, from a laptop without a GPU upwards.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
say = Console(stderr=True, highlight=False)

API_KEY = "MOERAY_API_KEY"
T = TypeVar("T")
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(text: str) -> int:
    """Bytes of "512MiB", "4G" or "1000000"."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([KMGT]?)(i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no size; write 512MiB, 4GiB or a number of bytes")
    return int(float(match[1]) * (1 << _UNITS[match[2].upper()]))


def fail(error: object) -> NoReturn:
    """End with a sentence instead of a traceback."""
    say.print(f"[bold red]moeray:[/] {error}", markup=True)
    raise typer.Exit(1)


def refuse(**asked: object) -> None:
    """Flags of the contract whose feature is not there yet, by name."""
    for flag, value in asked.items():
        if value:
            fail(f"--{flag.replace('_', '-')} is not available yet")


Model = Annotated[
    str,
    typer.Argument(
        metavar="[MODEL]",
        help="A directory in Hugging Face layout, a hub id, or nothing: the bundled tiny-oss.",
    ),
]
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


def _version(asked: bool) -> None:
    if asked:
        print(f"moeray {version('moeray')}")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    logging.basicConfig(level="WARNING", format="%(levelname)s %(name)s: %(message)s")


@app.command()
def serve(
    model: Model = "",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    served_model_name: Annotated[
        str, typer.Option(help="The model's name in requests. Default: last part of MODEL.")
    ] = "",
    tensor_parallel_size: Annotated[
        int,
        typer.Option("--tensor-parallel-size", "-tp", help="Ranks over which to shard the model."),
    ] = 1,
    data_parallel_size: Annotated[int, typer.Option(help="Not yet above 1.")] = 1,
    enable_expert_parallel: Annotated[
        bool,
        typer.Option(
            "--enable-expert-parallel",
            help="Each rank holds whole experts, instead of a cut through all of them.",
        ),
    ] = False,
    device: Device = "auto",
    dtype: DType = "auto",
    kernels: Kernels = "auto",
    batch_invariant: Invariant = False,
    kv_cache_memory: Memory = "",
    kv_cache_dtype: KVDType = "auto",
    gpu_memory_utilization: Annotated[
        float,
        typer.Option(
            help="Share of a GPU's memory to use: weights, the largest step, and KV cache."
        ),
    ] = 0.9,
    max_model_len: Length = None,
    max_num_seqs: Sequences = 256,
    max_num_batched_tokens: Tokens = None,
    block_size: Blocks = 16,
    enable_prefix_caching: Caching = True,
    seed: Annotated[
        int | None, typer.Option(help="Of requests that bring none. Default: drawn for each.")
    ] = None,
    stream_interval: Annotated[
        int,
        typer.Option(
            min=1,
            help="Send so many tokens of a stream together, the first one and the last ones at "
            "once: less work for ingress and client.",
        ),
    ] = 1,
    address: Annotated[
        str, typer.Option(help="Join the Ray cluster at this address instead of starting one.")
    ] = "",
    replicas: Annotated[int, typer.Option(help="Not yet above 1.")] = 1,
    autoscale: Annotated[str, typer.Option(metavar="MIN:MAX", help="Not yet.")] = "",
    config: Annotated[str, typer.Option(metavar="FILE", help="Not yet.")] = "",
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Only who has a key may ask; may be given several times, or as MOERAY_API_KEY "
            "with commas.",
        ),
    ] = None,
    api_key_file: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="More keys: their names, SHA-256 and limits (docs/api.md); read again when it "
            "changes.",
        ),
    ] = "",
    response_store: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Where responses of /v1/responses are kept, also for the next service. Default: "
            "they go with this one.",
        ),
    ] = "",
    max_concurrent_requests: Annotated[
        int, typer.Option(help="Most requests in progress; more get a 429. 0: any number.")
    ] = 2048,
    max_num_queued_reqs: Annotated[
        int,
        typer.Option(
            help="Most sequences that wait for their first token; more get a 429. 0: any number."
        ),
    ] = 1024,
    max_num_queued_tokens: Annotated[
        int, typer.Option(help="Most prompt tokens of those. 0: any number.")
    ] = 0,
    max_body_size: Annotated[
        str, typer.Option(metavar="BYTES", help="Of a request; a larger one gets a 413.")
    ] = "32MiB",
    request_timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds that a request may take; its header X-Request-Timeout may ask for less. "
            "Default: any time."
        ),
    ] = None,
) -> None:
    """Serve MODEL behind an OpenAI-compatible endpoint, until Ctrl-C or SIGTERM.

    `moeray serve` alone serves the bundled tiny-oss. Then:

    `curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json'
    -d '{"messages": [{"role": "user", "content": "What is 17 + 25?"}]}'`
    """
    refuse(
        data_parallel_size=data_parallel_size != 1,
        replicas=replicas != 1,
        autoscale=autoscale,
        config=config,
    )
    if api_key:
        _hide(api_key)
    spec = _spec(
        model=model,
        served_model_name=served_model_name,
        tensor_parallel_size=tensor_parallel_size,
        enable_expert_parallel=enable_expert_parallel,
        device=device,
        dtype=dtype,
        kernels=kernels,
        batch_invariant=batch_invariant,
        kv_cache_memory=kv_cache_memory,
        kv_cache_dtype=kv_cache_dtype,
        gpu_memory_utilization=gpu_memory_utilization,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        enable_prefix_caching=enable_prefix_caching,
        seed=seed,
    )
    limits = _convert(
        Limits,
        max_concurrent_requests=max_concurrent_requests or None,
        max_num_queued_reqs=max_num_queued_reqs or None,
        max_num_queued_tokens=max_num_queued_tokens or None,
        max_body_size=parse_size(max_body_size),
        request_timeout=request_timeout,
    )
    from cluster import service

    try:
        service.serve(
            ServiceConfig(
                models=(spec,),
                host=host,
                port=port,
                stream_interval=stream_interval,
                address=address or None,
                limits=limits,
                api_keys=_api_keys(),
                api_key_file=_absolute(api_key_file),
                response_store=_absolute(response_store),
            ),
            on_ready=_ready,
        )
    except (ValueError, service.StartupError) as error:
        fail(error)


@app.command()
def generate(
    model: Model = "",
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to ask or continue; may be given several times.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Send the prompt as a user's message, or continue it as it is. Default: chat if "
            "the model has a chat template.",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy. Default: the model's.")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from so many tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same tokens.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end.")] = False,
    device: Device = "auto",
    dtype: DType = "auto",
    kernels: Kernels = "auto",
    batch_invariant: Invariant = False,
    kv_cache_memory: Memory = "",
    kv_cache_dtype: KVDType = "auto",
    max_model_len: Length = None,
    block_size: Blocks = 16,
) -> None:
    """Generate in this process, without Ray: the same engine, for scripts and debugging.

    The answer goes to standard output, everything else to standard error.
    """
    if not prompt:
        raise typer.BadParameter("give --prompt TEXT")
    from cluster.llm import LLM, SamplingParams

    spec = _spec(
        model=model,
        device=device,
        dtype=dtype,
        kernels=kernels,
        batch_invariant=batch_invariant,
        kv_cache_memory=kv_cache_memory,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=max_model_len,
        block_size=block_size,
    )
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        ignore_eos=ignore_eos,
    )
    try:
        with Progress(
            "Loading weights",
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=say,
            transient=True,
        ) as bar:
            task = bar.add_task("", total=None)
            llm = LLM(
                **msgspec.structs.asdict(spec),
                progress=lambda done, of: bar.update(task, completed=done, total=of),
            )
        for note in llm.report.notes:
            say.print(note)
        as_chat = llm.has_chat_template if chat is None else chat
        for text in prompt:
            messages = [{"role": "user", "content": text}]
            for delta in llm.stream(messages if as_chat else text, params):
                if delta.kind == "content":
                    print(delta.text, end="", flush=True)
                elif delta.kind == "call":
                    print(f"{delta.name}{delta.text}", end="", flush=True)
            print()
    except ValueError as error:
        fail(error)


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
    spec = _spec(
        model="",
        kv_cache_memory="",
        device="cuda",
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

    spec = _spec(
        model="",
        kv_cache_memory="",
        device="cuda",
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
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report)).decode() + "\n")
        return
    # Wide: a table squeezed into 80 columns cannot be read.
    console = Console(width=None if sys.stdout.isatty() else 180)
    for title, rows in report.items():
        if rows:
            table = Table(*rows[0], title=title)
            for row in rows:
                table.add_row(*(str(value) for value in row.values()))
            console.print(table)


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
def status(
    url: Annotated[str, typer.Option(help="Of the service.")] = "http://127.0.0.1:8000",
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Show a service's engines, their ranks, processes and nodes.

    Where it needs an API key, put it into MOERAY_API_KEY.
    """
    from cluster import service

    try:
        found = service.status(url, os.environ.get(API_KEY, "").split(",")[0])
    except (OSError, ValueError) as error:
        fail(f"nothing answers at {url}: {error}")
    if as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(found)).decode() + "\n")
        return
    table = Table("engine", "rank", "pid", "node", "device", "weights", "running", "waiting")
    for engine in found["engines"]:
        for rank in engine["ranks"]:
            table.add_row(
                engine["engine"][2],
                str(rank["rank"]),
                str(rank["pid"]),
                rank["node"],
                rank["device"],
                show_size(rank["weight_bytes"]),
                str(engine["load"]["running"]),
                str(engine["load"]["waiting"]),
            )
    Console().print(table)


def show_size(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def _spec(kv_cache_memory: str, **fields: Any) -> ModelSpec:
    memory = parse_size(kv_cache_memory) if kv_cache_memory else None
    # Serving changes into a folder of its own; a relative path would lose its meaning.
    if fields["model"] and Path(fields["model"]).expanduser().exists():
        fields["model"] = str(Path(fields["model"]).expanduser().resolve())
    return _convert(ModelSpec, kv_cache_memory=memory, **fields)


def _absolute(file: str) -> str:
    return str(Path(file).expanduser().resolve()) if file else ""


def _convert(kind: type[T], **fields: Any) -> T:
    """Flags as the configuration they are named after."""
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        name = re.search(r"\$\.(\w+)", str(error))
        flag = f"--{name[1].replace('_', '-')}: " if name else ""
        raise typer.BadParameter(f"{flag}{error}") from error


def _hide(keys: list[str]) -> NoReturn:
    """Start again with API keys in the environment: who may list processes could read them in our
    command line, which Ray also keeps."""
    if any("," in key for key in keys):
        fail("an API key may not hold a comma")
    line, rest = iter(sys.orig_argv[1:]), []
    for word in line:
        if word == "--api-key":
            next(line)
        elif not word.startswith("--api-key="):
            rest.append(word)
    known = [key for key in os.environ.get(API_KEY, "").split(",") if key]
    os.environ[API_KEY] = ",".join(known + keys)
    os.execv(sys.executable, [sys.executable, *rest])


def _api_keys() -> tuple[ApiKey, ...]:
    """Hashes of the keys in the environment, which no process that we start gets to see."""
    from cluster.keys import given

    secrets = [key.strip() for key in os.environ.pop(API_KEY, "").split(",")]
    return tuple(given(secret) for secret in dict.fromkeys(filter(None, secrets)))


def _ready(url: str, engines: list[dict[str, Any]]) -> None:
    """What was loaded, where the memory goes, and the URL."""
    for engine in engines:
        for rank in engine["ranks"]:
            say.print(
                f"rank {rank['rank']}: pid {rank['pid']} on {rank['node']}, {rank['device']}, "
                f"{rank['threads']} threads, weights {show_size(rank['weight_bytes'])} in "
                f"{rank['seconds']:.1f} s"
            )
        for note in engine["ranks"][0]["notes"]:
            say.print(note)
        say.print(
            f"KV cache: {show_size(engine['kv_bytes'])} on each rank, "
            f"{engine['kv_blocks']:,} blocks; one sequence alone could have "
            f"{engine['kv_tokens']:,} tokens; sequences of {engine['max_model_len']:,} tokens at "
            f"once: {engine['concurrency']:.1f}"
        )
        if engine["reduced"]:
            say.print(
                f"The model length is {engine['max_model_len']:,}, less than the model's own: give "
                "more --kv-cache-memory for longer sequences"
            )
    print(f"moeray is ready at {url}", flush=True)
