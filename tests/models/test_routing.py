"""The router's running sums against the plain mean of page embeddings."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.routing import Router, page_costs

PAGES = [f"page {i}" for i in range(30)]


def made(clusters: int, seed: int = 0) -> tuple[Router, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(len(PAGES), 384)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    centers = np.stack([embeddings[rng.integers(0, 30, size=8)].mean(0) for _ in range(clusters)])
    return Router(PAGES, page_costs(embeddings, centers), "digest"), embeddings, centers


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
            assert router.cluster(sums, count) == expected
            found.add(expected)
    assert len(found) == clusters


@given(st.lists(st.lists(st.sampled_from([*PAGES, "unknown"]), max_size=20), max_size=8), st.randoms())
def test_order_and_steps_of_adding_do_not_matter(sessions: list[list[str]], rng: object) -> None:
    router, _, _ = made(4)
    sums, count = None, 0
    for session in sessions:
        sums, count = router.add(sums, count, session)
    pages = [page for session in sessions for page in session]
    rng.shuffle(pages)  # type: ignore[attr-defined]
    at_once, total = router.add(None, 0, pages)
    assert (sums or [0.0] * 4) == at_once == router.route(sessions)  # exactly, not nearly
    assert count == total == sum(page != "unknown" for page in pages)


def test_unknown_pages_change_nothing_and_no_page_is_cluster_0() -> None:
    router, _, _ = made(3)
    sums, count = router.add(None, 0, PAGES[:5])
    assert router.add(sums, count, ["unknown", "[UNK]", ""]) == (sums, count)
    assert router.cluster(None, 0) == router.cluster([0.0] * 3, 0) == 0


def test_add_does_not_change_its_argument() -> None:
    router, _, _ = made(3)
    sums, _ = router.add(None, 0, PAGES[:5])
    before = list(sums)
    router.add(sums, 5, PAGES[5:9])
    assert sums == before


def test_sums_of_another_router_are_refused() -> None:
    router, _, _ = made(3)
    with pytest.raises(ValueError, match="2 routing sums, but this router keeps 3"):
        router.add([0.0, 0.0], 1, PAGES[:1])
