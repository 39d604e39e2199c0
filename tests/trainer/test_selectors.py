"""A selector sees the past only, sees in training what it sees live, and learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.chains import Chains
from models.routing import ChainRouter
from models.selector import FLOOR, PageMeans, Posterior
from models.visit import Visit
from models.vocabulary import Tokenizer, Vocabulary
from tests.trainer.behaviour import embeddings_of, visitors, vocabulary_of
from trainer.corpus import Corpus
from trainer.mixture import MixtureOptions, fit_chains, responsibilities
from trainer.selectors import Histories, SelectorOptions, distil, fit_selector, router_of_choice

Fitted = tuple[Corpus, Vocabulary, np.ndarray, Chains]


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    corpus, _ = visitors(300, 3)
    vocabulary, tokens = vocabulary_of(corpus)
    users, held, options = np.arange(200), np.arange(200, 300), MixtureOptions([3], [8.0], 3)
    chains, _ = fit_chains(corpus, users, held, tokens, len(vocabulary), options)
    return corpus, vocabulary, tokens, chains


def test_the_target_is_in_the_labels_and_nowhere_else(fitted: Fitted) -> None:
    corpus, vocabulary, tokens, chains = fitted
    embeddings = embeddings_of(vocabulary)
    pages = corpus.pages.copy()
    for user in range(50):
        target = corpus.sessions(user)[-1]
        pages[corpus.starts[target] : corpus.starts[target + 1]] = corpus.names.index("p3")
    other = replace(corpus, pages=pages)
    for prefixes in (True, False):
        seen, changed = (Histories.of(c, range(50), chains, tokens, embeddings, prefixes) for c in (corpus, other))
        np.testing.assert_array_equal(seen.inputs, changed.inputs)
        np.testing.assert_array_equal(seen.logs, changed.logs)
        assert np.abs(seen.labels - changed.labels).max() > 0.1


def test_training_sees_what_the_live_selector_sees(fitted: Fitted) -> None:
    corpus, vocabulary, tokens, chains = fitted
    embeddings = embeddings_of(vocabulary)
    histories = Histories.of(corpus, range(60), chains, tokens, embeddings, prefixes=True)
    past = [
        [corpus.page_names(s) for s in corpus.sessions(user)[:length]]
        for user in range(60)
        for length in range(1, len(corpus.sessions(user)))
    ]
    visits = [Visit("s", sessions) for sessions in past]
    z = PageMeans(embeddings, Tokenizer(vocabulary))(visits)
    logs = Posterior(ChainRouter(vocabulary, chains, "")).logs(visits)
    assert len(histories.inputs) == len(visits)
    np.testing.assert_allclose(histories.inputs, np.concatenate([z, np.maximum(logs, FLOOR)], axis=1), atol=1e-5)
    np.testing.assert_allclose(histories.logs, logs, atol=1e-6)
    whole = responsibilities(chains, corpus, range(60), tokens)
    owners = [user for user in range(60) for _ in range(len(corpus.sessions(user)) - 1)]
    np.testing.assert_allclose(histories.labels, whole[owners])


def test_too_many_histories_are_sampled(fitted: Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, vocabulary, tokens, chains = fitted
    all_of_them = Histories.of(corpus, range(60), chains, tokens, embeddings_of(vocabulary), prefixes=True)
    monkeypatch.setattr("trainer.selectors.MOST_EXAMPLES", 40)
    some = Histories.of(corpus, range(60), chains, tokens, embeddings_of(vocabulary), prefixes=True)
    assert len(some.inputs) == len(some.labels) == len(some.logs) == 40
    rows, drawn = (np.concatenate([h.inputs, h.labels], axis=1) for h in (all_of_them, some))
    nearest = np.abs(rows[:, None] - drawn).max(axis=2)
    assert nearest.min(axis=0).max() < 1e-5  # each one drawn is one of them, with its own label
    assert len(set(nearest.argmin(axis=0))) > 35


def cross_entropy(net: torch.nn.Module, x: np.ndarray, y: np.ndarray) -> float:
    with torch.inference_mode():
        return float(-(y * torch.log_softmax(net(torch.from_numpy(x)), dim=1).numpy()).sum(axis=1).mean())


def test_soft_targets_are_learned_and_the_best_epoch_kept() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2_000, 4)).astype(np.float32)
    odds = np.stack([x[:, 0] * 2.0, x[:, 1], np.zeros(len(x))], axis=1)
    y = (np.exp(odds) / np.exp(odds).sum(axis=1, keepdims=True)).astype(np.float32)
    net = fit_selector(x[:1_500], y[:1_500], x[1_500:], y[1_500:])
    floor = float(-(y[1_500:] * np.log(y[1_500:])).sum(axis=1).mean())
    assert cross_entropy(net, x[1_500:], y[1_500:]) < floor + 0.02
    again = fit_selector(x[:1_500], y[:1_500], x[1_500:], y[1_500:])
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    # Labels that the validation users contradict: nothing after the first epoch is better, so that one is kept.
    once, longer = (
        fit_selector(x[:1_500], y[:1_500], x[1_500:], y[1_500:, ::-1].copy(), SelectorOptions(epochs=epochs, lr=0.01))
        for epochs in (1, 6)
    )
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), longer.parameters(), strict=True))


def test_a_distilled_selector_knows_nearly_what_the_chains_know(fitted: Fitted) -> None:
    corpus, vocabulary, tokens, chains = fitted
    net, nats = distil(corpus, range(200), range(200, 300), chains, tokens, embeddings_of(vocabulary))
    assert net.inputs == 6 + 3 and net.clusters == 3
    assert nats["mlp"] == pytest.approx(nats["mixture"], abs=0.05)
    judged = Histories.of(corpus, range(200, 300), chains, tokens, embeddings_of(vocabulary), prefixes=False)
    assert cross_entropy(net, judged.inputs, judged.labels) < 0.5


def test_the_network_routes_only_where_it_is_better() -> None:
    assert router_of_choice({"mlp": 2.0, "mixture": 2.1}) == "mlp"
    assert router_of_choice({"mlp": 2.0, "mixture": 2.0}) == "mixture"
    assert router_of_choice({"mlp": 2.0, "mixture": 1.9}) == "mixture"
