"""The highest inner products of a few queries with a catalogue's rows: all of them, or those that a graph finds."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from models.catalogue import Catalogue

LINKS, BUILD_WIDTH, SEARCH_WIDTH = 32, 100, 200  # of the graph: M, efConstruction, efSearch
MOST = 8_192  # candidates of a query
STALE = 4_096  # changed rows that are looked at besides the popular ones, before these are sorted anew
FIRST = 4  # candidates for each item that is wanted, at first


class Found(NamedTuple):
    """The best rows, best first: rows, scores and the query that reached each, (k,); fewer where there are no more."""

    rows: np.ndarray
    scores: np.ndarray
    queries: np.ndarray


def exact(catalogue: Catalogue, queries: np.ndarray, blocked: Sequence[int], k: int) -> Found:
    """The k rows whose highest product over the queries (S, D + 2) is highest; ties go to the lower row.

    One product and one pass: for a handful of queries that share their k this is faster than k for each of them, and
    the matrix may change between two searches (xpert_findings, section 5). `blocked` rows are left out.
    """
    products = queries @ catalogue.matrix[: catalogue.size].T  # (S, size)
    scores = products.max(axis=0)
    scores[~catalogue.available[: catalogue.size]] = -np.inf
    scores[list(blocked)] = -np.inf
    rows = highest(scores, k)
    return Found(rows, scores[rows], products[:, rows].argmax(axis=0))


def among(catalogue: Catalogue, rows: np.ndarray, queries: np.ndarray, blocked: Sequence[int], k: int) -> Found:
    """`exact` among some rows, ascending."""
    products = queries @ catalogue.matrix[rows].T
    scores = products.max(axis=0)
    scores[~catalogue.available[rows] | np.isin(rows, list(blocked))] = -np.inf
    places = highest(scores, k)
    return Found(rows[places], scores[places], products[:, places].argmax(axis=0))


def highest(scores: np.ndarray, k: int) -> np.ndarray:
    """Where the k highest of `scores` (n,) stand, best first; -inf is left out, ties go to the first."""
    if k < len(scores):
        floor = np.partition(scores, len(scores) - k)[len(scores) - k]
        places = np.flatnonzero(scores >= floor)
    else:
        places = np.arange(len(scores))
    places = places[np.isfinite(scores[places])]
    found: np.ndarray = places[np.argsort(-scores[places], kind="stable")[:k]]
    return found


class Graph:
    """HNSW over the vectors of a catalogue (Malkov and Yashunin 2018), the clicks joined by a threshold algorithm.

    Clicks change all the time, so the graph holds the vectors alone. The candidates are those with the highest cosines
    and those with the most clicks, and the search goes deeper until no other item can be among the k best (Fagin,
    Lotem, Naor 2003): as exact as the graph itself.
    """

    def __init__(self, rows: np.ndarray, vectors: np.ndarray, search_width: int = SEARCH_WIDTH) -> None:
        """`vectors` (n, D), unit, of `rows` (n,). Takes minutes for a million."""
        import faiss  # only where there are so many items

        faiss.omp_set_num_threads(1)  # of the thread that builds: predictions go on meanwhile
        self._graph = faiss.IndexHNSWFlat(vectors.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
        self._graph.hnsw.efConstruction = BUILD_WIDTH
        self._width = search_width
        self._rows = rows.tolist()  # by number in the graph; -1: no longer
        self._numbers = {row: number for number, row in enumerate(self._rows)}
        self._graph.add(np.ascontiguousarray(vectors, dtype=np.float32))
        self._popular: np.ndarray | None = None  # rows by clicks, most first
        self._changed: set[int] = set()

    @property
    def dead(self) -> int:
        """Places in the graph that stand for nothing any more."""
        return len(self._rows) - len(self._numbers)

    def put(self, row: int, vector: np.ndarray) -> None:
        """The row has this vector (D,) from now on."""
        self.drop(row)
        self._numbers[row] = len(self._rows)
        self._rows.append(row)
        self._graph.add(np.ascontiguousarray(vector[None], dtype=np.float32))

    def drop(self, row: int) -> None:
        """The row is not to be found any more."""
        number = self._numbers.pop(row, None)
        if number is not None:
            self._rows[number] = -1

    def clicked(self, rows: Sequence[int] | None) -> None:
        """The clicks of these rows have changed; None: of all."""
        if rows is None or len(self._changed) > STALE:
            self._popular = None
        else:
            self._changed.update(rows)

    def best(self, catalogue: Catalogue, queries: np.ndarray, blocked: Sequence[int], k: int) -> Found:
        """As `exact`, of what the graph finds; `queries` (S, D + 2)."""
        depth = FIRST * k + len(blocked)
        while True:
            rows, beyond = self._candidates(catalogue, queries, depth)
            found = among(catalogue, rows, queries, blocked, k)
            enough = len(found.rows) == k and found.scores[-1] >= beyond
            if enough or beyond == -np.inf:
                return found
            if depth >= MOST:
                return found if len(found.rows) == k else exact(catalogue, queries, blocked, k)
            depth = min(4 * depth, MOST)

    def _candidates(self, catalogue: Catalogue, queries: np.ndarray, depth: int) -> tuple[np.ndarray, float]:
        """Rows, ascending, and what no other row's score is above."""
        psi, prior, bias = np.ascontiguousarray(queries[:, :-2]), queries[:, -2], queries[:, -1]
        near, least = self._near(psi, depth)
        popular, floor = self._most_clicked(catalogue, depth)
        rows = np.unique(np.concatenate([near, popular, np.fromiter(self._changed, np.int64, len(self._changed))]))
        if len(rows) == catalogue.size:
            return rows, -np.inf
        # An item that is not among the near ones has a lower cosine, or no vector, whose cosine is 0.
        clicks = np.where(prior > 0, prior * floor, 0.0)
        return rows, float((np.maximum(least, 0.0) + clicks + bias).max())

    def _near(self, psi: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows with the highest cosines, and the lowest of them for each query (S,)."""
        depth = min(depth + self.dead, len(self._rows))
        if not depth:
            return np.empty(0, np.int64), np.zeros(len(psi))
        self._graph.hnsw.efSearch = max(self._width, depth)
        cosines, numbers = self._graph.search(psi, depth)
        # A list that the graph could not fill says nothing about the rest.
        least = np.where(numbers[:, -1] < 0, cosines.max(initial=1.0), cosines[:, -1])
        everything = depth == len(self._rows) and bool((numbers >= 0).all())
        found = np.array([self._rows[number] for number in np.unique(numbers[numbers >= 0])], dtype=np.int64)
        return found[found >= 0], np.full(len(psi), -1.0) if everything else least

    def _most_clicked(self, catalogue: Catalogue, depth: int) -> tuple[np.ndarray, float]:
        """Rows with the most clicks, and the log(1 + clicks) that no other unchanged row is above."""
        if self._popular is None or len(self._changed) > STALE:
            self._popular = highest(catalogue.log_clicks.copy(), MOST)
            self._changed.clear()
        rows = self._popular[:depth]
        stale = ~np.isin(rows, list(self._changed)) if self._changed else slice(None)
        clicks = catalogue.log_clicks[rows][stale]
        return rows, float(clicks[-1]) if len(clicks) else math.inf
