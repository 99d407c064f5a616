"""Which rank holds which experts, from what was recorded of their load. Pure.

A step waits in every layer for the rank with the most tokens. A placement moves experts between
ranks, and gives those with the most tokens to several: their tokens are shared out evenly. It is
made once, layer by layer: the busiest expert gets the next copy, then the busiest copy goes to the
idlest rank. Where ranks lie on several nodes, experts are first spread over the nodes, and all
copies of an expert stay on its node: which copy serves a token changes nothing between nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Annotated, Literal, TypeVar

import msgspec

from parallelism.layout import Layout, Places

Count = Annotated[int, msgspec.Meta(ge=0)]
Some = Annotated[int, msgspec.Meta(ge=1)]


class PlacementError(ValueError):
    """A load or a placement that cannot be; the message names the numbers."""


class ExpertLoad(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Tokens that every expert of every layer got; a file of ``moeray serve --expert-load``."""

    version: Literal[1] = 1
    model: str  # its name, for people
    config: str  # SHA-256 of its config.json
    expert_bytes: Count  # of one expert of one layer, as the recording engine held it
    calls: tuple[tuple[Count, ...], ...]  # [layers][experts]

    def __post_init__(self) -> None:
        if not self.calls or not self.calls[0]:
            raise PlacementError("there are no layers or no experts in it")
        for layer, calls in enumerate(self.calls):
            if len(calls) != self.experts:
                raise PlacementError(
                    f"layer {layer} has {len(calls)} experts, layer 0 has {self.experts}"
                )

    @property
    def experts(self) -> int:
        return len(self.calls[0])

    def plus(self, other: ExpertLoad) -> ExpertLoad:
        """Both together. Raises PlacementError where they are not of one model."""
        if (self.config, len(self.calls), self.experts) != (
            other.config,
            len(other.calls),
            other.experts,
        ):
            raise PlacementError(f"loads of two models: {_of(self)} and {_of(other)}")
        calls = tuple(
            tuple(map(sum, zip(*both, strict=True)))
            for both in zip(self.calls, other.calls, strict=True)
        )
        return msgspec.structs.replace(self, calls=calls)


class Placement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The experts of every rank; a file of ``moeray experts --output``."""

    version: Literal[1] = 1
    model: str
    config: str
    experts: Some
    slots: Some  # experts of a layer that a rank may hold at most
    ranks_per_node: Some
    layers: tuple[Places, ...]  # [layers][ranks] experts in ascending order

    def __post_init__(self) -> None:
        if not self.layers or not self.layers[0]:
            raise PlacementError("there are no layers or no ranks in it")
        if self.ranks % self.ranks_per_node:
            raise PlacementError(f"{self.ranks} ranks do not fill nodes of {self.ranks_per_node}")
        for layer, places in enumerate(self.layers):
            if len(places) != self.ranks:
                raise PlacementError(
                    f"layer {layer} has {len(places)} ranks, layer 0 has {self.ranks}"
                )
            for rank, held in enumerate(places):
                where = f"layer {layer}, rank {rank}"
                if len(held) > self.slots:
                    raise PlacementError(f"{where}: {len(held)} experts for {self.slots} slots")
                if any(a >= b for a, b in pairwise(held)):
                    raise PlacementError(f"{where}: experts are not in ascending order, each once")
                if held and not 0 <= held[0] <= held[-1] < self.experts:
                    raise PlacementError(
                        f"{where}: experts {held[0]} to {held[-1]} of a model that has 0 to "
                        f"{self.experts - 1}"
                    )
            placed = {expert for held in places for expert in held}
            if len(placed) < self.experts:
                missing = next(i for i in range(self.experts) if i not in placed)
                raise PlacementError(f"layer {layer}: no rank holds expert {missing}")

    @property
    def ranks(self) -> int:
        return len(self.layers[0])

    def loads(self, load: ExpertLoad, per: int = 1) -> list[list[float]]:
        """Tokens [layers][ranks], or of every ``per`` ranks together."""
        both = zip(load.calls, self.layers, strict=True)
        return [_by_rank(calls, places, per) for calls, places in both]

    def held(self, rank: int) -> int:
        """Experts of a rank, in all layers."""
        return sum(len(places[rank]) for places in self.layers)

    def bytes(self, expert_bytes: int) -> int:
        """Of the experts of the rank that holds the most."""
        return max(map(self.held, range(self.ranks))) * expert_bytes

    def check(self, config: str, layers: int, experts: int, ranks: int) -> None:
        """Raise PlacementError where it is not for such a model on so many ranks."""
        ours, asked = (len(self.layers), self.experts), (layers, experts)
        if (self.config, *ours) != (config, *asked):
            raise PlacementError(
                f"the placement is for {_of(self)}, not for a model of {layers} layers, {experts} "
                f"experts and config.json {config[:12]}"
            )
        if self.ranks != ranks:
            raise PlacementError(f"the placement is for {self.ranks} ranks, not for {ranks}")

    def fit(self, expert_bytes: int, room: int, rank: int | None = None) -> None:
        """Raise PlacementError where the experts of a rank, or of this one, take more than ``room``
        bytes."""
        needed = self.bytes(expert_bytes) if rank is None else self.held(rank) * expert_bytes
        if needed > room:
            raise PlacementError(
                f"the placement puts {needed:,} bytes of experts on "
                f"{'one rank' if rank is None else f'rank {rank}'} ({expert_bytes:,} each, "
                f"{self.slots} slots in {len(self.layers)} layers); there is room for {room:,}: "
                "give it fewer redundant experts or more ranks"
            )


File = TypeVar("File", ExpertLoad, Placement)


def parse(kind: type[File], data: bytes) -> File:
    """A file's content. Raises PlacementError."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        name = "expert load" if kind is ExpertLoad else "placement"
        raise PlacementError(f"this is no {name}: {error}") from error


