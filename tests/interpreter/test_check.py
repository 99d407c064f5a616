"""The GPU check without a GPU: its proofs under the interpreter, its sequences on fake tensors."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from kernels import attention, check, norm, proofs, rates, roofline
from kernels.check import Row
from kernels.launch import Launch, watched
from kernels.mxfp4 import MXFP4
from kernels.packed import Packed
from kernels.proofs import Context, Figure
from kernels.roofline import GPT_OSS_20B, GPT_OSS_120B, Ceilings, Group, Layer, Shape, Step
from tests import gpu_check
from tests.bench import load

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
BF16 = torch.bfloat16


@pytest.mark.parametrize(
    "proof",
    [
        partial(proofs.norms, dtype=BF16),
        partial(proofs.invariant_linear, dtype=torch.float32),
        partial(proofs.rope_kv_write, dtype=BF16),
        partial(proofs.rope_kv_write, dtype=BF16, fp8=True),
        partial(proofs.attention, rows=((0, 1), (600, 1), (99, 1)), heads=(8, 1)),
        partial(proofs.attention, rows=((0, 5), (37, 9), (40, 1)), heads=(8, 2), window=33),
        partial(proofs.attention, rows=((0, 5), (37, 9)), heads=(8, 2), chunk=16, fp8=True),
        partial(proofs.route, experts=32, k=4),
        partial(proofs.sampling, filters=(0, 1.0, 0.0)),
        partial(proofs.sampling, filters=(20, 0.9, 0.05)),
        partial(proofs.penalties),
        partial(proofs.experts, dtype=BF16, form="MXFP4", routing="spread"),
        partial(proofs.experts, dtype=torch.float32, form="MXFP4", routing="one"),
        partial(proofs.experts, dtype=BF16, form="dense", routing="ranks"),
        partial(proofs.experts, dtype=BF16, form="NVFP4", routing="spread"),
        partial(proofs.experts, dtype=BF16, form="INT4", routing="spread"),
        partial(proofs.invariant_attention, window=0),
        partial(proofs.invariant_attention, window=8),
        partial(proofs.invariant_products, mxfp4=True),
    ],
    ids=lambda proof: f"{proof.func.__name__} {proof.keywords}",
)
def test_proofs(proof: Callable[[Context], Figure | None]) -> None:
    row = check.run("proof", proof, Context(CPU, {}, large=False))
    assert row.result == "ok"


@pytest.mark.slow
def test_all_proofs_of_kernels() -> None:
    """Those that a device runs, at small sizes."""
    dtypes = torch.bfloat16, torch.float16, torch.float32
    context = Context(CPU, {}, large=False)
    for name, proof in [*proofs.kernel_checks(*dtypes), *proofs.invariance_checks()]:
        row = check.run(name, proof, context)
        assert row.result == "ok", row


@pytest.mark.parametrize(
    ("what", "broken", "said"),
    [
        ("wrong", lambda x, *_: x, "rms_norm: error"),
        ("unwritten", lambda x, *_: torch.empty_like(x), "rms_norm: error nan"),
        ("raises", lambda *_: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_broken_kernel_is_reported(
    what: str, broken: Callable[..., Tensor], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm, "rms_norm", broken)
    row = check.run(what, partial(proofs.norms, dtype=BF16), Context(CPU, {}, large=False))
    assert row.result.startswith("FAILED")
    assert said in row.result


def test_a_result_that_depends_on_its_batch_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    true = attention.paged_attention

    def drifting(q: Tensor, *rest: Any) -> Tensor:
        return true(q, *rest) * (1 + 2**-7 * (len(q) > 1))

    monkeypatch.setattr(attention, "paged_attention", drifting)
    proof = partial(proofs.invariant_attention, window=0)
    row = check.run("drift", proof, Context(CPU, {}, large=False))
    assert "decoded alone" in row.result


FATES = {"b": "FAILED: the process died", "d": "FAILED: no result in 60 s", "f": "FAILED: wrong"}


def _troubled(
    send: check.Send, first: int, figures: dict[str, float], deadline: float, names: str
) -> None:
    """A worker that dies at b, hangs at d, loses its device at e, and fails at f."""
    for name in names[first:]:
        if name == "b":
            os._exit(1)
        if name == "d":
            time.sleep(3600)
        result = FATES["f"] if name == "f" else "ok"
        known = Figure(sum(figures.values()) + 1, "x") if name in "ag" else None
        send((Row(name, result, known), name != "e"))
        if name == "e":
            os._exit(1)


@pytest.mark.parametrize(
    ("names", "patience"), [("abefg", 300), pytest.param("adg", 60, marks=pytest.mark.slow)]
)
def test_every_check_has_a_row_whatever_happens(names: str, patience: float) -> None:
    rows: list[Row] = []
    worker = partial(_troubled, names=names)
    check.supervise(worker, names, rows.append, time.monotonic() + 60, patience)
    assert [row.check for row in rows] == [*names]
    assert [row.result for row in rows] == [FATES.get(name, "ok") for name in names]
    assert rows[-1].figure == Figure(2.0, "x")  # a's figure was handed on
    results = check.Results(file := io.StringIO(), "here")
    for row in rows:
        results.write(row)
    assert results.failed == len({*names} & {*FATES})
    assert "| g | ok | 2 | x |  |" in file.getvalue()
    assert str(Row("m", "ok", Figure(0.5, "us", 0.73, "75 %"))) == (
        "| m | ok | 0.5 | us | 73% (target 75 %) |"
    )


def test_it_needs_nothing_but_torch_triton_and_its_folder(tmp_path: Path) -> None:
    """No package of ours or of others can be imported, and no GPU is a clear sentence."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=ignored)
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('numpy', 'ray', 'msgspec', 'workers', 'parallelism',\n"
        "                                  'cluster', 'moeray', 'tests'):\n"
        "            raise ModuleNotFoundError('blocked: ' + name, name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET")  # it needs numpy; a device does not
    code = (
        "import kernels.check, kernels.attention, kernels.moe, kernels.linear, kernels.rope; "
        "print(len(kernels.check.checks()))"
    )
    for command, status in ((["-c", code], 0), (["-m", "kernels.check"], 2)):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == status, done.stderr
    assert "needs a CUDA device" in done.stderr
    assert not (tmp_path / "docs").exists()


