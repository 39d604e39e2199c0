"""How cart and purchase are read off a session's pages, and how their probabilities are calibrated. numpy only."""

from collections.abc import Sequence

import numpy as np

from models.chains import Chains
from models.config import Outcome

OUTCOMES = ("cart", "purchase")
EDGE = 1e-4  # probabilities stay this far from 0 and 1
BASE_WEIGHT = 2.0  # sessions that the base rate counts as in a visitor's own rate


class OutcomeHead:
    """P(outcome | the pages of a session): certain when pages mark it, logistic in the pages when none do."""

    def __init__(
        self,
        outcome: Outcome,
        tokens: dict[str, int],
        size: int,
        weights: np.ndarray | None = None,
        chains: Chains | None = None,
    ) -> None:
        """`weights` (V,): log-odds a page adds, the constant in place of [PAD]; only used without outcome pages.

        `chains`: of the bundle's clusters, where they have any.
        """
        self.outcome = outcome
        self.marks = np.zeros(size, dtype=np.float32)
        self.marks[[tokens[page] for page in outcome.pages if page in tokens]] = 1.0
        self.certain = bool(self.marks.any())
        self.weights = np.zeros(size) if weights is None else weights
        self.passages = chains.first_passage(self.marks > 0) if chains is not None and self.certain else None  # (K,)

    def sessions(self, sessions: Sequence[Sequence[int]]) -> list[float]:
        """P(outcome) of each token session."""
        if self.certain:
            return [float(any(self.marks[token] for token in session)) for session in sessions]
        return [float(sigmoid(self.weights[0] + self.weights[list(set(session))].sum())) for session in sessions]

    def rollouts(self, sequences: np.ndarray) -> np.ndarray:
        """Mean P(outcome) of sampled sessions, where no page marks it: (B, R, S) -> (B,)."""
        batch, samples, _ = sequences.shape
        held = np.zeros((batch, samples, len(self.weights)), dtype=bool)
        np.put_along_axis(held, sequences, True, axis=2)
        weights = np.where(np.arange(len(self.weights)) < 4, 0.0, self.weights)
        mean: np.ndarray = sigmoid(self.weights[0] + held @ weights).mean(axis=1)
        return mean

    def rate(self, sessions: Sequence[Sequence[int]]) -> float:
        """The visitor's own rate, shrunk to the base rate as if seen in BASE_WEIGHT more sessions.

        The calibration is fitted to this, so no decoding setting may move it.
        """
        seen = self.sessions(sessions)
        return (sum(seen) + BASE_WEIGHT * self.outcome.base_rate) / (len(seen) + BASE_WEIGHT)

    def passage(self, posterior: np.ndarray) -> np.ndarray | None:
        """P(the next session holds a marked page) in the visitors' mixtures of chains: (B, K) -> (B,).

        None without chains or without outcome pages.
        """
        return None if self.passages is None else posterior @ self.passages

    def combine(self, rolled: np.ndarray, own: np.ndarray, passage: np.ndarray | None = None) -> np.ndarray:
        """Calibrated probability from rollouts, own rate and first passage, strictly inside (0, 1)."""
        o = self.outcome
        score = o.bias + o.rollout_weight * logit(rolled) + o.own_weight * logit(own)
        if passage is not None:
            score = score + o.passage_weight * logit(passage)
        return _inside(sigmoid(score))

    def fallback(self, own: np.ndarray) -> np.ndarray:
        """Calibrated probability from the own rate alone, strictly inside (0, 1)."""
        score = self.outcome.fallback_bias + self.outcome.fallback_own_weight * logit(own)
        return _inside(sigmoid(score))


def _inside(p: np.ndarray) -> np.ndarray:
    kept: np.ndarray = np.clip(p, EDGE, 1.0 - EDGE)
    return kept


def logit(p: np.ndarray) -> np.ndarray:
    """Log-odds, with p kept away from 0 and 1."""
    p = _inside(p)
    odds: np.ndarray = np.log(p) - np.log1p(-p)
    return odds


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Log-odds to probability, without overflow."""
    p: np.ndarray = 0.5 * (1.0 + np.tanh(0.5 * np.asarray(x)))
    return p
