"""From page probabilities to an expected set (hetlm_findings, section 4). numpy only."""

import numpy as np

from models.vocabulary import SPECIALS


def own_frequencies(counts: np.ndarray, sessions: np.ndarray, shares: np.ndarray, weight: float) -> np.ndarray:
    """Share of a visitor's sessions that hold each page, shrunk to popularity as if seen in `weight` more sessions.

    (B, V) counts, (B,) sessions, (V,) popularity -> (B, V).
    """
    frequencies: np.ndarray = (counts + weight * shares) / (sessions[:, None] + weight)
    return frequencies


def shrink(marginals: np.ndarray, rollouts: int, prior: np.ndarray, weight: float) -> np.ndarray:
    """q = (count + lambda prior) / (R + lambda), with count = R * marginal. (B, V) -> (B, V)."""
    q: np.ndarray = np.clip((marginals * rollouts + weight * prior) / (rollouts + weight), 0.0, 1.0)
    return q


def set_size(q: np.ndarray, total: np.ndarray) -> np.ndarray:
    """How many of the most probable pages to keep, at least one: the prefix with the largest expected overlap.

    `q` (B, N) descending; `total` (B,) the expected size of the next session's page set, E|A|. The prefix of m pages
    maximises sum q / (m + E|A| - sum q): intersection over union, each replaced by its expectation.
    """
    hits = np.cumsum(q, axis=1)
    m = np.arange(1, q.shape[1] + 1)
    sizes: np.ndarray = np.argmax(hits / (m + total[:, None] - hits), axis=1) + 1
    return sizes


def rank(q: np.ndarray, most: int) -> np.ndarray:
    """Tokens by falling probability, ties by token: (B, V) -> (B, min(most, pages))."""
    pages = q[:, len(SPECIALS) :]
    order: np.ndarray = np.argsort(-pages, axis=1, kind="stable")[:, :most] + len(SPECIALS)
    return order
