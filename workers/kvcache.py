"""The paged KV cache's memory on one rank: one arena of blocks, shared by all KV groups.

All groups have equally many layers (workers.architecture checks it), so layer i of any group lives
in plane i of the arena and a block id means the same bytes whichever group holds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.config import KVConfig


class KVCache:
    """Keys and values [planes, 2, blocks + 1, block_size, kv_heads, head_dim].

    One block more than the pool: it stays zero and stands in for every position that is padding.
    """

    def __init__(
        self,
        config: KVConfig,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        planes = len(config.groups[0].layers)
        shape = (planes, 2, config.num_blocks + 1, config.block_size, kv_heads, head_dim)
        self.config = config
        self.zero_block = config.num_blocks
        self.arena = torch.zeros(shape, dtype=dtype, device=device)
        self.group_of = {
            layer: index for index, group in enumerate(config.groups) for layer in group.layers
        }
        self._plane_of = {
            layer: plane for group in config.groups for plane, layer in enumerate(group.layers)
        }
        per_block = self.arena[:, :, 0].nbytes
        assert all(group.block_bytes == per_block for group in config.groups), (
            f"a block takes {per_block} bytes, the plan says {config.groups}"
        )

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each [slots, kv_heads, head_dim]."""
        k, v = self.arena[self._plane_of[layer]].flatten(1, 2).unbind()
        return k, v

    def poison(self, blocks: Sequence[int]) -> None:
        """Fill freed blocks with NaN, so that a test sees it when anything reads them."""
        assert self.zero_block not in blocks, "the zero block is never freed"
        self.arena[:, :, list(blocks)] = torch.nan
