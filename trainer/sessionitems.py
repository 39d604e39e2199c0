"""Session files as a log of items, and the task of a bundle's retriever: the items of the next session."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from models.items import WIDTH
from trainer.corpus import TRAIN, VALIDATION
from trainer.errors import TrainingError
from trainer.interactions import Cases, Interactions, Snapshot, Task
from trainer.protocols import HOUR_MS

ITEM_COLUMNS = ("user_id", "start_ms", "number", "items")
FEWEST_SNAPSHOTS = 8  # that are asked, however long the log is


def read_item_log(places: Sequence[Path]) -> Interactions | None:
    """The items of all session files below the places; None if no event had one. Raises TrainingError.

    Events have the time of their page where the files have `page_ts_ms`, else that of their session's start.
    """
    tables = [table for place in places for path in _files(place) if (table := _read(path)) is not None]
    if not tables:
        return None
    table = pa.concat_tables(tables).combine_chunks()
    if not table.num_rows:
        return None
    users, user = np.unique(table["user_id"].to_numpy(zero_copy_only=False), return_inverse=True)
    items, item = np.unique(table["item"].to_numpy(zero_copy_only=False), return_inverse=True)
    ts, number = table["ts_ms"].to_numpy(), table["number"].to_numpy()
    order = np.lexsort((table["place"].to_numpy(), ts, number, table["start_ms"].to_numpy(), user))
    user, number = user[order], number[order]
    first = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=len(users)))])
    turned = np.concatenate([[0], np.cumsum((number[1:] != number[:-1]) | (user[1:] != user[:-1]))])
    return Interactions(
        users=[str(one) for one in users.tolist()],
        items=[str(one) for one in items.tolist()],
        first=first,
        item=item[order].astype(np.int32),
        ts=np.maximum.accumulate(ts[order] + user * _apart(ts)) - user * _apart(ts),  # never backwards within a user
        session=(turned - turned[first[user]]).astype(np.int32),
    )


@dataclass(frozen=True)
class NextSessions:
    """Moments are starts of sessions, as a prediction is made when the one before has closed; the labels are the items
    of the session that are new to the visitor and in the index.

    All is as old as it is in service: vectors and co-visits are learned at some quantiles of the log's events, and
    between these clicks are counted, and items come into the index, every `every_ms`. The sessions that begin after the
    last quantiles validate. Of a long log only some of the snapshots are asked, a busy one sooner than a quiet one.
    Those of the training lie wider apart where few sessions begin, since each costs every epoch a step.
    """

    learned: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.875, 0.9375)
    validating: int = 2  # of these, at the end
    every_ms: int = HOUR_MS  # no longer than the shortest window of popularity that is tried
    train: int = 16_000  # cases, at most
    validation: int = 4_000
    train_each: int = 16  # sessions that a snapshot of the training is asked for, at least, on average
    train_snapshots: int = 256  # that are asked, at most
    validation_snapshots: int = 128
    work: int = 2_000_000_000  # events and numbers of vectors that are looked at for either kind of them, about
    seed: int = 0

    def task(self, log: Interactions) -> Task:
        """`test` is empty: a bundle is judged with `items evaluate`."""
        learned = np.unique(np.quantile(log.ts, self.learned, method="lower") + 1)
        born = np.full(len(log.items), np.iinfo(np.int64).max)
        np.minimum.at(born, log.item, log.ts)
        split = int(learned[max(0, len(learned) - self.validating)])
        cases, moments, new = self._cases(log, learned, split, born)
        later = cases.at >= split
        coverage = {
            part: float(np.diff(cases.starts)[rows].sum() / max(new[rows].sum(), 1))
            for part, rows in ((TRAIN, ~later), (VALIDATION, later))
        }
        labelled = np.diff(cases.starts) > 0
        most = max(FEWEST_SNAPSHOTS, self.work // (len(log.item) + WIDTH * len(log.items)))
        train = self._draw(moments, labelled & ~later, self.train, min(self.train_snapshots, most))
        validation = self._draw(moments, labelled & later, self.validation, min(self.validation_snapshots, most))
        asked = np.unique(moments[np.concatenate([train, validation])])
        snapshots = tuple(
            Snapshot(int(at), np.flatnonzero(born < at).astype(np.int32), int(learned[learned <= at][-1]))
            for at in asked.tolist()
        )
        which = replace(cases, snapshot=np.searchsorted(asked, moments))
        nobody = cases.take(np.zeros(0, dtype=np.int64))
        return Task("sessions", log, snapshots, which.take(train), which.take(validation), nobody, coverage)

    def _cases(
        self, log: Interactions, learned: np.ndarray, split: int, born: np.ndarray
    ) -> tuple[Cases, np.ndarray, np.ndarray]:
        """All sessions that are not a visitor's first, the moment of the snapshot that each asks, and how many items
        of each are new to the visitor. From `split` on they validate; `born` (N,): when each item was first clicked.
        """
        user = log.user
        turns = np.concatenate([[True], (user[1:] != user[:-1]) | (np.diff(log.session) != 0)])
        begins, session = np.flatnonzero(turns), np.cumsum(turns) - 1
        at = log.ts[begins]
        asks = (begins != log.first[user[begins]]) & (at >= learned[0])
        wide_ms = self._wide_ms(at[asks & (at < split)], learned)
        moments = np.where(at < split, _moments(at, learned, wide_ms), _moments(at, learned, self.every_ms))
        new = _first_clicks(log) & asks[session]
        held = new & (born[log.item] < moments[session])
        counts = np.bincount(session[held], minlength=len(begins))[asks]
        cases = Cases(
            log,
            user=user[begins[asks]],
            end=begins[asks],
            at=at[asks],
            snapshot=np.zeros(len(counts), dtype=np.int64),
            opens=np.ones(len(counts), dtype=bool),
            starts=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
            labels=log.item[held],
        )
        return cases, moments[asks], np.bincount(session[new], minlength=len(begins))[asks]

    def _wide_ms(self, at: np.ndarray, learned: np.ndarray) -> int:
        """How far apart the snapshots of a training lie whose sessions begin at (n,)."""
        every_ms, most = self.every_ms, max(FEWEST_SNAPSHOTS, len(at) // self.train_each)
        while len(np.unique(_moments(at, learned, every_ms))) > most:
            every_ms *= 2
        return every_ms

    def _draw(self, moments: np.ndarray, wanted: np.ndarray, cases: int, snapshots: int) -> np.ndarray:
        """Rows of at most so many cases, which ask at most so many snapshots; ascending."""
        drawn = np.random.default_rng(self.seed).permutation(np.flatnonzero(wanted))
        found, firsts = np.unique(moments[drawn], return_index=True)
        asked = found[np.argsort(firsts)[:snapshots]]  # a snapshot of many cases is among the first sooner
        return np.sort(drawn[np.isin(moments[drawn], asked)][:cases])


def _moments(at: np.ndarray, learned: np.ndarray, every_ms: int) -> np.ndarray:
    """The last snapshot before each of `at`: one whenever something is learned, and then every so often."""
    since = learned[(np.searchsorted(learned, at, side="right") - 1).clip(min=0)]
    found: np.ndarray = since + (at - since) // every_ms * every_ms
    return found


def _first_clicks(log: Interactions) -> np.ndarray:
    """(E,) bool: a user's first click on an item."""
    found = np.zeros(len(log.item), dtype=bool)
    found[np.unique(log.user * len(log.items) + log.item, return_index=True)[1]] = True
    return found


