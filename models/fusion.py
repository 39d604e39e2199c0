"""Several ranked lists made into one."""

from collections.abc import Sequence
from typing import NamedTuple


class Ranked(NamedTuple):
    """An item of a list, and the item that brought it; None: popularity did."""

    item_id: str
    score: float
    seed: str | None


def fuse(lists: Sequence[Sequence[Ranked]], constant: int) -> list[Ranked]:
    """By the sum of 1 / (constant + rank), rank from 1 (reciprocal-rank fusion, Cormack et al. 2009).

    Of equals the one that an earlier list has comes first, and so does its seed.
    """
    scores: dict[str, float] = {}
    seeds: dict[str, str | None] = {}
    for ranked in lists:
        for rank, one in enumerate(ranked, 1):
            scores[one.item_id] = scores.get(one.item_id, 0.0) + 1.0 / (constant + rank)
            if seeds.get(one.item_id) is None:
                seeds[one.item_id] = one.seed
    best = sorted(scores, key=lambda item_id: -scores[item_id])
    return [Ranked(item_id, scores[item_id], seeds[item_id]) for item_id in best]
