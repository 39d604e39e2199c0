"""Predictors: who generates the next session of a visitor of cluster k. One interface for every back end."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from models.language_model import LanguageModel, Rollouts


class Predictor(Protocol):
    """Generates and scores sessions, each visitor by the cluster it is in. Prompts are tokens that end with [BOS]."""

    clusters: int

    def rollouts(
        self, prompts: Sequence[Sequence[int]], clusters: Sequence[int], draws: np.ndarray, groups: np.ndarray
    ) -> Rollouts:
        """Sampled sessions and the greedy one: `draws` (B, R, S) uniforms, `groups` (G, V) marked pages."""
        ...

    def greedy(self, prompts: Sequence[Sequence[int]], clusters: Sequence[int], steps: int) -> list[list[int]]:
        """The most likely tokens, at most `steps`, without [EOS]."""
        ...

    def nll(
        self, prompts: Sequence[Sequence[int]], clusters: Sequence[int], targets: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """Nats of each target session, its [EOS] included: (B,)."""
        ...


class Separate:
    """A language model of its own for every cluster (HeTLM, section 1.2)."""

    def __init__(self, models: Sequence[LanguageModel]) -> None:
        self.models = list(models)
        self.clusters = len(self.models)

    def rollouts(
        self, prompts: Sequence[Sequence[int]], clusters: Sequence[int], draws: np.ndarray, groups: np.ndarray
    ) -> Rollouts:
        """See Predictor."""
        batch, samples, steps = draws.shape
        size = self.models[0].size
        together = Rollouts(
            np.zeros((batch, size), dtype=np.float32),
            np.zeros((batch, len(groups)), dtype=np.float32),
            np.zeros((batch, samples, steps), dtype=np.int64),
            [[] for _ in prompts],
        )

        def roll(model: LanguageModel, rows: list[int]) -> None:
            part = model.rollouts([prompts[row] for row in rows], draws[rows], groups)
            together.marginals[rows], together.groups[rows], together.sequences[rows] = part[:3]
            for row, path in zip(rows, part.paths, strict=True):
                together.paths[row] = path

        self._each(clusters, roll)
        return together

    def greedy(self, prompts: Sequence[Sequence[int]], clusters: Sequence[int], steps: int) -> list[list[int]]:
        """See Predictor."""
        paths: list[list[int]] = [[] for _ in prompts]

        def follow(model: LanguageModel, rows: list[int]) -> None:
            for row, path in zip(rows, model.greedy([prompts[row] for row in rows], steps), strict=True):
                paths[row] = path

        self._each(clusters, follow)
        return paths

    def nll(
        self, prompts: Sequence[Sequence[int]], clusters: Sequence[int], targets: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """See Predictor."""
        nats = np.zeros(len(prompts))

        def score(model: LanguageModel, rows: list[int]) -> None:
            nats[rows] = model.nll([prompts[row] for row in rows], [targets[row] for row in rows])

        self._each(clusters, score)
        return nats

    def _each(self, clusters: Sequence[int], work: Callable[[LanguageModel, list[int]], Any]) -> None:
        rows: dict[int, list[int]] = {}
        for row, cluster in enumerate(clusters):
            rows.setdefault(cluster, []).append(row)
        for cluster in sorted(rows):
            work(self.models[cluster], rows[cluster])
