"""Vectors of items from clicks and texts, and their global clusters (xpert_findings, sections 2 and 4)."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array, csr_array
from sklearn.cluster import MiniBatchKMeans
from sklearn.utils.extmath import randomized_svd

from models.items import WIDTH, nearest_clusters, unit
from trainer.errors import TooFewClicks
from trainer.interactions import NONE, Interactions

REACH = 5  # clicks of one user so many places apart still belong together; weight 1 / distance
SMOOTHING = 0.75  # exponent of the contexts' frequencies, against rare contexts (Levy et al. 2015)
LEAST_CLICKS = 2  # an item clicked less often says nothing about the company it keeps
CLUSTER_SHARE, LEAST_CLUSTERS = 0.02, 8  # K as a share of the items
KMEANS_STEPS = 20


@dataclass(frozen=True)
class Space:
    """Unit vectors of those items that have one; vectors of two spaces go together only when aligned."""

    items: np.ndarray  # (M,) int32, ascending, indices into the log's items
    vectors: np.ndarray  # (M, D) float32

    def rows(self, items: np.ndarray) -> np.ndarray:
        """Where the items stand, of the same shape; -1 for those without a vector."""
        if not len(self.items):
            return np.full(items.shape, NONE)
        places = np.searchsorted(self.items, items).clip(max=len(self.items) - 1)
        found: np.ndarray = np.where(self.items[places] == items, places, NONE)
        return found


def click_space(log: Interactions, seed: int = 0, width: int = WIDTH, least_clicks: int = LEAST_CLICKS) -> Space:
    """From the company that items keep in clicks: positive pointwise mutual information, truncated SVD.

    Levy and Goldberg 2014. Items with fewer clicks have no vector. Raises TooFewClicks when none is left.
    """
    items = np.flatnonzero(log.popularity() >= least_clicks).astype(np.int32)
    information = _information(log, items)
    kept = np.flatnonzero(information.sum(axis=1) > 0)
    if len(kept) < 2:
        raise TooFewClicks(
            "No two items were clicked together often enough to tell which belong together. Give more clicks, or texts."
        )
    information = information[kept][:, kept]
    left, values, _ = randomized_svd(information, min(width, len(kept) - 1), n_iter=4, random_state=seed)
    vectors = np.zeros((len(kept), width))
    vectors[:, : len(values)] = left * values  # their square roots did worse on Beauty's validation users
    return Space(items[kept], unit(vectors))


def text_space(items: np.ndarray, embeddings: np.ndarray, width: int = WIDTH) -> Space:
    """From texts' embeddings (M, 384) of `items` (M,), projected to their main directions."""
    order = np.argsort(items)
    _, _, directions = randomized_svd(embeddings, min(width, *embeddings.shape), n_iter=4, random_state=0)
    return Space(items[order].astype(np.int32), unit(_padded(embeddings[order] @ directions.T, width)))


def join(clicks: Space, texts: Space, text_weight: float, width: int = WIDTH) -> Space:
    """Both side by side, projected to `width`; an item with one of the two has zeros for the other."""
    items = np.union1d(clicks.items, texts.items).astype(np.int32)
    both = np.concatenate([_filled(clicks, items), text_weight * _filled(texts, items)], axis=1)
    left, values, _ = randomized_svd(both, min(width, *both.shape), n_iter=4, random_state=0)
    return Space(items, unit(_padded(left * values, width)))


def align(space: Space, before: Space) -> tuple[Space, float]:
    """The space turned so that items of both lie where they lay (orthogonal Procrustes), and their mean cosine.

    Items that the new space has no longer keep their last vector, so a history never loses its meaning overnight.
    """
    shared, new, old = np.intersect1d(space.items, before.items, return_indices=True)
    left, _, right = np.linalg.svd(space.vectors[new].T @ before.vectors[old])
    vectors = (space.vectors @ (left @ right)).astype(np.float32)
    cosine = float((vectors[new] * before.vectors[old]).sum(axis=1).mean()) if len(shared) else 0.0
    gone = ~np.isin(before.items, space.items)
    items = np.concatenate([space.items, before.items[gone]])
    order = np.argsort(items)
    return Space(items[order], np.concatenate([vectors, before.vectors[gone]])[order]), cosine


