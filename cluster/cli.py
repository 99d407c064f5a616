"""The command ``moeray``: flags to a configuration, and what people see at start-up."""

from __future__ import annotations

import logging
import os
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn
from rich.table import Table

from cluster import tools
from cluster.options import (
    Blocks,
    Caching,
    Device,
    DType,
    Invariant,
    Kernels,
    KVDType,
    Length,
    Memory,
    Sequences,
    Tokens,
    convert,
    fail,
    model_spec,
    parse_size,
    say,
    show_json,
    show_size,
)
from workers.config import ApiKey, Limits, ServiceConfig
from workers.hub import ABILITIES

app = typer.Typer(
    help="Serve mixture-of-experts language models on Ray, from a laptop without a GPU upwards.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.add_typer(tools.app)

API_KEY = "MOERAY_API_KEY"


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
    data_parallel_size: Annotated[
        int,
        typer.Option(
            help="Engines of so many ranks each, which share the experts: needs "
            "--enable-expert-parallel."
        ),
    ] = 1,
    enable_expert_parallel: Annotated[
        bool,
        typer.Option(
            "--enable-expert-parallel",
            help="Each rank holds whole experts, instead of a cut through all of them.",
        ),
    ] = False,
    expert_placement: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Which rank holds which experts, and copies of them: a file of `moeray experts "
            "--output`. Needs --enable-expert-parallel. Default: each a range of them.",
        ),
    ] = "",
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
    api_key_file: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Only who has a key may ask. The file has their names, SHA-256 and limits "
            "(docs/api.md); it is read again when it changes. MOERAY_API_KEY may hold more, with "
            "commas.",
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
    expert_load: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Count the tokens of every expert into FILE, for `moeray experts`; what it holds "
            "is added to. Written every minute and at the end, on the node of rank 0. Engine 1 of "
            "--data-parallel-size has FILE with .1 before its ending, and so on.",
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
        replicas=replicas != 1,
        autoscale=autoscale,
        config=config,
    )
    spec = model_spec(
        model=model,
        served_model_name=served_model_name,
        tensor_parallel_size=tensor_parallel_size,
        data_parallel_size=data_parallel_size,
        enable_expert_parallel=enable_expert_parallel,
        expert_placement=_absolute(expert_placement),
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
    limits = convert(
        Limits,
        max_concurrent_requests=max_concurrent_requests or None,
        max_num_queued_reqs=max_num_queued_reqs or None,
        max_num_queued_tokens=max_num_queued_tokens or None,
        max_body_size=parse_size(max_body_size),
        request_timeout=request_timeout,
    )
    from cluster import service

    bar = _loading_bar()
    task = bar.add_task("", total=None)

    def loading(done: int, size: int) -> None:
        if 0 < done < size:
            bar.start()
            bar.update(task, completed=done, total=size)

    def ready(url: str, engines: list[dict[str, Any]]) -> None:
        bar.stop()
        _ready(not model, url, engines)

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
                expert_load=_absolute(expert_load),
            ),
            on_ready=ready,
            on_loading=loading,
        )
    except (ValueError, service.StartupError) as error:
        fail(error)
    finally:
        bar.stop()


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

    spec = model_spec(
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
        with _loading_bar() as bar:
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
        show_json(found)
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


def _absolute(file: str) -> str:
    return str(Path(file).expanduser().resolve()) if file else ""


def _api_keys() -> tuple[ApiKey, ...]:
    """Hashes of the keys in the environment, which no process that we start gets to see."""
    from cluster.keys import given

    secrets = [key.strip() for key in os.environ.pop(API_KEY, "").split(",")]
    return tuple(given(secret) for secret in dict.fromkeys(filter(None, secrets)))


def _loading_bar() -> Progress:
    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn()
    return Progress("Loading weights", *columns, console=say, transient=True)


def _ready(bundled: bool, url: str, engines: list[dict[str, Any]]) -> None:
    """What was loaded, where the memory goes, what the bundled model can answer, and the URL."""
    lines: list[str] = []
    for number, engine in enumerate(engines):
        of = f"engine {number}, " if len(engines) > 1 else ""
        for rank in engine["ranks"]:
            say.print(
                f"{of}rank {rank['rank']}: pid {rank['pid']} on {rank['node']}, {rank['device']}, "
                f"{rank['threads']} threads, weights {show_size(rank['weight_bytes'])} in "
                f"{rank['seconds']:.1f} s"
            )
        lines += engine["ranks"][0]["notes"]
        lines.append(
            f"KV cache: {show_size(engine['kv_bytes'])} on each rank, "
            f"{engine['kv_blocks']:,} blocks; one sequence alone could have "
            f"{engine['kv_tokens']:,} tokens; sequences of {engine['max_model_len']:,} tokens at "
            f"once: {engine['concurrency']:.1f}"
        )
        if engine["reduced"]:
            lines.append(
                f"The model length is {engine['max_model_len']:,}, less than the model's own: give "
                "more --kv-cache-memory for longer sequences"
            )
    for line in dict.fromkeys(lines):  # engines of one kind say the same
        say.print(line)
    if bundled:
        say.print(f'The model says: "{ABILITIES}"')
    print(f"moeray is ready at {url}", flush=True)
