"""Session files as a log of items, and the task of a bundle's retriever: the items of the next session."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.corpus import TRAIN, VALIDATION
from trainer.errors import TrainingError
from trainer.interactions import Cases, Interactions, Snapshot, Task

ITEM_COLUMNS = ("user_id", "start_ms", "number", "items")


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

    Snapshots lie at quantiles of the log's events. The sessions that begin after the last ones validate.
    """

    snapshots: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.875, 0.9375)
    validating: int = 2  # of the snapshots, at the end
    train: int = 16_000  # cases, at most
    validation: int = 4_000
    seed: int = 0

    def task(self, log: Interactions) -> Task:
        """`test` is empty: a bundle is judged with `items evaluate`."""
        moments = np.unique(np.quantile(log.ts, self.snapshots, method="lower") + 1)
        snapshots = tuple(
            Snapshot(int(at), np.unique(log.between(None, int(at)).item).astype(np.int32)) for at in moments
        )
        split = int(moments[max(0, len(moments) - self.validating)])
        cases = self._cases(log, snapshots)
        trained, validated = np.flatnonzero(cases.at < split), np.flatnonzero(cases.at >= split)
        nobody = cases.take(np.zeros(0, dtype=np.int64))
        parts = self._draw(cases, trained, self.train), self._draw(cases, validated, self.validation)
        coverage = dict.fromkeys((TRAIN, VALIDATION), 1.0)
        return Task("sessions", log, snapshots, *parts, nobody, coverage)

    def _cases(self, log: Interactions, snapshots: Sequence[Snapshot]) -> Cases:
        user, size = log.user, len(log.items)
        begins = np.flatnonzero(np.concatenate([[False], (user[1:] == user[:-1]) & (np.diff(log.session) != 0)]))
        ends = np.append(begins[1:], len(user))
        moments = np.array([snapshot.at for snapshot in snapshots])
        which = np.searchsorted(moments, log.ts[begins], side="right") - 1
        indexed = np.zeros((len(snapshots), size), dtype=bool)
        for place, snapshot in enumerate(snapshots):
            indexed[place, snapshot.items] = True
        rows, labels = [], []
        for start, stop, asked in zip(begins.tolist(), ends.tolist(), which.tolist(), strict=True):
            if asked < 0:
                continue
            before = set(log.item[log.first[user[start]] : start].tolist())
            session = dict.fromkeys(log.item[start : min(stop, int(log.first[user[start] + 1]))].tolist())
            new = [item for item in session if indexed[asked, item] and item not in before]
            if new:
                rows.append((start, asked))
                labels.append(new)
        begin, which = np.array(rows, dtype=np.int64).reshape(-1, 2).T
        return Cases(
            log,
            user=user[begin],
            end=begin,
            at=log.ts[begin],
            snapshot=which,
            opens=np.ones(len(begin), dtype=bool),
            starts=np.concatenate([[0], np.cumsum([len(one) for one in labels], dtype=np.int64)]),
            labels=np.array([item for one in labels for item in one], dtype=np.int32),
        )

    def _draw(self, cases: Cases, rows: np.ndarray, most: int) -> Cases:
        drawn = np.random.default_rng(self.seed).permutation(rows)[:most]
        return cases.take(np.sort(drawn))


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
