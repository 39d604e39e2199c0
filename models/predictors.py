"""Predictors: who generates the next session of a visitor. One interface for every back end, hard or soft routing."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from models.engine import Engine, Rollouts
from models.engine_network import Stacked
from models.engine_waves import Branch
from models.engine_weights import stackable
from models.language_model import Ensemble, LanguageModel, Several, nll


class Predictor(Protocol):
    """Generates and scores sessions. Prompts are tokens that end with [BOS].

    `posterior` (B, K) says how likely each visitor belongs to each cluster; a row with a single 1 is hard routing.
    """

    clusters: int

    def rollouts(
        self,
        prompts: Sequence[Sequence[int]],
        posterior: np.ndarray,
        draws: np.ndarray,
        groups: np.ndarray,
        picks: np.ndarray,
    ) -> Rollouts:
        """Sampled sessions, and the greedy one of the likeliest cluster.

        `draws` (B, R, S) uniforms; `groups` (G, V) marked pages; `picks` (B,) uniforms that share the R rollouts out
        to the clusters.
        """
        ...

    def greedy(self, prompts: Sequence[Sequence[int]], clusters: Sequence[int], steps: int) -> list[list[int]]:
        """The most likely token at each step, at most `steps`, without [EOS]."""
        ...

    def nll(
        self, prompts: Sequence[Sequence[int]], posterior: np.ndarray, targets: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """Nats of each target session under the mixture, its [EOS] included: (B,)."""
        ...


class _Mixture:
    """What the back ends share: models, and where in them a cluster is found."""

    def __init__(self, models: Ensemble, clusters: int) -> None:
        self.clusters = clusters
        self.models = models
        self.engine = Engine(models)

    def _place(self, cluster: int, prompt: Sequence[int]) -> tuple[int, Sequence[int]]:
        """The model that stands for a cluster, and the prompt it wants."""
        raise NotImplementedError

    def rollouts(
        self,
        prompts: Sequence[Sequence[int]],
        posterior: np.ndarray,
        draws: np.ndarray,
        groups: np.ndarray,
        picks: np.ndarray,
    ) -> Rollouts:
        """See Predictor. A rollout stays with its cluster: that samples the mixture of sessions exactly."""
        shares = shared_out(posterior, draws.shape[1], picks)
        branches = []
        for visit, (prompt, share) in enumerate(zip(prompts, shares, strict=True)):
            likeliest = int(posterior[visit].argmax())
            for cluster in sorted({likeliest, *share.tolist()}):
                model, wanted = self._place(cluster, prompt)
                branches.append(Branch(visit, model, wanted, np.flatnonzero(share == cluster), cluster == likeliest))
        return self.engine.rollouts(branches, draws, groups)

    def greedy(self, prompts: Sequence[Sequence[int]], clusters: Sequence[int], steps: int) -> list[list[int]]:
        """See Predictor."""
        nothing = np.zeros(0, dtype=np.int64)
        branches = [
            Branch(visit, *self._place(cluster, prompt), nothing, True)
            for visit, (prompt, cluster) in enumerate(zip(prompts, clusters, strict=True))
        ]
        no_draws = np.zeros((len(prompts), 0, steps), dtype=np.float32)
        return self.engine.rollouts(branches, no_draws, np.zeros((0, self.models.size), dtype=np.float32)).paths

    def nll(
        self, prompts: Sequence[Sequence[int]], posterior: np.ndarray, targets: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """See Predictor: -log sum_k posterior_k exp(-nll_k)."""
        likelihood = np.full(posterior.shape, -np.inf)
        for cluster in range(self.clusters):
            rows = np.flatnonzero(posterior[:, cluster] > 0).tolist()
            if rows:
                placed = [self._place(cluster, prompts[row]) for row in rows]
                model = self.models.part(placed[0][0], placed[0][0] + 1)
                nats = nll(model, [prompt for _, prompt in placed], [targets[row] for row in rows])
                likelihood[rows, cluster] = np.log(posterior[rows, cluster]) - nats
        total: np.ndarray = -np.logaddexp.reduce(likelihood, axis=1)
        return total


class Separate(_Mixture):
    """A language model of its own for every cluster (HeTLM, section 1.2); merged adapters too."""

    def __init__(self, models: Sequence[LanguageModel]) -> None:
        """Models of one shape; the weights are copied."""
        super().__init__(ensemble(models, models[0].size), len(models))

    def _place(self, cluster: int, prompt: Sequence[int]) -> tuple[int, Sequence[int]]:
        return cluster, prompt


class Token(_Mixture):
    """One language model for all, told the cluster by the first token of the prompt: tokens V, V + 1, ... V + K - 1."""

    def __init__(self, model: LanguageModel, clusters: int) -> None:
        """`model` knows V + K tokens; only the first V can come out."""
        self._pages = model.size - clusters
        super().__init__(ensemble([model], self._pages), clusters)

    def _place(self, cluster: int, prompt: Sequence[int]) -> tuple[int, Sequence[int]]:
        return 0, [self._pages + cluster, *prompt]


def ensemble(models: Sequence[LanguageModel], size: int) -> Ensemble:
    """Stacked weights where the engine knows the architecture, else the transformers models one by one."""
    if stackable(models[0].model.config):
        return Stacked.of(models, size)
    return Several(models, size)


def shared_out(posterior: np.ndarray, rollouts: int, picks: np.ndarray) -> np.ndarray:
    """The cluster of each rollout, (B, R), by systematic sampling (Madow, 1944): each cluster gets its expected number
    of rollouts, rounded up or down, and exactly that number on average."""
    edges = posterior.cumsum(1)
    points = (np.arange(rollouts) + picks[:, None]) / max(rollouts, 1) * edges[:, -1:]
    shares: np.ndarray = (points[:, :, None] >= edges[:, None, :-1]).sum(2)
    return shares


def one_hot(clusters: Sequence[int], count: int) -> np.ndarray:
    """The posterior of hard routing, (B, K)."""
    return np.eye(count)[np.asarray(clusters, dtype=np.int64)]
