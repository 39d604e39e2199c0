"""How right predictions were: one at a time for the stream, many users at once for reports. numpy only.

Set semantics unless said: each page counts once, whatever the order (HeTLM, section 1.7).
"""

from collections.abc import Collection
from math import log
from typing import NamedTuple

import numpy as np

CLIP = 1e-7
BINS = 15  # of the calibration error


def hr(actual: Collection[str], predicted: Collection[str]) -> int:
    """Hit rate: 1 when at least one predicted page came, else 0."""
    return int(not set(actual).isdisjoint(predicted))


def ioa(actual: Collection[str], predicted: Collection[str]) -> float:
    """Share of the pages that came which were predicted; 0 when no page came."""
    came = set(actual)
    return len(came & set(predicted)) / len(came) if came else 0.0


def iop(actual: Collection[str], predicted: Collection[str]) -> float:
    """Share of the predicted pages that came; 0 when no page was predicted."""
    expected = set(predicted)
    return len(expected & set(actual)) / len(expected) if expected else 0.0


def iou(actual: Collection[str], predicted: Collection[str]) -> float:
    """Pages both predicted and seen, over pages either predicted or seen; 0 when both are empty."""
    union = set(actual) | set(predicted)
    return len(set(actual) & set(predicted)) / len(union) if union else 0.0


def log_loss(p: float, happened: bool) -> float:
    """Negative log probability of what happened, in nats, with `p` clipped to [1e-7, 1 - 1e-7]."""
    p = min(max(p, CLIP), 1.0 - CLIP)
    return -log(p if happened else 1.0 - p)


class Pages(NamedTuple):
    """Page lists of many users, flat: page `codes[i]` (>= 0) is on the list of user `users[i]` (0 to N - 1)."""

    codes: np.ndarray
    users: np.ndarray


