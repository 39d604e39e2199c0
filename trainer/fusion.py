"""Two rankings as one, by reciprocal ranks (Cormack, Clarke and Buettcher, SIGIR 2009)."""

from dataclasses import dataclass

import numpy as np

from trainer.interactions import NONE, Cases
from trainer.retrievers import Ranking, Retriever

CONSTANT = 60.0
DEPTH = 100  # of each list, at least


@dataclass(frozen=True)
class Fused:
    """The sum of 1 / (constant + rank) over both lists; an item's seed is that of the first list that has one."""

    name: str
    first: Retriever
    second: Retriever
    constant: float = CONSTANT

    def rank(self, cases: Cases, k: int) -> Ranking:
        """See Retriever."""
        depth = max(k, DEPTH)
        return fuse(self.first.rank(cases, depth), self.second.rank(cases, depth), k, self.constant)


def fuse(first: Ranking, second: Ranking, k: int, constant: float = CONSTANT) -> Ranking:
    """The k best of both lists of each case; of equals, those of the first list, in its order."""
    size = len(first.items)
    items = np.full((size, k), NONE, dtype=np.int32)
    scores = np.full((size, k), -np.inf, dtype=np.float32)
    seeds = np.full((size, k), NONE, dtype=np.int32)
    for row in range(size):
        found: dict[int, tuple[float, int]] = {}  # item -> score, seed
        for ranking in (first, second):
            listed = zip(ranking.items[row].tolist(), ranking.seeds[row].tolist(), strict=True)
            for rank, (item, seed) in enumerate(listed, start=1):
                if item == NONE:
                    break
                score, by = found.get(item, (0.0, NONE))
                found[item] = (score + 1 / (constant + rank), seed if by == NONE else by)
        top = sorted(found.items(), key=lambda one: -one[1][0])[:k]
        for place, (item, (score, seed)) in enumerate(top):
            items[row, place], scores[row, place], seeds[row, place] = item, score, seed
    return Ranking(items, scores, seeds)
