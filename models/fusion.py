"""Several ranked lists made into one."""

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item", str, int)  # by its id or by its number


class Ranked(NamedTuple, Generic[Item]):
    """An item of a list, and the item that brought it; None: popularity did."""

    item: Item
    score: float
    seed: Item | None


def fuse(lists: Sequence[Sequence[Ranked[Item]]], constant: float) -> list[Ranked[Item]]:
    """By the sum of 1 / (constant + rank), rank from 1 (reciprocal-rank fusion, Cormack et al. 2009).

    Of equals the one that an earlier list has comes first, and so does its seed.
    """
    scores: dict[Item, float] = {}
    seeds: dict[Item, Item | None] = {}
    for ranked in lists:
        for rank, one in enumerate(ranked, 1):
            scores[one.item] = scores.get(one.item, 0.0) + 1.0 / (constant + rank)
            if seeds.get(one.item) is None:
                seeds[one.item] = one.seed
    best = sorted(scores, key=lambda item: -scores[item])
    return [Ranked(item, scores[item], seeds[item]) for item in best]
