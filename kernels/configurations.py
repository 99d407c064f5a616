"""Tile shapes of the Triton kernels, by architecture and shape class.

None of these was tuned on a GPU: they were chosen from the machine code that ahead-of-time
compilation gives (registers, spills, instruction kinds) and from published kernels' shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

# "generic": sm_80, 86, 89, 120 (mma.sync) and the interpreter; "hopper": sm_90 (wgmma);
# "blackwell": sm_100, 103 (tcgen05, with block scales).
Family = Literal["generic", "hopper", "blackwell"]
FAMILIES: dict[int, Family] = {
    80: "generic",
    86: "generic",
    89: "generic",
    90: "hopper",
    100: "blackwell",
    103: "blackwell",
    120: "generic",
}


def family(arch: int) -> Family:
    """Of an architecture: 90 is sm_90; 0 is the interpreter. Raises ValueError."""
    if arch and arch not in FAMILIES:
        known = ", ".join(f"sm_{each}" for each in FAMILIES)
        raise ValueError(f"no kernel is made for sm_{arch}; they are for {known}")
    return FAMILIES[arch] if arch else "generic"


# The instructions that a tile's products must become; the machine code is checked for them.
Products = Literal["mma.sync", "wgmma", "tcgen05", "tcgen05.block_scale"]


# Of tiles with 64 rows or more; smaller ones are mma.sync everywhere.
PRODUCTS: dict[Family, Products] = {
    "generic": "mma.sync",
    "hopper": "wgmma",
    "blackwell": "tcgen05",
}


@dataclass(frozen=True, slots=True)
class Tile:
    rows: int
    columns: int  # keys of attention, output features of a product
    depth: int  # of one step along the sum; the head size of attention
    warps: int
    stages: int
    products: Products = "mma.sync"


@dataclass(frozen=True, slots=True)
class Attention:
    """For one rank's heads. Decoding rows split their keys until ``programs`` programs run, but
    into parts of at least ``least_split`` keys; with ``span``, at its multiples and nowhere else.
    """

    group: int  # query heads of a KV head
    kv_heads: int
    prefill: Tile
    decode: Tile
    programs: int
    least_split: int
    span: int  # 0, or the keys of a batch-invariant part


def attention(arch: Family, heads: int, kv_heads: int, head_dim: int, invariant: bool) -> Attention:
    """Raises ValueError for heads that no tile holds."""
    group = heads // kv_heads
    if heads % kv_heads or group > 16 or head_dim not in (16, 32, 64, 128):
        raise ValueError(
            f"Triton attention serves up to 16 query heads for each KV head and head sizes 16, 32, "
            f"64 and 128, not {heads} query and {kv_heads} KV heads of {head_dim}; "
            "use --kernels reference"
        )
    rows = 64 if invariant or head_dim == 128 else 128
    # 128 rows with 8 warps spill on tcgen05, 64 rows with 4 warps on mma.sync.
    warps = {"generic": 8, "hopper": 4 if rows == 64 else 8, "blackwell": 4}[arch]
    prefill = Tile(rows, 64, head_dim, warps, 3, PRODUCTS[arch])
    # With fp8 keys, 4 warps spill on sm_100.
    decode = prefill if invariant else Tile(16, 64, head_dim, 8 if arch == "blackwell" else 4, 4)
    return Attention(group, kv_heads, prefill, decode, 264, 256, 1024 if invariant else 0)


@dataclass(frozen=True, slots=True)
class Tiles:
    """The first whose rows hold an expert's pairs on average, else the last: fewer rows read the
    weights as fast, more multiply less that is not there. Equal for a batch-invariant run."""

    small: Tile
    middle: Tile
    large: Tile

    def of(self, pairs: int, experts: int) -> Tile:
        for tile in (self.small, self.middle):
            if pairs <= tile.rows * experts:
                return tile
        return self.large


@dataclass(frozen=True, slots=True)
class Experts:
    """By what the weights are: numbers, words that are unpacked, or blocks with scales."""

    dense: Tiles
    words: Tiles
    scaled: Tiles


def experts(arch: Family, invariant: bool) -> Experts:
    small = Tile(16, 64, 64, 4, 4)
    rows = 64 if arch == "generic" else 128  # 128 spill with mma.sync
    large = Tile(rows, 128, 64, 8, 3, PRODUCTS[arch])
    middle = Tile(32, 64, 64, 4, 4) if arch == "generic" else replace(large, rows=64, warps=4)
    block_scale: Products = "tcgen05.block_scale" if arch == "blackwell" else "mma.sync"
    # Few rows go to the right side of the product, so the weights fill the tensor core's 128.
    few = Tile(16, 128, 128, 4, 4, block_scale)
    more = replace(few, rows=64, warps=8)
    many = Tile(128, 128, 128, 8, 3, block_scale)
    # Of INT4, 128 columns spill on tcgen05.
    words = replace(large, columns=64, warps=4) if arch == "blackwell" else large
    if invariant:
        return Experts(*(Tiles(tile, tile, tile) for tile in (large, words, many)))
    return Experts(
        Tiles(small, middle, large),
        Tiles(small, replace(words, rows=middle.rows, warps=4), words),
        Tiles(few, more, many),
    )


def linear(arch: Family) -> Tile:
    """Of batch-invariant dense layers."""
    return Tile(64, 128, 64, 4, 3, PRODUCTS[arch])
