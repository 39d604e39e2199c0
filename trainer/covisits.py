"""Co-visitation: how often one item is clicked after, or beside, another by the same user."""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from trainer.interactions import NONE, Interactions


@dataclass(frozen=True)
class CoVisits:
    """Counts of N items by each other."""

    counts: csr_array  # (N, N) float32, from an item to another; never to itself
    clicks: np.ndarray  # (N,) float32: how often each item was clicked (`follow`), or by how many users (`beside`)

    @classmethod
    def follow(cls, log: Interactions) -> "CoVisits":
        """The click that came next, of the same user."""
        same = log.user[1:] == log.user[:-1]
        before, after = log.item[:-1][same], log.item[1:][same]
        moved = before != after
        ones = np.ones(int(moved.sum()), dtype=np.float32)
        shape = (len(log.items), len(log.items))
        clicks = np.bincount(before, minlength=len(log.items)).astype(np.float32)
        return cls(csr_array((ones, (before[moved], after[moved])), shape=shape), clicks)

    @classmethod
    def beside(cls, log: Interactions) -> "CoVisits":
        """Users who clicked both, in whatever order."""
        clicked = users_by_items(log)
        together = csr_array(clicked.T @ clicked)
        clicks = together.diagonal()
        together.setdiag(0)
        together.eliminate_zeros()
        return cls(together, clicks)

    def scores(self, recent: np.ndarray, weights: np.ndarray, power: float, items: np.ndarray) -> np.ndarray:
        """(B, s, M) weight * count / clicks(seed) ** power of each of `items` (M,) beside each seed.

        `recent` (B, s), -1 where there is no seed, which counts nothing; `weights` (s,).
        """
        seeds = recent.ravel()
        there = seeds != NONE
        scale = np.tile(weights, len(recent)) / np.maximum(self.clicks[seeds], 1) ** power * there
        found = self.counts[np.where(there, seeds, 0)][:, items].toarray() * scale[:, None]
        each: np.ndarray = found.reshape(*recent.shape, len(items)).astype(np.float32)
        return each


def users_by_items(log: Interactions) -> csr_array:
    """(U, N) float32: 1 where the user clicked the item."""
    clicked = csr_array(
        (np.ones(len(log.item), dtype=np.float32), (log.user, log.item)), shape=(len(log.users), len(log.items))
    )
    clicked.data[:] = 1  # several clicks were summed
    return clicked
