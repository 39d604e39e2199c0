"""Sparse chains against the formulas written out, and against dense linear algebra."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import models.chains
from models.chains import Chains
from models.vocabulary import BOS, EOS, SPECIALS, UNK
from tests.models.chained import random_chains

SIZE, CLUSTERS = 14, 3


def probability(chains: Chains, head: int, tail: int, k: int) -> float:
    """(n_k(u, v) + lam p_k(v)) / (n_k(u) + lam), pair by pair."""
    pairs = list(zip(chains.heads.tolist(), chains.tails.tolist(), chains.counts[:, k].tolist(), strict=True))
    seen = sum(n for u, v, n in pairs if (u, v) == (head, tail))
    total = sum(n for u, _, n in pairs if u == head)
    return float((seen + chains.smoothing * chains.marginals[k, tail]) / (total + chains.smoothing))


@pytest.mark.parametrize("session", [[5, 6, 5], [UNK], [13, 4, 4, UNK, 9], []])
def test_a_session_has_the_likelihood_of_its_steps(session: list[int]) -> None:
    chains = random_chains(SIZE, CLUSTERS)
    path = [BOS, *session, EOS]
    expected = [sum(math.log(probability(chains, u, v, k)) for u, v in pairwise(path)) for k in range(CLUSTERS)]
    np.testing.assert_allclose(chains.log_likelihood(session), expected, rtol=1e-12)


def test_every_row_is_a_distribution() -> None:
    chains = random_chains(SIZE, CLUSTERS)
    for k in range(CLUSTERS):
        steps = chains.matrix(k)
        np.testing.assert_allclose(steps.sum(axis=1), 1.0)
        assert steps[5, 7] == pytest.approx(probability(chains, 5, 7, k))
        assert (steps[:, :EOS] == 0.0).all()


def solved(chains: Chains, marked: list[int], k: int) -> float:
    """First passage as a linear system: h = Q h + b over the pages that are neither marked nor [EOS]."""
    steps = chains.matrix(k)
    free = [t for t in range(chains.size) if t not in (*marked, EOS)]
    h = np.linalg.solve(np.eye(len(free)) - steps[np.ix_(free, free)], steps[np.ix_(free, marked)].sum(axis=1))
    return float(h[free.index(BOS)])


@pytest.mark.parametrize("marked", [[4], [7, 9], [UNK, 12], list(range(3, SIZE))])
def test_first_passage_is_exact(marked: list[int]) -> None:
    chains = random_chains(SIZE, CLUSTERS)
    marks = np.isin(np.arange(SIZE), marked)
    expected = [solved(chains, marked, k) for k in range(CLUSTERS)]
    np.testing.assert_allclose(chains.first_passage(marks), expected, atol=1e-6)
    assert (chains.first_passage(np.zeros(SIZE, dtype=bool)) == 0.0).all()


def test_page_probabilities_are_first_passages_of_single_pages() -> None:
    chains = random_chains(SIZE, CLUSTERS)
    held = chains.page_probabilities()
    assert held.shape == (CLUSTERS, SIZE) and (held[:, : len(SPECIALS)] == 0.0).all()
    for token in range(len(SPECIALS), SIZE):
        np.testing.assert_allclose(held[:, token], chains.first_passage(np.arange(SIZE) == token), atol=1e-6)


def test_with_many_pages_they_are_visits_times_no_early_return(monkeypatch: pytest.MonkeyPatch) -> None:
    chains = random_chains(40, CLUSTERS, share=0.1)
    exact = chains.page_probabilities()
    monkeypatch.setattr(models.chains, "DENSE", 10)
    held = chains.page_probabilities()
    for k in range(CLUSTERS):
        steps = chains.matrix(k)
        steps[EOS] = 0.0
        visits = np.linalg.inv(np.eye(40) - steps)[BOS]
        loop = np.diag(steps)
        early = loop + np.diag(steps @ steps) - loop**2
        np.testing.assert_allclose(held[k, 4:], np.minimum(visits * (1.0 - early), 1.0)[4:], atol=1e-6)
    assert (held >= exact - 1e-6).all()
    assert (held[:, 4:] - exact[:, 4:]).max() < 0.1


def test_tensors_bring_the_chains_back() -> None:
    chains = random_chains(SIZE, CLUSTERS)
    again = Chains.from_tensors(chains.tensors(), SIZE)
    for name, values in chains.tensors().items():
        np.testing.assert_array_equal(again.tensors()[name], values)


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("prior", lambda a: None, "holds no 'chains.prior'"),
        ("prior", lambda a: a * 0.0, "a session could be impossible"),
        ("smoothing", lambda a: -a, "below 0"),
        ("marginals", lambda a: a[:, :-1], r"`chains.marginals` is \(3, 13\) float64, but should be \(3, 14\)"),
        ("marginals", lambda a: a * np.nan, "NaN"),
        ("counts", lambda a: a.astype(np.float32), "float32"),
        ("heads", lambda a: a + 20, "no ordered pairs of 14 tokens"),
        ("tails", lambda a: a[::-1].copy(), "no ordered pairs"),
        ("tails", lambda a: a[:-1], "chains.tails"),
    ],
)
def test_tensors_that_are_no_chains_are_refused(name: str, spoil: Any, words: str) -> None:
    tensors = random_chains(SIZE, CLUSTERS).tensors()
    spoilt = spoil(tensors.pop(f"chains.{name}"))
    if spoilt is not None:
        tensors[f"chains.{name}"] = spoilt
    with pytest.raises(ValueError, match=words):
        Chains.from_tensors(tensors, SIZE)
