"""Chains as predictors: counting by hand, enumerating and simulating say the same."""

from collections import Counter
from itertools import pairwise, product

import numpy as np
import pytest

from models.chains import Chains
from models.sampling import uniforms
from models.vocabulary import BOS, EOS, UNK
from tests.trainer.conftest import shop, write
from trainer.corpus import Corpus, read_corpus
from trainer.markov import ChainPredictor
from trainer.mixture import MixtureOptions, fit_chains

A, B, C = 4, 5, 6
STEPS = 12


def two_chains() -> Chains:
    """Two chains over three pages that mostly end soon."""
    rng = np.random.default_rng(0)
    heads, tails = np.array(list(product([BOS, A, B, C], [EOS, A, B, C]))).T
    counts = rng.uniform(0.0, 4.0, size=(len(heads), 2)) * np.where(tails == EOS, 4.0, 1.0)[:, None]
    counts[(heads == BOS) & (tails == EOS)] = 0.0
    marginals = np.zeros((2, 7))
    marginals[:, EOS:] = rng.dirichlet(np.ones(5), size=2)
    return Chains(np.array([0.7, 0.3]), 0.5, marginals, heads, tails, counts)


def dense(chains: Chains) -> np.ndarray:
    """Transition matrices (K, V, V), pair by pair."""
    table = np.zeros((chains.clusters, chains.size, chains.size))
    pairs = dict(zip(zip(chains.heads.tolist(), chains.tails.tolist(), strict=True), chains.counts, strict=True))
    for k, u, v in product(range(chains.clusters), range(chains.size), range(chains.size)):
        out = sum(n[k] for (head, _), n in pairs.items() if head == u)
        n = pairs[u, v][k] if (u, v) in pairs else 0.0
        table[k, u, v] = (n + chains.smoothing * chains.marginals[k, v]) / (out + chains.smoothing)
    return table


def bayes(table: np.ndarray, prior: np.ndarray, prompt: list[int]) -> np.ndarray:
    weights = prior.copy()
    for u, v in pairwise(prompt):
        if v != BOS:
            weights = weights * table[:, u, v]
    normalised: np.ndarray = weights / weights.sum()
    return normalised


PROMPTS = [[BOS, A, B, A, EOS, BOS, B, EOS, BOS], [BOS, C, EOS, BOS], [BOS]]


def test_posterior_and_nll_are_bayes_by_hand() -> None:
    chains = two_chains()
    table, predictor, targets = dense(chains), ChainPredictor(chains), [[A, A], [C], [B, UNK, C]]
    posterior, nats = predictor.posterior(PROMPTS), predictor.nll(PROMPTS, None, targets)
    for row, (prompt, target) in enumerate(zip(PROMPTS, targets, strict=True)):
        weights = bayes(table, chains.prior, prompt)
        np.testing.assert_allclose(posterior[row], weights)
        path = [BOS, *target, EOS]
        chances = np.prod([table[:, u, v] for u, v in pairwise(path)], axis=0)
        assert nats[row] == pytest.approx(-np.log(weights @ chances))


def test_first_order_nll_is_that_of_counting_pairs(corpus: Corpus) -> None:
    lam, users = 3.0, np.arange(len(corpus.users))
    tokens = np.arange(len(corpus.names)) + 4
    chains, _ = fit_chains(corpus, users, users[:5], tokens, len(tokens) + 4, MixtureOptions([1], [lam]))
    pairs: Counter[tuple[int, int]] = Counter()
    for session in range(len(corpus.session_ids)):
        path = [BOS, *tokens[corpus.page_ids(session)].tolist(), EOS]
        pairs.update(pairwise(path))
    arrived, left = Counter[int](), Counter[int]()
    for (u, v), n in pairs.items():
        arrived[v] += n
        left[u] += n
    # Every token but [PAD] and [BOS] counts as one more, as if in 50 steps; then as lam steps out of every token.
    kinds, total = len(tokens) + 2, sum(arrived.values())
    share = {
        v: (arrived[v] + 50 * (arrived[v] + 1) / (total + kinds)) / (total + 50) for v in range(2, 4 + len(tokens))
    }

    def nats(path: list[int]) -> float:
        return -sum(float(np.log((pairs[u, v] + lam * share[v]) / (left[u] + lam))) for u, v in pairwise(path))

    targets = [tokens[corpus.page_ids(session)].tolist() for session in range(20)] + [[4, 4], [UNK]]
    found = ChainPredictor(chains).nll([[BOS, 4, EOS, BOS]] * len(targets), None, targets)
    np.testing.assert_allclose(found, [nats([BOS, *target, EOS]) for target in targets])


