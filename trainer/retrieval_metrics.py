"""How well ranked lists foretell the labels (XPert, section 4 and its appendix, as the spec reads them).

Each measure is a mean over cases. A list that is shorter than k has misses in the places that are left; labels that are
not in the index count in every denominator.
"""

import numpy as np

from trainer.interactions import NONE, Cases
from trainer.retrievers import Ranking

CUTS = (10, 50, 100)
MEASURES = {
    **{f"recall_{k}": f"labels among the first {k}, as a share of all the case's labels" for k in CUTS},
    **{f"ndcg_{k}": f"discounted gain of the first {k}, as a share of the highest possible" for k in CUTS},
    "auc_100": "pairs of a label and another item of the first 100 in the right order, ties half; 0 without a label",
    "mrr_100": "1 / place of the first label among the first 100; 0 without one",
    "precision_1": "whether the first item is a label",
    "precision_3": "labels among the first 3, divided by 3",
}


def hits(items: np.ndarray, cases: Cases) -> np.ndarray:
    """(C, k) bool: which of the ranked items (C, k) are labels of the case."""
    size = len(cases.log.items)
    rows = np.repeat(np.arange(len(cases)), np.diff(cases.starts))
    keys = np.arange(len(cases))[:, None] * size + items
    found: np.ndarray = np.isin(keys, rows * size + cases.labels) & (items != NONE)
    return found


def positives(cases: Cases) -> np.ndarray:
    """(C,) int: how many distinct labels each case has."""
    return np.diff(cases.truth().indptr)


def measure(hit: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Every measure of each case, (C,) float64, from `hit` and `scores` (C, >= 100) and the number of `labels` (C,)."""
    gains = 1 / np.log2(np.arange(max(CUTS)) + 2)
    highest = np.cumsum(gains)
    found = {f"recall_{k}": hit[:, :k].sum(axis=1) / labels for k in CUTS}
    found |= {f"ndcg_{k}": hit[:, :k] @ gains[:k] / highest[np.minimum(labels, k) - 1] for k in CUTS}
    found["auc_100"] = _auc(hit[:, :100], scores[:, :100])
    found["mrr_100"] = np.where(hit[:, :100].any(axis=1), 1 / (hit[:, :100].argmax(axis=1) + 1), 0.0)
    return found | {f"precision_{k}": hit[:, :k].sum(axis=1) / k for k in (1, 3)}


def recalls(items: np.ndarray, cases: Cases, k: int) -> np.ndarray:
    """(C,) Recall@k of each case, of ranked items (C, >= k)."""
    found: np.ndarray = hits(items[:, :k], cases).sum(axis=1) / positives(cases)
    return found


def recall(items: np.ndarray, cases: Cases, k: int) -> float:
    """Mean Recall@k of ranked items (C, >= k)."""
    return float(recalls(items, cases, k).mean())


def strengths(ranking: Ranking, cases: Cases) -> np.ndarray:
    """(C,) Recall@10 + Recall@50 of each case: what validation compares."""
    found: np.ndarray = recalls(ranking.items, cases, 10) + recalls(ranking.items, cases, 50)
    return found


def strength(ranking: Ranking, cases: Cases) -> float:
    """Mean Recall@10 + Recall@50."""
    return float(strengths(ranking, cases).mean())


def _auc(hit: np.ndarray, scores: np.ndarray) -> np.ndarray:
    rows, places = np.nonzero(hit)
    others = ~hit[rows] & np.isfinite(scores[rows])  # (H, k), a row a hit; a place without an item is no pair
    own = scores[rows, places, None]
    right = ((scores[rows] < own) & others).sum(axis=1) + ((scores[rows] == own) & others).sum(axis=1) / 2
    pairs = others.sum(axis=1)
    shares = np.divide(right, pairs, out=np.ones(len(rows)), where=pairs > 0)
    counts = hit.sum(axis=1)
    found: np.ndarray = np.bincount(rows, shares, minlength=len(hit)) / np.maximum(counts, 1)
    return found
