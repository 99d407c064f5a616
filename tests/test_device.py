"""What goes to the device in one copy, and how memory is shared out there."""

from __future__ import annotations

import pytest
import torch

from workers.capacity import device_room
from workers.device import ALIGNED, RING, Staging
from workers.runner import ladder


def test_a_step_is_packed_into_one_copy_at_the_same_addresses() -> None:
    staging = Staging(256, torch.device("cpu"), pinned=False)
    addresses = set()
    for step in range(2 * RING):
        given = [
            torch.arange(3) + step,
            torch.arange(5, dtype=torch.int32) - step,
            torch.zeros(0, dtype=torch.int64),
            torch.ones(2, 2, dtype=torch.bool),
        ]
        put = [staging.put(tensor) for tensor in given]
        assert staging.flush() == step % RING
        for ours, theirs in zip(put, given, strict=True):
            assert torch.equal(ours, theirs)
            assert ours.data_ptr() % ALIGNED == put[0].data_ptr() % ALIGNED
        addresses.add(tuple(tensor.data_ptr() for tensor in put))
    assert len(addresses) == 1


def test_values_arrive_with_the_copy_and_not_before() -> None:
    staging = Staging(64, torch.device("cpu"), pinned=False)
    first = staging.put(torch.tensor([1]))
    staging.flush()
    second = staging.put(torch.tensor([2]))
    assert first.item() == second.item() == 1
    staging.flush()
    assert first.item() == second.item() == 2


def test_too_large_a_step_is_refused() -> None:
    staging = Staging(64, torch.device("cpu"), pinned=False)
    with pytest.raises(RuntimeError, match="over 64 bytes"):
        staging.put(torch.zeros(9, dtype=torch.int64))


@pytest.mark.parametrize("most", [1, 2, 5, 32, 33, 64, 256])
def test_every_batch_has_a_size_on_the_ladder(most: int) -> None:
    sizes = ladder(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for rows in range(1, most + 1):
        size = next(size for size in sizes if size >= rows)
        assert size < max(2 * rows, rows + 32)


def test_the_kv_cache_gets_what_the_rest_leaves() -> None:
    """80 of 100 may be used; 30 are taken, a step takes 5, and so do graphs."""
    assert device_room(total=100, free=70, activations=5, utilization=0.8) == 40
    assert device_room(total=100, free=10, activations=5, utilization=0.9) == 0