def test_costs_by_hand() -> None:
    """Against the published limits of gpt-oss-20b on an H100: 894 and 14,100 tokens/s."""
    h100 = Ceilings(3.35e12, 989e12)
    assert GPT_OSS_120B.expert_bytes == 13_219_200
    assert roofline.touched(1, 128, 4) == pytest.approx(4)
    assert roofline.touched(64, 128, 4) == pytest.approx(111, abs=0.3)
    many = roofline.moe_cost(GPT_OSS_120B, 16_384, eight_bit=True)
    assert many.seconds(h100) == 2 * many.seconds(replace(h100, fp8=2 * h100.flops))
    moe_one = roofline.moe_cost(GPT_OSS_120B, 1)
    assert moe_one.bytes == pytest.approx(52_876_800)
    assert moe_one.flops == 2 * 3 * 2880 * 2880 * 4
    rows = [(8191, 1)] * 2
    cost = roofline.attention_cost(GPT_OSS_120B, rows, 0)
    assert (cost.bytes, cost.flops) == (2 * 8192 * 2048, 2 * 8192 * 64 * 64 * 4)
    cost = roofline.attention_cost(GPT_OSS_120B, rows, 128)
    assert (cost.bytes, cost.flops) == (2 * 128 * 2048, 2 * 128 * 64 * 64 * 4)
    cost = roofline.attention_cost(GPT_OSS_120B, [(2, 3)], 2)
    assert (cost.bytes, cost.flops) == (4 * 2048, 6 * 64 * 64 * 4)
    for batch, rate in ((1, 894), (64, 14_100), (256, 37_000)):
        seconds = roofline.step_seconds(GPT_OSS_20B, batch, 1500, h100)
        assert batch / seconds == pytest.approx(rate, rel=0.02)


