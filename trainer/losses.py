"""The losses of HeTLM (spec/hetlm.md, sections 1.3 to 1.5), and the centroids between which the last is measured."""

from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["sum", "mean"]

LEAST_MASS = 1e-3  # the centroid of a cluster with less soft mass in the batch would be arbitrary
EPSILON = 1e-8


def llm_loss(logits: Tensor, labels: Tensor, scored: Tensor, reduction: Reduction) -> Tensor:
    """L_LLM of each sample, in nats, as the sum or the mean over its scored tokens: (B,).

    `labels` and `scored` are (B, T); `logits` (S, V) has a row for each of the S scored places, row by row.
    """
    costs = torch.nn.functional.cross_entropy(logits, labels[scored], reduction="none")
    totals = costs.new_zeros(scored.shape).masked_scatter(scored, costs).sum(1)
    return totals if reduction == "sum" else totals / scored.sum(1)


def expected_loss(logits: Tensor, losses: Tensor) -> Tensor:
    """L_1, eq. (1): the loss under the selector's own choice, mean over the batch. (B, K), (B, K) -> scalar.

    No gradient reaches the predictors, so dL_1/dlogit_k = pi_k (l_k - sum_j pi_j l_j) / B.
    """
    return (logits.softmax(1) * losses.detach()).sum(1).mean()


def hard_critic(losses: Tensor, chosen: Tensor) -> Tensor:
    """L_C^k, eq. (2): the mean loss of predictor k over the samples that chose it, at least one. (B,), (B,) bool."""
    return losses[chosen].mean()


def soft_critic(losses: Tensor, probabilities: Tensor) -> Tensor:
    """Predictor k's part of L_C = L_1 as Algorithm 1, line 10 has it; none reaches the selector. (B,), (B,)."""
    return (probabilities.detach() * losses).mean()


def entropy(logits: Tensor) -> Tensor:
    """L_2, eq. (3): the entropy of the selector's choice in nats, mean over the batch. (B, K) -> scalar."""
    logs = logits.log_softmax(1)
    return -(logs.exp() * logs).sum(1).mean()


def separation(centroids: Tensor, alive: Tensor, tau: float | None = None) -> Tensor:
    """L_3 of centroids (K, D) over the pairs in which both are `alive` (K,) bool: a scalar.

    Without `tau` eq. (4) as printed: the sigmoid of minus the Manhattan distances, summed over ordered pairs. With
    `tau`, a typical distance, of minus their mean over `tau`, which does not saturate. No pair counts as distance 0.
    """
    first, second = torch.triu_indices(len(centroids), len(centroids), 1, device=centroids.device)
    both = alive[first] & alive[second]
    distances = (centroids[first[both]] - centroids[second[both]]).abs().sum(1)
    if tau is None:
        return torch.sigmoid(-2 * distances.sum())
    return torch.sigmoid(-distances.sum() / (tau * max(len(distances), 1)))


def mean_distance(centroids: Tensor) -> float:
    """Mean Manhattan distance of two of the centroids (K, D); 1 for a single one, which has no distance to scale."""
    return float(torch.pdist(centroids, p=1).mean()) if len(centroids) > 1 else 1.0


def soft_centroids(logits: Tensor, z: Tensor, old: Tensor, memory: float) -> tuple[Tensor, Tensor]:
    """Centroids that pass a gradient to the selector, and which of them the batch moved: (K, D), (K,) bool.

    The batch's means of z (B, D), weighted by the selector's choice (B, K), enter with 1 - memory, the `old` (K, D)
    with `memory` and without gradient. A cluster with hardly any mass in the batch keeps its old one.
    """
    choice = logits.softmax(1)
    mass = choice.sum(0)
    fresh = choice.T @ z / (mass + EPSILON)[:, None]
    alive = mass >= LEAST_MASS
    kept = old.detach()
    return torch.where(alive[:, None], memory * kept + (1 - memory) * fresh, kept), alive


def hard_centroids(z: Tensor, clusters: Tensor, old: Tensor) -> Tensor:
    """Mean of z (N, D) over the samples of each cluster (N,); one that nobody chose keeps its old one. (K, D)."""
    sizes = torch.bincount(clusters, minlength=len(old))
    sums = torch.nn.functional.one_hot(clusters, len(old)).to(z.dtype).T @ z
    return torch.where(sizes[:, None] > 0, sums / sizes.clamp(min=1)[:, None], old)
