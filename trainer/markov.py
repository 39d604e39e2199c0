"""Markov chains as predictors of their own: page and outcome probabilities are exact, without rollouts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from models.chains import Chains
from models.engine import Rollouts
from models.predictors import shared_out
from models.vocabulary import BOS, EOS, PAD, UNK


class ChainPredictor:
    """A mixture of Markov chains as a predictor (models.predictors.Predictor); first-order Markov is its K = 1.

    A visitor's posterior over the chains comes from the prompt, so the clusters of a bundle play no part.
    """

    clusters = 1

    def __init__(self, chains: Chains) -> None:
        self.chains, self.size = chains, chains.size
        self.parameters = chains.counts.size + chains.marginals[:, EOS:].size + chains.clusters - 1
        self._held = chains.page_probabilities()  # (K, V)
        self._paths: dict[tuple[int, int], list[int]] = {}
        self._passages: dict[bytes, np.ndarray] = {}

    def rollouts(
        self,
        prompts: Sequence[Sequence[int]],
        posterior: Any,
        draws: np.ndarray,
        groups: np.ndarray,
        picks: np.ndarray,
    ) -> Rollouts:
        """See Predictor. Page and group probabilities are exact; the path is that of the likeliest chain."""
        weights = self.posterior(prompts)
        passages = np.zeros((len(groups), self.chains.clusters))
        for row, marks in enumerate(groups):
            passages[row] = self._passage((marks > 0).tobytes())
        return Rollouts(
            (weights @ self._held).astype(np.float32),
            (weights @ passages.T).astype(np.float32),
            self._sample(shared_out(weights, draws.shape[1], picks), draws),
            self._greedy(weights, draws.shape[2]),
        )

    def greedy(self, prompts: Sequence[Sequence[int]], clusters: Any, steps: int) -> list[list[int]]:
        """See Predictor."""
        return self._greedy(self.posterior(prompts), steps)

    def nll(self, prompts: Sequence[Sequence[int]], posterior: Any, targets: Sequence[Sequence[int]]) -> np.ndarray:
        """See Predictor: -log sum_k P(k | prompt) P_k(target)."""
        whole = [[BOS, *target, EOS] for target in targets]
        joint = np.log(self.posterior(prompts)) + self._log_likelihood(whole)
        nats: np.ndarray = -np.logaddexp.reduce(joint, axis=1)
        return nats

    def posterior(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """P(chain | the sessions of the prompt): (B, K), never quite 0."""
        logs = np.log(self.chains.prior) + self._log_likelihood(prompts)
        logs -= logs.max(axis=1, keepdims=True)
        weights = np.maximum(np.exp(logs), np.finfo(float).tiny)
        normalised: np.ndarray = weights / weights.sum(axis=1, keepdims=True)
        return normalised

    def _passage(self, marks: bytes) -> np.ndarray:
        """P(a session holds a marked page | chain), solved once for each group of pages: (K,)."""
        if marks not in self._passages:
            self._passages[marks] = self.chains.first_passage(np.frombuffer(marks, dtype=bool))
        return self._passages[marks]

    def _log_likelihood(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """log P_k of all steps but the sure ones from [EOS] to [BOS]: (B, K)."""
        rows = np.repeat(np.arange(len(prompts)), [len(prompt) - 1 for prompt in prompts])
        heads = np.array([token for prompt in prompts for token in prompt[:-1]], dtype=np.int64)
        tails = np.array([token for prompt in prompts for token in prompt[1:]], dtype=np.int64)
        counted = tails != BOS
        logs = self.chains.log_probabilities(heads[counted], tails[counted])
        sums = np.zeros((len(prompts), self.chains.clusters))
        np.add.at(sums, rows[counted], logs)
        return sums

    def _greedy(self, weights: np.ndarray, steps: int) -> list[list[int]]:
        return [list(self._path(k, steps)) for k in weights.argmax(axis=1).tolist()]

    def _path(self, chain: int, steps: int) -> list[int]:
        """The likeliest page after each page, at least one, until [EOS] or `steps` pages."""
        if (chain, steps) not in self._paths:
            path: list[int] = []
            while len(path) < steps:
                chances = self._row(chain, path[-1] if path else BOS)
                chances[[PAD, BOS, UNK]] = -1.0
                if not path:
                    chances[EOS] = -1.0
                following = int(chances.argmax())
                if following == EOS:
                    break
                path.append(following)
            self._paths[chain, steps] = path
        return self._paths[chain, steps]

    def _row(self, chain: int, head: int) -> np.ndarray:
        """Weights of the steps out of a token, up to a factor: (V,)."""
        row: np.ndarray = self.chains.smoothing * self.chains.marginals[chain]
        out = slice(*np.searchsorted(self.chains.heads, [head, head + 1]))
        row[self.chains.tails[out]] += self.chains.counts[out, chain]
        return row

    def _sample(self, owners: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Sampled sessions of the chains `owners` (B, R), uniforms (B, R, S) to tokens, [EOS] after the end."""
        sequences = np.full(draws.shape, EOS, dtype=np.int64)
        for k in range(self.chains.clusters):
            mine = owners == k
            sequences[mine] = self._walk(k, draws[mine])
        return sequences

    def _walk(self, chain: int, draws: np.ndarray) -> np.ndarray:
        """Sessions of one chain by inversion: the pairs seen out of a token first, then the smoothing. (N, S)."""
        counted = np.concatenate([[0.0], self.chains.counts[:, chain].cumsum()])
        firsts = np.searchsorted(self.chains.heads, np.arange(self.size + 1))
        smoothed = self.chains.marginals[chain].cumsum()
        sessions = np.full(draws.shape, EOS, dtype=np.int64)
        tokens, going = np.full(len(draws), BOS), np.arange(len(draws))
        for step in range(draws.shape[1]):
            start, end = counted[firsts[tokens]], counted[firsts[tokens + 1]]
            mass = draws[going, step] * (end - start + self.chains.smoothing)
            pairs = np.searchsorted(counted, np.minimum(start + mass, end), side="right") - 1
            rest = (mass - (end - start)) / self.chains.smoothing * smoothed[-1]
            other = np.searchsorted(smoothed, np.maximum(rest, 0.0), side="right")
            tails = self.chains.tails[np.minimum(pairs, len(self.chains.tails) - 1)]
            tokens = np.where(mass < end - start, tails, np.minimum(other, self.size - 1))
            sessions[going, step] = tokens
            going, tokens = going[tokens != EOS], tokens[tokens != EOS]
        return sessions
