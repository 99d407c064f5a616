"""What ``config.json`` may say, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from workers.architecture import UnsupportedModel, Yarn, parse

HUB: dict[str, Any] = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "experts_per_token": 4,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
    "initial_context_length": 4096,
    "rms_norm_eps": 1e-5,
    "swiglu_limit": 7.0,
    "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "eos_token_id": 200002,
    "quantization_config": {"quant_method": "mxfp4"},
}


def without(config: dict[str, Any], *keys: str, **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys} | changes


def test_both_spellings_of_rope_are_the_same_model() -> None:
    saved_by_transformers_5 = without(
        HUB,
        "rope_scaling",
        "rope_theta",
        rope_parameters=HUB["rope_scaling"] | {"rope_theta": 150000},
    )
    assert parse(HUB) == parse(saved_by_transformers_5)
    assert parse(HUB).rope_scaling == Yarn(32.0, 4096, 32.0, 1.0, truncate=False)
    assert parse(HUB).rope_theta == 150000


def test_layers_alternate_from_a_window() -> None:
    assert parse(HUB).windows[:3] == (128, 0, 128)
    assert parse(without(HUB, layer_types=["full_attention"] * 24)).windows == (0,) * 24


def test_stop_ids_come_from_the_generation_config_and_lie_in_the_vocabulary() -> None:
    assert parse(HUB).eos_token_ids == (200002,)
    assert parse(HUB, {"eos_token_id": [200002, 199999, 999999]}).eos_token_ids == (200002, 199999)
    assert parse(without(HUB, "eos_token_id")).eos_token_ids == ()


def test_groups_of_gpt_oss_20b_take_24_kib_a_token_in_full_layers() -> None:
    window, full = sorted(parse(HUB).kv_groups(16, 1, 2), key=lambda group: group.name == "full")
    assert (window.name, full.name) == ("window:128", "full")
    assert full.block_bytes == window.block_bytes == 16 * 24 * 1024
    assert parse(HUB).kv_groups(16, 8, 2)[0].block_bytes == 16 * 24 * 1024 // 8


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (without(HUB, model_type="llama"), "model_type 'llama'"),
        (without(HUB, "hidden_size"), "'hidden_size' must be int, got None"),
        (without(HUB, hidden_size="2880"), "'hidden_size' must be int, got '2880'"),
        (without(HUB, hidden_size=True), "'hidden_size' must be int, got True"),
        (without(HUB, num_key_value_heads=7), "64 heads are no multiple of 7 KV heads"),
        (without(HUB, quantization_config={"quant_method": "awq"}), "quant_method 'awq'"),
        (without(HUB, layer_types=["full_attention"] * 3), "do not fit 24 layers"),
        (without(HUB, "rope_theta"), "no rope_theta"),
        (without(HUB, rope_scaling={"rope_type": "longrope"}), "rope type 'longrope'"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_field(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        parse(config)


def test_groups_of_unequal_blocks_are_refused() -> None:
    uneven = without(HUB, layer_types=["sliding_attention"] + ["full_attention"] * 23)
    with pytest.raises(UnsupportedModel, match=r"full: 23 layers, window:128: 1 layers"):
        parse(uneven).kv_groups(16, 1, 2)
