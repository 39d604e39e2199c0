"""Clicks on items: who clicked what and when, the moments to judge retrieval at, and the snapshots of the index."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
from scipy.sparse import csr_array

NONE = -1  # where there is no item
FEW = 8  # times fewer events than all: then they are looked up by time, else all are looked at

T = TypeVar("T")


@dataclass(frozen=True)
class Interactions:
    """E events of U users on N items, by user and then by time.

    Events of user u are `first[u]` to `first[u + 1]`. Data without times number each user's events back from the last,
    which is -1: so "before -2" is all but the last two of everybody, and one rule, `ts < at`, cuts both kinds.
    """

    users: list[str]
    items: list[str]
    first: np.ndarray  # (U + 1,) int64
    item: np.ndarray  # (E,) int32, indices into `items`
    ts: np.ndarray  # (E,) int64, epoch ms, or -1, -2, ... backwards
    session: np.ndarray  # (E,) int32, number of the session among the user's, from 0
    _found: dict[Any, Any] = field(init=False, default_factory=dict, repr=False, compare=False)

    @property
    def timed(self) -> bool:
        """Whether the events have times."""
        return bool(self.ts.max(initial=0) > 0)

    @cached_property
    def user(self) -> np.ndarray:
        """(E,) int64: whose event it is."""
        return np.repeat(np.arange(len(self.users)), np.diff(self.first))

    @cached_property
    def _by_time(self) -> np.ndarray:
        """(E,) int64: the events in the order of their times."""
        return np.argsort(self.ts, kind="stable")

    def between(self, start: int | None, end: int) -> "Interactions":
        """The events with start <= ts < end, of the same users and items; None: from the first on."""
        kept = self._inside(start, end)
        counts = np.bincount(self.user[kept], minlength=len(self.users))
        first = np.concatenate([[0], np.cumsum(counts)])
        return Interactions(self.users, self.items, first, self.item[kept], self.ts[kept], self.session[kept])

    def popularity(self) -> np.ndarray:
        """(N,) int64: clicks on each item."""
        return np.bincount(self.item, minlength=len(self.items))

    def once(self, make: Callable[["Interactions"], T]) -> T:
        """What `make` makes of these events; it is kept, and not made again."""
        if make not in self._found:
            self._found[make] = make(self)
        kept: T = self._found[make]
        return kept

    def _inside(self, start: int | None, end: int) -> np.ndarray:
        """Which events have start <= ts < end: a mask, or their places in order."""
        if start is not None:
            low, high = np.searchsorted(self.ts, [start, end], sorter=self._by_time)
            if (high - low) * FEW < len(self.ts):
                return np.sort(self._by_time[low:high])
        inside: np.ndarray = self.ts < end if start is None else (self.ts >= start) & (self.ts < end)
        return inside


@dataclass(frozen=True)
class Cases:
    """C moments at which a retriever is asked for the items that a user clicks next.

    The history of case c are the events `log.first[user[c]]` to `end[c]`; its labels, which no retriever may read
    before it has ranked, are `labels[starts[c]:starts[c + 1]]`.
    """

    log: Interactions
    user: np.ndarray  # (C,) int64
    end: np.ndarray  # (C,) int64
    at: np.ndarray  # (C,) int64, the moment, as `Interactions.ts`
    snapshot: np.ndarray  # (C,) int64, which of the task's snapshots answers
    opens: np.ndarray  # (C,) bool: the click to predict is the first of a session
    starts: np.ndarray  # (C + 1,) int64
    labels: np.ndarray  # (L,) int32

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> "Cases":
        """The cases `rows`, indices or a mask, in that order."""
        chosen = np.arange(len(self))[rows]
        counts = np.diff(self.starts)[chosen]
        starts = np.concatenate([[0], np.cumsum(counts)])
        places = np.repeat(self.starts[chosen] - starts[:-1], counts) + np.arange(starts[-1])
        same = {field.name: getattr(self, field.name)[chosen] for field in fields(self)[1:6]}
        return Cases(self.log, **same, starts=starts, labels=self.labels[places])

    def by_snapshot(self) -> Iterator[tuple[int, np.ndarray]]:
        """Each snapshot that is asked, with the rows of its cases."""
        for snapshot in np.unique(self.snapshot).tolist():
            yield snapshot, np.flatnonzero(self.snapshot == snapshot)

    def history(self, row: int, last: int | None = None) -> np.ndarray:
        """(H,) int32: the items that the user of a case has clicked, oldest first; `last`: only that many."""
        start, end = int(self.log.first[self.user[row]]), int(self.end[row])
        return self.log.item[start if last is None else max(start, end - last) : end]

    def recent(self, seeds: int) -> np.ndarray:
        """(C, seeds) int32: the distinct items clicked last, newest first, -1 where there are fewer."""
        found = np.full((len(self), seeds), NONE, dtype=np.int32)
        for row in range(len(self)):
            newest = list(dict.fromkeys(self.history(row)[::-1].tolist()))[:seeds]
            found[row, : len(newest)] = newest
        return found

    def seen(self) -> csr_array:
        """(C, N) bool: what the user of each case has clicked before it, which is never retrieved again."""
        starts = self.log.first[self.user]
        counts = self.end - starts
        rows = np.repeat(np.arange(len(self)), counts)
        places = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(starts, counts)
        shape = (len(self), len(self.log.items))
        return csr_array((np.ones(len(rows), dtype=bool), (rows, self.log.item[places])), shape=shape)

    def truth(self) -> csr_array:
        """(C, N) bool: the labels."""
        rows = np.repeat(np.arange(len(self)), np.diff(self.starts))
        shape = (len(self), len(self.log.items))
        return csr_array((np.ones(len(rows), dtype=bool), (rows, self.labels)), shape=shape)


class Snapshot(NamedTuple):
    """The index at one moment: clicks are counted before `at`, and only `items` can be retrieved.

    What is learned, vectors and co-visits, knows the events before `learned`; None: before `at`, too.
    """

    at: int  # as `Interactions.ts`
    items: np.ndarray  # (M,) int32, ascending
    learned: int | None = None


@dataclass(frozen=True)
class Task:
    """What retrieval is trained for and judged by: one log, its snapshots in time order, and three sets of cases.

    `coverage`: by set of cases, the share of labels that the index held, before any case was left out for it.
    `content` (N, D): what is known of the items beside the clicks, as vectors of their texts, or their attributes.
    """

    name: str
    log: Interactions
    snapshots: tuple[Snapshot, ...]
    train: Cases
    validation: Cases
    test: Cases
    coverage: dict[str, float]
    content: csr_array | np.ndarray | None = None
    _learned: dict[tuple[int, int | None], Interactions] = field(
        init=False, default_factory=dict, repr=False, compare=False
    )

    def known(self, snapshot: int, span: int | None = None) -> Interactions:
        """All events before a snapshot, or those of the last `span` ms: what counts as popular."""
        at = self.snapshots[snapshot].at
        return self.log.between(None if span is None else at - span, at)

    def learned_at(self, snapshot: int) -> int:
        """Before when the events lie that vectors and co-visits of a snapshot are made of."""
        at, _, learned = self.snapshots[snapshot]
        return at if learned is None else learned

    def learned(self, snapshot: int, span: int | None = None) -> Interactions:
        """These events, or those of the last `span` ms before; the same object for snapshots that learn the same."""
        at = self.learned_at(snapshot)
        if (at, span) not in self._learned:
            self._learned.clear()  # one is enough for snapshots that are asked in the order of time
            self._learned[at, span] = self.log.between(None if span is None else at - span, at)
        return self._learned[at, span]
