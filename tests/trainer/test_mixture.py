"""EM against a slow, obvious EM; types that are there are found, and K = 1 where there are none."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from models.chains import Chains
from models.vocabulary import BOS, EOS, UNK
from tests.trainer.behaviour import corpus_of, visitors, vocabulary_of
from trainer.corpus import Corpus
from trainer.mixture import (
    FLAT,
    HeldOut,
    MixtureOptions,
    fewest,
    fit_chains,
    maximise,
    next_session_nll,
    posterior,
    responsibilities,
)
from trainer.steps import Steps

QUICK = MixtureOptions(restarts=4, trial_restarts=2)


def walked(corpus: Corpus, sessions: range, tokens: np.ndarray) -> Counter[tuple[int, int]]:
    """Steps of some sessions, counted one by one."""
    steps: Counter[tuple[int, int]] = Counter()
    for session in sessions:
        path = [BOS, *tokens[corpus.page_ids(session)].tolist(), EOS]
        steps.update(pairwise(path))
    return steps


def test_steps_are_counted_within_sessions() -> None:
    corpus = corpus_of([[["a", "b", "a", "b"], ["b"]], [["c"]], [["a"], ["c", "c", "c"], ["b", "a"]]])
    tokens = np.array([4, 5, UNK])
    rows = [corpus.sessions(2)[:-1], range(0), corpus.sessions(0)]
    steps = Steps.of(corpus, rows, tokens, 6)
    pairs = list(zip(steps.heads.tolist(), steps.tails.tolist(), strict=True))
    assert pairs == sorted(pairs)
    for row, sessions in enumerate(rows):
        counted = walked(corpus, sessions, tokens)
        assert dict(zip(pairs, steps.counts[row].toarray()[0].tolist(), strict=True)) == {p: counted[p] for p in pairs}
    assert Steps.of(corpus, [], tokens, 6).counts.shape == (0, 0)


def test_rare_steps_are_left_to_the_smoothing() -> None:
    corpus, _ = visitors(60, 2)
    _, tokens = vocabulary_of(corpus)
    steps = Steps.of(corpus, [corpus.sessions(user) for user in range(60)], tokens, len(tokens) + 4)
    few = steps.frequent(20)
    totals = np.asarray(steps.counts.sum(axis=0)).ravel()
    assert np.asarray(few.counts.sum()) == np.sort(totals)[-20:].sum()
    assert (np.diff(few.heads * few.size + few.tails) > 0).all()
    assert steps.frequent(10_000) is steps


def test_one_step_of_em_is_the_formulas_written_out() -> None:
    corpus, _ = visitors(40, 2)
    vocabulary, tokens = vocabulary_of(corpus)
    size, lam = len(vocabulary), 3.0
    steps = Steps.of(corpus, [corpus.sessions(user) for user in range(40)], tokens, size)
    shares = np.random.default_rng(0).dirichlet(np.ones(2), size=40)
    chains = maximise(steps, shares, lam)

    counts = [walked(corpus, corpus.sessions(user), tokens) for user in range(40)]
    expected = [
        {pair: sum(shares[i, k] * counts[i][pair] for i in range(40)) for pair in sum(counts, Counter())}
        for k in range(2)
    ]
    arrived = [[sum(n for (_, v), n in found.items() if v == t) for t in range(size)] for found in expected]
    pooled = [0.0 if t < EOS else arrived[0][t] + arrived[1][t] + 1.0 for t in range(size)]
    marginals = [[n + FLAT * p / sum(pooled) for n, p in zip(row, pooled, strict=True)] for row in arrived]
    logs = np.zeros((40, 2))
    for k, found in enumerate(expected):
        total = Counter[int]()
        for (u, _), n in found.items():
            total[u] += n
        for i, walk in enumerate(counts):
            for (u, v), n in walk.items():
                p = (found[u, v] + lam * marginals[k][v] / sum(marginals[k])) / (total[u] + lam)
                logs[i, k] += n * math.log(p)
    np.testing.assert_allclose(steps.log_likelihood(chains), logs, rtol=1e-10)
    np.testing.assert_allclose(chains.prior, (shares.sum(axis=0) + 1.0) / 42.0)
    joint = np.exp(logs - logs.max(axis=1, keepdims=True)) * chains.prior
    found_shares = responsibilities(chains, corpus, range(40), tokens)
    np.testing.assert_allclose(found_shares, joint / joint.sum(axis=1, keepdims=True), atol=1e-10)


@pytest.fixture(scope="module")
def typed() -> tuple[Corpus, np.ndarray, np.ndarray, Chains, dict[int, float]]:
    """800 visitors of three types, and the chains fitted to 600 of them."""
    corpus, kinds = visitors(800, 3)
    vocabulary, tokens = vocabulary_of(corpus)
    chains, choices = fit_chains(corpus, np.arange(600), np.arange(600, 700), tokens, len(vocabulary), QUICK)
    return corpus, kinds, tokens, chains, choices.by_clusters


def test_the_types_are_found(typed: tuple[Corpus, np.ndarray, np.ndarray, Chains, dict[int, float]]) -> None:
    corpus, kinds, tokens, chains, by_clusters = typed
    best = min(by_clusters, key=by_clusters.__getitem__)
    assert chains.clusters == 3 <= best
    assert max(by_clusters) in (best + 2, 8)  # when two larger K are worse, no larger one is tried
    test = range(700, 800)
    found = responsibilities(chains, corpus, test, tokens, history=True).argmax(axis=1)
    assert normalized_mutual_info_score(kinds[700:], found) > 0.8
    shares = responsibilities(chains, corpus, range(600), tokens)
    assert (np.diff(chains.prior) <= 0).all()
    np.testing.assert_allclose(shares.mean(axis=0), chains.prior, atol=0.02)


def test_without_types_there_is_one_cluster() -> None:
    corpus, _ = visitors(400, 1)
    vocabulary, tokens = vocabulary_of(corpus)
    chains, choices = fit_chains(corpus, np.arange(300), np.arange(300, 400), tokens, len(vocabulary), QUICK)
    assert chains.clusters == 1 and len(choices.by_clusters) > 1
    assert choices.nll == pytest.approx(min(choices.by_smoothing.values()))
    np.testing.assert_array_equal(responsibilities(chains, corpus, range(9), tokens), 1.0)


def test_a_larger_k_must_be_clearly_better() -> None:
    rng = np.random.default_rng(0)
    one = rng.normal(10.0, 3.0, size=400)
    noise, gain = rng.normal(0.0, 1.0, size=400), rng.normal(0.3, 1.0, size=400)
    assert fewest({1: one, 3: one - 0.02}) == 3  # a small gain, but for everybody
    assert fewest({1: one, 2: one - 0.01 - noise + noise.mean()}) == 1
    assert fewest({1: one, 2: one - gain, 3: one - gain + 0.1, 4: one - gain - 0.01 * noise}) == 2
    assert fewest({5: one}) == 5


def test_the_seed_decides() -> None:
    corpus, _ = visitors(200, 2)
    vocabulary, tokens = vocabulary_of(corpus)
    users, held = np.arange(150), np.arange(150, 200)
    first, again, other = (
        fit_chains(corpus, users, held, tokens, len(vocabulary), MixtureOptions([4], [8.0], 2, seed=seed))[0]
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first.counts, again.counts)
    assert not np.array_equal(first.counts, other.counts)


def test_validation_scores_the_last_session_by_the_ones_before(
    typed: tuple[Corpus, np.ndarray, np.ndarray, Chains, dict[int, float]],
) -> None:
    corpus, _, tokens, chains, _ = typed
    nats = count = 0.0
    for user in range(700, 720):
        *past, last = [tokens[corpus.page_ids(session)].tolist() for session in corpus.sessions(user)]
        prior = np.log(chains.prior) + sum(chains.log_likelihood(session) for session in past)
        weights = np.exp(prior - np.logaddexp.reduce(prior))
        nats -= math.log(float(weights @ np.exp(chains.log_likelihood(last))))
        count += len(last) + 1
    held_out = HeldOut.of(corpus, np.arange(700, 720), tokens, chains.size)
    assert held_out.nll(chains) == pytest.approx(nats / count)


def test_certainty_about_a_far_fetched_session_stays_finite() -> None:
    logs = np.array([[-900.0, -3.0]])
    assert next_session_nll(np.array([[1.0, 0.0]]), logs) == pytest.approx([900.0])
    assert next_session_nll(np.array([[0.5, 0.5]]), logs) == pytest.approx([3.0 + math.log(2.0)])
    chains = Chains(np.array([0.5, 0.5]), 1.0, np.ones((2, 5)), np.array([1]), np.array([4]), np.ones((1, 2)))
    np.testing.assert_allclose(posterior(chains, logs), [[0.0, 1.0]], atol=1e-300)


@pytest.mark.parametrize("most", [100, 10_000])
def test_more_users_than_the_trials_look_at(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr("trainer.mixture.MOST_USERS", most)
    corpus, kinds = visitors(500, 2)
    vocabulary, tokens = vocabulary_of(corpus)
    options = MixtureOptions([2], [8.0], 3)
    chains, _ = fit_chains(corpus, np.arange(400), np.arange(400, 500), tokens, len(vocabulary), options)
    steps = sum(len(corpus.page_ids(s)) + 1 for user in range(400) for s in corpus.sessions(user))
    assert chains.counts.sum() == pytest.approx(steps)  # all users are in it
    found = responsibilities(chains, corpus, range(400, 500), tokens).argmax(axis=1)
    assert normalized_mutual_info_score(kinds[400:], found) > 0.8
