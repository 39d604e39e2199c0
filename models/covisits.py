"""What is often clicked by those who clicked the visitor's newest items: the table's co-visits at work."""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_array

from models.catalogue import Catalogue
from models.items import ItemTable, RetrieverConfig
from models.search import Found, highest

FILL = 1e-6  # weight of popularity where counts say nothing: it orders what is left, and moves nothing else


class CoVisits:
    """Sums of fade^k * count(seed, item) / clicks(seed)^power over the newest items, the k-th of them from 0."""

    def __init__(self, counts: csr_array, clicks: np.ndarray, chosen: RetrieverConfig) -> None:
        """`counts` (N, N), from an item to those beside it; `clicks` (N,) that they are divided by."""
        self._counts = counts
        self._scale = 1.0 / np.maximum(clicks, 1) ** chosen.counts_power
        self._fade = chosen.counts_fade

    @classmethod
    def of(cls, table: ItemTable) -> "CoVisits | None":
        """Those of the table; None if the chosen retriever looks at none."""
        if not (table.retriever.fused or table.retriever.ranker == "counts"):
            return None
        indptr, indices, values = (table.tensors[f"covisits_{part}"] for part in ("indptr", "indices", "values"))
        counts = csr_array((values, indices, indptr), shape=(len(table), len(table)))
        counts.sum_duplicates()
        return cls(counts, table.tensors.get("covisits_clicks", table.clicks), table.retriever)

    def best(self, catalogue: Catalogue, recent: Sequence[int | None], blocked: Sequence[int], k: int) -> Found:
        """The k best rows of the catalogue. `recent`: rows of the newest items, newest first; None: none in the table.

        The query of a row is the place in `recent` that counts most for it; -1 where none counts.
        """
        scores = FILL * catalogue.log_clicks.astype(np.float64)
        parts = []
        for place, row in enumerate(recent):
            if row is None:  # the next one is as old as it is all the same
                continue
            start, end = self._counts.indptr[row : row + 2]
            columns, counts = self._counts.indices[start:end], self._counts.data[start:end]
            part = counts * (self._fade**place * self._scale[row])
            scores[columns] += part
            parts.append((place, columns, part))
        scores[~catalogue.available[: catalogue.size]] = -np.inf
        scores[list(blocked)] = -np.inf
        rows = highest(scores, k)
        return Found(rows, scores[rows], self._brought(rows, parts))

    @staticmethod
    def _brought(rows: np.ndarray, parts: Sequence[tuple[int, np.ndarray, np.ndarray]]) -> np.ndarray:
        best, most = np.full(len(rows), -1), np.zeros(len(rows))
        order = np.argsort(rows)
        for place, columns, part in parts:
            at = np.searchsorted(rows, columns, sorter=order).clip(max=max(len(rows) - 1, 0))
            hit = rows[order[at]] == columns if len(rows) else np.zeros(0, dtype=bool)
            where, value = order[at[hit]], part[hit]
            better = value > most[where]
            best[where[better]], most[where[better]] = place, value[better]
        return best
