"""Hypothesis strategies for the engine core: small values in which everything collides."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.oracle import BROKEN
from workers.config import KVConfig, KVGroup, SchedulerConfig
from workers.wire import Request, Sampling, Wait

VOCAB = 7
EOS = 0

FULL = KVGroup("full", (1,), 64)


def kv_groups() -> st.SearchStrategy[tuple[KVGroup, ...]]:
    """One to three groups, a full one not always among them. Chunks fit block sizes 1, 2, 4."""
    windows = st.integers(1, 9).map(lambda n: KVGroup("window", (0,), 64, n))
    chunks = st.sampled_from([4, 8]).map(lambda n: KVGroup("chunk", (2,), 64, n))
    return st.one_of(
        windows.map(lambda window: (FULL, window)),
        st.just((FULL,)),
        st.tuples(windows),
        st.tuples(st.just(FULL), chunks),
        st.tuples(windows, st.just(FULL), chunks),
    )


def kv_configs(min_blocks: int = 6, max_blocks: int = 40) -> st.SearchStrategy[KVConfig]:
    return st.builds(
        KVConfig,
        groups=kv_groups(),
        num_blocks=st.integers(min_blocks, max_blocks),
        block_size=st.sampled_from([1, 2, 4]),
        prefix_caching=st.sampled_from([True, True, True, False]),
    )


def scheduler_configs() -> st.SearchStrategy[SchedulerConfig]:
    return st.builds(
        SchedulerConfig,
        max_num_seqs=st.integers(1, 6),
        max_num_batched_tokens=st.sampled_from([1, 3, 8, 64]),
        max_model_len=st.sampled_from([12, 40]),
        eos_token_ids=st.just((EOS,)),
    )


def prompts() -> st.SearchStrategy[list[int]]:
    """Prompts with long common prefixes."""
    common = [1 + (i * i) % (VOCAB - 1) for i in range(24)]
    tails = st.lists(st.integers(1, VOCAB - 1), max_size=6)
    return st.tuples(st.integers(0, len(common)), tails).map(
        lambda pair: (common[: pair[0]] + pair[1]) or [1]
    )


def samplings() -> st.SearchStrategy[Sampling]:
    return st.builds(
        Sampling,
        max_tokens=st.integers(1, 14),
        temperature=st.sampled_from([0.0, 1.0]),
        seed=st.integers(0, 2),
        min_tokens=st.sampled_from([0, 0, 3]),
        ignore_eos=st.booleans(),
        stop_token_ids=st.sampled_from([(), (), (3,), (2, 5)]),
        logprobs=st.sampled_from([None, None, 0, 2]),
    )


def requests(id: str) -> st.SearchStrategy[Request]:
    """``emitted`` stays empty: only tokens that the model would give are a legal resumption."""
    waits: list[tuple[Wait, ...]] = [(), (), (), ("grammar",), ("image", "remote_kv")]
    return st.builds(
        Request,
        id=st.just(id),
        model=st.just("m"),
        prompt=prompts(),
        sampling=samplings(),
        choice=st.integers(0, 1),
        priority=st.sampled_from([0, 0, 1]),
        salt=st.sampled_from(["", "", "tenant"]),
        waits=st.sampled_from(waits),
        grammar=st.sampled_from(["", "", "", "any", BROKEN]),
    )