def page_scores(
    actual: Pages, predicted: Pages, seen: Pages, users: int, valid: np.ndarray | None = None, multiset: bool = False
) -> dict[str, np.ndarray]:
    """The page scores of each of N users (HeTLM, section 1.7.1): a dict of (N,) arrays.

    hr, ioa, iop and iou count pages once, or with `multiset` as often as both lists hold them. Of the predicted pages,
    val_p is the share that exist, new_p the share of these (each once) that the input `seen` does not hold, new_share
    the share that exist and are not in the input, any_new whether there is one. A user without predicted pages has 0
    everywhere. `valid` (pages,) tells which codes exist; None: all do.
    """
    size = 1 + max((int(pages.codes.max()) for pages in (actual, predicted, seen) if len(pages.codes)), default=0)
    came, came_times = _counted(actual, size)
    said, said_times = _counted(predicted, size)
    both, at_came, at_said = np.intersect1d(came, said, assume_unique=True, return_indices=True)
    hits = _per_user(both // size, users, np.minimum(came_times[at_came], said_times[at_said]) if multiset else None)
    came_pages = _per_user(came // size, users, came_times if multiset else None)
    said_pages = _per_user(said // size, users, said_times if multiset else None)
    exists = np.ones(len(said)) if valid is None else valid[said % size].astype(float)
    new = exists * ~np.isin(said, _counted(seen, size)[0])
    length = _per_user(predicted.users, users)
    return {
        "hr": (hits > 0).astype(float),
        "ioa": _ratio(hits, came_pages),
        "iop": _ratio(hits, said_pages),
        "iou": _ratio(hits, came_pages + said_pages - hits),
        "val_p": _ratio(_per_user(said // size, users, exists * said_times), length),
        "new_p": _ratio(_per_user(said // size, users, new), _per_user(said // size, users, exists)),
        "any_new": (_per_user(said // size, users, new) > 0).astype(float),
        "new_share": _ratio(_per_user(said // size, users, new * said_times), length),
    }


class Cases(NamedTuple):
    """Probabilities and what happened, tied probabilities together, under R weightings: G distinct ones, ascending.

    A weight is how often a user counts: one row of ones is the sample itself, other rows are bootstrap resamples.
    """

    p: np.ndarray  # (G,)
    positives: np.ndarray  # (R, G)
    cases: np.ndarray  # (R, G)

    @classmethod
    def of(cls, p: np.ndarray, happened: np.ndarray, weights: np.ndarray) -> "Cases":
        """(N,) probabilities, (N,) outcomes, (R, N) weights."""
        order = np.argsort(p, kind="stable")
        distinct, first = np.unique(p[order], return_index=True)
        sorted_weights = weights[:, order]
        positives = np.add.reduceat(sorted_weights * happened[order], first, axis=1)
        return cls(distinct, positives, np.add.reduceat(sorted_weights, first, axis=1))


def auc(cases: Cases) -> np.ndarray:
    """Area under the ROC curve, ties count half: (R,). NaN where all or none happened."""
    negatives = cases.cases - cases.positives
    below = np.cumsum(negatives, axis=1) - negatives / 2
    return _defined((cases.positives * below).sum(axis=1), cases.positives.sum(axis=1) * negatives.sum(axis=1))


def average_precision(cases: Cases) -> np.ndarray:
    """Precision at each distinct probability, weighted by the recall it adds: (R,). NaN where none happened."""
    found = np.cumsum(cases.positives[:, ::-1], axis=1)
    said = np.cumsum(cases.cases[:, ::-1], axis=1)
    return _defined((cases.positives[:, ::-1] * _ratio(found, said)).sum(axis=1), found[:, -1])


def calibration_error(cases: Cases, bins: int = BINS) -> np.ndarray:
    """Mean distance of probability and frequency over bins of equal mass (ECE): (R,).

    A case whose rank among N is m (ties share their mean rank, (m - 1/2) / N in (0, 1)) is in bin floor(bins * that).
    """
    resamples = len(cases.cases)
    at = calibration_bins(cases, bins) + bins * np.arange(resamples)[:, None]
    gap = np.bincount(at.ravel(), (cases.positives - cases.cases * cases.p).ravel(), minlength=resamples * bins)
    error: np.ndarray = np.abs(gap).reshape(resamples, bins).sum(axis=1) / cases.cases.sum(axis=1)
    return error


def calibration_bins(cases: Cases, bins: int = BINS) -> np.ndarray:
    """The bin of every distinct probability under each weighting: (R, G)."""
    total = cases.cases.sum(axis=1, keepdims=True)
    middle = np.cumsum(cases.cases, axis=1) - cases.cases / 2
    at: np.ndarray = np.minimum(bins * middle / total, bins - 1).astype(np.int64)
    return at


def worst_share(values: np.ndarray, weights: np.ndarray, share: float = 0.1) -> np.ndarray:
    """Mean of the lowest `share` of the values, at least one: (N,), (R, N) -> (R,)."""
    order = np.argsort(values, kind="stable")
    taken = weights[:, order]
    total = taken.sum(axis=1, keepdims=True)
    most = np.maximum(np.floor(share * total + 1e-9), 1)
    before = np.cumsum(taken, axis=1) - taken
    mean: np.ndarray = (np.clip(most - before, 0, taken) @ values[order]) / most[:, 0]
    return mean


def _counted(pages: Pages, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct (user, page) as user * size + page, ascending, and how often each is there."""
    distinct, times = np.unique(pages.users.astype(np.int64) * size + pages.codes, return_counts=True)
    return distinct, times


def _per_user(users: np.ndarray, count: int, weights: np.ndarray | None = None) -> np.ndarray:
    return np.bincount(users, weights, minlength=count).astype(float)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    ratio: np.ndarray = np.divide(part, whole, out=np.zeros_like(part, dtype=float), where=whole > 0)
    return ratio


def _defined(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    ratio: np.ndarray = np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
    return ratio
