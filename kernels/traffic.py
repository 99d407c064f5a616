"""What a launch must move and compute, and how long a GPU needs for that at the very least.

An estimate from shapes, for decode steps; nothing here was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels.launch import Launch
from kernels.mxfp4 import BLOCK
from kernels.roofline import touched

# By architecture: name, bytes/s of memory, bf16 flop/s; from the vendor's data sheets.
GPUS = {90: ("H100", 3.35e12, 989e12), 100: ("B200", 8e12, 2.25e15)}


@dataclass(frozen=True, slots=True)
class Work:
    moved: int  # bytes, every operand once, intermediate results and padding included
    minimum: int  # bytes of weights and keys that any kernel has to read
    flops: int
    fp8: int = 0  # of them with 8-bit activations, which are twice as fast

    def __add__(self, other: Work) -> Work:
        return Work(
            self.moved + other.moved,
            self.minimum + other.minimum,
            self.flops + other.flops,
            self.fp8 + other.fp8,
        )

    def seconds(self, arch: int) -> float:
        """At the limits of the memory or the tensor cores, whichever is later."""
        _, bandwidth, peak = GPUS[arch]
        return max(self.moved / bandwidth, (self.flops - self.fp8 / 2) / peak)


def work(launch: Launch, context: int, k: int) -> Work:
    """Of a launch in a step where every row decodes behind ``context`` tokens and every token
    chooses ``k`` experts."""
    named = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False))
    options = launch.options
    tensors = {name: t for name, t in named.items() if isinstance(t, Tensor)}
    moved = minimum = flops = 0.0
    sizes = {name: float(t.nbytes) for name, t in tensors.items()}
    if "order_ptr" in tensors and "w_ptr" in tensors:
        pairs = len(tensors["order_ptr"])
        experts = int(tensors["w_ptr"].shape[0])
        share = touched(pairs // k, experts, k) / experts
        for name in ("w_ptr", "scales_ptr", "bias_ptr"):
            sizes[name] = sizes.get(name, 0.0) * share
        numbers = named["rows"] * named["depth"] * experts * share
        packed = tensors["w_ptr"].dtype.itemsize != 2
        width = (1 / 2 + 1 / BLOCK) if packed else tensors["w_ptr"].itemsize
        minimum = numbers * width
        flops = 2.0 * pairs * named["rows"] * named["depth"]
    elif "tables_ptr" in tensors:
        rows, size = len(tensors["tile_rows_ptr"]), options["D"]
        keys = min(context + 1, options["WINDOW"] or context + 1)
        cache = tensors["k_ptr"]
        sizes["k_ptr"] = sizes["v_ptr"] = float(
            rows * keys * cache.shape[1] * size * cache.itemsize
        )
        minimum = sizes["k_ptr"] + sizes["v_ptr"]
        flops = 4.0 * rows * named["heads"] * keys * size
    elif "k_cache_ptr" in tensors:
        sizes["k_cache_ptr"] = sizes["v_cache_ptr"] = sizes["k_ptr"]
    moved = sum(sizes.values())
    fp8 = flops if options.get("FORM") == "mxfp4 x mxfp8" else 0
    return Work(round(moved), round(minimum), round(flops), round(fp8))
