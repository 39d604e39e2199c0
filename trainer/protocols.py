"""How a log becomes a task: the last items of each user, or the days after the ones of the training."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from trainer.corpus import TEST, TRAIN, VALIDATION, place_of
from trainer.errors import TrainingError, at_least_one
from trainer.interactions import Cases, Interactions, Snapshot, Task

LABELS_AT, EXAMPLE_AT = -2, -3  # without times: where the labels begin, and the last event before them
HOUR_MS, DAY_MS = 3_600_000, 86_400_000


@dataclass(frozen=True)
class Histories:
    """U users' items in order, and of some of them the labels that came after."""

    users: list[str]
    items: Sequence[Sequence[str]]
    labels: Sequence[Sequence[str]]  # empty: a user who is not judged


@dataclass(frozen=True)
class LastItems:
    """Each user's last items are the labels, as for AmazonReviews: snapshot 0 knows the events before the last
    history event, which is what the training predicts; snapshot 1 knows the whole histories. Validation and test
    users are different ones; both are also in the training log, as in the paper.
    """

    validation: int = 1_700  # users
    test: int | None = 4_000  # users; None: all that are left
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises TrainingError for a value that cannot work."""
        at_least_one(self, ("validation", "test"))

    def task(self, name: str, told: Histories, content: csr_array | np.ndarray | None, items: list[str]) -> Task:
        """`content` (N, D) and `items` (N,) name what the log may hold. Raises TrainingError when nobody has labels."""
        judged = [user for user, labels in enumerate(told.labels) if labels and told.items[user]]
        if len(judged) < 2:
            raise TrainingError(f"{name}: {len(judged)} users have a history and labels, and two are needed.")
        judged.sort(key=lambda user: place_of(f"{self.seed}:{told.users[user]}"))
        aside = min(self.validation, len(judged) // 2)
        last = None if self.test is None else aside + self.test
        parts = {VALIDATION: sorted(judged[:aside]), TEST: sorted(judged[aside:last])}
        log = self._log(told, items)
        snapshots = tuple(Snapshot(at, _clicked(log.between(None, at))) for at in (EXAMPLE_AT, LABELS_AT))
        train, covered = _drop_uncovered(self._cases(log, range(len(log.users)), EXAMPLE_AT, 0), snapshots)
        if not len(train):
            raise TrainingError(f"{name}: nobody's last item before the labels can be trained on. Give a longer log.")
        cases = {part: self._cases(log, chosen, LABELS_AT, 1) for part, chosen in parts.items()}
        coverage = {TRAIN: covered} | {part: _coverage(found, snapshots) for part, found in cases.items()}
        return Task(name, log, snapshots, train, cases[VALIDATION], cases[TEST], coverage, content)

    def _log(self, told: Histories, items: list[str]) -> Interactions:
        index = {item: place for place, item in enumerate(items)}
        sizes = [len(history) + len(labels) for history, labels in zip(told.items, told.labels, strict=True)]
        rows = (item for pair in zip(told.items, told.labels, strict=True) for part in pair for item in part)
        numbers = [
            np.arange(-len(history), len(labels)) for history, labels in zip(told.items, told.labels, strict=True)
        ]
        return Interactions(
            users=told.users,
            items=items,
            first=np.concatenate([[0], np.cumsum(sizes)]),
            item=np.fromiter((index[item] for item in rows), dtype=np.int32, count=sum(sizes)),
            ts=np.concatenate(numbers) + LABELS_AT,
            session=np.zeros(sum(sizes), dtype=np.int32),
        )

    def _cases(self, log: Interactions, users: Sequence[int], at: int, snapshot: int) -> Cases:
        """All events from `at` up to the next moment are labels; users without history or labels are left out."""
        rows, ends, counts, labels = [], [], [], []
        for user in users:
            start, stop = int(log.first[user]), int(log.first[user + 1])
            end = start + int(np.searchsorted(log.ts[start:stop], at))
            last = end + 1 if at == EXAMPLE_AT else stop
            if start < end < stop:
                rows.append(user)
                ends.append(end)
                counts.append(last - end)
                labels.append(log.item[end:last])
        size = len(rows)
        return Cases(
            log,
            user=np.array(rows, dtype=np.int64),
            end=np.array(ends, dtype=np.int64),
            at=np.full(size, at, dtype=np.int64),
            snapshot=np.full(size, snapshot, dtype=np.int64),
            opens=np.zeros(size, dtype=bool),
            starts=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
            labels=np.concatenate(labels) if labels else np.zeros(0, dtype=np.int32),
        )


@dataclass(frozen=True)
class LaterDays:
    """Days of training, then of validation, then of test, counted from the log's first day, which is 0. One click of
    a user is asked for, drawn by a hash; it is an item that the user has not seen, and that is in the index.
    """

    train_days: tuple[int, int] = (4, 11)  # from, and before
    validation_days: tuple[int, int] = (11, 12)
    test_days: tuple[int, int] = (12, 16)
    train: int = 16_000  # cases
    validation: int = 2_000
    test: int = 6_000
    snapshot_hours: int = 6  # how often the index is made anew
    index_hours: int = 48  # an item is in the index with `index_clicks` in so many hours before the snapshot
    index_clicks: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises TrainingError for a value that cannot work: a case must never be answered by what knows its label."""
        at_least_one(self, ("train", "validation", "test", "snapshot_hours", "index_hours", "index_clicks"))
        before = 0
        for name in ("train_days", "validation_days", "test_days"):
            start, end = getattr(self, name)
            if not before <= start < end:
                raise TrainingError(
                    f"{name} is [{start}, {end}]: from a day that is not before {before}, up to a later one, is asked "
                    "for. Days of training come first, then those of validation, then those of the test."
                )
            before = end

    def task(self, name: str, log: Interactions) -> Task:
        """Raises TrainingError when the log has no case for one of the parts."""
        zero = int(log.ts.min())
        first, last = self.train_days[0] * DAY_MS, self.test_days[1] * DAY_MS
        moments = range(zero + first, zero + last, self.snapshot_hours * HOUR_MS)
        snapshots = tuple(self._snapshot(log, at) for at in moments)
        indexed = np.zeros((len(snapshots), len(log.items)), dtype=bool)
        for place, snapshot in enumerate(snapshots):
            indexed[place, snapshot.items] = True
        days = {TRAIN: self.train_days, VALIDATION: self.validation_days, TEST: self.test_days}
        sizes = {TRAIN: self.train, VALIDATION: self.validation, TEST: self.test}
        cases, coverage = {}, {}
        for part, (start, end) in days.items():
            inside = np.flatnonzero((log.ts >= zero + start * DAY_MS) & (log.ts < zero + end * DAY_MS))
            inside = inside[_unseen(log)[inside]]
            which = np.searchsorted(moments, log.ts[inside], side="right") - 1
            held = indexed[which, log.item[inside]]
            coverage[part] = float(held.mean()) if len(held) else 0.0
            cases[part] = self._draw(log, inside[held], which[held], sizes[part])
            if not len(cases[part]):
                raise TrainingError(f"{name} has no click to predict for {part}, days {start} to {end - 1} of the log.")
        return Task(name, log, snapshots, cases[TRAIN], cases[VALIDATION], cases[TEST], coverage)

    def _snapshot(self, log: Interactions, at: int) -> Snapshot:
        counts = log.between(at - self.index_hours * HOUR_MS, at).popularity()
        return Snapshot(at, np.flatnonzero(counts >= self.index_clicks).astype(np.int32))

    def _draw(self, log: Interactions, events: np.ndarray, snapshots: np.ndarray, size: int) -> Cases:
        """The first click of each user in a shuffle of all, up to `size`: who clicks more is drawn sooner."""
        order = np.random.default_rng(self.seed).permutation(len(events))
        firsts = np.unique(log.user[events[order]], return_index=True)[1]
        chosen = np.sort(order[np.sort(firsts)[:size]])
        events, snapshots = events[chosen], snapshots[chosen]
        return Cases(
            log,
            user=log.user[events],
            end=events,
            at=log.ts[events],
            snapshot=snapshots,
            opens=log.session[events] != log.session[events - 1],
            starts=np.arange(len(events) + 1),
            labels=log.item[events],
        )


def _unseen(log: Interactions) -> np.ndarray:
    """(E,) bool: a click on what its user has not clicked before, and not the user's first."""
    pairs = log.user * len(log.items) + log.item
    found = np.zeros(len(pairs), dtype=bool)
    found[np.unique(pairs, return_index=True)[1]] = True  # of equal pairs, the first
    found[log.first[:-1][np.diff(log.first) > 0]] = False
    return found


def _clicked(log: Interactions) -> np.ndarray:
    return np.unique(log.item).astype(np.int32)


def _coverage(cases: Cases, snapshots: Sequence[Snapshot]) -> float:
    held = [
        np.isin(cases.labels[cases.starts[row] : cases.starts[row + 1]], snapshots[snapshot].items)
        for snapshot, rows in cases.by_snapshot()
        for row in rows.tolist()
    ]
    return float(np.concatenate(held).mean()) if held else 0.0


def _drop_uncovered(cases: Cases, snapshots: Sequence[Snapshot]) -> tuple[Cases, float]:
    """Cases of one label that the index holds, and the share of them: nothing can be learned from the others."""
    held = np.isin(cases.labels, snapshots[0].items)
    return cases.take(held), float(held.mean()) if len(held) else 0.0
