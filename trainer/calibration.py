"""Everything of a bundle that is chosen rather than descended to: outcome pages, calibration, decoding, thresholds."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GroupKFold

from models.config import Decoding, Outcome, Source
from models.forecaster import Evidence, Forecaster
from models.metrics import iou
from models.outcomes import OUTCOMES, OutcomeHead, logit
from models.sets import own_frequencies, rank
from models.vocabulary import SPECIALS, Vocabulary
from trainer.corpus import Corpus
from trainer.examples import Example

PURE = 0.99  # share of a page's sessions that must have the outcome
COVERED = 0.9  # share of the outcome's sessions that its pages must account for
GAIN = 0.02  # share of them that a further page must add
FEWEST = 5  # cases of either kind that a calibration needs
FOLDS = 5  # of the cross-validation that chooses the source of an outcome's probability

CALIBRATION_TARGETS = 3  # last sessions of each validation user that calibration looks at
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


def calibrate_outcome(
    head: OutcomeHead,
    rolled: np.ndarray,
    own: np.ndarray,
    happened: np.ndarray,
    passage: np.ndarray | None = None,
    users: Sequence[str] | None = None,
) -> Outcome:
    """Who tells the probability, with which logistic weights, and the threshold with the best F1.

    The source has the least log loss in cross-validation over `users` (each row its own without), the own rate being
    part of each: first passage, rollouts, both, or neither.
    """
    fewest = min(happened.sum(), len(happened) - happened.sum())
    if fewest < FEWEST:  # nothing to learn from: the base rate, whatever the visitor did
        bias = float(logit(np.array(head.outcome.base_rate)))
        return msgspec.structs.replace(
            head.outcome, source="own", bias=bias, rollout_weight=0.0, passage_weight=0.0, own_weight=0.0,
            fallback_bias=bias, fallback_own_weight=0.0,
        )  # fmt: skip
    sources: dict[Source, list[np.ndarray]] = {"own": [], "rollouts": [rolled]}
    if passage is not None:
        sources |= {"passage": [passage], "combined": [rolled, passage]}
    features = {source: np.stack([logit(p) for p in (own, *parts)], axis=1) for source, parts in sources.items()}
    folds = _folds(len(happened), users)
    losses = {source: _held_out_loss(x, happened, folds) for source, x in features.items()}
    source = min(losses, key=losses.__getitem__)
    fitted = _logistic().fit(features[source], happened)
    alone = _logistic().fit(features["own"], happened)
    own_weight, *weights = fitted.coef_[0].tolist()
    outcome = msgspec.structs.replace(
        head.outcome, source=source, bias=float(fitted.intercept_[0]), own_weight=own_weight,
        rollout_weight=weights[0] if source in ("rollouts", "combined") else 0.0,
        passage_weight=weights[-1] if source in ("passage", "combined") else 0.0,
        fallback_bias=float(alone.intercept_[0]), fallback_own_weight=float(alone.coef_[0, 0]),
    )  # fmt: skip
    chosen = copy.copy(head)
    chosen.outcome = outcome
    p = chosen.combine(rolled, own, passage)  # to the last bit as predicted later: a threshold stands on one of them
    return msgspec.structs.replace(outcome, threshold=best_threshold(p, happened))


def _folds(rows: int, users: Sequence[str] | None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows to fit to and rows to judge on, all rows of a user on one side, or any rows where users are too few."""
    apart = users is not None and len(set(users)) >= FOLDS
    return list(GroupKFold(FOLDS).split(np.zeros(rows), groups=users if apart else range(rows)))


