"""How the lists of several seeds become one: the highest score wins, or places are dealt by quotas."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

REFILLED = 100.0  # what refilled places score less, so that they stand behind all others; far above any sum of cosines


@dataclass(frozen=True)
class Slots:
    """How places are dealt. `merge` of an item found by several seeds: its highest score, or their sum."""

    merge: Literal["max", "sum"] = "max"
    quotas: bool = False
    power: float = 0.6
    refill: bool = False

    def deal(self, each: np.ndarray, weights: np.ndarray, k: int) -> np.ndarray:
        """Scores (B, S, M) by seed, -inf where an item may not be retrieved, to scores (B, M) of the whole list.

        `weights` (B, S) of the seeds, 0 for none. An item that gets no place has -inf. Seen items must be masked in
        `each`: they would take places from those that can be shown.
        """
        if self.quotas:
            each = each.copy()
            kept = np.zeros(each.shape, dtype=bool)
            for row, quota in enumerate(quotas(weights, k, self.power).tolist()):
                for seed, places in enumerate(quota):
                    top = np.argsort(-each[row, seed], kind="stable")[:places]
                    kept[row, seed, top] = True
            dealt = merged(np.where(kept, each, -np.inf), self.merge)
            if self.refill:
                rest = merged(np.where(weights[:, :, None] > 0, each, -np.inf), self.merge)
                dealt = np.where(np.isfinite(dealt), dealt, rest - REFILLED)
            return dealt
        return merged(np.where(weights[:, :, None] > 0, each, -np.inf), self.merge)


def merged(each: np.ndarray, merge: Literal["max", "sum"]) -> np.ndarray:
    """(B, S, M) -> (B, M): the highest, or the sum of those that are there; -inf where none is."""
    highest: np.ndarray = each.max(axis=1)
    if merge == "max":
        return highest
    there = np.isfinite(each)
    return np.where(there.any(axis=1), np.where(there, each, 0).sum(axis=1), -np.inf)


def quotas(weights: np.ndarray, k: int, power: float) -> np.ndarray:
    """Places of k for each seed, by weight ** power and the largest remainders: (B, S) -> (B, S) int."""
    shares = np.where(weights > 0, np.maximum(weights, 0) ** power, 0.0)
    totals = shares.sum(axis=1, keepdims=True)
    exact = k * np.divide(shares, totals, out=np.zeros(shares.shape), where=totals > 0)
    whole = np.floor(exact + 1e-9).astype(np.int64)
    left = np.where(totals[:, 0] > 0, k - whole.sum(axis=1), 0)
    order = np.argsort(-(exact - whole), axis=1, kind="stable")
    ranks = np.argsort(order, axis=1, kind="stable")
    found: np.ndarray = whole + (ranks < left[:, None])
    return found
