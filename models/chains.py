"""A mixture of first-order Markov chains over sessions: one chain of pages for each kind of visitor. numpy only.

Chain k steps from token u to token v with p_k(v | u) = (n_k(u, v) + lam p_k(v)) / (n_k(u) + lam): the counts of the
pairs seen, each row smoothed towards the cluster's marginal p_k. A session is [BOS], pages (unknown ones as [UNK]),
[EOS]. Only pairs seen are kept, so a vocabulary of many thousand pages needs no V x V table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from models.vocabulary import BOS, EOS, PAD, SPECIALS

DENSE = 2_048  # up to so many tokens a V x V matrix of one cluster is made where it gives an exact answer
TOLERANCE = 1e-8
MOST_STEPS = 10_000
PREFIX = "chains."


@dataclass(frozen=True, eq=False)
class Chains:
    """K chains over V tokens with M pairs seen; pairs are in ascending order of (head, tail)."""

    prior: np.ndarray  # (K,) share of the visitors
    smoothing: float  # lam: the marginal weighs as much as so many steps out of a token
    marginals: np.ndarray  # (K, V) p_k(v); positive but for [PAD] and [BOS], which nothing steps to
    heads: np.ndarray  # (M,) int64
    tails: np.ndarray  # (M,) int64
    counts: np.ndarray  # (M, K) n_k(u, v), expected counts of the pairs

    @property
    def clusters(self) -> int:
        """K."""
        return len(self.prior)

    @property
    def size(self) -> int:
        """V, special tokens included."""
        return int(self.marginals.shape[1])

    @cached_property
    def totals(self) -> np.ndarray:
        """n_k(u), steps out of each token: (V, K)."""
        totals = np.zeros((self.size, self.clusters))
        np.add.at(totals, self.heads, self.counts)
        return totals

    def log_probabilities(self, heads: np.ndarray, tails: np.ndarray) -> np.ndarray:
        """log p_k(tail | head) of N steps: (N,), (N,) -> (N, K)."""
        smoothed = self._seen(heads, tails) + self.smoothing * self.marginals[:, tails].T
        logs: np.ndarray = np.log(smoothed) - np.log(self.totals[heads] + self.smoothing)
        return logs

    def log_likelihood(self, session: Sequence[int]) -> np.ndarray:
        """log P_k of one session of page tokens, its [EOS] included: (K,)."""
        path = np.array([BOS, *session, EOS], dtype=np.int64)
        logs: np.ndarray = self.log_probabilities(path[:-1], path[1:]).sum(axis=0)
        return logs

    def matrix(self, cluster: int) -> np.ndarray:
        """p_k(v | u) of one cluster as a dense (V, V) matrix: rows u, columns v."""
        dense = np.tile(self.smoothing * self.marginals[cluster], (self.size, 1))
        dense[self.heads, self.tails] += self.counts[:, cluster]
        steps: np.ndarray = dense / dense.sum(axis=1, keepdims=True)
        return steps

    def first_passage(self, marks: np.ndarray) -> np.ndarray:
        """P(a session holds a marked page | k), exact to TOLERANCE: marks (V,) bool -> (K,).

        h(u) = sum_v p(v | u) (1 if v is marked, 0 if it is [EOS], else h(v)), solved by iteration from h = 0. After t
        steps h is the chance within t pages, so it grows towards the answer.
        """
        marks = np.asarray(marks, dtype=bool)
        hold = np.zeros((self.size, self.clusters))
        hold[marks] = 1.0
        free = ~marks
        free[[PAD, BOS, EOS]] = False
        start = np.zeros(self.clusters)
        for _ in range(MOST_STEPS):
            stepped = self._forth(hold)
            moved = max(np.abs(stepped[free] - hold[free]).max(initial=0.0), np.abs(stepped[BOS] - start).max())
            hold[free], start = stepped[free], stepped[BOS]
            if moved < TOLERANCE:
                break
        return start

    def page_probabilities(self) -> np.ndarray:
        """P(a session holds page v | k) of every token: (K, V), special tokens 0.

        It is visits(v) / G(v, v): expected visits of a session over expected visits once there. With at most DENSE
        tokens G is the fundamental matrix (I - Q)^-1 and this is exact. With more, 1 / G(v, v) = 1 - P(coming back)
        counts returns after one or two steps only: an upper bound, too high by visits(v) x P(first return later).
        """
        held = self._held_dense() if self.size <= DENSE else self._held_sparse()
        held[:, : len(SPECIALS)] = 0.0
        probabilities: np.ndarray = np.minimum(held, 1.0)
        return probabilities

    def tensors(self) -> dict[str, np.ndarray]:
        """What `from_tensors` reads, under names that start with `chains.`."""
        parts = {
            "prior": self.prior, "smoothing": np.array([self.smoothing]), "marginals": self.marginals,
            "heads": self.heads, "tails": self.tails, "counts": self.counts,
        }  # fmt: skip
        return {PREFIX + name: np.ascontiguousarray(values) for name, values in parts.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray], size: int) -> "Chains":
        """Chains over `size` tokens. Raises ValueError that says what does not fit."""
        try:
            prior, smoothing, marginals, heads, tails, counts = (
                np.asarray(tensors[PREFIX + name])
                for name in ("prior", "smoothing", "marginals", "heads", "tails", "counts")
            )
        except KeyError as error:
            raise ValueError(f"holds no {error}") from None
        clusters, pairs = len(prior), len(heads)
        shapes = {
            "prior": (prior, (clusters,), np.float64), "smoothing": (smoothing, (1,), np.float64),
            "marginals": (marginals, (clusters, size), np.float64), "heads": (heads, (pairs,), np.int64),
            "tails": (tails, (pairs,), np.int64), "counts": (counts, (pairs, clusters), np.float64),
        }  # fmt: skip
        for name, (values, shape, kind) in shapes.items():
            if values.shape != shape or values.dtype != kind:
                wanted = f"{shape} {np.dtype(kind)}"
                raise ValueError(f"`{PREFIX}{name}` is {values.shape} {values.dtype}, but should be {wanted}")
            if not np.isfinite(values).all() or (values < 0).any():
                raise ValueError(f"`{PREFIX}{name}` holds a number below 0, NaN or infinite")
        keys = heads * size + tails
        if not clusters or not pairs or max(heads.max(), tails.max()) >= size or (np.diff(keys) <= 0).any():
            raise ValueError(f"`{PREFIX}heads` and `{PREFIX}tails` are no ordered pairs of {size} tokens")
        if smoothing[0] <= 0 or (prior <= 0).any() or (marginals[:, EOS:] <= 0).any():
            raise ValueError("the smoothing, a prior or a marginal is 0, so a session could be impossible")
        return cls(prior, float(smoothing[0]), marginals, heads, tails, counts)

    def _seen(self, heads: np.ndarray, tails: np.ndarray) -> np.ndarray:
        """n_k(head, tail) of N pairs, 0 where the pair was never seen: (N, K)."""
        wanted = np.asarray(heads, dtype=np.int64) * self.size + tails
        place = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        seen: np.ndarray = np.where((self._keys[place] == wanted)[:, None], self.counts[place], 0.0)
        return seen

    @cached_property
    def _keys(self) -> np.ndarray:
        keys: np.ndarray = self.heads * self.size + self.tails
        return keys

    def _forth(self, values: np.ndarray) -> np.ndarray:
        """Expected value one step later: sum_v p_k(v | u) values(v, k), (V, K) -> (V, K)."""
        firsts, bounds = self._rows
        expected = np.zeros_like(values)
        expected[firsts] = np.add.reduceat(self.counts * values[self.tails], bounds, axis=0)
        expected += self.smoothing * np.einsum("kv,vk->k", self.marginals, values)
        expected /= self.totals + self.smoothing
        return expected

    def _back(self, mass: np.ndarray) -> np.ndarray:
        """Mass one step later: sum_u mass(u, k) p_k(v | u), (V, K) -> (V, K)."""
        share = mass / (self.totals + self.smoothing)
        moved: np.ndarray = self.smoothing * self.marginals.T * share.sum(axis=0)
        steps = self.counts * share[self.heads]
        for k in range(self.clusters):
            moved[:, k] += np.bincount(self.tails, steps[:, k], minlength=self.size)
        return moved

    @cached_property
    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that have pairs, and where each one's pairs begin."""
        firsts, bounds = np.unique(self.heads, return_index=True)
        return firsts, bounds

    def _held_dense(self) -> np.ndarray:
        held = np.zeros((self.clusters, self.size))
        for k in range(self.clusters):
            steps = self.matrix(k)
            steps[EOS] = 0.0
            visits = np.linalg.inv(np.eye(self.size) - steps)
            held[k] = visits[BOS] / np.diag(visits)
        return held

    def _held_sparse(self) -> np.ndarray:
        mass = np.zeros((self.size, self.clusters))
        mass[BOS] = 1.0
        visits = np.zeros_like(mass)
        for _ in range(MOST_STEPS):
            mass = self._back(mass)
            mass[EOS] = 0.0
            visits += mass
            if mass.sum(axis=0).max() < TOLERANCE:
                break
        held: np.ndarray = (visits * (1.0 - self._returns())).T
        return held

    def _returns(self) -> np.ndarray:
        """P(first return after one or two steps) of each token: (V, K)."""
        size, norm = self.size, self.totals + self.smoothing
        smooth, own = self.smoothing * self.marginals.T, np.zeros((size, self.clusters))
        loop = self.heads == self.tails
        own[self.heads[loop]] = self.counts[loop]
        once = (own + smooth) / norm
        # p(u | v) p(v | u) = (n(v,u) + s(u)) (n(u,v) + s(v)) / norm(v) norm(u), summed over u: four products of sums.
        mirrored = self._seen(self.tails, self.heads)
        both, out, into = (np.zeros((size, self.clusters)) for _ in range(3))
        np.add.at(both, self.heads, self.counts * mirrored / norm[self.tails])
        np.add.at(out, self.heads, self.counts / norm[self.tails])
        np.add.at(into, self.tails, self.counts * smooth[self.heads] / norm[self.heads])
        flat = (smooth / norm).sum(axis=0)
        twice = (both + out * smooth + into + smooth * flat) / norm
        # The middle must be another page: not v itself, and not [EOS], where a session ends.
        at_end = (self.marginals[:, [EOS]] * self.smoothing).T * smooth / norm[EOS]
        to_end = np.zeros((size, self.clusters))
        ends = self.tails == EOS
        to_end[self.heads[ends]] = self.counts[ends]
        ended = (to_end * smooth / norm[EOS] + at_end) / norm
        twice_there: np.ndarray = once + twice - once**2 - ended
        return twice_there
