"""A load generator for OpenAI-compatible servers, lean enough to share two cores with one.

It speaks HTTP/1.1 over asyncio streams: a full client costs as much CPU per chunk as the server.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np


@dataclass
class Stream:
    """Timings of one streamed completion, in seconds on the monotonic clock."""

    sent: float
    chunks: list[float] = field(default_factory=list)  # arrival of every chunk with text or tokens
    tokens: int = 0

    @property
    def ttft(self) -> float:
        return self.chunks[0] - self.sent


@dataclass
class Load:
    """What one run at one concurrency gave."""

    streams: list[Stream]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return sum(stream.tokens for stream in self.streams) / self.seconds

    @property
    def num_chunks(self) -> int:
        return sum(len(stream.chunks) for stream in self.streams)

    def ttft_ms(self, percentile: float) -> float:
        return 1e3 * float(np.percentile([stream.ttft for stream in self.streams], percentile))

    def itl_ms(self, percentile: float, after: float = 0.0, before: float = np.inf) -> float:
        """Time between chunks of one stream, of those that arrived in [after, before)."""
        gaps = [
            later - earlier
            for stream in self.streams
            for earlier, later in zip(stream.chunks, stream.chunks[1:], strict=False)
            if after <= later < before
        ]
        return 1e3 * float(np.percentile(gaps, percentile))


def prompt(length: int, vocab_size: int, seed: int) -> list[int]:
    """Random token ids; one seed, one prompt, so that every server sees the same ones."""
    draw = random.Random(seed)
    return [draw.randrange(vocab_size) for _ in range(length)]


async def stream(
    url: str, model: str, ids: list[int], max_tokens: int, deadline: float = 600
) -> Stream:
    """One streamed completion of exactly ``max_tokens`` tokens.

    Raises RuntimeError when the server refuses, ends early or counts another number of tokens.
    """
    parts = urlsplit(url)
    body = json.dumps(
        {
            "model": model,
            "prompt": ids,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,  # a model without a tokenizer has no text to send
        }
    ).encode()
    async with asyncio.timeout(deadline):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
        try:
            result = Stream(time.monotonic())
            writer.write(
                b"POST %b/v1/completions HTTP/1.1\r\nHost: %b\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\nConnection: close\r\n\r\n%b"
                % (parts.path.encode(), parts.netloc.encode(), len(body), body)
            )
            status = await reader.readline()
            if b" 200 " not in status:
                raise RuntimeError(f"{status!r}: {(await reader.read())[-500:]!r}")
            async for line in _lines(reader):
                if line == b"data: [DONE]":
                    break
                if not line.startswith(b"data: {"):
                    continue  # blank, or a keep-alive comment
                event = json.loads(line[6:])
                if event.get("usage"):
                    result.tokens = event["usage"]["completion_tokens"]
                if event.get("choices"):
                    result.chunks.append(time.monotonic())
                elif "error" in event:
                    raise RuntimeError(event["error"]["message"])
        finally:
            writer.close()
    if result.tokens != max_tokens:
        raise RuntimeError(f"asked for {max_tokens} tokens, got {result.tokens}")
    return result


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The lines of a body in HTTP/1.1's chunked coding, whose chunks may end anywhere."""
    while await reader.readline() != b"\r\n":
        pass  # headers
    rest = b""
    while size := int(await reader.readline() or b"0", 16):
        *lines, rest = (rest + (await reader.readexactly(size + 2))[:-2]).split(b"\n")
        for line in lines:
            yield line
    raise RuntimeError("the stream ended without data: [DONE]")


async def closed_loop(
    url: str,
    model: str,
    vocab_size: int,
    concurrency: int,
    requests: int,
    prompt_tokens: int = 128,
    output_tokens: int = 128,
    seed: int = 0,
) -> Load:
    """``concurrency`` clients, each sending its next request when the last one has ended."""
    todo = iter(range(requests))
    streams: list[Stream] = []

    async def client() -> None:
        for number in todo:
            ids = prompt(prompt_tokens, vocab_size, seed + number)
            streams.append(await stream(url, model, ids, output_tokens))

    start = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return Load(streams, time.monotonic() - start)


async def long_prompt_arrives(
    url: str, model: str, vocab_size: int, streams: int = 8, long: int = 8192, output: int = 256
) -> tuple[float, float, float]:
    """p99 inter-token latency of running streams before and while a long prompt is computed.

    Returns (p99 before in ms, p99 during in ms, time to the long prompt's first token in s).
    """
    start = time.monotonic()
    async with asyncio.TaskGroup() as group:
        running = [
            group.create_task(stream(url, model, prompt(128, vocab_size, 900 + i), output))
            for i in range(streams)
        ]
        probe = await stream(url, model, prompt(128, vocab_size, 990), 32)  # all are under way
        intruder = group.create_task(stream(url, model, prompt(long, vocab_size, 999), 1))
        arrived = time.monotonic()
        ttft = (await intruder).ttft
    load = Load([task.result() for task in running], time.monotonic() - start)
    return (
        load.itl_ms(99, after=probe.chunks[0], before=arrived),
        load.itl_ms(99, after=arrived, before=arrived + ttft),
        ttft,
    )
