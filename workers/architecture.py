"""What a checkpoint's ``config.json`` says, in one vocabulary for every model family. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Any

import msgspec

from parallelism.layout import Layout, check
from workers.config import KVGroup, ModelSpec

MXFP4_BLOCK = 32  # values with one scale: what lies between cuts of an expert


class UnsupportedModel(ValueError):
    """The checkpoint is of a kind moeray does not serve; the message says which part."""


class Yarn(msgspec.Struct, frozen=True):
    """YaRN context extension, https://arxiv.org/abs/2309.00071."""

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


class Llama3(msgspec.Struct, frozen=True):
    """Llama 3.1's context extension, arXiv:2407.21783: see ``workers.model``."""

    factor: float
    original_max_position: int
    low: float  # turns within the original context
    high: float


class Architecture(msgspec.Struct, frozen=True, kw_only=True):
    """A decoder with paged attention and a mixture of experts in every layer."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # of one expert
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    windows: tuple[int, ...]  # per layer; 0: full attention
    max_position: int
    rope_theta: float
    rope_scaling: Yarn | Llama3 | None
    rms_norm_eps: float = 1e-5
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702
    tie_word_embeddings: bool = False
    mxfp4: bool = False  # experts are stored as *_blocks and *_scales
    eos_token_ids: tuple[int, ...] = ()

    def kv_groups(self, block_size: int, tp: int, kv_dtype_bytes: int) -> tuple[KVGroup, ...]:
        """KV groups with the bytes of one block on one of ``tp`` ranks.

        Raises UnsupportedModel where groups would need blocks of different sizes.
        """
        per_layer = (
            2 * block_size * max(1, self.num_kv_heads // tp) * self.head_dim * kv_dtype_bytes
        )
        by_window: dict[int, list[int]] = {}
        for layer, window in enumerate(self.windows):
            by_window.setdefault(window, []).append(layer)
        groups = tuple(
            KVGroup("window" if window else "full", tuple(layers), per_layer * len(layers), window)
            for window, layers in sorted(by_window.items())
        )
        if len({group.block_bytes for group in groups}) > 1:
            counts = ", ".join(f"{group.name}: {len(group.layers)} layers" for group in groups)
            raise UnsupportedModel(
                f"KV groups must have equally many layers to share one block pool ({counts})"
            )
        return groups


def _require(config: Mapping[str, Any], key: str, kind: type | UnionType) -> Any:
    value = config.get(key)
    if not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool):
        name = kind.__name__ if isinstance(kind, type) else str(kind)
        raise UnsupportedModel(f"config.json: {key!r} must be {name}, got {value!r}")
    return value


def _rope(config: Mapping[str, Any]) -> tuple[float, Yarn | Llama3 | None]:
    """Both spellings: hub files keep ``rope_scaling`` beside ``rope_theta``; transformers 5 saves
    one ``rope_parameters`` that holds both. Reading only one of them loses YaRN silently."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = scaling.get("rope_theta", config.get("rope_theta"))
    if not isinstance(theta, int | float):
        raise UnsupportedModel(f"config.json: no rope_theta (got {theta!r})")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return float(theta), None
    if kind not in ("yarn", "llama3"):
        raise UnsupportedModel(
            f"config.json: rope type {kind!r} is not supported (yarn, llama3 or default)"
        )
    factor = float(_require(scaling, "factor", int | float))
    original = int(
        scaling.get("original_max_position_embeddings", config.get("initial_context_length", 4096))
    )
    if kind == "llama3":
        low, high = (float(scaling.get(f"{which}_freq_factor", 1.0)) for which in ("low", "high"))
        return float(theta), Llama3(factor, original, low, high)
    return float(theta), Yarn(
        factor,
        original,
        beta_fast=float(scaling.get("beta_fast", 32.0)),
        beta_slow=float(scaling.get("beta_slow", 1.0)),
        truncate=bool(scaling.get("truncate", True)),
    )


def parse(config: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> Architecture:
    """Architecture of a ``config.json`` and, where there is one, ``generation_config.json``.

    Raises UnsupportedModel with the field that is missing or not supported.
    """
    if config.get("model_type") != "gpt_oss":
        raise UnsupportedModel(
            f"model_type {config.get('model_type')!r} is not supported; moeray serves: gpt_oss"
        )
    layers = _require(config, "num_hidden_layers", int)
    window = _require(config, "sliding_window", int)
    kinds = config.get("layer_types") or [
        "full_attention" if i % 2 else "sliding_attention" for i in range(layers)
    ]
    if len(kinds) != layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(f"config.json: layer_types {kinds!r} do not fit {layers} layers")
    heads, kv_heads = (
        _require(config, "num_attention_heads", int),
        _require(config, "num_key_value_heads", int),
    )
    if heads % kv_heads:
        raise UnsupportedModel(f"config.json: {heads} heads are no multiple of {kv_heads} KV heads")
    quantization = config.get("quantization_config") or {}
    if quantization and quantization.get("quant_method") != "mxfp4":
        raise UnsupportedModel(
            f"quant_method {quantization.get('quant_method')!r} is not supported (mxfp4 or none)"
        )
    theta, scaling = _rope(config)
    eos = (generation or {}).get("eos_token_id", config.get("eos_token_id"))
    vocab = _require(config, "vocab_size", int)
    eos_ids = tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,)
    return Architecture(
        vocab_size=vocab,
        hidden_size=_require(config, "hidden_size", int),
        intermediate_size=_require(config, "intermediate_size", int),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_require(config, "head_dim", int),
        num_experts=_require(
            config, "num_local_experts" if "num_local_experts" in config else "num_experts", int
        ),
        experts_per_token=_require(
            config,
            "num_experts_per_tok" if "num_experts_per_tok" in config else "experts_per_token",
            int,
        ),
        windows=tuple(window if kind == "sliding_attention" else 0 for kind in kinds),
        max_position=_require(config, "max_position_embeddings", int),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-5)),
        swiglu_limit=float(config.get("swiglu_limit", 7.0)),
        swiglu_alpha=float(config.get("swiglu_alpha", 1.702)),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        mxfp4=bool(quantization),
        # Ids outside the vocabulary (transformers' defaults in tiny checkpoints) never occur.
        eos_token_ids=tuple(int(i) for i in eos_ids if 0 <= int(i) < vocab),
    )


def layout(arch: Architecture, spec: ModelSpec, rank: int = 0, engine: int = 0) -> Layout:
    """Of one rank of an engine. Raises LayoutError where the model cannot be cut so."""
    layout = Layout(
        spec.tensor_parallel_size,
        spec.enable_expert_parallel,
        rank,
        spec.data_parallel_size,
        engine,
    )
    check(
        layout,
        heads=arch.num_heads,
        kv_heads=arch.num_kv_heads,
        experts=arch.num_experts,
        intermediate=arch.intermediate_size,
        unit=MXFP4_BLOCK if arch.mxfp4 else 1,
        vocabulary=arch.vocab_size,
    )
    return layout
