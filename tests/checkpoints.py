"""Tiny random gpt-oss checkpoints, saved by transformers, and the bf16 -> MXFP4 quantiser for them.

transformers initialises linear biases to 0 and norms to 1, which would hide faults: everything is
random here. Activations exceed the SwiGLU limit, and prompts can exceed the window.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM, Mxfp4Config

ROPE = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
TINY: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,  # three MXFP4 blocks: uneven over two ranks
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
    "sliding_window": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # larger ones amplify rounding beyond any tolerance
    "rope_parameters": ROPE,
    "eos_token_id": 255,
    "pad_token_id": 254,
    "tie_word_embeddings": False,
}


def tiny_gpt_oss(
    path: Path,
    mxfp4: bool = False,
    shards: int = 1,
    seed: int = 0,
    hub_rope: bool = False,
    **overrides: Any,
) -> Path:
    """Write a random checkpoint in Hugging Face layout into ``path``; returns ``path``.

    Tensors are stored in bf16, the experts in MXFP4 where asked. ``shards`` > 1 gives that many
    safetensors files and an index; their names say one less than there are, as the hub's do.
    ``hub_rope`` spells the rope configuration as hub files do. ``overrides`` are config fields.
    """
    path.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = GptOssForCausalLM(GptOssConfig(**(TINY | overrides)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "sinks")):
                parameter.normal_(0, 0.5)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.to(torch.bfloat16).save_pretrained(path, max_shard_size="100GB")
    config = json.loads((path / "config.json").read_text())
    if hub_rope:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope
    if mxfp4:
        config["quantization_config"] = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["self_attn", "router", "embed_tokens", "lm_head"],
        }
    (path / "config.json").write_text(json.dumps(config, indent=2))
    if mxfp4 or shards > 1:
        whole = path / "model.safetensors"
        tensors = load_file(whole)
        whole.unlink()
        write_tensors(path, with_mxfp4_experts(tensors) if mxfp4 else tensors, shards)
    return path


def write_tensors(path: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """One ``model.safetensors``, or ``shards`` files with tensors dealt in turn and an index."""
    if shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return
    names = [f"model-{i:05}-of-{shards - 1:05}.safetensors" for i in range(shards)]
    where = {tensor: names[i % shards] for i, tensor in enumerate(sorted(tensors))}
    for file in names:
        part = {tensor: tensors[tensor] for tensor, home in where.items() if home == file}
        save_file(part, path / file, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def with_mxfp4_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with every expert matrix [E, in, out] as ``_blocks`` and ``_scales``."""
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales = quantize_mxfp4(tensor.transpose(1, 2))
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            packed[name] = tensor
    return packed


def quantize_mxfp4(w: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks u8 [..., out, in/32, 16] and scales u8 [..., out, in/32] of ``w`` [..., out, in].

    Scales are powers of two rounded up from max|w| / 6 (the value 6 is never exceeded); elements
    are rounded to the nearest e2m1 value, ties to the even code; element 2b is the low nibble of
    byte b. Format: OCP Microscaling specification 1.0.
    """
    groups = w.float().unflatten(-1, (-1, 32))
    d = groups.abs().amax(-1) / 6
    exponent = ((d.view(torch.int32) + 0x007FFFFF) & 0x7F800000) >> 23
    scaled = groups / torch.where(d > 0, torch.exp2(exponent.float() - 127), 1.0)[..., None]
    magnitude = scaled.abs()
    code = torch.zeros_like(magnitude, dtype=torch.uint8)
    # Boundaries between neighbouring values; a tie goes to the even code.
    for i, boundary in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):
        code += (magnitude > boundary if i % 2 == 0 else magnitude >= boundary).to(torch.uint8)
    code |= torch.signbit(scaled).to(torch.uint8) << 3
    packed = code[..., 0::2] | code[..., 1::2] << 4
    return packed.contiguous(), exponent.to(torch.uint8).contiguous()


def oracle(path: Path, dtype: torch.dtype = torch.float32) -> GptOssForCausalLM:
    """transformers' model of the checkpoint, eager everywhere: what our numbers are compared to."""
    quantized = "quantization_config" in json.loads((path / "config.json").read_text())
    model = GptOssForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="eager",
        **({"quantization_config": Mxfp4Config(dequantize=True)} if quantized else {}),
    )
    return model.eval()


def gpt_oss_config(name: str) -> dict[str, Any]:
    """The published ``config.json`` of gpt-oss-20b or gpt-oss-120b."""
    layers, experts = {"gpt-oss-20b": (24, 32), "gpt-oss-120b": (36, 128)}[name]
    rope = dict(ROPE)
    return {
        "model_type": "gpt_oss",
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 201088,
        "sliding_window": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "swiglu_limit": 7.0,
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": rope,
        "eos_token_id": 200002,
        "pad_token_id": 199999,
        "quantization_config": {"quant_method": "mxfp4"},
    }
