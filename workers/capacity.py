"""How much memory goes where. Pure: what start-up prints is what the caches allocate."""

from __future__ import annotations

import msgspec

from workers.architecture import Architecture
from workers.blocks import BlockPool
from workers.config import KVConfig, ModelSpec, SchedulerConfig

GIB = 1 << 30


class TooLittleMemory(ValueError):
    """The KV cache does not hold what was asked for; the message has the numbers."""


class Capacity(msgspec.Struct, frozen=True):
    """The KV pool of one engine and what fits into it."""

    kv: KVConfig
    scheduler: SchedulerConfig
    bytes_per_rank: int
    tokens: int  # of one sequence alone, were it unbounded
    concurrency: float  # sequences of the full model length that fit at once
    reduced: bool  # the model length is less than the model's own, because the pool is small


def default_kv_bytes(free: int, spec: ModelSpec, cuda: bool) -> int:
    """KV bytes of a rank that may take ``free`` at most."""
    if spec.kv_cache_memory is not None:
        return spec.kv_cache_memory
    return free if cuda else min(GIB, free // 4)


def device_room(total: int, free: int, activations: int, utilization: float) -> int:
    """KV bytes on a GPU of ``total`` bytes that has ``free`` ones beside the weights.

    ``utilization`` is the share of the whole GPU that may be used at all. The largest step takes
    ``activations`` bytes, and captured graphs keep at most as much again for themselves.
    """
    return max(0, int(total * utilization) - (total - free) - 2 * activations)


def default_batched_tokens(spec: ModelSpec, cuda: bool) -> int:
    """The token budget of a step: as much as hides the reading of the weights, and no more, since
    every sequence that decodes waits for the whole step."""
    return spec.max_num_batched_tokens or max(2048 if cuda else 512, spec.max_num_seqs)


def capacity(
    architecture: Architecture,
    spec: ModelSpec,
    kv_bytes: int,
    kv_dtype_bytes: int,
    batched_tokens: int,
) -> Capacity:
    """The pool that ``kv_bytes`` per rank give, and the longest sequence served from it.

    Raises TooLittleMemory where --max-model-len was given and does not fit, or nothing does.
    """
    groups = architecture.kv_groups(spec.block_size, spec.tensor_parallel_size, kv_dtype_bytes)
    num_blocks = kv_bytes // groups[0].block_bytes - 1  # one more is allocated, for padding
    kv = KVConfig(groups, num_blocks, spec.block_size, spec.enable_prefix_caching)
    if num_blocks < 1:
        raise TooLittleMemory(
            f"--kv-cache-memory of {kv_bytes:,} bytes is too little; a block takes "
            f"{groups[0].block_bytes:,} bytes, and one of them is for padding"
        )
    pool = BlockPool(kv)
    asked = spec.max_model_len or architecture.max_position
    if asked > architecture.max_position:
        raise TooLittleMemory(
            f"--max-model-len {asked} is more than the model's {architecture.max_position} "
            "positions"
        )
    tokens = _longest(pool, architecture.max_position)
    length = min(asked, tokens + 1)  # the last token is sampled, never computed
    if length < asked and spec.max_model_len is not None:
        needed = pool.blocks_needed(asked - 1)
        raise TooLittleMemory(
            f"--max-model-len {asked} needs {needed} KV blocks of {groups[0].block_bytes:,} bytes, "
            f"{kv_bytes:,} bytes per rank hold {num_blocks}: give --kv-cache-memory "
            f"{(needed + 1) * groups[0].block_bytes} or at most --max-model-len {length}"
        )
    if length < 2:
        raise TooLittleMemory(
            f"{num_blocks} KV blocks hold no sequence; give more --kv-cache-memory"
        )
    scheduler = SchedulerConfig(
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=batched_tokens,
        max_model_len=length,
        eos_token_ids=architecture.eos_token_ids,
    )
    return Capacity(
        kv=kv,
        scheduler=scheduler,
        bytes_per_rank=(num_blocks + 1) * groups[0].block_bytes,
        tokens=tokens,
        concurrency=num_blocks / pool.blocks_needed(length - 1),
        reduced=length < architecture.max_position and spec.max_model_len is None,
    )


def _longest(pool: BlockPool, limit: int) -> int:
    """Most tokens, up to ``limit``, whose KV fits into the pool; need never falls with length."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if pool.blocks_needed(middle) <= pool.num_blocks:
            low = middle
        else:
            high = middle - 1
    return low