def _held_out_loss(x: np.ndarray, happened: np.ndarray, folds: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Log loss of a logistic regression on rows that it was not fitted to."""
    p = np.full(len(happened), happened.mean())
    for seen, unseen in folds:
        if len(set(happened[seen].tolist())) == 2:  # else all cases are in one fold: the base rate
            p[unseen] = _logistic().fit(x[seen], happened[seen]).predict_proba(x[unseen])[:, 1]
    return float(log_loss(happened, p))


def _logistic() -> LogisticRegression:
    return LogisticRegression(C=1.0, solver="newton-cholesky")  # made for many rows and a handful of columns


def best_threshold(p: np.ndarray, happened: np.ndarray) -> float:
    """The probability from which on to predict the outcome, with the best F1."""
    order = np.argsort(-p, kind="stable")
    hits = np.cumsum(happened[order])
    f1 = 2 * hits / (np.arange(1, len(p) + 1) + happened.sum())
    last = np.append(np.diff(p[order]) < 0, True)  # of those with the same probability: one threshold takes them all
    return float(p[order[int(np.argmax(np.where(last, f1, -1.0)))]])


def calibrate(forecaster: Forecaster, seen: Sequence[Example], chunk: int = 256) -> None:
    """Choose decoding settings and outcome calibration on held-out examples; changes the forecaster in place."""
    parts = [forecaster.evidence([e.visit for e in seen[i : i + chunk]]) for i in range(0, len(seen), chunk)]
    evidence = _together(parts)
    targets = [example.target for example in seen]
    outcomes = {}
    users = [example.user_id for example in seen]
    probabilities: list[list[float]] = []
    for i, (head, name) in enumerate(zip(forecaster.heads, OUTCOMES, strict=True)):
        happened = np.array([getattr(example, name) for example in seen], dtype=int)
        rolled, own, passage = evidence.rolled[:, i], evidence.own[:, i], head.passage(evidence.posterior)
        head.outcome = calibrate_outcome(head, rolled, own, happened, passage, users)
        outcomes[name] = head.outcome
        probabilities.append(head.combine(rolled, own, passage).tolist())

    def overlap(decoding: Decoding) -> float:
        forecaster.config = msgspec.structs.replace(forecaster.config, decoding=decoding)
        sets = forecaster.expected_sets(forecaster.probabilities(evidence), probabilities)
        return float(np.mean([iou(t, [page for page, _ in s]) for t, s in zip(targets, sets, strict=True)]))

    start = forecaster.config.decoding
    choices = [msgspec.structs.replace(start, shrink=s, own_weight=w) for s in SHRINKS for w in OWN_WEIGHTS]
    best = max(choices, key=overlap)
    best = msgspec.structs.replace(best, fallback_pages=_fallback_size(forecaster, best, evidence, targets))
    forecaster.config = msgspec.structs.replace(forecaster.config, decoding=best, **outcomes)


def choose_softness(forecaster: Forecaster, seen: Sequence[Example], chunk: int = 256) -> None:
    """Spread visitors over the clusters by their posterior if that costs fewer nats than the likeliest cluster alone.

    Changes the forecaster in place.
    """

    def nats(soft: bool) -> float:
        forecaster.config = msgspec.structs.replace(forecaster.config, soft=soft)
        parts = [seen[i : i + chunk] for i in range(0, len(seen), chunk)]
        return sum(float(forecaster.nll([e.visit for e in p], [e.target for e in p])[0].sum()) for p in parts)

    soft = forecaster.config.clusters > 1 and nats(True) < nats(False)
    forecaster.config = msgspec.structs.replace(forecaster.config, soft=soft)


def _fallback_size(forecaster: Forecaster, decoding: Decoding, evidence: Evidence, targets: list[list[str]]) -> int:
    q = own_frequencies(evidence.counts, evidence.sessions, forecaster.shares, decoding.own_weight)
    order = rank(q, max(SET_SIZES))
    named = [forecaster.tokenizer.decode(row) for row in order.tolist()]
    return max(SET_SIZES, key=lambda size: sum(iou(t, pages[:size]) for t, pages in zip(targets, named, strict=True)))


def _together(parts: Sequence[Evidence]) -> Evidence:
    """One batch of evidence: arrays and lists of all parts, end to end."""
    columns: list[Any] = [
        np.concatenate(column) if isinstance(column[0], np.ndarray) else [row for part in column for row in part]
        for column in zip(*parts, strict=True)
    ]
    return Evidence(*columns)
