"""The routers' running sums against the plain mean of page embeddings, and against the chains themselves."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.chains import Chains
from models.manifest import BundleRefused
from models.routing import CentroidRouter, ChainRouter, Router, make_router, page_costs
from models.vocabulary import SPECIALS, Tokenizer, Vocabulary
from tests.models.chained import random_chains

PAGES = [f"page {i}" for i in range(30)]
VOCABULARY = Vocabulary(PAGES, [0.1] * len(PAGES), 1)
KINDS = ("centroids", "chains")


def made(clusters: int, seed: int = 0) -> tuple[Router, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(len(PAGES), 384)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    centers = np.stack([embeddings[rng.integers(0, 30, size=8)].mean(0) for _ in range(clusters)])
    return CentroidRouter(PAGES, page_costs(embeddings, centers), "digest"), embeddings, centers


def chained(clusters: int, seed: int = 0) -> tuple[Router, Chains]:
    chains = random_chains(len(VOCABULARY), clusters, seed)
    return ChainRouter(VOCABULARY, chains, "digest"), chains


ROUTERS = {"centroids": made(4)[0], "chains": chained(4)[0]}


def nearest(pages: list[str], embeddings: np.ndarray, centers: np.ndarray) -> tuple[int, float]:
    """The obvious way: mean embedding, nearest centroid, and how much nearer it is than the second."""
    mean = embeddings[[PAGES.index(page) for page in pages]].astype(np.float64).mean(axis=0)
    distances = ((centers.astype(np.float64) - mean) ** 2).sum(axis=1)
    first, second = np.sort(distances)[:2]
    return int(np.argmin(distances)), float(second - first)


@pytest.mark.parametrize("clusters", [2, 3, 6])
def test_it_is_the_nearest_centroid_of_the_mean_embedding(clusters: int) -> None:
    router, embeddings, centers = made(clusters)
    rng = np.random.default_rng(1)
    found = set()
    for _ in range(300):
        pages = [PAGES[i] for i in rng.integers(0, 30, size=int(rng.integers(1, 60)))]
        sums, count = router.add(None, 0, pages)
        expected, margin = nearest(pages, embeddings, centers)
        assert count == len(pages) and len(sums) == router.width == clusters
        if margin > 1e-6:
            assert router.cluster(sums) == expected
            assert router.log_posterior(sums)[expected] == 0.0
            assert sum(map(math.exp, router.log_posterior(sums))) == 1.0
            found.add(expected)
    assert len(found) == clusters


@pytest.mark.parametrize("clusters", [1, 2, 5])
def test_it_is_the_posterior_of_the_chains(clusters: int) -> None:
    router, chains = chained(clusters)
    tokenizer = Tokenizer(VOCABULARY)
    rng = np.random.default_rng(2)
    found = set()
    for _ in range(200):
        sessions = [
            rng.choice([*PAGES, "unknown"], size=rng.integers(1, 9)).tolist() for _ in range(rng.integers(1, 6))
        ]
        joint = np.log(chains.prior) + sum(chains.log_likelihood(tokenizer.encode(pages)) for pages in sessions)
        expected = joint - np.logaddexp.reduce(joint)
        posterior = router.log_posterior(router.route(sessions))
        np.testing.assert_allclose(posterior, expected, atol=1e-7)
        assert router.cluster(router.route(sessions)) == int(np.argmax(expected))
        found.add(int(np.argmax(expected)))
    assert len(found) == clusters


def test_a_new_visitor_has_the_prior() -> None:
    router, chains = chained(3)
    for sums in (None, [], router.route([]), router.route([[]])):
        np.testing.assert_allclose(np.exp(router.log_posterior(sums)), chains.prior, atol=1e-12)
        assert router.cluster(sums) == int(np.argmax(chains.prior))


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.lists(st.sampled_from([*PAGES, "unknown"]), max_size=20), max_size=8), st.randoms())
def test_the_order_of_sessions_does_not_matter(kind: str, sessions: list[list[str]], rng: object) -> None:
    router = ROUTERS[kind]
    sums, count = None, 0
    for session in sessions:
        sums, count = router.add(sums, count, session)
    shuffled = list(sessions)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    assert (sums or [0.0] * 4) == router.route(shuffled) == router.route(sessions)  # exactly, not nearly
    assert all(value * 2**32 == round(value * 2**32) for value in router.route(sessions))
    assert count == sum(page != "unknown" for pages in sessions for page in pages)


def test_unknown_pages_are_nothing_to_a_centroid_and_no_page_is_cluster_0() -> None:
    router, _, _ = made(3)
    sums, count = router.add(None, 0, PAGES[:5])
    assert router.add(sums, count, ["unknown", "[UNK]", ""]) == (sums, count)
    assert router.cluster(None) == router.cluster([0.0] * 3) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_add_does_not_change_its_argument(kind: str) -> None:
    router = ROUTERS[kind]
    sums, _ = router.add(None, 0, PAGES[:5])
    before = list(sums)
    router.add(sums, 5, PAGES[5:9])
    assert sums == before


@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_another_router_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="2 routing sums, but this router keeps 4"):
        ROUTERS[kind].add([0.0, 0.0], 1, PAGES[:1])


def test_the_selector_says_which_tensors_route() -> None:
    chains, costs = random_chains(len(VOCABULARY), 3).tensors(), {"costs": np.zeros((len(VOCABULARY), 2))}
    place = Path("bundle")
    assert make_router(place, VOCABULARY, "mixture", chains, "").clusters == 3
    assert make_router(place, VOCABULARY, "mlp", {**chains, **costs}, "").clusters == 3
    assert make_router(place, VOCABULARY, "mlp", costs, "").clusters == 2
    assert make_router(place, VOCABULARY, "kmeans", {**chains, **costs}, "").clusters == 2
    with pytest.raises(BundleRefused, match=r"selector.safetensors: holds no `costs`"):
        make_router(place, VOCABULARY, "kmeans", chains, "")
    with pytest.raises(BundleRefused, match=r"selector.safetensors: holds no 'chains.prior'"):
        make_router(place, VOCABULARY, "mixture", costs, "")
    small = Vocabulary(PAGES[:5], [0.1] * 5, 1)
    with pytest.raises(BundleRefused, match=rf"costs` is \({len(SPECIALS) + 30}, 2\)"):
        make_router(place, small, "kmeans", costs, "")
    with pytest.raises(BundleRefused, match=r"chains\.marginals"):
        make_router(place, small, "mixture", chains, "")
