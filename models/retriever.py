"""The items to put before a visitor: a bundle's table and operator at work, while catalogue and clicks change."""

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from models.catalogue import Catalogue
from models.covisits import CoVisits
from models.fusion import Ranked, fuse
from models.items import WEIGHTS, ItemTable, RetrieverConfig
from models.search import Found, Graph, exact, highest
from models.seeding import seeds_of
from models.visit import Interest
from models.xpert import FEEDFORWARD, FEEDFORWARD_WEIGHTS, XPert

EXACT_UP_TO = 300_000  # items; a graph searches among more
FUSED_DEPTH = 100  # items of each list that are fused, at least
DEAD_SHARE = 0.2  # of the graph's places: then it is built anew


class Counts(NamedTuple):
    """Items known, available ones among them, and clicks in the window."""

    known: int
    available: int
    clicks: int


class Retriever:
    """Ranks the items that are available now for visitors at the close of a session. Safe for several threads."""

    def __init__(self, table: ItemTable, number: int, exact_up_to: int = EXACT_UP_TO) -> None:
        """`number`: items in a list. Raises ValueError when the table's weights do not fit."""
        self.table, self.chosen, self.number = table, table.retriever, number
        self.catalogue = Catalogue(table)
        self.graph: Graph | None = None
        self._operator = operator_of(table.retriever, table.tensors)
        self._covisits = CoVisits.of(table)
        self._exact_up_to, self._building = exact_up_to, False
        self._moved: set[int] = set()  # rows whose vectors have changed since the graph under work was begun
        self._lock = threading.RLock()
        self._tend()

    # ---------------------------------------------------------------- changes

    def put(self, item_id: str, available: bool) -> bool:
        """Make the item known, or say whether it is available; whether it has no place among the others yet."""
        with self._lock:
            known = self.catalogue.row(item_id) is not None
            row = self.catalogue.put(item_id, available)
            if self.graph is not None and not known:
                self.graph.clicked([row])
            return not self.catalogue.has_vector(row)

    def place(self, item_ids: Sequence[str], vectors: np.ndarray) -> None:
        """Give items that are new to the table their vectors (n, D); those removed meanwhile stay so."""
        with self._lock:
            for item_id, vector in zip(item_ids, vectors, strict=True):
                row = self.catalogue.row(item_id)
                if row is not None and self.catalogue.is_new(row):
                    self.catalogue.place(row, vector)
                    self._moved.add(row)
                    if self.graph is not None:
                        self.graph.put(row, vector)
            self._tend()

    def remove(self, item_id: str) -> None:
        """The item is gone."""
        with self._lock:
            row = self.catalogue.remove(item_id)
            if row is not None and self.catalogue.is_new(row):
                self._moved.add(row)
                if self.graph is not None:
                    self.graph.drop(row)
                    self.graph.clicked([row])
            self._tend()

    def click(self, clicks: Iterable[tuple[str, int]]) -> None:
        """Count clicks for the popularity, (item, event time) each."""
        with self._lock:
            rows = self.catalogue.click(clicks)
            if self.graph is not None:
                self.graph.clicked(rows)

    def counts(self) -> Counts:
        """How much there is."""
        with self._lock:
            available = int(self.catalogue.available[: self.catalogue.size].sum())
            return Counts(len(self.catalogue), available, self.catalogue.window.events)

    # ---------------------------------------------------------------- lists

    def rank(self, interests: Sequence[Interest]) -> list[list[Ranked[str]]]:
        """The best items for each visitor, best first: (item, score, the seed that brought it or None).

        What the visitor has touched or bought, and what is not available, is left out before the places are dealt.
        """
        with self._lock, torch.inference_mode():
            queries = self._queries(interests) if self._asks and interests else [None] * len(interests)
            return [self._rank(one, asked) for one, asked in zip(interests, queries, strict=True)]

    def popular(self, interests: Sequence[Interest]) -> list[list[Ranked[str]]]:
        """The items clicked most in the window, with the same left out."""
        with self._lock:
            return [self._named(self._popular(self._blocked(one), self.number)) for one in interests]

    @property
    def _asks(self) -> bool:
        return self.chosen.ranker not in ("popularity", "counts")

    def _rank(self, interest: Interest, asked: "_Asked | None") -> list[Ranked[str]]:
        blocked = self._blocked(interest)
        depth = max(FUSED_DEPTH, self.number) if self.chosen.fused else self.number
        counted = self._counted(interest, blocked, depth) if self._covisits is not None else None
        if self.chosen.ranker == "counts" and counted is not None:
            return counted
        if asked is not None:
            first = self._named(self._search(asked.queries, blocked, depth), asked.seeds)
        else:
            first = self._named(self._popular(blocked, depth))
        return fuse([first, counted], self.chosen.fusion)[: self.number] if self.chosen.fused and counted else first

    def _blocked(self, interest: Interest) -> list[int]:
        seeds = [item_id for item_id, _, _ in interest.seeds]
        touched = (*interest.session, *interest.recent, *interest.bought, *seeds)
        return self.catalogue.rows(dict.fromkeys(touched))

    def _search(self, queries: np.ndarray, blocked: Sequence[int], k: int) -> Found:
        if self.graph is not None:
            return self.graph.best(self.catalogue, queries, blocked, k)
        return exact(self.catalogue, queries, blocked, k)

    def _popular(self, blocked: Sequence[int], k: int) -> Found:
        catalogue = self.catalogue
        scores = np.where(catalogue.available[: catalogue.size], catalogue.log_clicks, -np.inf)
        scores[list(blocked)] = -np.inf
        rows = highest(scores, k)
        return Found(rows, scores[rows], np.full(len(rows), -1))

    def _counted(self, interest: Interest, blocked: Sequence[int], k: int) -> list[Ranked[str]]:
        assert self._covisits is not None
        rows = [self.table.row(item_id) for item_id in interest.recent[: self.chosen.counts_seeds]]
        return self._named(self._covisits.best(self.catalogue, rows, blocked, k), interest.recent)

    # ---------------------------------------------------------------- queries

    def _queries(self, interests: Sequence[Interest]) -> "list[_Asked | None]":
        """One for each visitor; None for those without a seed that has a vector: popularity is all there is."""
        rule = self.chosen.seeding
        seeds = [self.catalogue.rows(seeds_of(one, self.catalogue, rule)) for one in interests]
        history = [self.catalogue.rows(one.recent[: self.chosen.history]) for one in interests]
        vectors, known = self._padded(seeds)
        z = None
        if self._operator.aggregation is not None:
            z = self._operator.user(*self._padded([[r for r in h if self.catalogue.has_vector(r)] for h in history]))
        opens = torch.ones(len(interests), dtype=torch.bool)  # the next click is the first of the next session
        queries = self._operator(vectors, known, z, opens).numpy()
        return [
            _Asked(queries[place, : len(rows)], self._ids(rows)) if rows else None for place, rows in enumerate(seeds)
        ]

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors of the rows of each visitor (B, S, D), and which there are (B, S); S is at least 1."""
        longest = max(1, *(len(one) for one in rows))
        known = torch.tensor([[place < len(one) for place in range(longest)] for one in rows])
        padded = np.array([[*one, *[0] * (longest - len(one))] for one in rows], dtype=np.int64)
        vectors = torch.from_numpy(self.catalogue.matrix[padded, : self.table.vectors.shape[1]])
        return vectors * known[:, :, None], known

    def _ids(self, rows: Sequence[int]) -> list[str]:
        return [self.catalogue.ids[row] or "" for row in rows]

    def _named(self, found: Found, seeds: Sequence[str] = ()) -> list[Ranked[str]]:
        catalogue = self.catalogue
        return [
            Ranked(
                catalogue.ids[row] or "",
                score,
                seeds[query] if 0 <= query < len(seeds) and catalogue.has_vector(row) else None,
            )
            for row, score, query in zip(*(one.tolist() for one in found), strict=True)
        ]

    # ---------------------------------------------------------------- the graph

    def _tend(self) -> None:
        """Have a graph built beside when there are too many items for exact search, or too much of it is dead."""
        wanted = self.catalogue.size > self._exact_up_to
        worn = self.graph is not None and self.graph.dead > DEAD_SHARE * self.catalogue.size
        if wanted and not self._building and (self.graph is None or worn):
            self._building = True
            self._moved.clear()
            rows = np.flatnonzero(self.catalogue.placed[: self.catalogue.size])
            threading.Thread(target=self._build, args=(rows, self.catalogue.vectors[rows]), daemon=True).start()

    def _build(self, rows: np.ndarray, vectors: np.ndarray) -> None:
        graph = Graph(rows, vectors)
        with self._lock:
            for row in self._moved:
                graph.drop(row)
                if self.catalogue.has_vector(row):
                    graph.put(row, self.catalogue.vectors[row])
            self.graph, self._building = graph, False


class _Asked(NamedTuple):
    """A visitor's queries (S, D + 2), and the item of each."""

    queries: np.ndarray
    seeds: list[str]


