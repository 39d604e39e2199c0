"""K-means clusters of visitors on their mean page embeddings (HeTLM, section 1.4, step 2)."""

from collections.abc import Sequence

import numpy as np
from sklearn.cluster import KMeans

from models.routing import CentroidRouter, Router, page_costs
from models.vocabulary import SPECIALS, Vocabulary
from trainer.corpus import Corpus
from trainer.selectors import mean_embeddings

RESTARTS = 4


def user_embeddings(corpus: Corpus, users: Sequence[int], tokens: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """Mean page embedding of each user's sessions before the last one, or of the only one: (users, D) float32.

    The last session is a target and stays out; unknown pages do not count.
    """
    sessions = [corpus.sessions(user) for user in users]
    return mean_embeddings(corpus, [own[:-1] or own for own in sessions], tokens, embeddings)


def centroids(means: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """At most `clusters` centroids, the one with most users first: (K, D) float32."""
    distinct = len(np.unique(means.round(6), axis=0))
    fitted = KMeans(min(clusters, distinct), n_init=RESTARTS, random_state=seed).fit(means)
    sizes = np.bincount(fitted.labels_, minlength=len(fitted.cluster_centers_))
    order = np.argsort(-sizes, kind="stable")
    kept: np.ndarray = fitted.cluster_centers_[order[sizes[order] > 0]].astype(np.float32)
    return kept


def make_costs(embeddings: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """The router's table for every token; special tokens cost nothing."""
    costs = page_costs(embeddings, centers)
    costs[: len(SPECIALS)] = 0.0
    return costs


def assign(corpus: Corpus, users: np.ndarray, router: Router) -> np.ndarray:
    """Cluster of each user, from the sessions before the last one (or the only one)."""
    found = np.zeros(len(users), dtype=np.int64)
    for row, user in enumerate(users.tolist()):
        sessions = corpus.sessions(user)
        found[row] = router.cluster(router.route([corpus.page_names(s) for s in (sessions[:-1] or sessions)]))
    return found


def router_of(vocabulary: Vocabulary, costs: np.ndarray) -> Router:
    """The router before it has a digest."""
    return CentroidRouter(vocabulary.pages, costs[len(SPECIALS) :], "")
