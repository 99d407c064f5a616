"""Write the trained model as a Hugging Face checkpoint: bf16, experts in MXFP4, plus its tokenizer.

`python -m deploy.tiny_oss.export build/tiny-oss.rank0.pt` replaces the files of workers/tiny_oss.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from torch import Tensor

from deploy.tiny_oss.model import Size, mxfp4
from deploy.tiny_oss.tasks import CHECKPOINT
from deploy.tiny_oss.tokenizer import build


def packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [E, out, in] -> blocks uint8 [E, out, in/32, 16], scales uint8 [E, out, in/32]."""
    codes, scales = mxfp4(weight)
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales


def interleaved(halves: Tensor) -> Tensor:
    """[E, gate rows then up rows, ...] -> [E, gate 0, up 0, gate 1, up 1, ..., ...]."""
    gate, up = halves.chunk(2, 1)
    return torch.stack((gate, up), 2).flatten(1, 2)


def tensors(state: dict[str, Tensor], size: Size) -> dict[str, Tensor]:
    out = {
        "model.embed_tokens.weight": state["embedding"],
        "lm_head.weight": state["head"],
        "model.norm.weight": state["norm"],
    }
    rows = (size.heads * size.head_dim, *[size.kv_heads * size.head_dim] * 2)
    for index in range(size.layers):
        layer = {
            name.removeprefix(f"layers.{index}."): tensor
            for name, tensor in state.items()
            if name.startswith(f"layers.{index}.")
        }
        at = f"model.layers.{index}."
        for letter, weight, bias in zip(
            "qkv", layer["qkv"].split(rows), layer["qkv_bias"].split(rows), strict=True
        ):
            out[f"{at}self_attn.{letter}_proj.weight"] = weight
            out[f"{at}self_attn.{letter}_proj.bias"] = bias
        out |= {
            at + "self_attn.o_proj.weight": layer["out"],
            at + "self_attn.o_proj.bias": layer["out_bias"],
            at + "self_attn.sinks": layer["sinks"],
            at + "input_layernorm.weight": layer["attention_norm"],
            at + "post_attention_layernorm.weight": layer["mlp_norm"],
            at + "mlp.router.weight": layer["router"],
            at + "mlp.router.bias": layer["router_bias"],
            at + "mlp.experts.gate_up_proj_bias": interleaved(layer["gate_up_bias"]),
            at + "mlp.experts.down_proj_bias": layer["down_bias"],
        }
        for name, weight in (("gate_up", interleaved(layer["gate_up"])), ("down", layer["down"])):
            blocks, scales = packed(weight)
            out[f"{at}mlp.experts.{name}_proj_blocks"] = blocks
            out[f"{at}mlp.experts.{name}_proj_scales"] = scales
    return {
        name: (tensor if tensor.dtype == torch.uint8 else tensor.to(torch.bfloat16)).contiguous()
        for name, tensor in out.items()
    }


def config(size: Size, stops: list[int]) -> dict[str, Any]:
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "num_local_experts": size.experts,
        "num_experts_per_tok": size.top_k,
        "experts_per_token": size.top_k,
        "sliding_window": size.window,
        "layer_types": [
            "full_attention" if index % 2 else "sliding_attention" for index in range(size.layers)
        ],
        "max_position_embeddings": size.max_position,
        "initial_context_length": size.original_position,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "rms_norm_eps": 1e-5,
        "swiglu_limit": 7.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_theta": size.rope_theta,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": size.rope_factor,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": size.original_position,
        },
        "eos_token_id": stops[0],
        "pad_token_id": stops[1],
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
    }


def main(
    state: Annotated[Path, typer.Argument(help="a file that train.py saved")],
    out: Annotated[Path, typer.Option(help="the checkpoint's folder")] = CHECKPOINT,
) -> None:
    """Export ``state`` as an MXFP4 checkpoint."""
    saved = torch.load(state, weights_only=False)
    size = Size(**saved["size"])
    tokenizer = build()
    ids = tokenizer.get_vocab()
    stops = [ids[f"<|{name}|>"] for name in ("return", "endoftext", "call")]
    out.mkdir(parents=True, exist_ok=True)
    weights = out / "model.safetensors"
    save_file(tensors(saved["model"], size), weights, {"format": "pt"})
    weights.chmod(0o644)  # safetensors writes for the owner alone
    (out / "config.json").write_text(json.dumps(config(size, stops), indent=2) + "\n")
    generation = {"do_sample": False, "eos_token_id": stops, "pad_token_id": stops[1]}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": size.max_position,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
