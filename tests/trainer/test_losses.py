"""Each loss against its formula in plain numpy, and its gradient against the closed form or finite differences."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.losses import (
    entropy,
    expected_loss,
    hard_centroids,
    hard_critic,
    llm_loss,
    mean_distance,
    separation,
    soft_centroids,
    soft_critic,
)

RNG = np.random.default_rng(4)
LOGITS = RNG.normal(size=(5, 3))  # 5 users, 3 clusters
LOSSES = RNG.uniform(1, 6, size=(5, 3))
Z = RNG.normal(size=(5, 4))
OLD = RNG.normal(size=(3, 4))
ALIVE = torch.ones(3, dtype=torch.bool)


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(1, keepdims=True))
    pi: np.ndarray = e / e.sum(1, keepdims=True)
    return pi


def slope(loss: Callable[[Tensor], Tensor], at: np.ndarray) -> np.ndarray:
    """Our gradient."""
    x = torch.tensor(at, requires_grad=True)
    (found,) = torch.autograd.grad(loss(x), x)
    return found.numpy()


def differences(formula: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """The gradient by central differences."""
    found = np.zeros_like(at)
    for i in np.ndindex(*at.shape):
        up, down = at.copy(), at.copy()
        up[i] += step
        down[i] -= step
        found[i] = (formula(up) - formula(down)) / (2 * step)
    return found


def check(loss: Callable[[Tensor], Tensor], formula: Callable[[np.ndarray], float], at: np.ndarray) -> None:
    """Same value, same gradient."""
    assert float(loss(torch.tensor(at))) == pytest.approx(formula(at), rel=1e-12)
    np.testing.assert_allclose(slope(loss, at), differences(formula, at), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_llm_loss_is_the_nll_of_the_scored_tokens(reduction: str) -> None:
    labels = np.array([[3, 1, 0, 2], [2, 2, 1, 0]])
    scored = np.array([[False, True, True, False], [True, True, True, False]])
    logits = RNG.normal(size=(5, 4))  # of the scored places, row by row

    def formula(logits: np.ndarray) -> np.ndarray:
        probabilities, place = softmax(logits), 0
        found = np.zeros(2)
        for i in range(2):
            for j in range(4):
                if scored[i, j]:
                    found[i] -= np.log(probabilities[place, labels[i, j]])
                    place += 1
        return found / scored.sum(1) if reduction == "mean" else found

    def loss(logits: Tensor) -> Tensor:
        return llm_loss(logits, torch.tensor(labels), torch.tensor(scored), reduction)  # type: ignore[arg-type]

    weights = np.array([1.0, 3.0])
    np.testing.assert_allclose(loss(torch.tensor(logits)).numpy(), formula(logits), rtol=1e-12)
    check(lambda x: loss(x) @ torch.tensor(weights), lambda x: float(formula(x) @ weights), logits)


def test_l1_is_the_expected_loss_and_its_gradient_the_policy_gradient() -> None:
    losses = torch.tensor(LOSSES, requires_grad=True)
    check(lambda x: expected_loss(x, losses), lambda x: float((softmax(x) * LOSSES).sum(1).mean()), LOGITS)
    pi = softmax(LOGITS)
    baseline = (pi * LOSSES).sum(1, keepdims=True)
    closed = pi * (LOSSES - baseline) / len(pi)
    np.testing.assert_allclose(slope(lambda x: expected_loss(x, losses), LOGITS), closed, rtol=1e-12)
    expected_loss(torch.tensor(LOGITS, requires_grad=True), losses).backward()
    assert losses.grad is None  # the actor teaches the selector only


@pytest.mark.parametrize("k", [0, 2])
def test_the_hard_critic_is_the_mean_over_those_who_chose_the_predictor(k: int) -> None:
    clusters = np.array([0, 2, 0, 0, 2])
    chosen = clusters == k

    def formula(column: np.ndarray) -> float:
        return float(sum(loss for loss, cluster in zip(column, clusters, strict=True) if cluster == k) / chosen.sum())

    def loss(column: Tensor) -> Tensor:
        return hard_critic(column, torch.tensor(chosen))

    check(loss, formula, LOSSES[:, k])
    np.testing.assert_allclose(slope(loss, LOSSES[:, k]), chosen / chosen.sum())


def test_the_soft_critics_of_all_predictors_add_up_to_l1() -> None:
    pi = torch.tensor(softmax(LOGITS), requires_grad=True)

    def loss(losses: Tensor) -> Tensor:
        return torch.stack([soft_critic(losses[:, k], pi[:, k]) for k in range(3)]).sum()

    check(loss, lambda losses: float((softmax(LOGITS) * losses).sum(1).mean()), LOSSES)
    np.testing.assert_allclose(slope(loss, LOSSES), softmax(LOGITS) / 5, rtol=1e-12)
    assert float(loss(torch.tensor(LOSSES))) == pytest.approx(
        float(expected_loss(torch.tensor(LOGITS), torch.tensor(LOSSES)))
    )
    loss(torch.tensor(LOSSES, requires_grad=True)).backward()
    assert pi.grad is None  # the critic teaches the predictors only


def test_l2_is_the_entropy_also_where_a_probability_is_zero() -> None:
    def formula(logits: np.ndarray) -> float:
        pi = softmax(logits)
        return float(-(pi * np.log(pi)).sum(1).mean())

    check(entropy, formula, LOGITS)
    pi = softmax(LOGITS)
    row = -(pi * np.log(pi)).sum(1, keepdims=True)
    np.testing.assert_allclose(slope(entropy, LOGITS), -pi * (np.log(pi) + row) / len(pi), rtol=1e-10)
    sharp = np.array([[2_000.0, 0.0, 0.0]])
    assert float(entropy(torch.tensor(sharp))) == 0.0 and not slope(entropy, sharp).any()


def l3(centroids: np.ndarray, tau: float | None, alive: np.ndarray | None = None) -> float:
    """Eq. (4), and its scaled form, with two loops."""
    live = np.ones(len(centroids), dtype=bool) if alive is None else alive
    pairs = [(k, m) for k in range(len(centroids)) for m in range(len(centroids)) if k != m and live[k] and live[m]]
    distances = [float(np.abs(centroids[k] - centroids[m]).sum()) for k, m in pairs]
    exponent = sum(distances) if tau is None else np.mean(distances) / tau
    return float(1 / (1 + np.exp(exponent)))


@pytest.mark.parametrize("tau", [None, 2.5])
def test_l3_is_the_sigmoid_of_minus_the_manhattan_distances(tau: float | None) -> None:
    for scale in (0.05, 1.0):
        check(lambda e: separation(e, ALIVE, tau), lambda e: l3(e, tau), scale * OLD)
    alive = np.array([True, False, True])
    check(lambda e: separation(e, torch.tensor(alive), tau), lambda e: l3(e, tau, alive), 0.3 * OLD)
    for few in (torch.zeros(3, dtype=torch.bool), torch.tensor([True, False, False])):  # no pair
        assert float(separation(torch.tensor(OLD), few, tau)) == 0.5


@pytest.mark.parametrize("memory", [0.0, 0.9])
@pytest.mark.parametrize("tau", [None, 2.5])
def test_l3_reaches_the_selector_through_soft_centroids(memory: float, tau: float | None) -> None:
    old = torch.tensor(0.1 * OLD, requires_grad=True)

    def formula(logits: np.ndarray) -> float:
        pi = softmax(logits)
        fresh = np.stack([(pi[:, k, None] * Z).sum(0) / (pi[:, k].sum() + 1e-8) for k in range(3)])
        return l3(memory * 0.1 * OLD + (1 - memory) * fresh, tau)

    def loss(logits: Tensor) -> Tensor:
        return separation(*soft_centroids(logits, torch.tensor(Z), old, memory), tau)

    check(loss, formula, LOGITS)
    loss(torch.tensor(LOGITS, requires_grad=True)).backward()
    assert old.grad is None
    pi, e = softmax(LOGITS), soft_centroids(torch.tensor(LOGITS), torch.tensor(Z), old, 0.0)[0].detach().numpy()

    def first(x: Tensor) -> Tensor:  # de_k/dpi_ik = (z_i - e_k) / sum_j pi_jk, chained through the softmax
        return soft_centroids(x, torch.tensor(Z), old, memory)[0][0].sum()

    by_choice = ((Z - e[0]) / pi[:, 0].sum()).sum(1) * (1 - memory)
    closed = by_choice[:, None] * pi[:, :1] * (np.eye(3)[0] - pi)
    np.testing.assert_allclose(slope(first, LOGITS), closed, rtol=1e-6)


def test_a_cluster_with_hardly_any_mass_keeps_its_centroid_and_stays_out_of_the_pairs() -> None:
    logits = LOGITS.copy()
    logits[:, 1] = -20.0
    centroids, alive = soft_centroids(torch.tensor(logits), torch.tensor(Z), torch.tensor(OLD), 0.5)
    assert alive.tolist() == [True, False, True]
    assert centroids[1].tolist() == OLD[1].tolist()


def embedded(users: int, clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors around centroids in 384 dimensions, as the sentence encoder makes them; and their clusters."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(clusters, 384))
    labels = np.arange(users) % clusters
    z = centers[labels] + 0.5 * rng.normal(size=(users, 384))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    centroids = np.stack([z[labels == k].mean(0) for k in range(clusters)])
    return tuple(torch.tensor(x, dtype=torch.float32) for x in (z, centroids, labels))  # type: ignore[return-value]


def test_as_printed_l3_is_dead_with_a_sharp_selector_and_scaled_it_lives() -> None:
    z, centroids, labels = embedded(24, 6)
    # Probability .97 on the K-means cluster: what a selector has learnt after its pretraining.
    sharp = 5.0 * torch.nn.functional.one_hot(labels.long(), 6).float()

    def gradient(tau: float | None, logits: Tensor) -> float:
        x = logits.clone().requires_grad_()
        (found,) = torch.autograd.grad(separation(*soft_centroids(x, z, centroids, 0.0), tau), x)
        return float(found.abs().max())

    tau = mean_distance(centroids)
    assert gradient(None, sharp) <= 1e-12
    assert gradient(tau, sharp) > 1e-5
    # All soft centroids coincide when the selector tells nobody apart; then eq. (4) as printed acts too.
    assert gradient(None, 1e-3 * torch.randn(24, 6, generator=torch.Generator().manual_seed(0))) > 1e-3


def test_tau_is_the_mean_distance_of_two_centroids() -> None:
    pairs = [np.abs(OLD[k] - OLD[m]).sum() for k, m in ((0, 1), (0, 2), (1, 2))]
    assert mean_distance(torch.tensor(OLD)) == pytest.approx(np.mean(pairs))
    assert float(separation(torch.tensor(OLD), ALIVE, mean_distance(torch.tensor(OLD)))) == pytest.approx(
        1 / (1 + np.e)
    )
    assert mean_distance(torch.tensor(OLD[:1])) == 1.0


def test_hard_centroids_are_means_and_an_empty_cluster_keeps_its_own() -> None:
    clusters = torch.tensor([2, 0, 2, 2, 0])
    found = hard_centroids(torch.tensor(Z), clusters, torch.tensor(OLD)).numpy()
    np.testing.assert_allclose(found[0], Z[[1, 4]].mean(0))
    np.testing.assert_allclose(found[2], Z[[0, 2, 3]].mean(0))
    assert found[1].tolist() == OLD[1].tolist()
