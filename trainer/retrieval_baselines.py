"""Retrievers that count or compare, and learn no weights: what a trained one must beat."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.linalg.lapack import spotrf, spotri

from trainer.covisits import CoVisits, users_by_items
from trainer.interactions import NONE, Cases, Interactions, Task
from trainer.items import Space
from trainer.retrievers import Ranking, Score, rank_by

FILL = 1e-6  # weight of popularity where counts say nothing: it orders what is left, and moves nothing else
WARD_DISTANCE, WARD_DECAY, WARD_CLUSTERS = 0.6, 0.07, 3  # PinnerSage, by the settings that XPert compares with


@dataclass(frozen=True)
class Popularity:
    """The items clicked most in the last `span` ms before the snapshot; None: in all the time it knows."""

    task: Task
    span: int | None = None
    name: str = "popularity"

    def rank(self, cases: Cases, k: int) -> Ranking:
        """See Retriever."""
        return rank_by(self._prepare, self.task, cases, k)

    def _prepare(self, snapshot: int) -> Score:
        clicks = log_clicks(self.task, snapshot, self.span)
        return lambda cases: (np.broadcast_to(clicks, (len(cases), len(clicks))), None)


@dataclass(frozen=True)
class Counts:
    """Co-visits of the items clicked last: the k-th newest weighs `fade` ** k, over its clicks to the `power`."""

    task: Task
    count: Callable[[Interactions], CoVisits]
    span: int | None = None
    seeds: int = 5
    fade: float = 0.5
    power: float = 0.5
    name: str = "counts"

    def rank(self, cases: Cases, k: int) -> Ranking:
        """See Retriever."""
        return rank_by(self._prepare, self.task, cases, k)

    def _prepare(self, snapshot: int) -> Score:
        visits, items = self.task.learned(snapshot, self.span).once(self.count), self.task.snapshots[snapshot].items
        weights = self.fade ** np.arange(self.seeds)
        fill = FILL * log_clicks(self.task, snapshot, self.span)

        def score(cases: Cases) -> tuple[np.ndarray, np.ndarray]:
            recent = cases.recent(self.seeds)
            each = visits.scores(recent, weights, self.power, items)  # (B, s, M)
            return each.sum(axis=1) + fill, _brought(recent, each)

        return score


@dataclass(frozen=True)
class Nearest:
    """The items closest to one of the seeds, by cosine: per-event retrieval that is not personal (NP-PER).

    `pick` chooses up to s seeds (B, s) of some cases, -1 where there are fewer.
    """

    task: Task
    spaces: Sequence[Space]  # one a snapshot
    pick: Callable[[Cases, Space], np.ndarray]
    name: str = "nearest items"

    def rank(self, cases: Cases, k: int) -> Ranking:
        """See Retriever."""
        return rank_by(self._prepare, self.task, cases, k)

    def _prepare(self, snapshot: int) -> Score:
        space = self.spaces[snapshot]
        items = _vectors(space, self.task.snapshots[snapshot].items)

        def score(cases: Cases) -> tuple[np.ndarray, np.ndarray]:
            seeds = self.pick(cases, space)
            cosines = _vectors(space, seeds) @ items.T  # (B, s, M)
            cosines[space.rows(seeds) == NONE] = -np.inf
            return cosines.max(axis=1), _brought(seeds, cosines)

        return score


def recent_seeds(count: int) -> Callable[[Cases, Space], np.ndarray]:
    """The distinct items clicked last."""
    return lambda cases, space: cases.recent(count)


def ward_medoids(cases: Cases, space: Space) -> np.ndarray:
    """(B, 3): the medoids of the Ward clusters that matter most among what a user clicked (PinnerSage, section 3).

    A cluster's importance is the sum of exp(-0.07 * age) over its clicks, the newest of age 1.
    """
    found = np.full((len(cases), WARD_CLUSTERS), NONE, dtype=np.int32)
    for row in range(len(cases)):
        history = cases.history(row)
        history = history[space.rows(history) != NONE]
        if len(history):
            medoids = _medoids(history, space)[:WARD_CLUSTERS]
            found[row, : len(medoids)] = medoids
    return found


@dataclass(frozen=True)
class EASE:
    """A linear model of all items on all others, in closed form ("Embarrassingly shallow autoencoders", Steck 2019).

    Over the items of the snapshot: M^2 floats of memory, and M^3 steps.
    """

    task: Task
    penalty: float = 100.0
    span: int | None = None
    name: str = "EASE"

    def rank(self, cases: Cases, k: int) -> Ranking:
        """See Retriever."""
        return rank_by(self._prepare, self.task, cases, k)

    def _prepare(self, snapshot: int) -> Score:
        items = self.task.snapshots[snapshot].items
        clicked = users_by_items(self.task.known(snapshot, self.span))[:, items]
        weights = ease_weights(np.asarray((clicked.T @ clicked).toarray(), dtype=np.float32), self.penalty)
        fill = FILL * log_clicks(self.task, snapshot, self.span)
        return lambda cases: (cases.seen()[:, items].astype(np.float32) @ weights + fill, None)


def ease_weights(gram: np.ndarray, penalty: float) -> np.ndarray:
    """B = I - P / diag(P) with P = (gram + penalty I)^-1, (M, M) -> (M, M); overwrites `gram`."""
    gram[np.diag_indices_from(gram)] += penalty
    factor, wrong = spotrf(gram, lower=1, clean=1, overwrite_a=1)
    inverse, failed = spotri(factor, lower=1, overwrite_c=1)
    if wrong or failed:
        raise ValueError(f"the item matrix cannot be inverted with a penalty of {penalty}. Raise it.")
    inverse = np.tril(inverse) + np.tril(inverse, -1).T
    weights: np.ndarray = -inverse / np.diag(inverse)
    weights[np.diag_indices_from(weights)] = 0
    return weights


def log_clicks(task: Task, snapshot: int, span: int | None) -> np.ndarray:
    """(M,) float32: log(1 + clicks) of the snapshot's items in the last `span` ms before it."""
    clicks = task.known(snapshot, span).popularity()[task.snapshots[snapshot].items]
    found: np.ndarray = np.log1p(clicks).astype(np.float32)
    return found


def _vectors(space: Space, items: np.ndarray) -> np.ndarray:
    """(...) -> (..., D), zeros for those without a vector."""
    rows = space.rows(items)
    found: np.ndarray = space.vectors[np.maximum(rows, 0)] * (rows != NONE)[..., None]
    return found


def _brought(seeds: np.ndarray, each: np.ndarray) -> np.ndarray:
    """(B, s), (B, s, M) -> (B, M): the seed that counts most for each item."""
    found: np.ndarray = np.take_along_axis(seeds, each.argmax(axis=1), axis=1)
    return found


def _medoids(history: np.ndarray, space: Space) -> np.ndarray:
    """The medoid of each Ward cluster, the most important cluster first; `history` (H,), oldest first."""
    vectors = _vectors(space, history)
    importance = np.exp(-WARD_DECAY * np.arange(len(history), 0, -1))
    if len(history) == 1:
        return history
    cluster = fcluster(linkage(vectors, "ward"), WARD_DISTANCE, "distance") - 1
    found = []
    for label in np.argsort(-np.bincount(cluster, importance), kind="stable").tolist():
        members = np.flatnonzero(cluster == label)
        inner = vectors[members]
        apart = ((inner[:, None] - inner[None]) ** 2).sum(axis=(1, 2))
        found.append(history[members[apart.argmin()]])
    return np.array(found, dtype=np.int32)