def operator_of(chosen: RetrieverConfig, tensors: Mapping[str, np.ndarray]) -> XPert:
    """What turns seeds into queries, ready to use. Raises ValueError when the weights do not fit the ranker."""
    width = tensors["vectors"].shape[1]
    weights = {
        name.removeprefix(WEIGHTS): torch.tensor(one) for name, one in tensors.items() if name.startswith(WEIGHTS)
    }
    if chosen.ranker not in ("shared", "residual", "personal"):
        operator = XPert("identity", width, max(len(chosen.seed_bias), 1))
        with torch.no_grad():
            operator.prior.copy_(torch.tensor(chosen.prior))
            operator.seed_bias.copy_(torch.tensor(chosen.seed_bias or (0.0,)))
    else:
        seeds = weights["seed_bias"].shape[0] if "seed_bias" in weights else 1
        hidden = weights.get(FEEDFORWARD_WEIGHTS)
        feedforward = FEEDFORWARD if hidden is None else len(hidden)
        operator = XPert(chosen.ranker, width, seeds, chosen.heads, chosen.activation, feedforward)
        try:
            operator.load_state_dict(weights)
        except RuntimeError as error:
            said = " ".join(str(error).split())
            raise ValueError(f"the weights `{WEIGHTS}...` do not fit the ranker {chosen.ranker!r}: {said}") from None
    return operator.eval().requires_grad_(False)
