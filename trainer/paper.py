"""HeTLM as published, mode "paper": K-means clusters of embeddings, learnt by a selector, refined by Algorithm 1."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.selector import Embed, SelectorNet
from models.vocabulary import Tokenizer
from trainer.actor_critic import ActorCritic
from trainer.checkpoints import Run
from trainer.clusters import centroids as kmeans
from trainer.examples import Example
from trainer.losses import hard_centroids
from trainer.paper_options import PaperOptions
from trainer.samples import Samples

__all__ = ["PaperFit", "PaperOptions", "fit_paper"]

IMITATION_LR = 1e-3  # of the ancestor AC-TPC, as the batch
IMITATION_BATCH = 128


@dataclass(frozen=True)
class PaperFit:
    """K clusters that somebody chose, the largest first."""

    models: list[PreTrainedModel]
    selector: SelectorNet  # z (N, D) -> logits (N, K)
    centroids: np.ndarray  # (K, D) float32, means over the training users
    clusters: np.ndarray  # (N,) of the training users
    users: list[int]  # training users in each cluster
    history: list[list[int]]  # users in each cluster that training began with: at its start, and after each epoch


def fit_paper(
    model: PreTrainedModel, train: Sequence[Example], held: Sequence[Example], embed: Embed, tokenizer: Tokenizer,
    clusters: int, options: PaperOptions, store: Run, device: torch.device, context: int = 512, seed: int = 0,
    progress: Any = None, deadline: float = math.inf, checkpoint_steps: int = 100,
) -> PaperFit:  # fmt: skip
    """Fine-tune copies of the pretrained `model`, one for each of at most `clusters` clusters, and their selector.

    How many are left is up to the training: a cluster that no training user chooses is dropped. The epoch with the
    least validation loss of the chosen predictors is kept. No step begins after `deadline` (time.monotonic()).
    """
    trained, judged = (
        Samples.of(part, _embedded(part, embed, store, name), tokenizer, context)
        for part, name in ((train, "embeddings-train"), (held, "embeddings-validation"))
    )
    selector, centroids = _start(trained.z, clusters, options.selector_epochs, store, seed)
    models = [copy.deepcopy(model) for _ in range(len(centroids))]
    training = ActorCritic(selector, models, centroids, trained, judged, options, store, device, seed, checkpoint_steps)
    training.run(progress, deadline)
    chosen = training.clusters(trained.z).cpu()
    sizes = torch.bincount(chosen, minlength=len(models))
    kept = [k for k in sizes.argsort(descending=True, stable=True).tolist() if sizes[k]]
    place = torch.zeros(len(models), dtype=torch.long)
    place[kept] = torch.arange(len(kept))
    return PaperFit(
        models=[models[k] for k in kept],
        selector=prune(selector, kept),
        centroids=hard_centroids(trained.z, chosen, centroids)[kept].numpy(),
        clusters=place[chosen].numpy(),
        users=sizes[kept].tolist(),
        history=training.sizes,
    )


def prune(selector: SelectorNet, kept: Sequence[int]) -> SelectorNet:
    """A selector of the clusters `kept`, in that order; their odds against each other stay."""
    pruned = SelectorNet(selector.inputs, len(kept))
    state = selector.state_dict()
    pruned.load_state_dict(state | {name: state[name][list(kept)] for name in ("output.weight", "output.bias")})
    return pruned


def imitate(selector: SelectorNet, z: Tensor, labels: Tensor, epochs: int) -> None:
    """Teach the selector to give z (N, D) the labels (N,), by cross-entropy."""
    optimizer = torch.optim.Adam(selector.parameters(), lr=IMITATION_LR)
    selector.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(z)).split(IMITATION_BATCH):
            loss = torch.nn.functional.cross_entropy(selector(z[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _embedded(examples: Sequence[Example], embed: Embed, store: Run, name: str) -> Tensor:
    """z of the sessions before each target, made once: (N, D) float32."""
    kept = store.finished(name)
    if kept is not None:
        return kept["z"]
    z = torch.as_tensor(embed([example.visit for example in examples]))
    store.finish(name, {"z": z})
    return z


def _start(z: Tensor, clusters: int, epochs: int, store: Run, seed: int) -> tuple[SelectorNet, Tensor]:
    """A selector that has learnt the K-means clusters of z (N, D), and their centroids (K, D)."""
    kept = store.finished("imitation")
    if kept is not None:
        centroids = kept.pop("centroids")
        selector = SelectorNet(z.shape[1], len(centroids))
        selector.load_state_dict(kept)
        return selector, centroids
    centroids = torch.as_tensor(kmeans(z.numpy(), clusters, seed))
    torch.manual_seed(seed)
    selector = SelectorNet(z.shape[1], len(centroids))
    imitate(selector, z, torch.cdist(z, centroids).argmin(1), epochs)
    store.finish("imitation", {**selector.state_dict(), "centroids": centroids})
    return selector, centroids
