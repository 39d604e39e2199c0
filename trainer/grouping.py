"""Which visitors go together: found before their predictors learn, by what they do or by what they saw."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.chains import Chains
from models.config import Embedding
from models.config import Selector as Kind
from models.routing import ChainRouter, Router
from models.selector import PREFIX as MLP
from models.selector import (
    MLPSelector,
    PageMeans,
    Posterior,
    Selector,
    SelectorNet,
    make_embed,
    make_selector,
    selector_tensors,
)
from models.visit import Visit
from trainer.clusters import assign, centroids, make_costs, router_of, user_embeddings
from trainer.material import Material
from trainer.mixture import MixtureOptions, fit_chains, refit_chains, responsibilities
from trainer.options import KMEANS_CLUSTERS, PAPER_CLUSTERS
from trainer.selectors import SelectorOptions, distil, router_of_choice


@dataclass(frozen=True)
class Grouping:
    """Clusters, who routes to them, and how each training user is spread over them."""

    kind: Kind
    router: Router
    selector: Selector
    tensors: dict[str, np.ndarray]  # what the bundle keeps of router and selector
    posterior: np.ndarray  # (training users, K)
    choices: dict[str, Any]  # what validation said

    @property
    def users(self) -> list[int]:
        """Training users in each cluster."""
        counts: list[int] = np.bincount(self.posterior.argmax(axis=1), minlength=self.posterior.shape[1]).tolist()
        return counts


def by_behaviour(material: Material) -> Grouping:
    """A mixture of Markov chains, and a selector where it routes better than the chains' own posterior."""
    m = material
    kept = m.store.finished("mixture")
    if kept is None:
        _fit_mixture(m)
        kept = m.store.finished("mixture")  # several processes go on with what the first one found
        assert kept is not None
    tensors = {name: value.numpy() for name, value in kept.items()}
    chains = Chains.from_tensors(tensors, len(m.vocabulary))
    router = ChainRouter(m.vocabulary, chains, "")
    kind: Kind = "mlp" if any(name.startswith(MLP) for name in tensors) else "mixture"
    selector = make_selector(Path(), kind, chains.clusters, router, PageMeans(m.embeddings, m.tokenizer), tensors)
    posterior = responsibilities(chains, m.corpus, m.train_users.tolist(), m.tokens)
    return Grouping(kind, router, selector, tensors, posterior, m.store.told("mixture"))


def by_names(material: Material) -> Grouping:
    """K-means on mean page embeddings, which a running sum knows: the baseline of clusterwise models."""
    m, options = material, material.options
    kept = m.store.finished("kmeans")
    if m.start is not None:
        centers = m.start.selector["centroids"]
    elif kept is None:
        means = user_embeddings(m.corpus, m.train_users.tolist(), m.tokens, m.embeddings)
        centers = centroids(means, options.clusters or KMEANS_CLUSTERS, options.seed)
        m.store.finish("kmeans", {"centroids": torch.tensor(centers)})
    else:
        centers = kept["centroids"].numpy()
    costs = make_costs(m.embeddings, centers)
    router = router_of(m.vocabulary, costs)
    posterior = np.eye(router.clusters)[assign(m.corpus, m.train_users, router)]
    return Grouping("kmeans", router, Posterior(router), {"costs": costs, "centroids": centers}, posterior, {})


def by_sessions(material: Material, embedding: Embedding) -> Grouping:
    """K-means on z, what the selector of mode "paper" sees: its very start, after which nobody changes cluster."""
    m, o = material, material.options
    embed = make_embed(embedding, m.embeddings, m.tokenizer, o.encoder, m.device.type)
    kept = m.store.finished("kmeans")
    if kept is None:
        sessions = [[m.corpus.page_names(s) for s in m.corpus.sessions(user)] for user in m.train_users.tolist()]
        z = embed([Visit("", own[:-1] or own) for own in sessions])
        returning = [len(own) > 1 for own in sessions]  # as in mode "paper", they alone have a say
        known = None if m.start is None else m.start.selector["centroids"]
        centers = centroids(z[returning], o.clusters or PAPER_CLUSTERS, o.seed) if known is None else known
        kept = {"z": torch.tensor(z), "centroids": torch.tensor(centers)}
        m.store.finish("kmeans", kept)
    centers = kept["centroids"].numpy()
    selector = MLPSelector(nearest(centers), embed)
    costs = make_costs(m.embeddings, centers)
    tensors = {**selector_tensors(nearest(centers)), "costs": costs, "centroids": centers}
    posterior = np.eye(len(centers))[torch.cdist(kept["z"], kept["centroids"]).argmin(1).numpy()]
    return Grouping("mlp", router_of(m.vocabulary, costs), selector, tensors, posterior, {})


def nearest(centers: np.ndarray) -> SelectorNet:
    """A network that chooses the nearest of the centers (K, D): its logits are 2 z.e - |e|^2, with z = (z)+ - (-z)+."""
    clusters, width = centers.shape
    net = SelectorNet(width, clusters, hidden=2 * width)
    e, one = torch.tensor(centers), torch.eye(width)
    weights = {
        "hidden.weight": torch.cat([one, -one]), "hidden.bias": torch.zeros(2 * width),
        "output.weight": 2 * torch.cat([e, -e], dim=1), "output.bias": -e.square().sum(dim=1),
    }  # fmt: skip
    net.load_state_dict(weights)
    return net


def _fit_mixture(m: Material) -> None:
    """Fit chains and a selector, and keep them with what validation said."""
    options = m.options
    task = None if m.progress is None else m.progress.add_task("clusters", total=None)
    tried = range(1, 9) if options.clusters is None else [options.clusters]
    how = MixtureOptions(clusters=tried, seed=options.seed)
    if m.start is None:
        size = len(m.vocabulary)
        chains, chosen = fit_chains(m.corpus, m.train_users, m.held_users, m.tokens, size, how)
    else:
        start = m.start.chains(m.vocabulary)
        chains, chosen = refit_chains(m.corpus, m.train_users, m.held_users, m.tokens, start, how)
    choices: dict[str, Any] = {
        "nll_by_clusters": {str(k): nll for k, nll in chosen.by_clusters.items()},
        "nll_by_smoothing": {str(lam): nll for lam, nll in chosen.by_smoothing.items()},
        "nll": chosen.nll,
    }
    tensors = chains.tensors()
    if chains.clusters > 1:
        users, held = m.train_users.tolist(), m.held_users.tolist()
        net, nll = distil(m.corpus, users, held, chains, m.tokens, m.embeddings, SelectorOptions(seed=options.seed))
        choices["nll_by_selector"] = nll
        if router_of_choice(nll) == "mlp":
            tensors |= selector_tensors(net)
    m.store.tell("mixture", choices)
    m.store.finish("mixture", {name: torch.tensor(value) for name, value in tensors.items()})
    if task is not None:
        m.progress.update(task, total=1, completed=1)