@pytest.mark.parametrize(("batch", "splits"), [(1, True), (256, False)])
def test_a_step_launches_what_it_should(batch: int, splits: bool) -> None:
    """gpt-oss-20b whole, on fake CUDA tensors."""
    mode = FakeTensorMode()

    def put(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

    def pack(w: MXFP4) -> Packed:
        """The real one looks at values."""
        count, rows, blocks, _ = w.blocks.shape
        chunks = -(-blocks // 4)
        words, scales = (
            torch.empty(count, rows, n, dtype=torch.int32, device="cuda")
            for n in (16 * chunks, chunks)
        )
        return Packed("mxfp4", words, scales)

    ops = replace(Context(CPU, {}).ops(), pack=pack)
    shape, rows = GPT_OSS_20B, [(1499, 1)] * batch
    groups = Group.of(ops, rows, shape.window, put), Group.of(ops, rows, 0, put)
    launches: list[Launch] = []
    with mode, watched(launches.append):
        device = torch.device("cuda")
        layers = [Layer.random(ops, shape, device) for _ in range(shape.layers)]
        out = Step(ops, shape, layers, groups, batch).decode()
    assert out.shape == (batch, 2880)
    assert out.device.type == "cuda"
    assert Counter(launch.kernel.__name__ for launch in launches) == {
        "_rms_norm": 48,
        "_rope_kv_write": 24,
        "_attend": 24,
        **({"_combine": 12} if splits else {}),
        "_route": 24,
        "_sort": 24,
        "_grouped": 48,
        "_add_pairs": 24,
    }
    tensors = [a for each in launches for a in each.arguments if isinstance(a, Tensor)]
    assert {tensor.device.type for tensor in tensors} == {"cuda"}


def test_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every timed sequence once, at small shapes, its launches only looked at."""
    small = Shape(layers=2, experts=8, hidden=64, inner=64, vocabulary=100)
    launched: Counter[str] = Counter()

    def measure(run: Callable[[], object], flush: bool = True) -> float:
        with watched(lambda launch: launched.update([launch.kernel.__name__])):
            run()
        return 1e-3

    for name in ("GPT_OSS_20B", "GPT_OSS_120B"):
        monkeypatch.setattr(rates, name, small)
    monkeypatch.setattr(roofline, "measure", measure)
    ceilings = {"HBM copy": 2.0, "HBM read": 3.0, "bf16 product": 800.0}
    context = Context(CPU, {f"ceiling: {name}": value for name, value in ceilings.items()})
    found = {}
    for name, proof in [*rates.invariance_costs(), *rates.kernel_times(), *rates.steps()]:
        heavy = ("head", "prefill", "64 x", "256 tokens", "512", "4096", "batch 256")
        if not any(word in name for word in heavy):
            launched.clear()
            row = check.run(name, proof, context)
            assert row.result == "ok", row
            assert row.figure is not None
            found[name] = (row.figure, dict(launched))
    figure, kernels = found["time: decode attention, 1 x 8k"]
    assert kernels == {"_attend": 1, "_combine": 1}
    assert figure.value == 1000  # us
    assert figure.fraction == pytest.approx(8192 * 2048 / 3e12 / 1e-3)
    assert found["time: decode attention, 8 x 8k, window 128"][1] == {"_attend": 1}
    assert found["time: MoE 120b, 64 tokens"][1] == {"_sort": 1, "_grouped": 2, "_add_pairs": 1}
    assert found["time: linear qkv, 64 tokens"][1] == {}
    assert found["time, batch-invariant: linear qkv, 64 tokens"][1] == {"_linear": 1}
    assert found["time: sampling, 64 rows"][1] == {"_draw": 1, "_pick": 1}
    step = found["step: gpt-oss-20b decode, batch 64"][1]
    assert step["_draw"] == 1
    assert step["_rms_norm"] == 5
    assert step["_grouped"] == 4


def _in_process(work: object, names: object, write: Callable[[Row], None], end: float) -> None:
    for name, proof in check.checks():
        write(check.run(name, proof, Context(CPU, {}, large=False)))


@pytest.mark.parametrize(("broken", "status"), [(False, 0), (True, 1)])
def test_the_status_says_whether_any_failed(
    broken: bool, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Properties:
        name, major, minor, total_memory = "H100", 9, 0, 1 << 36

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    monkeypatch.setattr(check, "supervise", _in_process)
    proof = partial(proofs.norms, dtype=BF16)
    monkeypatch.setattr(check, "checks", lambda: [("norms", proof), ("again", proof)])
    if broken:
        monkeypatch.setattr(norm, "rms_norm", lambda x, *_: x)
    output = tmp_path / "here" / "results.md"
    output.parent.mkdir()
    output.write_text("earlier\n")
    assert check.main(["--output", str(output)]) == status
    text = output.read_text()
    assert text.startswith("earlier\n")
    assert text.count("| FAILED: AssertionError: rms_norm: error" if broken else "| ok |") == 2


def test_greedy_tokens_are_compared_up_to_their_first_difference() -> None:
    asked: list[tuple[list[int], int, int]] = []

    def gap(prefix: Any, one: int, other: int) -> float:
        asked.append((list(prefix), one, other))
        return 0.01 * other

    figure = gpu_check.compare([[1], [2]], [[5, 3, 9], [4, 4, 4]], [[5, 6, 7], [4, 4, 4]], gap)
    assert asked == [([1, 5], 6, 3)]
    assert figure.value == pytest.approx(0.03)
    with pytest.raises(AssertionError, match=r"prompt 0, token 0: logits 0\.08 apart"):
        gpu_check.compare([[1]], [[8]], [[7]], gap)


def test_both_sets_of_kernels_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the server and the model; a server that does not start is a row."""
    down: set[str] = set()

    @contextmanager
    def moeray(directory: Path, *flags: str) -> Iterator[tuple[str, None]]:
        if down & {*flags}:
            raise RuntimeError("`moeray serve` did not become ready")
        yield flags[1], None

    async def closed_loop(url: str, *_: object) -> load.Load:
        return load.Load([load.Stream(0.0, tokens=50)], 2.0)

    monkeypatch.setattr(gpu_check, "build", lambda size, directory: directory)
    monkeypatch.setattr(gpu_check, "moeray", moeray)
    monkeypatch.setattr(gpu_check, "greedy", lambda url, prompt: [1, 2])
    monkeypatch.setattr(gpu_check, "gap_of", lambda _: None)
    monkeypatch.setattr(load, "closed_loop", closed_loop)
    for failed in (0, 2):
        results = check.Results(file := io.StringIO(), "here")
        gpu_check.served(results)
        assert results.failed == failed
        down.add("reference")
        assert "| served: triton, 32 streams | ok | 25 | tokens/s |  |" in file.getvalue()
    assert "only ['triton'] answered" in file.getvalue()
    assert "did not become ready" in file.getvalue()


def test_the_served_check_says_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main() == 2
    assert "needs a CUDA device" in capsys.readouterr().err
