"""Which part of which stored tensor a parameter is. Pure; the loader, the checker and the memory
plan all read this one declaration."""

from __future__ import annotations

from math import prod

import msgspec

Range = tuple[int, int]  # first, one past the last


class Slice(msgspec.Struct, frozen=True):
    """A rectangular part of one tensor of the checkpoint."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor, as stored
    ranges: tuple[Range, ...]  # the part, by dimension
    packed: bool = False  # stored as bytes (uint8), not as numbers
    transposed: bool = False  # the parameter has the last two dimensions the other way round

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the part, as it lies in the file."""
        return tuple(last - first for first, last in self.ranges)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Of the part, as the parameter holds it."""
        *rest, a, b = (1, *self.stored_shape)
        return (*rest[1:], b, a) if self.transposed else self.stored_shape

    @property
    def count(self) -> int:
        """Elements of the part."""
        return prod(self.stored_shape)

    def runs(self, item: int) -> tuple[int, tuple[tuple[int, int], ...], int]:
        """How the part lies in the stored tensor with ``item`` bytes per element.

        Returns (offset of the first byte, ((count, stride), ...) from the outside in, length):
        runs of ``length`` adjacent bytes, repeated along every (count, stride in bytes).
        """
        strides = [item * prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        offset = sum(
            first * stride for (first, _), stride in zip(self.ranges, strides, strict=True)
        )
        inner = len(self.shape)
        length = item
        while inner:  # dimensions that are adjacent bytes
            first, last = self.ranges[inner - 1]
            length *= last - first
            inner -= 1
            if (first, last) != (0, self.shape[inner]):
                break
        outer = tuple(
            (last - first, stride)
            for (first, last), stride in zip(self.ranges[:inner], strides[:inner], strict=True)
        )
        return offset, outer, length


def whole(name: str, *shape: int) -> Slice:
    """All of a tensor."""
    return Slice(name, shape, tuple((0, size) for size in shape))


def part(name: str, shape: tuple[int, ...], axis: int, cut: Range, **how: bool) -> Slice:
    """Of ``axis`` only ``cut``; of the others everything."""
    ranges = tuple(cut if at == axis else (0, size) for at, size in enumerate(shape))
    return Slice(name, shape, ranges, **how)