@pytest.fixture
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return read_corpus(write(shop(60), tmp_path_factory.mktemp("markov")))


def test_page_and_group_probabilities_are_those_of_very_many_steps() -> None:
    chains = two_chains()
    table = dense(chains)
    groups = np.zeros((2, 7), dtype=np.float32)
    groups[0, C], groups[1, [A, B]] = 1.0, 1.0
    rolled = ChainPredictor(chains).rollouts(PROMPTS, None, np.zeros((3, 1, 4)), groups, np.zeros(3))
    for row, prompt in enumerate(PROMPTS):
        weights = bayes(table, chains.prior, prompt)
        a, b, c, a_or_b = (weights @ [_passage(matrix, marks) for matrix in table] for marks in ({A}, {B}, {C}, {A, B}))
        np.testing.assert_allclose(rolled.marginals[row, [A, B, C]], [a, b, c], atol=1e-6)
        np.testing.assert_allclose(rolled.groups[row], [c, a_or_b], atol=1e-6)


def _passage(matrix: np.ndarray, marks: set[int]) -> float:
    """P(a session holds a marked page): what has arrived there after very many single steps."""
    place = np.zeros(len(matrix))
    place[BOS] = 1.0
    arrived = 0.0
    for _ in range(2_000):
        stepped = place @ matrix
        arrived += stepped[list(marks)].sum()
        stepped[[EOS, *marks]] = 0.0
        place = stepped
    return arrived


def test_the_path_is_the_greedy_one_of_the_likeliest_chain() -> None:
    chains = two_chains()
    table, predictor = dense(chains), ChainPredictor(chains)
    for prompt, path in zip(PROMPTS, predictor.greedy(PROMPTS, None, STEPS), strict=True):
        matrix = table[bayes(table, chains.prior, prompt).argmax()].copy()
        matrix[:, UNK] = 0.0
        slow: list[int] = []
        while len(slow) < STEPS:
            row = matrix[slow[-1] if slow else BOS].copy()
            if not slow:
                row[EOS] = 0.0
            if row.argmax() == EOS:
                break
            slow.append(int(row.argmax()))
        assert path == slow


def test_sampled_sessions_have_the_probabilities_of_the_chains() -> None:
    chains = two_chains()
    predictor = ChainPredictor(chains)
    draws = uniforms(["one"], 20_000, 40)
    rolled = predictor.rollouts(PROMPTS[:1], None, draws, np.zeros((0, 7)), np.array([0.5]))
    assert rolled.sequences.shape == draws.shape
    held = [(rolled.sequences == page).any(axis=2).mean() for page in (A, B, C)]
    np.testing.assert_allclose(held, rolled.marginals[0, [A, B, C]], atol=0.01)
    steps = np.zeros((7, 7))
    for session in rolled.sequences[0, :4_000].tolist():
        path = [BOS, *session]
        for u, v in pairwise(path):
            steps[u, v] += 1
            if v == EOS:
                break
    weights = predictor.posterior(PROMPTS[:1])[0]
    first = steps[BOS] / steps[BOS].sum()
    np.testing.assert_allclose(first, np.einsum("k,kv->v", weights, dense(chains)[:, BOS]), atol=0.02)
