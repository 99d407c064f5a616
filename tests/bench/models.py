"""The two random gpt-oss checkpoints of the benchmark, and transformers' own rate on them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

VOCAB = 49152


@dataclass(frozen=True)
class Size:
    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    experts: int
    intermediate: int
    vocabulary: int = VOCAB


SMALL = Size("small", 256, 8, 8, 2, 16, 256)
MEDIUM = Size("medium", 768, 12, 12, 2, 32, 896)


def build(size: Size, directory: Path) -> Path:
    """Write a random bf16 checkpoint in Hugging Face layout; returns its directory."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)
    h, inter, experts = size.hidden, size.intermediate, size.experts
    queries, keys = size.heads * 64, size.kv_heads * 64

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape).normal_(0, 0.02, generator=draw).to(torch.bfloat16)

    ends = ("model.embed_tokens.weight", "lm_head.weight")
    tensors = {end: normal(size.vocabulary, h) for end in ends}
    tensors["model.norm.weight"] = torch.ones(h, dtype=torch.bfloat16)
    for layer in range(size.layers):
        at = f"model.layers.{layer}."
        tensors[at + "input_layernorm.weight"] = torch.ones(h, dtype=torch.bfloat16)
        tensors[at + "post_attention_layernorm.weight"] = torch.ones(h, dtype=torch.bfloat16)
        for name, rows, columns in (
            ("q", queries, h),
            ("k", keys, h),
            ("v", keys, h),
            ("o", h, queries),
        ):
            tensors[f"{at}self_attn.{name}_proj.weight"] = normal(rows, columns)
            tensors[f"{at}self_attn.{name}_proj.bias"] = normal(rows)
        tensors[at + "self_attn.sinks"] = normal(size.heads)
        tensors[at + "mlp.router.weight"] = normal(experts, h)
        tensors[at + "mlp.router.bias"] = normal(experts)
        tensors[at + "mlp.experts.gate_up_proj"] = normal(experts, h, 2 * inter)
        tensors[at + "mlp.experts.gate_up_proj_bias"] = normal(experts, 2 * inter)
        tensors[at + "mlp.experts.down_proj"] = normal(experts, inter, h)
        tensors[at + "mlp.experts.down_proj_bias"] = normal(experts, h)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["GptOssForCausalLM"],
                "model_type": "gpt_oss",
                "vocab_size": size.vocabulary,
                "hidden_size": h,
                "intermediate_size": inter,
                "num_hidden_layers": size.layers,
                "num_attention_heads": size.heads,
                "num_key_value_heads": size.kv_heads,
                "head_dim": 64,
                "num_local_experts": experts,
                "num_experts_per_tok": 4,
                "sliding_window": 128,
                "max_position_embeddings": 16384,
                "attention_bias": True,
                "rms_norm_eps": 1e-5,
                "swiglu_limit": 7.0,
                "tie_word_embeddings": False,
                "rope_theta": 150000,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 32.0,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "truncate": False,
                    "original_max_position_embeddings": 4096,
                },
                "eos_token_id": 0,
                "torch_dtype": "bfloat16",
            }
        )
    )
    return directory


def transformers_rate(directory: Path, batch: int, threads: int) -> float:
    """Output tokens/s of ``generate`` at one batch size: prompt 128, output 128, bf16.

    A process of its own, so that neither side inherits the other's thread pool or memory.
    """
    run = subprocess.run(
        [sys.executable, "-m", "tests.bench.models", str(directory), str(batch), str(threads)],
        check=True,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    return float(run.stdout.split()[-1])


def _generate(directory: str, batch: int, threads: int) -> None:
    import time

    import torch
    from transformers import GptOssForCausalLM

    from tests.bench.load import prompt

    torch.set_num_threads(threads)
    model = GptOssForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    ids = torch.tensor([prompt(128, VOCAB, i) for i in range(batch)])

    def run(tokens: int) -> float:
        start = time.monotonic()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return time.monotonic() - start

    run(8)
    print(max(batch * 128 / run(128) for _ in range(3)))


if __name__ == "__main__":
    _generate(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
