"""What training examples refer to: vectors, clusters and clicks of each snapshot's items, and cases as arrays."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from models.items import indexed, nearest_clusters
from trainer.interactions import NONE, Cases, Task
from trainer.items import Space, global_centroids
from trainer.retrieval_options import XPertOptions
from trainer.seeds import Seeds, channel_seeds, recent_seeds

KEPT = 1 << 26  # numbers of slates that stay in memory; a slate is soon made again


@dataclass
class World:
    """What the examples of a task refer to: for each of its snapshots the vectors and the clicks of its items."""

    task: Task
    spaces: Sequence[Space]
    options: XPertOptions
    _slates: dict[int, "Slate"] = field(default_factory=dict)
    _clusters: dict[int, dict[int, int]] = field(default_factory=dict)  # by the identity of their space

    def but(self, options: XPertOptions) -> "World":
        """The same with other options; clusters are kept where these do not change them."""
        same = (options.clusters, options.seed) == (self.options.clusters, self.options.seed)
        return World(self.task, self.spaces, options, {}, self._clusters if same else {})

    def slate(self, snapshot: int) -> "Slate":
        """The candidates of a snapshot."""
        found = self._slates.pop(snapshot, None)
        if found is None:
            clicks = self.task.known(snapshot, self.options.popularity_ms).popularity()
            found = Slate.of(self.task.snapshots[snapshot].items, self.spaces[snapshot], clicks)
        self._slates[snapshot] = found  # the last one now
        while len(self._slates) > 1 and sum(slate.index.numel() for slate in self._slates.values()) > KEPT:
            del self._slates[next(iter(self._slates))]
        return found

    def clusters(self, snapshot: int) -> dict[int, int]:
        """Global cluster of each item that has a vector."""
        space, o = self.spaces[snapshot], self.options
        if id(space) not in self._clusters:
            found = nearest_clusters(space.vectors, global_centroids(space.vectors, o.clusters, o.seed))
            self._clusters[id(space)] = dict(zip(space.items.tolist(), found.tolist(), strict=True))
        return self._clusters[id(space)]

    def seeds(self, cases: Cases) -> Seeds:
        """The seeds of each case, by the policy of the options."""
        o = self.options
        found: list[list[tuple[int, float]]] = [[] for _ in range(len(cases))]
        for snapshot, rows in cases.by_snapshot():
            if o.policy == "channels":
                clusters = self.clusters(snapshot)
                for row in rows.tolist():
                    found[row] = channel_seeds(cases.history(row).tolist(), clusters, o.gamma, o.seeds, o.protect)
            else:
                known = dict.fromkeys(self.spaces[snapshot].items.tolist(), 0)
                for row in rows.tolist():
                    found[row] = recent_seeds(cases.history(row).tolist(), known, o.gamma, o.seeds)
        return Seeds.of(found, o.seeds)


@dataclass(frozen=True)
class Slate:
    """Candidates of one snapshot: `items` (M,), and what queries are multiplied with, `index` (M, D + 2)."""

    space: Space
    items: np.ndarray
    index: Tensor

    @classmethod
    def of(cls, items: np.ndarray, space: Space, clicks: np.ndarray) -> "Slate":
        """`clicks` (N,) of all items of the log. An item without a vector has zeros, and its clicks."""
        vectors = looked_up(space, items)[0].numpy()
        return cls(space, items, torch.from_numpy(indexed(vectors, np.log1p(clicks[items]))))

    @property
    def vectors(self) -> Tensor:
        """(M, D)."""
        return self.index[:, :-2]


@dataclass(frozen=True)
class Batch:
    """B cases of one snapshot."""

    seeds: np.ndarray  # (B, S) int32, heaviest first, -1 for none
    weights: np.ndarray  # (B, S) float32
    history: np.ndarray  # (B, H) int32
    opens: Tensor  # (B,) bool
    seen: csr_array  # (B, N) bool
    targets: np.ndarray  # (B,) int32


def looked_up(space: Space, items: np.ndarray) -> tuple[Tensor, Tensor]:
    """Vectors of items, zeros for those without one, and which have one: (...) -> (..., D), (...) bool."""
    rows = space.rows(items)
    known = rows != NONE
    vectors = space.vectors[rows.clip(0)] * known[..., None]
    return torch.from_numpy(vectors), torch.from_numpy(known)


def trimmed(items: np.ndarray) -> np.ndarray:
    """Without the columns at the end that are empty in every row; the first one stays."""
    kept: np.ndarray = items[:, : max(1, int((items != NONE).sum(axis=1).max()))]
    return kept


class Examples:
    """Cases as arrays, made once. A case's target is one of its labels that it has not seen and the index holds."""

    def __init__(self, cases: Cases, world: World) -> None:
        self.cases, self.world = cases, world
        self.seeds, self.weights = world.seeds(cases)
        self.seen, self.history = cases.seen(), cases.recent(world.options.history)
        labelled = len(cases.labels) > 0  # not when visitors are asked for whose next clicks nobody knows
        self.targets = cases.labels[cases.starts[:-1]] if labelled else np.full(len(cases), NONE, dtype=np.int32)

    def batches(self, rng: np.random.Generator) -> Iterator[tuple[Slate, np.ndarray]]:
        """All rows once, in any order; those of a batch share a snapshot, and have histories of about one length."""
        lengths = (self.history != NONE).sum(axis=1)
        parts = []
        for snapshot, rows in self.cases.by_snapshot():
            count = math.ceil(len(rows) / self.world.options.batch)
            ordered = rows[np.lexsort((rng.random(len(rows)), lengths[rows]))]
            parts += [(snapshot, part) for part in np.array_split(ordered, count)]
        for i in rng.permutation(len(parts)).tolist():
            yield self.world.slate(parts[i][0]), parts[i][1]

    def batches_of_items(self, rng: np.random.Generator) -> Iterator[tuple[Slate, np.ndarray]]:
        """As many batches, each of distinct targets, drawn uniformly, and of one case of each (item-wise batching)."""
        size = self.world.options.batch
        parts: list[int] = []
        for snapshot, rows in self.cases.by_snapshot():
            parts += [snapshot] * math.ceil(len(rows) / size)
        for i in rng.permutation(len(parts)).tolist():
            rows = rng.permutation(np.flatnonzero(self.cases.snapshot == parts[i]))
            one_each = rows[np.unique(self.targets[rows], return_index=True)[1]]  # a random case of each target
            yield self.world.slate(parts[i]), rng.permutation(one_each)[:size]

    def batch(self, rows: np.ndarray) -> Batch:
        """The cases `rows`."""
        opens = torch.from_numpy(self.cases.opens[rows])
        return Batch(
            self.seeds[rows], self.weights[rows], self.history[rows], opens, self.seen[rows], self.targets[rows]
        )
