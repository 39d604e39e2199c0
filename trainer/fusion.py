"""Two rankings as one, by reciprocal ranks (Cormack, Clarke and Buettcher, SIGIR 2009)."""

from dataclasses import dataclass
from itertools import takewhile

import numpy as np

from models import fusion
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
        best = fusion.fuse([_listed(first, row), _listed(second, row)], constant)
        for place, (item, score, seed) in enumerate(best[:k]):
            items[row, place], scores[row, place] = item, score
            seeds[row, place] = NONE if seed is None else seed
    return Ranking(items, scores, seeds)


def _listed(ranking: Ranking, row: int) -> list[fusion.Ranked[int]]:
    """One case's list, which ends where nothing is named any more."""
    listed = zip(ranking.items[row].tolist(), ranking.scores[row].tolist(), ranking.seeds[row].tolist(), strict=True)
    named = takewhile(lambda one: one[0] != NONE, listed)
    return [fusion.Ranked(item, score, None if seed == NONE else seed) for item, score, seed in named]
