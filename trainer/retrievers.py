"""What every retriever does: rank the items of the index for each of some cases."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from trainer.interactions import NONE, Cases, Task

BATCH = 200  # cases that are scored at a time


class Ranking(NamedTuple):
    """The best items of B cases, best first; where a case has fewer than k, the rest is -1 with a score of -inf."""

    items: np.ndarray  # (B, k) int32
    scores: np.ndarray  # (B, k) float32
    seeds: np.ndarray  # (B, k) int32: the item of the history that brought it; -1: none did


class Retriever(Protocol):
    """Ranks items of the case's snapshot that its user has not seen, from its history alone."""

    @property
    def name(self) -> str:
        """As it stands in the report."""
        ...

    def rank(self, cases: Cases, k: int) -> Ranking:
        """The k best items of each case."""
        ...


# Scores (B, M) of some cases over the items of a snapshot, and (B, M) the seed that brought each, or None.
Score = Callable[[Cases], tuple[np.ndarray, np.ndarray | None]]


def rank_by(prepare: Callable[[int], Score], task: Task, cases: Cases, k: int) -> Ranking:
    """The k items that score highest for each case; what its user has seen is masked before.

    `prepare` is called once for each snapshot that is asked.
    """
    shape = (len(cases), k)
    found = Ranking(np.full(shape, NONE, np.int32), np.full(shape, -np.inf, np.float32), np.full(shape, NONE, np.int32))
    for snapshot, rows in cases.by_snapshot():
        items, score = task.snapshots[snapshot].items, prepare(snapshot)
        for part in np.array_split(rows, -(-len(rows) // BATCH)):
            some = cases.take(part)
            scores, seeds = score(some)
            masked = np.where(some.seen()[:, items].toarray(), -np.inf, scores)
            for whole, one in zip(found, best(masked, items, k, seeds), strict=True):
                whole[part] = one
    return found


def best(scores: np.ndarray, items: np.ndarray, k: int, seeds: np.ndarray | None = None) -> Ranking:
    """The k highest of `scores` (B, M) over the index's `items` (M,); -inf is never retrieved, ties go to the first.

    `seeds` (B, M): the item that brought each.
    """
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k] if k >= scores.shape[1] else _highest(scores, k)
    found = np.take_along_axis(scores, order, axis=1).astype(np.float32)
    there = np.isfinite(found)
    brought = np.full(order.shape, NONE) if seeds is None else np.take_along_axis(seeds, order, axis=1)
    short = ((0, 0), (0, k - order.shape[1]))
    return Ranking(
        np.pad(np.where(there, items[order], NONE).astype(np.int32), short, constant_values=NONE),
        np.pad(np.where(there, found, -np.inf), short, constant_values=-np.inf).astype(np.float32),
        np.pad(np.where(there, brought, NONE).astype(np.int32), short, constant_values=NONE),
    )


def _highest(scores: np.ndarray, k: int) -> np.ndarray:
    """(B, k): where the k highest stand, in order. A stable sort of all would give the same, more slowly."""
    floor = np.partition(scores, scores.shape[1] - k, axis=1)[:, scores.shape[1] - k, None]
    order = np.empty((len(scores), k), dtype=np.int64)
    for row, (values, least) in enumerate(zip(scores, floor[:, 0], strict=True)):
        places = np.flatnonzero(values >= least)
        order[row] = places[np.argsort(-values[places], kind="stable")[:k]]
    return order
