"""The full models on fake CUDA tensors: nothing mixes devices or waits, and the sizes are right."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from kernels.launch import Launch
from tests.checkpoints import gpt_oss_config
from workers.architecture import parse
from workers.config import ModelSpec
from workers.dryrun import CUDA, GPT_OSS_120B, Dry, HostWait, decode, launches

GIB = 1 << 30
# Weights of a rank, with expert parallelism; from the shapes in the models' configurations.
PUBLISHED = {
    ("gpt-oss-20b", 1): 12.82,
    ("gpt-oss-20b", 2): 6.41,
    ("gpt-oss-20b", 4): 3.21,
    ("gpt-oss-20b", 8): 1.61,
    ("gpt-oss-120b", 1): 60.77,
    ("gpt-oss-120b", 2): 30.40,
    ("gpt-oss-120b", 4): 15.21,
    ("gpt-oss-120b", 8): 7.62,
}
DECODE = [(1500, 1)] * 64
MIXED = [(0, 700), (9000, 1), (128, 65)]


def tensors(launch: Launch) -> list[torch.Tensor]:
    return [each for each in launch.arguments if isinstance(each, torch.Tensor)]


@pytest.mark.parametrize(("model", "tp"), PUBLISHED)
def test_a_rank_of_the_full_model(model: str, tp: int) -> None:
    arch = parse(gpt_oss_config(model))
    spec = ModelSpec(tensor_parallel_size=tp, enable_expert_parallel=tp > 1)
    dry = Dry(arch, spec, 90, tp - 1)
    assert dry.stored_bytes / GIB == pytest.approx(PUBLISHED[model, tp], abs=0.01)
    # The kernels' form of the experts pads their rows a little.
    assert dry.stored_bytes <= dry.held_bytes <= 1.03 * dry.stored_bytes
    arena = dry.cache.arena
    tokens = arena.shape[2] * arena.shape[3]
    layers = arch.num_layers // 2  # full ones: the planes that both groups share
    assert arena.nbytes / tokens == layers * 2048 / min(tp, 8)
    for rows in (DECODE, MIXED):
        step = dry.step(rows)
        count = sum(n for _, n in rows)
        assert step.experts.shape == (arch.num_layers, count, 4)
        assert step.logits.shape == (len(rows), -(-arch.vocab_size // tp))
        assert step.logits.device == step.experts.device == CUDA
        assert step.logits.dtype == torch.bfloat16
        assert {t.device for each in step.launches for t in tensors(each)} == {CUDA}
        sums = [x.shape for name, x in step.collectives if name == "all_reduce"]
        # The embedding, and attention and experts of every layer.
        assert sums == [(count, 2880)] * ((1 + 2 * arch.num_layers) if tp > 1 else 0)


def test_a_cut_through_experts_takes_uneven_parts() -> None:
    arch = parse(gpt_oss_config("gpt-oss-120b"))
    arch = msgspec.structs.replace(arch, num_layers=2, windows=arch.windows[:2])
    sizes = [Dry(arch, ModelSpec(tensor_parallel_size=8), 90, rank).stored_bytes for rank in (0, 7)]
    blocks = 3 * 2880 * 128 * 2 * 17  # bytes of one more MXFP4 block of the intermediate size
    assert sizes[0] - sizes[1] > blocks


def test_waiting_for_the_device_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = parse(gpt_oss_config("gpt-oss-20b"))
    arch = msgspec.structs.replace(arch, num_layers=2, windows=arch.windows[:2])
    dry = Dry(arch, ModelSpec(), 90, 0)
    dry.step(DECODE)
    block = dry.model.blocks[1]
    for read in (
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: int(x.sum()),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: torch.empty(x.shape, dtype=x.dtype).copy_(x),
        lambda x: 1 if x.sum() > 0 else 0,
    ):
        forward = type(block).forward

        def reading(x, *args, read=read, forward=forward):  # type: ignore[no-untyped-def]
            read(x)
            return forward(block, x, *args)

        monkeypatch.setattr(block, "forward", reading)
        with pytest.raises(HostWait):
            dry.step(DECODE)


def test_mixed_devices_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    arch = parse(gpt_oss_config("gpt-oss-20b"))
    arch = msgspec.structs.replace(arch, num_layers=2, windows=arch.windows[:2])
    dry = Dry(arch, ModelSpec(), 90, 0)
    with dry._mode:
        weight = torch.nn.Parameter(torch.empty(2880), requires_grad=False)
    dry.model.norm._parameters["weight"] = weight
    step = dry.step(DECODE)
    devices = {t.device.type for each in step.launches for t in tensors(each)}
    assert devices == {"cuda", "cpu"}


@pytest.mark.slow
def test_one_layer_of_each_kind_launches_what_all_do() -> None:
    arch = parse(gpt_oss_config("gpt-oss-20b"))

    def argument(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{value.dtype} {int(value.storage_offset()) * value.itemsize % 16}"
        return str(value)

    def shapes(found: list[Launch]) -> set[tuple[str, ...]]:
        """What Triton specialises on, but for integers that vary within a variant."""
        return {
            (each.kernel.__name__, str(each.options), *map(argument, tensors(each)))
            for each in found
        }

    whole = Dry(arch, ModelSpec(), 90, 0)
    cut = shapes(launches(arch, ModelSpec(), 90))
    for rows in (DECODE, [(0, 2048)], [(131071, 1)]):
        assert shapes(whole.step(rows).launches) <= cut


def test_the_built_in_shape_is_the_published_one() -> None:
    assert parse(gpt_oss_config("gpt-oss-120b")) == GPT_OSS_120B


def test_a_decode_step_moves_what_the_model_implies() -> None:
    """Experts of 13.22 MB, all but 64 * 4 draws' misses of 128; keys of 36 KiB a token."""
    step = decode(GPT_OSS_120B, ModelSpec(), 90, 64, 1500)
    experts = 36 * 128 * (1 - (1 - 4 / 128) ** 64) * 3 * 2880**2 * 17 / 32
    assert step["grouped up"][1].minimum + step["grouped down"][1].minimum == pytest.approx(experts)
    assert step["attend"][1].minimum == 64 * 1501 * 18 * 2048
    assert step["attend window 128"][1].minimum == 64 * 128 * 18 * 2048
    assert step["dense layers"][1].moved == pytest.approx(3.10e9, rel=0.01)
    for _, work in step.values():
        assert work.moved >= work.minimum
