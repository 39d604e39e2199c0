"""Selectors: one posterior, whether from sums, from sessions or from a network."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.encoder import Encoder, text_of
from models.manifest import BundleRefused
from models.routing import ChainRouter
from models.selector import (
    FLOOR,
    MLPSelector,
    PageMeans,
    Posterior,
    SelectorNet,
    make_embed,
    make_selector,
    selector_tensors,
)
from models.visit import Visit
from models.vocabulary import Tokenizer
from tests.models.chained import random_chains
from tests.models.conftest import PAGES, SIZE, vocabulary

WIDTH, CLUSTERS = 7, 3
VISITS = [
    Visit("a", [["home", "shoes"], ["home", "cart"]]),
    Visit("b", [["help", "nowhere"]]),
    Visit("c", []),
    Visit("d", [PAGES * 20] * 4),
]


@pytest.fixture
def router() -> ChainRouter:
    return ChainRouter(vocabulary(), random_chains(SIZE, CLUSTERS), "digest")


@pytest.fixture
def means() -> PageMeans:
    return PageMeans(np.random.default_rng(0).normal(size=(SIZE, WIDTH)).astype(np.float32), Tokenizer(vocabulary()))


def net(inputs: int, clusters: int = CLUSTERS) -> SelectorNet:
    torch.manual_seed(0)
    return SelectorNet(inputs, clusters, hidden=5)


def test_the_posterior_is_that_of_the_sums_or_else_of_the_sessions(router: ChainRouter) -> None:
    posterior = Posterior(router)
    found = posterior.posterior(VISITS)
    np.testing.assert_allclose(found.sum(axis=1), 1.0)
    for visit, row in zip(VISITS, found, strict=True):
        sums = router.route(visit.sessions)
        np.testing.assert_array_equal(row, np.exp(router.log_posterior(sums)))
        elsewhere = Visit(visit.seed, [["sale"]], sums)
        np.testing.assert_array_equal(posterior.posterior([elsewhere])[0], row)
        foreign = Visit(visit.seed, visit.sessions, [0.0] * 5)
        np.testing.assert_array_equal(posterior.posterior([foreign])[0], row)
    assert posterior.posterior([]).shape == (0, CLUSTERS)


def test_the_embedding_is_the_mean_of_known_pages() -> None:
    embeddings = np.random.default_rng(1).normal(size=(SIZE, WIDTH)).astype(np.float32)
    z = PageMeans(embeddings, Tokenizer(vocabulary()))(VISITS)
    assert z.dtype == np.float32 and z.shape == (4, WIDTH)
    home, shoes, cart, help_ = (embeddings[4 + PAGES.index(page)] for page in ("home", "shoes", "cart", "help"))
    np.testing.assert_allclose(z[0], (2 * home + shoes + cart) / 4, atol=1e-6)
    np.testing.assert_allclose(z[1], help_)
    assert (z[2] == 0.0).all()


@pytest.mark.parametrize("sees_posterior", [True, False])
def test_the_network_sees_its_input_and_no_other_visit(
    router: ChainRouter, means: PageMeans, sees_posterior: bool
) -> None:
    model = net(WIDTH + CLUSTERS * sees_posterior)
    selector = MLPSelector(model, means, router if sees_posterior else None)
    found = selector.posterior(VISITS)
    np.testing.assert_allclose(found.sum(axis=1), 1.0)
    w1, b1, w2, b2 = (parameter.detach().numpy() for parameter in model.parameters())
    for visit, row in zip(VISITS, found, strict=True):
        x = means([visit])[0].astype(np.float64)
        if sees_posterior:
            x = np.concatenate([x, np.maximum(router.log_posterior(router.route(visit.sessions)), FLOOR)])
        logits = w2 @ np.maximum(w1 @ x + b1, 0.0) + b2
        np.testing.assert_allclose(row, np.exp(logits) / np.exp(logits).sum(), rtol=1e-9)
        np.testing.assert_allclose(selector.posterior([visit])[0], row, rtol=1e-12)
    assert selector.posterior([]).shape == (0, CLUSTERS)


@pytest.mark.parametrize("inputs", [WIDTH, WIDTH + CLUSTERS])
def test_tensors_bring_the_network_back(router: ChainRouter, means: PageMeans, inputs: int) -> None:
    model = net(inputs)
    tensors = selector_tensors(model)
    again = make_selector(Path("bundle"), "mlp", CLUSTERS, router, means, tensors)
    expected = MLPSelector(model, means, router if inputs > WIDTH else None)
    np.testing.assert_array_equal(again.posterior(VISITS), expected.posterior(VISITS))
    assert isinstance(make_selector(Path("bundle"), "mixture", CLUSTERS, router, means, tensors), Posterior)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mlp.hidden.weight": None}, "no network for 3 clusters"),
        ({"mlp.output.bias": np.zeros(4, dtype=np.float32)}, "no network for 3 clusters"),
        ({"mlp.more": np.zeros(4, dtype=np.float32)}, "no network for 3 clusters"),
        ({"mlp.hidden.weight": np.zeros((5, 9), dtype=np.float32)}, "reads 9 numbers, but an embedding has 7"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    router: ChainRouter, means: PageMeans, change: dict[str, Any], words: str
) -> None:
    tensors = {
        name: tensor for name, tensor in {**selector_tensors(net(WIDTH)), **change}.items() if tensor is not None
    }
    with pytest.raises(BundleRefused, match=words):
        make_selector(Path("bundle"), "mlp", CLUSTERS, router, means, tensors)


def test_a_router_of_another_size_is_refused(router: ChainRouter, means: PageMeans) -> None:
    with pytest.raises(BundleRefused, match="3 clusters, but the config says 4"):
        make_selector(Path("bundle"), "mixture", 4, router, means, {})


def test_the_encoder_reads_the_end_of_a_long_history() -> None:
    assert text_of([["home", "shoes"], ["cart"]]) == "home - shoes | cart"
    embed = make_embed("text", np.zeros((SIZE, WIDTH)), Tokenizer(vocabulary()))
    past = [["search", "shirts"]] * 200
    same, other = Visit("a", [["music"], *past]), Visit("b", [*past, ["music", "drums"]])
    z = embed([Visit("c", past), same, other])
    assert z.shape == (3, 384)
    np.testing.assert_allclose(z[0], z[1], atol=1e-5)  # the oldest page is out of sight
    assert np.abs(z[0] - z[2]).max() > 1e-3
    np.testing.assert_allclose(
        Encoder().encode(["home - shoes"])[0], embed([Visit("d", [["home", "shoes"]])])[0], atol=1e-5
    )
