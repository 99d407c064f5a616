"""The rank grid: who holds which heads, experts and vocabulary. Pure.

An engine is ``tp`` ranks, over which attention and vocabulary are sharded; ``dp`` engines share one
set of experts. These are spread over all ``dp`` * ``tp`` ranks, whole ones (expert parallelism, a
contiguous range each). One engine can also cut through each of them along its intermediate
dimension.
"""

from __future__ import annotations

import msgspec

from parallelism.shard import Range

Places = tuple[tuple[int, ...], ...]  # of one layer: the experts that each of all ranks holds


class LayoutError(ValueError):
    """The model cannot be cut like this; the message names the numbers and a way out."""


class Layout(msgspec.Struct, frozen=True):
    """One rank's place in a grid of ``dp`` engines of ``tp`` ranks."""

    tp: int = 1
    expert_parallel: bool = False
    rank: int = 0  # in its engine
    dp: int = 1
    dp_rank: int = 0  # the engine

    @property
    def world(self) -> int:
        """How many ranks there are: all of them share the experts."""
        return self.dp * self.tp

    @property
    def ep_rank(self) -> int:
        """This rank among all of them."""
        return self.dp_rank * self.tp + self.rank

    def heads(self, count: int) -> Range:
        """Query or KV heads of this rank; KV heads fewer than ranks are held by several."""
        if count % self.tp == 0:
            return _even(count, self.tp, self.rank)
        if self.tp % count == 0:
            return _even(count, count, self.rank * count // self.tp)
        raise LayoutError(f"{count} heads cannot be spread over {self.tp} ranks")

    def vocabulary(self, size: int) -> Range:
        """Token ids whose embeddings and logits are this rank's; the last ranks may have fewer."""
        each = -(-size // self.tp)
        return min(size, self.rank * each), min(size, (self.rank + 1) * each)

    def experts(self, count: int, rank: int | None = None) -> Range:
        """Experts of this rank, or of another of all ranks."""
        if not self.expert_parallel:
            return 0, count
        return _even(count, self.world, self.ep_rank if rank is None else rank)

    def places(self, count: int) -> Places:
        """The experts of all ranks, where nobody has placed them otherwise."""
        ranks = range(self.world)
        return tuple(tuple(range(*self.experts(count, rank))) for rank in ranks)

    def intermediate(self, size: int, unit: int = 1) -> Range:
        """Columns of every expert's intermediate dimension, in whole ``unit``s, perhaps uneven."""
        if self.expert_parallel:
            return 0, size
        first, last = _even(size // unit, self.tp, self.rank)
        return first * unit, last * unit

    @property
    def adds_expert_bias(self) -> bool:
        """Whether the down projection's bias is this rank's to add: once for every expert."""
        return self.expert_parallel or self.rank == 0


def check(
    layout: Layout,
    *,
    heads: int,
    kv_heads: int,
    experts: int,
    intermediate: int,
    unit: int,
    vocabulary: int,
) -> None:
    """Raise LayoutError where a model with these numbers cannot be cut so.

    ``unit`` is what the intermediate dimension may be cut into: 32 for MXFP4, else 1.
    """
    tp, dp = layout.tp, layout.dp
    flag, engines = f"--tensor-parallel-size {tp}", f"--data-parallel-size {dp}"
    if tp < 1:
        raise LayoutError(f"{flag} must be at least 1")
    if dp < 1:
        raise LayoutError(f"{engines} must be at least 1")
    if dp > 1 and not layout.expert_parallel:
        raise LayoutError(
            f"{engines} needs --enable-expert-parallel: engines that share no experts are replicas"
        )
    if heads % tp:
        raise LayoutError(f"{flag} does not divide the model's {heads} attention heads")
    if kv_heads % tp and tp % kv_heads:
        raise LayoutError(f"{flag} and the model's {kv_heads} KV heads: one must divide the other")
    if vocabulary < tp:
        raise LayoutError(f"{flag} exceeds the vocabulary of {vocabulary} tokens")
    if layout.expert_parallel and experts < layout.world:
        ranks = flag if dp == 1 else f"{engines} x {flag} = {layout.world} ranks"
        raise LayoutError(
            f"{ranks} with --enable-expert-parallel exceeds the model's {experts} experts"
        )
    if not layout.expert_parallel and intermediate // unit < tp:
        blocks = f"{intermediate // unit} MXFP4 blocks" if unit > 1 else f"{intermediate} columns"
        raise LayoutError(
            f"{flag} exceeds the {blocks} of an expert's intermediate dimension: "
            "add --enable-expert-parallel or use fewer ranks"
        )


def _even(count: int, parts: int, index: int) -> Range:
    """Contiguous parts whose sizes differ by at most 1, the larger ones first."""
    size, rest = divmod(count, parts)
    first = index * size + min(index, rest)
    return first, first + size + (index < rest)
