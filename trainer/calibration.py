"""Everything of a bundle that is chosen rather than descended to: outcome pages, calibration, decoding, thresholds."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression

from models.baselines import own_rate
from models.config import Decoding, Outcome
from models.forecaster import Evidence, Forecaster
from models.metrics import iou
from models.outcomes import OutcomeHead, logit
from models.sets import own_frequencies, rank
from models.vocabulary import SPECIALS, Vocabulary
from trainer.corpus import Corpus
from trainer.examples import Example

PURE = 0.99  # share of a page's sessions that must have the outcome
COVERED = 0.9  # share of the outcome's sessions that its pages must account for
GAIN = 0.02  # share of them that a further page must add
FEWEST = 5  # cases of either kind that a calibration needs

SHRINKS = (8.0, 16.0, 32.0)
OWN_WEIGHTS = (1.0, 2.0, 4.0, 8.0)
SET_SIZES = range(2, 13)


@dataclass(frozen=True)
class SessionPages:
    """Which training sessions hold which tokens: a sparse (S, V) matrix of ones, and their outcomes."""

    held: sp.csr_matrix
    flags: dict[str, np.ndarray]

    @classmethod
    def of(cls, corpus: Corpus, sessions: np.ndarray, tokens: np.ndarray, size: int) -> "SessionPages":
        """Sessions of the corpus by index; unknown pages are left out."""
        rows = np.repeat(np.arange(len(corpus.session_ids)), np.diff(corpus.starts))
        columns = tokens[corpus.pages]
        known = columns >= len(SPECIALS)
        ones = np.ones(int(known.sum()))
        held = sp.csr_matrix((ones, (rows[known], columns[known])), shape=(len(corpus.session_ids), size))
        held.data[:] = 1.0
        return cls(held[sessions], {"cart": corpus.cart[sessions], "purchase": corpus.purchase[sessions]})


def find_outcome(pages: SessionPages, name: str, vocabulary: Vocabulary) -> tuple[Outcome, np.ndarray]:
    """The pages that mark an outcome, learned from the sessions, and log-odds of all pages for when none does.

    A page marks it when (nearly) all its sessions have the outcome; the pages taken together must account for nearly
    all sessions with it, each adding some. Weights (V,) hold the constant in place of [PAD].
    """
    flags = pages.flags[name].astype(float)
    positives = flags.sum()
    outcome = Outcome(pages=[], base_rate=float((positives + 0.5) / (len(flags) + 1)))
    weights = np.zeros(len(vocabulary))
    weights[0] = float(logit(np.array(outcome.base_rate)))
    if min(positives, len(flags) - positives) < FEWEST:
        return outcome, weights
    counts = np.asarray(pages.held.sum(axis=0)).ravel()
    hits = pages.held.T @ flags
    pure = np.flatnonzero((hits >= FEWEST) & (hits >= PURE * counts))
    covered, chosen = np.zeros(len(flags), dtype=bool), []
    for token in pure[np.argsort(-hits[pure], kind="stable")]:
        adds = (pages.held[:, [token]].toarray().ravel() > 0) & ~covered
        if adds.sum() >= GAIN * positives:
            covered |= adds
            chosen.append(vocabulary.pages[token - len(SPECIALS)])
    if covered.sum() >= COVERED * positives:
        return msgspec.structs.replace(outcome, pages=chosen), weights
    fitted = LogisticRegression(C=1.0, max_iter=300).fit(pages.held, flags.astype(int))
    weights = fitted.coef_[0].copy()
    weights[: len(SPECIALS)] = 0.0
    weights[0] = fitted.intercept_[0]
    return outcome, weights


def calibrate_outcome(head: OutcomeHead, rolled: np.ndarray, own: np.ndarray, happened: np.ndarray) -> Outcome:
    """Logistic weights of rollouts and own rate, with and without rollouts, and the threshold with the best F1."""
    fewest = min(happened.sum(), len(happened) - happened.sum())
    if fewest < FEWEST:  # nothing to learn from: the base rate, whatever the visitor did
        bias = float(logit(np.array(head.outcome.base_rate)))
        return msgspec.structs.replace(
            head.outcome, bias=bias, rollout_weight=0.0, own_weight=0.0, fallback_bias=bias, fallback_own_weight=0.0
        )
    features = np.stack([logit(rolled), logit(own)], axis=1)
    both = LogisticRegression(C=1.0).fit(features, happened)
    alone = LogisticRegression(C=1.0).fit(features[:, 1:], happened)
    outcome = msgspec.structs.replace(
        head.outcome,
        bias=float(both.intercept_[0]), rollout_weight=float(both.coef_[0, 0]), own_weight=float(both.coef_[0, 1]),
        fallback_bias=float(alone.intercept_[0]), fallback_own_weight=float(alone.coef_[0, 0]),
    )  # fmt: skip
    p = both.predict_proba(features)[:, 1]
    return msgspec.structs.replace(outcome, threshold=best_threshold(p, happened))


def best_threshold(p: np.ndarray, happened: np.ndarray) -> float:
    """The probability from which on to predict the outcome, with the best F1."""
    order = np.argsort(-p, kind="stable")
    hits = np.cumsum(happened[order])
    f1 = 2 * hits / (np.arange(1, len(p) + 1) + happened.sum())
    return float(p[order[int(np.argmax(f1))]])


def calibrate(forecaster: Forecaster, seen: Sequence[Example], chunk: int = 256) -> None:
    """Choose decoding settings and outcome calibration on held-out examples; changes the forecaster in place."""
    parts = [forecaster.evidence([e.visit for e in seen[i : i + chunk]]) for i in range(0, len(seen), chunk)]
    evidence = _together(parts)
    targets = [example.target for example in seen]
    outcomes = {}
    for i, (head, name) in enumerate(zip(forecaster.heads, ("cart", "purchase"), strict=True)):
        happened = np.array([getattr(example, name) for example in seen], dtype=int)
        head.outcome = calibrate_outcome(head, evidence.rolled[:, i], evidence.own[:, i], happened)
        outcomes[name] = head.outcome
    probabilities = [head.combine(evidence.rolled[:, i], evidence.own[:, i]) for i, head in enumerate(forecaster.heads)]

    def overlap(decoding: Decoding) -> float:
        forecaster.config = msgspec.structs.replace(forecaster.config, decoding=decoding)
        sets = forecaster.expected_sets(forecaster.probabilities(evidence), [p.tolist() for p in probabilities])
        return float(np.mean([iou(t, [page for page, _ in s]) for t, s in zip(targets, sets, strict=True)]))

    start = forecaster.config.decoding
    choices = [msgspec.structs.replace(start, shrink=s, own_weight=w) for s in SHRINKS for w in OWN_WEIGHTS]
    best = max(choices, key=overlap)
    best = msgspec.structs.replace(best, fallback_pages=_fallback_size(forecaster, best, evidence, targets))
    forecaster.config = msgspec.structs.replace(forecaster.config, decoding=best, **outcomes)


def base_rates(pages: SessionPages) -> dict[str, float]:
    """Share of training sessions with each outcome, never quite 0 or 1."""
    return {name: own_rate([float(flags.mean())] * len(flags), 0.5, 1.0) for name, flags in pages.flags.items()}


def _fallback_size(forecaster: Forecaster, decoding: Decoding, evidence: Evidence, targets: list[list[str]]) -> int:
    q = own_frequencies(evidence.counts, evidence.sessions, forecaster.shares, decoding.own_weight)
    order = rank(q, max(SET_SIZES))
    named = [forecaster.tokenizer.decode(row) for row in order.tolist()]
    return max(SET_SIZES, key=lambda size: sum(iou(t, pages[:size]) for t, pages in zip(targets, named, strict=True)))


def _together(parts: Sequence[Evidence]) -> Evidence:
    return Evidence(
        clusters=[cluster for part in parts for cluster in part.clusters],
        counts=np.concatenate([part.counts for part in parts]),
        sessions=np.concatenate([part.sessions for part in parts]),
        own=np.concatenate([part.own for part in parts]),
        marginals=np.concatenate([part.marginals for part in parts]),
        rolled=np.concatenate([part.rolled for part in parts]),
        paths=[path for part in parts for path in part.paths],
    )
