"""The items that can be put before a visitor right now: a bundle's table, and what has changed since it was made."""

from collections.abc import Iterable

import numpy as np

from models.items import ItemTable, indexed
from models.popularity import BUCKETS, ClickWindow

STRANGERS = 100_000  # items that are not known, at most about, whose clicks are counted


class Catalogue:
    """Rows of a matrix that queries are multiplied with, changed in place. Rows of the table come first and stay.

    An item that is new to the table has a row of its own until it is removed, and zeros for a vector until it is
    placed: only its clicks can bring it before anybody. The window counts the clicks of items that are not known as
    well: clicks and items come by different ways, and an item may be published after its first clicks. Not for several
    threads.
    """

    def __init__(self, table: ItemTable) -> None:
        """All items of the table are available until something else is said."""
        self.table = table
        self.size = len(table)  # rows in use, freed ones among them
        self.ids: list[str | None] = list(table.ids)  # None: a freed row
        self.matrix = indexed(table.vectors, np.log1p(table.clicks))  # (capacity, D + 2); see `indexed`
        self.available = np.ones(self.size, dtype=bool)  # (capacity,)
        self.placed: np.ndarray = (table.vectors != 0).any(axis=1)  # (capacity,) whether it has a vector
        self.window = ClickWindow(table.retriever.window_ms, table.retriever.clicks_until_ms)
        self._rows = {item_id: row for row, item_id in enumerate(table.ids)}
        self._free: list[int] = []
        self._own = table.clicks.astype(np.float32)  # (capacity,) counted when the table was made
        self._clicks = np.zeros_like(self._own)  # (capacity,) in the window
        self._share = 1.0  # of the table's own clicks that still counts
        self._since_ms = table.retriever.clicks_until_ms
        self._width = table.vectors.shape[1]

    def __len__(self) -> int:
        """Items that are known, available or not."""
        return len(self._rows)

    @property
    def log_clicks(self) -> np.ndarray:
        """(size,) log(1 + clicks in the window)."""
        found: np.ndarray = self.matrix[: self.size, self._width]
        return found

    @property
    def vectors(self) -> np.ndarray:
        """(size, D), unit; zeros where an item has none."""
        found: np.ndarray = self.matrix[: self.size, : self._width]
        return found

    def row(self, item_id: str) -> int | None:
        """The item's row; None if it is not known."""
        return self._rows.get(item_id)

    def rows(self, item_ids: Iterable[str]) -> list[int]:
        """Rows of those that are known, in the order given."""
        return [self._rows[item_id] for item_id in item_ids if item_id in self._rows]

    def has_vector(self, row: int) -> bool:
        """Whether the item of the row is placed among the others."""
        return bool(self.placed[row])

    def is_new(self, row: int) -> bool:
        """Whether the table does not have the item of the row."""
        return row >= len(self.table)

    def cluster(self, row: int) -> int:
        """The global cluster of the item of a row, which has a vector."""
        return self.table.nearest(self.vectors[row]) if self.is_new(row) else int(self.table.clusters[row])

    # ---------------------------------------------------------------- changes

    def put(self, item_id: str, available: bool) -> int:
        """Make the item known, or say whether it is available now; its row."""
        row = self._rows.get(item_id)
        if row is None:
            row = self._free.pop() if self._free else self._grow()
            self.ids[row], self._rows[item_id] = item_id, row
            self._clicks[row] = self.window.counts[item_id]
            self._show(np.array([row]))
        self.available[row] = available
        return row

    def place(self, row: int, vector: np.ndarray) -> None:
        """Give the item of a row its vector (D,), of length 1 or zeros."""
        self.matrix[row, : self._width] = vector
        self.placed[row] = bool(vector.any())

    def remove(self, item_id: str) -> int | None:
        """Take the item out, whose row is free then; one of the table keeps its row, and can only be put back."""
        row = self._rows.get(item_id)
        if row is None:
            return None
        self.available[row] = False
        if self.is_new(row):
            del self._rows[item_id]
            self.ids[row], self._clicks[row], self.matrix[row, : self._width + 1] = None, 0.0, 0.0
            self.placed[row] = False
            self._free.append(row)
        return row

    def click(self, clicks: Iterable[tuple[str, int]]) -> list[int] | None:
        """Count clicks, (item, event time) each; the rows that changed, None for all.

        The table's own clicks fade as the stream takes their place: they are gone a window after they were counted.
        """
        changed = self.window.add((item_id, ts_ms) for item_id, ts_ms in clicks if self._counts(item_id))
        rows = self.rows(changed)
        self._clicks[rows] = [self.window.counts[self.ids[row] or ""] for row in rows]
        share = self._fading()
        if share != self._share:
            self._share = share
            self._show(slice(0, self.size))
            return None
        self._show(np.array(rows, dtype=np.int64))
        return rows

    def _counts(self, item_id: str) -> bool:
        counted = self.window.counts
        return item_id in self._rows or item_id in counted or len(counted) < len(self._rows) + STRANGERS

    def _fading(self) -> float:
        """Falls by steps, so that a click changes all rows now and then only."""
        newest = self.window.newest_ms
        if newest is None:
            return 1.0
        if self._since_ms is None:
            self._since_ms = newest
        steps = (newest - self._since_ms) * BUCKETS // self.window.window_ms
        return min(self._share, max(0.0, 1.0 - steps / BUCKETS))

    def _show(self, rows: slice | np.ndarray) -> None:
        self.matrix[rows, self._width] = np.log1p(self._share * self._own[rows] + self._clicks[rows])

    def _grow(self) -> int:
        if self.size == len(self.matrix):
            more = max(1_024, self.size // 4)
            blank = np.zeros((more, self._width + 2), dtype=np.float32)
            blank[:, -1] = 1.0
            self.matrix = np.concatenate([self.matrix, blank])
            self.available, self.placed = (np.append(one, blank[:, 0] > 0) for one in (self.available, self.placed))
            self._own, self._clicks = (np.concatenate([one, blank[:, 0]]) for one in (self._own, self._clicks))
        self.ids.append(None)
        self.size += 1
        return self.size - 1
