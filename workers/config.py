"""Configuration values. A run is one frozen tree; what is measured is never written back into it.

Pure: nothing here touches a device, a file or a clock.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Device = Literal["auto", "cuda", "cpu"]
Kernels = Literal["auto", "reference", "cpu", "triton"]
DType = Literal["auto", "float32", "bfloat16"]
KVDType = Literal["auto", "fp8"]
Count = Annotated[int, msgspec.Meta(ge=1)]


class KVGroup(msgspec.Struct, frozen=True):
    """Layers whose KV lives and dies together.

    ``full`` keeps every token, ``window`` n the last n (the current one included), ``chunk`` n
    those since the last multiple of n.
    """

    kind: Literal["full", "window", "chunk"]
    layers: tuple[int, ...]
    block_bytes: int  # of one block on one rank, over all the group's layers, keys and values
    size: int = 0  # n; 0 for full

    @property
    def name(self) -> str:
        return self.kind if self.kind == "full" else f"{self.kind}:{self.size}"


class KVConfig(msgspec.Struct, frozen=True):
    """The block pool of one engine. All groups have equal ``block_bytes`` and share the pool."""

    groups: tuple[KVGroup, ...]
    num_blocks: int
    block_size: int = 16  # tokens
    prefix_caching: bool = True


class SchedulerConfig(msgspec.Struct, frozen=True):
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model to serve and how. Field names follow the command line's flags."""

    model: str = ""  # directory, hub id, or empty: the bundled tiny-oss
    served_model_name: str = ""  # empty: the directory's or the hub id's last part
    revision: str = "main"
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False
    expert_placement: str = ""  # file of ``moeray experts --output``; empty: experts in their order
    device: Device = "auto"
    dtype: DType = "auto"
    kernels: Kernels = "auto"
    batch_invariant: bool = False
    kv_cache_dtype: KVDType = "auto"  # auto: as dtype; fp8: e4m3
    kv_cache_memory: int | None = None  # bytes per rank; None: computed
    gpu_memory_utilization: float = 0.9
    block_size: int = 16
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None  # None: 2,048 on CUDA, 512 on CPU
    enable_prefix_caching: bool = True
    seed: int | None = None  # of requests that bring none; None: drawn for each


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one ingress takes; None: any number. Field names follow the command line's flags."""

    max_concurrent_requests: Count | None = 2048
    max_num_queued_reqs: Count | None = 1024  # sequences without their first token
    max_num_queued_tokens: Count | None = None  # prompt tokens of those
    max_body_size: Count = 32 << 20  # bytes
    request_timeout: Annotated[float, msgspec.Meta(gt=0)] | None = None  # seconds


class ApiKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who may ask; the key itself is known by its hash alone."""

    name: Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9._-]{1,64}$")]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    max_concurrent_requests: Count | None = None
    requests_per_minute: Count | None = None


class ServiceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A service: models behind one HTTP endpoint."""

    models: tuple[ModelSpec, ...]
    name: str = "moeray"
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 1
    stream_interval: int = 1  # tokens that are sent together, but the first and the last at once
    address: str | None = None  # of a running Ray cluster; None: start one here
    limits: Limits = Limits()
    api_keys: tuple[ApiKey, ...] = ()
    api_key_file: str = ""  # more of them; empty: none
    response_store: str = ""  # file of kept responses; empty: one that goes with the service
    expert_load: str = ""  # file of tokens by layer and expert; empty: none
