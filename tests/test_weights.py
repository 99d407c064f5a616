"""Reading checkpoints: every rank its own bytes, and every fault named before anything is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.dispatch import Shapes, choose
from kernels.mxfp4 import MXFP4, dequantize
from parallelism.group import Group
from parallelism.layers import Place
from parallelism.layout import Layout
from tests.checkpoints import tiny_gpt_oss, write_tensors
from workers.config import ModelSpec
from workers.hub import CheckpointError, architecture, read_json
from workers.model import Block, Decoder
from workers.rank import Rank
from workers.weights import declared, load, plan, stored_tensors

CPU = torch.device("cpu")


def decoder(directory: Path, layout: Layout) -> Decoder:
    ops = choose("reference", CPU, Shapes(torch.float32, 4, 2, 16))
    place = Place(layout, Group(layout.rank, layout.tp), ops, torch.float32, CPU)
    return Decoder(architecture(directory), place)


def whole(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("mxfp4", [False, True])
@pytest.mark.parametrize("ep", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_ranks_read_their_share_and_no_more(tp: int, ep: bool, mxfp4: bool, tmp_path: Path) -> None:
    """Shards put together are the whole tensors; bytes read are the bytes of the layout."""
    tiny_gpt_oss(tmp_path, mxfp4=mxfp4, shards=2, intermediate_size=160)
    stored = whole(tmp_path)
    seen = {name: torch.zeros(tensor.shape, dtype=torch.int32) for name, tensor in stored.items()}
    total = 0
    for rank in range(tp):
        model = decoder(tmp_path, Layout(tp, ep, rank))
        shares = plan(model, tmp_path)
        parts = {name: parameter.parts for name, parameter in declared(model)}
        assert shares.size == sum(
            prod(part.stored_shape) * stored[part.name].element_size()
            for each in parts.values()
            for part in each
        )
        assert shares.size < sum(t.nbytes for t in stored.values()) * (0.45 if tp == 4 else 1.01)
        total += shares.size
        heard: list[int] = []
        load(model, shares, CPU, dequantise=False, progress=heard.append)
        assert sum(heard) == shares.size
        loaded = dict(model.named_parameters(remove_duplicate=False))
        for name, slices in parts.items():
            expected = []
            for part in slices:
                cut = tuple(slice(*each) for each in part.ranges)
                seen[part.name][cut] += 1
                piece = stored[part.name][cut]
                expected.append(piece.transpose(-1, -2) if part.transposed else piece)
            wanted = torch.cat(expected)
            assert torch.equal(loaded[name], wanted.to(loaded[name].dtype)), name
    for name, count in seen.items():
        # Norms, the router and KV heads fewer than ranks are held by several.
        shared = any(part in name for part in ("norm", "router", "k_proj", "v_proj"))
        assert int(count.min()) >= 1, name
        assert shared or int(count.max()) == 1, name


@pytest.mark.parametrize("dequantise", [False, True])
def test_mxfp4_stays_packed_or_is_dequantised(dequantise: bool, tmp_path: Path) -> None:
    tiny_gpt_oss(tmp_path, mxfp4=True)
    model = decoder(tmp_path, Layout())
    load(model, plan(model, tmp_path), CPU, dequantise)
    block = model.blocks[1]
    assert isinstance(block, Block)
    experts = block.experts
    stored = whole(tmp_path)
    name = "model.layers.1.mlp.experts.down_proj"
    expected = dequantize(MXFP4(stored[f"{name}_blocks"], stored[f"{name}_scales"]), torch.float32)
    if dequantise:
        assert isinstance(experts.w2, Tensor)
        assert torch.equal(experts.w2, expected)
        assert not [p for p, _ in model.named_parameters() if "_blocks" in p]
    else:
        assert isinstance(experts.w2, MXFP4)
        assert torch.equal(dequantize(experts.w2, torch.float32), expected)


def test_form_of_experts_follows_free_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_gpt_oss(tmp_path, mxfp4=True)
    spec = ModelSpec(model=str(tmp_path), device="cpu")
    roomy = Rank(spec)
    assert "dequantised at load" in roomy.load(None).notes[0]
    monkeypatch.setattr(Rank, "_free", lambda self: 1 << 20)
    tight = Rank(spec)
    report = tight.load(None)
    assert "stay packed" in report.notes[0]
    assert report.weight_bytes < 1 << 20


def drop(tensors: dict[str, Tensor]) -> str:
    del tensors["model.layers.2.self_attn.sinks"]
    return r"tensor model\.layers\.2\.self_attn\.sinks is missing from the files in"


def add(tensors: dict[str, Tensor]) -> str:
    tensors["model.layers.9.self_attn.sinks"] = torch.zeros(8)
    return r"tensor model\.layers\.9\.self_attn\.sinks in .*model.*safetensors: .* no place"


def reshape(tensors: dict[str, Tensor]) -> str:
    name = "model.layers.0.mlp.experts.down_proj"
    tensors[name] = tensors[name].transpose(1, 2).contiguous()
    return rf"tensor {name} in .*safetensors has shape \[8, 64, 96\].* \[8, 96, 64\]"


def retype(tensors: dict[str, Tensor]) -> str:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int32)
    return r"tensor lm_head\.weight in .*safetensors has dtype I32"


@pytest.mark.parametrize("fault", [drop, add, reshape, retype])
@pytest.mark.parametrize("shards", [1, 3])
def test_faulty_tensors_are_named(
    fault: Callable[[dict[str, Tensor]], str], shards: int, tmp_path: Path
) -> None:
    tiny_gpt_oss(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    message = fault(tensors)
    write_tensors(tmp_path, tensors, shards)
    with pytest.raises(CheckpointError, match=message):
        plan(decoder(tmp_path, Layout()), tmp_path)


def truncate(directory: Path) -> str:
    file = directory / "model-00001-of-00002.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)
    return r"tensor \S+ in .*00001-of-00002\.safetensors is truncated"


def behead(directory: Path) -> str:
    (directory / "model-00000-of-00002.safetensors").write_bytes(b"\x10\0\0")
    return r"00000-of-00002\.safetensors is truncated or no safetensors file"


def garble(directory: Path) -> str:
    file = directory / "model-00000-of-00002.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:8] + b"!" + data[9:])
    return r"00000-of-00002\.safetensors has no readable safetensors header"


def lose(directory: Path) -> str:
    (directory / "model-00002-of-00002.safetensors").unlink()
    return r"00002-of-00002\.safetensors is missing; .* expects it to hold tensor \S+"


def misdirect(directory: Path) -> str:
    index = directory / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"]["model.norm.weight"] = "model-00000-of-00002.safetensors"
    where = found["weight_map"]
    here = next(name for name, file in where.items() if "00001" in file)
    where[here] = "model-00000-of-00002.safetensors"
    index.write_text(json.dumps(found))
    return r"tensor \S+ is (missing from|not in)"


def break_index(directory: Path) -> str:
    (directory / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    return r"index\.json is no index"


def empty(directory: Path) -> str:
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    return "holds no safetensors files"


@pytest.mark.parametrize("fault", [truncate, behead, garble, lose, misdirect, break_index, empty])
def test_faulty_files_are_named(fault: Callable[[Path], str], tmp_path: Path) -> None:
    tiny_gpt_oss(tmp_path, shards=3)
    message = fault(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        plan(decoder(tmp_path, Layout()), tmp_path)


def test_the_same_tensor_twice_is_refused(tmp_path: Path) -> None:
    tiny_gpt_oss(tmp_path)
    save_file({"lm_head.weight": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight is in both"):
        stored_tensors(tmp_path)


def test_offsets_that_do_not_fit_are_named(tmp_path: Path) -> None:
    header: dict[str, Any] = {"t": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}
    raw = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))
    with pytest.raises(CheckpointError, match=r"tensor t in .*: 8 bytes do not fit shape \[3\]"):
        stored_tensors(tmp_path)


def test_unreadable_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config\.json holds no JSON object"):
        read_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match=r"generation_config\.json cannot be read"):
        read_json(tmp_path / "generation_config.json")
