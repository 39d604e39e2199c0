"""Outcome pages are found in the data, and calibration learns what can be learned."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score, log_loss

from models.bundle import load_bundle
from models.config import Outcome
from models.outcomes import OUTCOMES, OutcomeHead, sigmoid
from models.vocabulary import Vocabulary
from tests.models.chained import random_chains
from tests.models.conftest import write_tiny
from tests.trainer.conftest import shop, write
from trainer.calibration import SessionPages, best_threshold, calibrate, calibrate_outcome, find_outcome
from trainer.corpus import read_corpus
from trainer.examples import examples
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


def test_the_threshold_takes_all_with_the_same_probability() -> None:
    p = np.array([0.5, 0.5, 0.5, 0.5, 0.4, 0.3])
    happened = np.array([1, 0, 0, 0, 1, 0])
    assert best_threshold(p, happened) == 0.4  # the first alone would have the best F1, but nobody can have it alone


def test_the_threshold_takes_those_that_it_was_chosen_from() -> None:
    rng = np.random.default_rng(3)
    for base in (0.11, 0.23, 0.37):
        own = rng.choice([base, base + 0.2, base + 0.4], size=400)
        happened = (rng.random(400) < own).astype(int)
        head = OutcomeHead(Outcome([], base_rate=base), {}, 6)
        head.outcome = calibrate_outcome(head, own, own, happened)
        assert head.outcome.threshold in head.combine(own, own)


def drawn(seed: int, users: int = 1_000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two independent causes in log-odds, and what they made happen."""
    rng = np.random.default_rng(seed)
    one, other = rng.normal(size=users), rng.normal(size=users)
    return one, other, (rng.random(users) < sigmoid(one + other - 1.0)).astype(int)


def chosen(rolled: np.ndarray, passage: np.ndarray | None, happened: np.ndarray) -> Outcome:
    head = OutcomeHead(Outcome([], base_rate=0.3), {}, 6)
    own = np.full(len(happened), 0.3)
    return calibrate_outcome(head, rolled, own, happened, passage, [f"u{i // 2}" for i in range(len(happened))])


def test_validation_chooses_who_tells_the_probability() -> None:
    one, other, happened = drawn(0)
    noise = sigmoid(np.random.default_rng(1).normal(size=len(happened)))
    knows, both = sigmoid(one), sigmoid(one + other)
    assert chosen(both, noise, happened).source in ("rollouts", "combined")
    passage = chosen(noise, both, happened)
    assert passage.source in ("passage", "combined") and passage.passage_weight == pytest.approx(1.0, abs=0.2)
    combined = chosen(knows, sigmoid(other), happened)
    assert combined.source == "combined"
    assert (combined.rollout_weight, combined.passage_weight) == pytest.approx((1.0, 1.0), abs=0.3)
    assert chosen(knows, None, happened).source == "rollouts"
    nobody = chosen(noise, noise[::-1].copy(), np.random.default_rng(2).integers(0, 2, size=len(happened)))
    assert nobody.source == "own" and (nobody.rollout_weight, nobody.passage_weight) == (0.0, 0.0)


def test_the_chosen_source_is_what_combine_uses() -> None:
    one, other, happened = drawn(3)
    rolled, passage, own = sigmoid(one), sigmoid(other), np.full(len(happened), 0.3)
    head = OutcomeHead(Outcome([], base_rate=0.3), {}, 6)
    head.outcome = chosen(rolled, passage, happened)
    p = head.combine(rolled, own, passage)
    assert log_loss(happened, p) < log_loss(happened, head.fallback(own)) - 0.1
    assert f1_score(happened, p >= head.outcome.threshold) > f1_score(happened, p >= 0.5)


@pytest.mark.parametrize("own_weight", [1.0, 8.0])
def test_what_was_calibrated_is_what_is_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_weight: float
) -> None:
    monkeypatch.setattr("trainer.calibration.OWN_WEIGHTS", (own_weight,))
    corpus = read_corpus(write(shop(120), tmp_path / "sessions"))
    seen = examples(corpus, corpus.returning(), None, 3)
    bundle = load_bundle(write_tiny(tmp_path / "bundle"), "cpu")
    before = bundle.fallback([one.visit for one in seen])
    calibrate(bundle, seen)
    assert bundle.config.decoding.own_weight == own_weight
    for name, head in zip(OUTCOMES, bundle.heads, strict=True):
        share = np.mean([getattr(one, name) for one in seen])
        told = [getattr(one, name) for one in bundle.forecast([one.visit for one in seen])]
        assert np.mean(told) == pytest.approx(share, abs=1e-3)  # as of every logistic regression with a constant
        assert head.outcome.threshold in told
        own = [getattr(one, name) for one in bundle.fallback([one.visit for one in seen])]
        assert np.mean(own) == pytest.approx(share, abs=1e-3)
        assert own != [getattr(one, name) for one in before]


def test_a_few_cases_of_one_visitor_are_enough_to_calibrate() -> None:
    happened = np.zeros(60, dtype=int)
    happened[:5] = 1
    head = OutcomeHead(Outcome([], base_rate=0.1), {}, 6)
    p = np.linspace(0.6, 0.1, 60)
    outcome = calibrate_outcome(head, p, p, happened, p, ["one"] * 5 + [f"u{i}" for i in range(55)])
    assert np.isfinite([outcome.bias, outcome.rollout_weight, outcome.passage_weight, outcome.threshold]).all()


def test_first_passage_is_that_of_the_visitors_mixture() -> None:
    chains = random_chains(9, 3)
    head = OutcomeHead(Outcome(["b", "c"], base_rate=0.2), {"a": 4, "b": 5, "c": 7}, 9, chains=chains)
    marks = np.isin(np.arange(9), [5, 7])
    posterior = np.array([[0.2, 0.3, 0.5], [0.0, 1.0, 0.0]])
    found = head.passage(posterior)
    assert found is not None
    np.testing.assert_allclose(found, posterior @ chains.first_passage(marks))
    assert OutcomeHead(Outcome([], base_rate=0.2), {}, 9, chains=chains).passage(posterior) is None
    assert OutcomeHead(Outcome(["b"], base_rate=0.2), {"b": 5}, 9).passage(posterior) is None
