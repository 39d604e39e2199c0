"""How often users step from one page to another: the counts that chains are fitted to and scored with."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from models.chains import Chains
from models.vocabulary import BOS, EOS
from trainer.corpus import Corpus


@dataclass(frozen=True)
class Steps:
    """Counts of the steps between tokens: a sparse (rows, M) matrix over M pairs in ascending order of (head, tail)."""

    counts: sp.csr_matrix
    heads: np.ndarray
    tails: np.ndarray
    size: int

    @classmethod
    def of(cls, corpus: Corpus, rows: Sequence[range], tokens: np.ndarray, size: int) -> "Steps":
        """One row for each list of sessions; `tokens` maps the corpus' pages to `size` tokens."""
        sessions = np.array([session for row in rows for session in row], dtype=np.int64)
        owner = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        lengths = corpus.starts[sessions + 1] - corpus.starts[sessions]
        ends = np.cumsum(lengths + 2)  # of each session in one stream of [BOS] pages [EOS]
        stream = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.int64)
        inside = np.ones(len(stream), dtype=bool)
        inside[ends - 1] = inside[ends - lengths - 2] = False
        stream[ends - 1], stream[ends - lengths - 2] = EOS, BOS
        shift = np.repeat(corpus.starts[sessions] - (ends - lengths - 1), lengths)
        stream[inside] = tokens[corpus.pages[np.flatnonzero(inside) + shift]]
        within = np.ones(max(len(stream) - 1, 0), dtype=bool)
        within[ends[:-1] - 1] = False  # from one session's [EOS] to the next one's [BOS] is no step
        keys = (stream[:-1] * size + stream[1:])[within]
        pairs, columns = np.unique(keys, return_inverse=True)
        index = np.repeat(owner, lengths + 1)
        shape = (len(rows), len(pairs))
        counts = sp.coo_matrix((np.ones(len(keys)), (index, columns)), shape=shape).tocsr()
        return cls(counts, pairs // size, pairs % size, size)

    def frequent(self, most: int) -> "Steps":
        """Only the `most` frequent pairs."""
        if len(self.heads) <= most:
            return self
        total = np.asarray(self.counts.sum(axis=0)).ravel()
        kept = np.sort(np.argsort(-total, kind="stable")[:most])
        return Steps(self.counts[:, kept], self.heads[kept], self.tails[kept], self.size)

    def sample(self, most: int, seed: int) -> "Steps":
        """At most so many rows, drawn at random; the pairs stay."""
        rows = self.counts.shape[0]
        if rows <= most:
            return self
        kept = np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))
        return Steps(self.counts[kept], self.heads, self.tails, self.size)

    def log_likelihood(self, chains: Chains) -> np.ndarray:
        """log P_k of all sessions of each row: (rows, K)."""
        logs: np.ndarray = self.counts @ chains.log_probabilities(self.heads, self.tails)
        return logs