def _apart(ts: np.ndarray) -> int:
    return int(ts.max() - ts.min() + 1)


def _files(place: Path) -> list[Path]:
    return [place] if place.is_file() else sorted(place.rglob("*.parquet"))


def _read(path: Path) -> pa.Table | None:
    """A row an event with an item: user_id, start_ms, number, ts_ms, place, item; None if the file has no items."""
    try:
        names = pq.read_schema(path).names
        if "items" not in names:
            return None
        timed = ["page_ts_ms"] if "page_ts_ms" in names else []
        table = pq.read_table(path, columns=[*ITEM_COLUMNS, *timed], partitioning=None)
        table = table.filter(pc.is_valid(table["items"])).combine_chunks()
        if not table.num_rows:
            return None
        return _exploded(table)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise TrainingError(
            f"{path}: the items of its sessions cannot be read ({error}). Write it again, or take it out."
        ) from None


def _exploded(table: pa.Table) -> pa.Table:
    lists = table["items"].combine_chunks()
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    parent = np.repeat(np.arange(table.num_rows), lengths)
    item = pc.list_flatten(lists)
    place = np.arange(len(parent)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    if "page_ts_ms" in table.column_names:
        ts = pc.list_flatten(table["page_ts_ms"].combine_chunks())
        if len(ts) != len(item):
            raise ValueError("items and page_ts_ms are not of one length")
    else:
        ts = table["start_ms"].take(pa.array(parent))
    found = pa.table(
        {
            "user_id": table["user_id"].take(pa.array(parent)).cast(pa.large_string()),
            "start_ms": table["start_ms"].take(pa.array(parent)).cast(pa.int64()),
            "number": table["number"].take(pa.array(parent)).cast(pa.int64()),
            "ts_ms": ts.cast(pa.int64()),
            "place": pa.array(place, pa.int64()),
            "item": item.cast(pa.large_string()),
        }
    )
    return found.filter(pc.is_valid(found["item"]))