def imbalance(loads: Sequence[Sequence[float]]) -> float:
    """How much longer a step takes than with evenly spread tokens: the most over the mean of
    [layers][ranks], averaged over layers that have any; 1 is even."""
    ratios = [max(each) * len(each) / sum(each) for each in loads if sum(each)]
    return sum(ratios) / len(ratios) if ratios else 1.0


def contiguous(load: ExpertLoad, ranks: int, ranks_per_node: int = 0) -> Placement:
    """What is without a placement: each rank holds a range of experts. Raises PlacementError.

    ``ranks_per_node`` 0: all are on one node.
    """
    if not 1 <= ranks <= load.experts:
        raise PlacementError(f"{ranks} ranks for {load.experts} experts: give 1 to {load.experts}")
    if ranks_per_node < 0 or (ranks_per_node and ranks % ranks_per_node):
        raise PlacementError(f"{ranks} ranks do not fill nodes of {ranks_per_node}")
    places = _in_order(load.experts, ranks)
    return Placement(
        model=load.model,
        config=load.config,
        experts=load.experts,
        slots=len(places[0]),
        ranks_per_node=ranks_per_node or ranks,
        layers=(places,) * len(load.calls),
    )


def place(load: ExpertLoad, ranks: int, redundant: int = 0, ranks_per_node: int = 0) -> Placement:
    """One whose ranks hold up to ``redundant`` experts more in every layer.

    For this load, no layer is worse than contiguous, nor than with fewer redundant experts; slots
    that would not help stay free. Raises PlacementError.
    """
    start = contiguous(load, ranks, ranks_per_node)
    most = load.experts - start.slots
    if not 0 <= redundant <= most:
        raise PlacementError(
            f"{redundant} redundant experts on each of {ranks} ranks, which hold {start.slots} of "
            f"{load.experts} already: give 0 to {most}"
        )
    layers = []
    for calls, best in zip(load.calls, start.layers, strict=True):
        least = _worst(calls, best, start.ranks_per_node)
        for extra in range(redundant + 1):
            found = _spread(calls, ranks, start.ranks_per_node, start.slots + extra, extra)
            if (worst := _worst(calls, found, start.ranks_per_node)) < least:
                best, least = found, worst
        layers.append(best)
    return msgspec.structs.replace(start, slots=start.slots + redundant, layers=tuple(layers))


def _spread(calls: Sequence[int], ranks: int, per_node: int, slots: int, extra: int) -> Places:
    """One layer: experts over the nodes, then theirs and ``extra`` copies a rank over the ranks."""
    nodes = ranks // per_node
    shares = [*map(len, _in_order(len(calls), nodes))]
    places: list[tuple[int, ...]] = []
    for experts in _pack([(float(load), expert) for expert, load in enumerate(calls)], shares):
        copies = _copies({expert: calls[expert] for expert in experts}, extra * per_node, per_node)
        places += _pack(copies, [slots] * per_node)
    return tuple(places)


def _copies(calls: dict[int, int], extra: int, most: int) -> list[tuple[float, int]]:
    """(tokens, expert) of every copy: the busiest gets the next one, up to ``most`` of each."""
    count = dict.fromkeys(calls, 1)
    queue = [(-float(load), expert) for expert, load in calls.items()] if most > 1 else []
    heapify(queue)
    while extra and queue:
        _, expert = heappop(queue)
        count[expert] += 1
        extra -= 1
        if count[expert] < most:
            heappush(queue, (-calls[expert] / count[expert], expert))
    return [(calls[expert] / n, expert) for expert, n in count.items() for _ in range(n)]


def _pack(copies: Sequence[tuple[float, int]], slots: Sequence[int]) -> Places:
    """The busiest copy goes to the idlest place that has a free slot and no copy of it."""
    held: list[list[int]] = [[] for _ in slots]
    total = [0.0] * len(slots)
    for load, expert in sorted(copies, key=lambda copy: (-copy[0], copy[1])):
        free = [at for at, most in enumerate(slots) if len(held[at]) < most]
        # Where all that are free have a copy already, there is one fewer.
        if fit := [at for at in free if expert not in held[at]]:
            at = min(fit, key=lambda at: (total[at], len(held[at]), at))
            held[at].append(expert)
            total[at] += load
    return tuple(tuple(sorted(experts)) for experts in held)


def _by_rank(calls: Sequence[int], places: Places, per: int) -> list[float]:
    """Tokens of every ``per`` ranks together, where copies share theirs evenly."""
    copies = [0] * len(calls)
    for held in places:
        for expert in held:
            copies[expert] += 1
    ranks = [sum(calls[expert] / copies[expert] for expert in held) for held in places]
    return [sum(ranks[at : at + per]) for at in range(0, len(ranks), per)]


def _worst(calls: Sequence[int], places: Places, per_node: int) -> tuple[float, float]:
    """Tokens of the busiest rank, then of the busiest node."""
    return max(_by_rank(calls, places, 1)), max(_by_rank(calls, places, per_node))


def _in_order(count: int, parts: int) -> Places:
    """As experts are spread without a placement."""
    return Layout(tp=parts, expert_parallel=True).places(count)


def _of(what: ExpertLoad | Placement) -> str:
    layers = len(what.calls if isinstance(what, ExpertLoad) else what.layers)
    return f"{what.model} ({layers} layers, {what.experts} experts, config.json {what.config[:12]})"
