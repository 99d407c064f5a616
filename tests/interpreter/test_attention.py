"""Paged attention under Triton's interpreter against a row-by-row softmax."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels import attention, configurations
from kernels.attention import PagedPlan
from kernels.reference import Put, Rows
from tests.test_kernels import BATCHES, KV_DTYPES, Scene, assert_batch_invariant

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Paged:
    """The Triton kernels as ``Scene.attend`` wants them."""

    def __init__(self, scene: Scene, invariant: bool, span: int = 0) -> None:
        heads, kv_heads = scene.q.shape[1], scene.k_cache.shape[1]
        self.config = configurations.attention(
            "generic", heads, kv_heads, scene.q.shape[2], invariant
        )
        if span:
            small = configurations.Tile(16, 16, 0, 4, 1)
            self.config = configurations.Attention(
                heads // kv_heads, kv_heads, small, small, 264, span, span if invariant else 0
            )

    def plan(self, rows: Rows, put: Put) -> PagedPlan:
        return attention.plan(rows, put, self.config)

    paged_attention = staticmethod(attention.paged_attention)


@example(  # keys are split, and the sink counts once
    dtype=torch.float32,
    rows=[(150, 1)],
    heads=(8, 1),
    size=16,
    block_size=16,
    window=0,
    span=32,
    invariant=False,
    kv_dtype=None,
)
@settings(max_examples=30)
@given(
    dtype=st.sampled_from(list(TOLERANCE)),
    rows=st.lists(
        st.tuples(st.integers(0, 150), st.sampled_from([1, 1, 1, 2, 7, 40])),
        min_size=1,
        max_size=4,
    ),
    heads=st.sampled_from([(8, 1), (8, 2), (4, 4), (6, 1), (10, 2), (3, 1)]),
    size=st.sampled_from([16, 64]),
    block_size=st.sampled_from([4, 16]),
    window=st.sampled_from([0, 1, 8, 33]),
    span=st.sampled_from([0, 32]),
    invariant=st.booleans(),
    kv_dtype=KV_DTYPES,
)
def test_attention(
    dtype: torch.dtype,
    rows: list[tuple[int, int]],
    heads: tuple[int, int],
    size: int,
    block_size: int,
    window: int,
    span: int,
    invariant: bool,
    kv_dtype: torch.dtype | None,
) -> None:
    scene = Scene(
        rows,
        heads=heads[0],
        kv_heads=heads[1],
        size=size,
        block_size=block_size,
        window=window,
        dtype=dtype,
        kv_dtype=kv_dtype,
    )
    ours = scene.attend(Paged(scene, invariant, span))
    assert not ours.isnan().any()
    torch.testing.assert_close(
        ours.double(), scene.expected(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


@settings(max_examples=10)
@given(**BATCHES)
def test_rows_never_depend_on_their_batch(
    others: list[int], window: int, cuts: list[int], kv_dtype: torch.dtype | None
) -> None:
    """With spans of 32 keys: prefilled in one program or decoded in several, to the bit."""
    assert_batch_invariant(
        lambda scene: scene.attend(Paged(scene, invariant=True, span=32)),
        others,
        window,
        cuts,
        kv_dtype,
    )