def aligned(spaces: Iterable[Space]) -> tuple[list[Space], list[float]]:
    """Each space aligned to the one before it, in time order, and the mean cosines."""
    found: list[Space] = []
    cosines: list[float] = []
    for space in spaces:
        if found:
            space, cosine = align(space, found[-1])
            cosines.append(cosine)
        found.append(space)
    return found, cosines


def global_centroids(vectors: np.ndarray, clusters: int | None = None, seed: int = 0) -> np.ndarray:
    """K-means of the items' vectors from a random start, (N, D) -> (K, D) float32; K is 2 % of the items unless given.

    Clusters that no item is nearest to are left out.
    """
    wanted = clusters or max(LEAST_CLUSTERS, round(CLUSTER_SHARE * len(vectors)))
    fitted = MiniBatchKMeans(
        min(wanted, len(np.unique(vectors, axis=0))),
        init="random",
        n_init=1,
        max_iter=KMEANS_STEPS,
        batch_size=4096,
        random_state=seed,
    ).fit(vectors)
    centroids = fitted.cluster_centers_.astype(np.float32)
    kept: np.ndarray = centroids[np.unique(nearest_clusters(vectors, centroids))]
    return kept


def text_map(embeddings: np.ndarray, vectors: np.ndarray, penalty: float = 1.0) -> np.ndarray:
    """Where a new item's text puts it among the known ones: ridge regression, (N, 384), (N, D) -> (384, D) float32."""
    square = embeddings.T @ embeddings + penalty * np.eye(embeddings.shape[1])
    solved: np.ndarray = np.linalg.solve(square, embeddings.T @ vectors).astype(np.float32)
    return solved


def _information(log: Interactions, items: np.ndarray) -> csr_array:
    """Positive PMI of items in each other's company: (M, M), sparse, symmetric but for the smoothing."""
    together = _company(log, items)
    totals = together.sum(axis=1)
    contexts = totals**SMOOTHING
    contexts = contexts / max(contexts.sum(), 1e-12)
    pairs = together.tocoo()
    with np.errstate(divide="ignore"):
        values = np.log(pairs.data / (totals[pairs.row] * contexts[pairs.col]))
    positive = values > 0
    return csr_array((values[positive], (pairs.row[positive], pairs.col[positive])), shape=pairs.shape)


def _company(log: Interactions, items: np.ndarray) -> csr_array:
    """How often two of `items` stand within reach of each other in one user's clicks, by 1 / distance: (M, M)."""
    place = np.full(len(log.items), NONE)
    place[items] = np.arange(len(items))
    known = place[log.item] != NONE
    row, user = place[log.item[known]], log.user[known]
    heads, tails, weights = [], [], []
    for distance in range(1, REACH + 1):
        same = (user[distance:] == user[:-distance]) & (row[distance:] != row[:-distance])
        heads.append(row[:-distance][same])
        tails.append(row[distance:][same])
        weights.append(np.full(int(same.sum()), 1.0 / distance))
    one_way = coo_array(
        (np.concatenate(weights), (np.concatenate(heads), np.concatenate(tails))), shape=(len(items), len(items))
    ).tocsr()
    return (one_way + one_way.T).tocsr()


def _filled(space: Space, items: np.ndarray) -> np.ndarray:
    vectors = np.zeros((len(items), space.vectors.shape[1]), dtype=np.float32)
    vectors[np.searchsorted(items, space.items)] = space.vectors
    return vectors


def _padded(vectors: np.ndarray, width: int) -> np.ndarray:
    return np.pad(vectors, ((0, 0), (0, width - vectors.shape[1])))
