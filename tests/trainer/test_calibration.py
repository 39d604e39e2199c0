"""Outcome pages are found in the data, and calibration learns what can be learned."""

from pathlib import Path

import numpy as np
import pytest

from models.config import Outcome
from models.outcomes import OutcomeHead
from models.vocabulary import Vocabulary
from tests.trainer.conftest import shop, write
from trainer.calibration import SessionPages, best_threshold, calibrate_outcome, find_outcome
from trainer.corpus import read_corpus
from trainer.windows import page_tokens


def pages_of(path: Path, marked: bool) -> tuple[SessionPages, Vocabulary]:
    corpus = read_corpus(write(shop(200, marked=marked), path))
    vocabulary = Vocabulary(corpus.names, [0.1] * len(corpus.names), 1)
    tokens = page_tokens(corpus, vocabulary.tokens())
    return SessionPages.of(corpus, np.arange(len(corpus.session_ids)), tokens, len(vocabulary)), vocabulary


def test_outcome_pages_are_found(tmp_path: Path) -> None:
    pages, vocabulary = pages_of(tmp_path, marked=True)
    cart, _ = find_outcome(pages, "cart", vocabulary)
    purchase, _ = find_outcome(pages, "purchase", vocabulary)
    assert (cart.pages, purchase.pages) == (["basket"], ["thank you"])
    assert cart.base_rate == pytest.approx(pages.flags["cart"].mean(), abs=0.01)


def test_without_outcome_pages_weights_are_fitted(tmp_path: Path) -> None:
    pages, vocabulary = pages_of(tmp_path, marked=False)
    cart, weights = find_outcome(pages, "cart", vocabulary)
    assert cart.pages == [] and np.isfinite(weights).all()
    tokens = vocabulary.tokens()
    head = OutcomeHead(cart, tokens, len(vocabulary), weights)
    with_hint, without = head.sessions([[tokens["shoes"]], [tokens["boots"]]])
    assert with_hint > without + 0.1  # carts of this shop show as another look at the first product


def test_an_outcome_that_never_happens_keeps_its_base_rate() -> None:
    head = OutcomeHead(Outcome([], base_rate=0.01), {}, 6)
    found = calibrate_outcome(head, np.full(50, 0.2), np.full(50, 0.1), np.zeros(50, dtype=int))
    head.outcome = found
    np.testing.assert_allclose(head.combine(np.array([0.01, 0.9]), np.array([0.5, 0.5])), 0.01)
    np.testing.assert_allclose(head.fallback(np.array([0.01, 0.9])), 0.01)


def test_calibration_corrects_a_boastful_model() -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.1, 0.9, size=4_000)
    happened = (rng.random(4_000) < truth).astype(int)
    odds = 3.0 * np.log(truth / (1 - truth)) + 1.0
    head = OutcomeHead(Outcome([], base_rate=0.5), {}, 6)
    head.outcome = calibrate_outcome(head, 1 / (1 + np.exp(-odds)), np.full(4_000, 0.5), happened)
    np.testing.assert_allclose(head.combine(1 / (1 + np.exp(-odds)), np.full(4_000, 0.5)), truth, atol=0.05)
    assert head.outcome.rollout_weight == pytest.approx(1 / 3, abs=0.05)


def test_the_threshold_has_the_best_f1() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(200)
    happened = (rng.random(200) < p).astype(int)

    def f1(threshold: float) -> float:
        said = p >= threshold
        return float(2 * (said & (happened == 1)).sum() / (said.sum() + happened.sum()))

    assert f1(best_threshold(p, happened)) == pytest.approx(max(f1(t) for t in p))
