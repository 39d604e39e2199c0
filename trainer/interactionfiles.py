"""Readers of logs of items: Amazon Beauty's sequences, Globo's clicks, AmazonReviews-1M as released, session files."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.sparse import csr_array

from trainer.corpus import read_table
from trainer.errors import TrainingError
from trainer.interactions import Interactions
from trainer.protocols import Histories
from trainer.sessionitems import read_item_log

CLICK_COLUMNS = ("user_id", "session_id", "article_id", "ts_ms")
LABELS = 2  # of a sequence: its last two items (XPert, AmazonReviews)
TRAIN_FILE, TEST_FILE, FEATURES_FILE = "final_data_train.txt", "final_data_test.txt", "item_features.txt"


def read_sequences(path: Path) -> Histories:
    """Lines of `user item item ...`, oldest first; the last two items are the labels. Raises TrainingError."""
    users, items, labels = [], [], []
    for number, line in _lines(path):
        user, *clicked = line.split()
        if len(clicked) <= LABELS:
            raise TrainingError(
                f"{path}, line {number}: {len(clicked)} items after the user. Give three or more: two are the labels."
            )
        users.append(user)
        items.append(clicked[:-LABELS])
        labels.append(clicked[-LABELS:])
    return Histories(users, items, labels)


def read_attributes(path: Path, items: list[str]) -> csr_array:
    """JSON of item -> attribute numbers, as (N, A) indicators for `items`. Raises TrainingError."""
    try:
        told = msgspec.json.decode(path.read_bytes(), type=dict[str, list[int]])
    except (OSError, msgspec.MsgspecError) as error:
        raise TrainingError(
            f"{path} cannot be read as attributes of items ({error}). Give JSON: item -> [1, 2]."
        ) from None
    places = [(row, attribute) for row, item in enumerate(items) for attribute in set(told.get(item, ()))]
    if not places:
        raise TrainingError(f"{path} has attributes for none of the {len(items):,} items of the log. Is it another's?")
    rows, columns = np.array(places, dtype=np.int64).reshape(-1, 2).T
    shape = (len(items), int(columns.max()) + 1)
    return csr_array((np.ones(len(rows), dtype=np.float32), (rows, columns)), shape=shape)


def read_clicks(path: Path) -> Interactions:
    """Parquet with user_id, session_id, article_id and ts_ms, one row a click, in any order. Raises TrainingError."""
    try:
        table = pq.read_table(path, columns=list(CLICK_COLUMNS))
        times = table["ts_ms"].cast(pa.int64())
    except (pa.ArrowException, OSError) as error:
        raise TrainingError(
            f"{path} cannot be read as clicks ({error}). Give Parquet with {', '.join(CLICK_COLUMNS)}."
        ) from None
    for name in CLICK_COLUMNS:
        if table[name].null_count:
            raise TrainingError(
                f"{path}: {table[name].null_count:,} rows have null in the column {name}. Take them out."
            )
    if not table.num_rows:
        raise TrainingError(f"{path} holds no click. Give another file.")
    users, user = np.unique(table["user_id"].to_numpy(), return_inverse=True)
    items, item = np.unique(table["article_id"].to_numpy(), return_inverse=True)
    ts, session = times.to_numpy(), table["session_id"].to_numpy()
    order = np.lexsort((ts, user))
    user, session = user[order], session[order]
    first = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=len(users)))])
    turned = np.concatenate([[0], np.cumsum(session[1:] != session[:-1])])  # also turns with the user
    return Interactions(
        users=[str(one) for one in users.tolist()],
        items=[str(one) for one in items.tolist()],
        first=first,
        item=item[order].astype(np.int32),
        ts=ts[order],
        session=(turned - turned[np.minimum(first[:-1], len(turned) - 1)][user]).astype(np.int32),
    )


def read_sessions(path: Path) -> Interactions:
    """The items of session files, a directory or one file, as the archive and `replay --sessions` write them.

    Raises TrainingError.
    """
    read_table(path)  # says what is wrong with any of the files
    log = read_item_log([path])
    if log is None:
        raise TrainingError(f"no session of {path} has items. Give sessions of events that have an item_id.")
    return log


def first_clicks(log: Interactions) -> Histories:
    """Each item once, where its user first clicked it: what comes again is no news. The last two items are the labels
    of users who have more than these; the others teach.
    """
    items, labels = [], []
    for start, end in zip(log.first[:-1].tolist(), log.first[1:].tolist(), strict=True):
        clicked = [log.items[item] for item in dict.fromkeys(log.item[start:end].tolist())]
        last = LABELS if len(clicked) > LABELS else 0
        items.append(clicked[: len(clicked) - last])
        labels.append(clicked[len(clicked) - last :])
    return Histories(log.users, items, labels)


def read_released(directory: Path) -> tuple[Histories, list[str], np.ndarray]:
    """AmazonReviews-1M as it was released with XPert: histories with labels, the items, and their vectors (N, D).

    final_data_train.txt and final_data_test.txt hold `user, label,label, label time, item:time item:time ...`, parted
    by tabs; item_features.txt holds an item and its vector. A user of both files stands with the row of the test, whose
    history goes on to the labels of the training; one of the training alone is not judged, and the labels there end
    the history. Raises TrainingError.
    """
    histories: dict[str, tuple[list[str], list[str]]] = {}
    for name in (TRAIN_FILE, TEST_FILE):
        for number, line in _lines(directory / name):
            user, labels, history = _released_row(directory / name, number, line)
            histories[user] = (history, labels) if name == TEST_FILE else (history + labels, [])
    items, vectors = read_vectors(directory / FEATURES_FILE)
    known = set(items)
    for user, rows in histories.items():
        if absent := next((item for row in rows for item in row if item not in known), None):
            raise TrainingError(f"{directory}: item {absent!r} of user {user!r} has no vector in {FEATURES_FILE}.")
    told = Histories(list(histories), [row for row, _ in histories.values()], [row for _, row in histories.values()])
    return told, items, vectors


def read_vectors(path: Path) -> tuple[list[str], np.ndarray]:
    """Lines of an item and its vector, parted by blanks, tabs or commas: the items and (N, D) float32, to unit length.

    Raises TrainingError.
    """
    items: list[str] = []
    rows: list[np.ndarray] = []
    for number, line in _lines(path):
        item, *values = line.replace(",", " ").split()
        try:
            row = np.array(values, dtype=np.float32)
        except ValueError as error:
            raise TrainingError(
                f"{path}, line {number}: {error}. Give an item and the numbers of its vector."
            ) from None
        if not len(row) or (rows and len(row) != len(rows[0])):
            raise TrainingError(
                f"{path}, line {number}: {len(row)} numbers after the item, not {len(rows[0]) if rows else 'a vector'}."
            )
        items.append(item)
        rows.append(row)
    found = np.stack(rows) if rows else np.zeros((0, 0), dtype=np.float32)
    return items, found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


def _released_row(path: Path, number: int, line: str) -> tuple[str, list[str], list[str]]:
    fields = line.split("\t")
    if len(fields) != 4:
        raise TrainingError(
            f"{path}, line {number}: {len(fields)} fields, not four: user, labels, time of the label, history."
        )
    timed = []
    for event in fields[3].split():
        item, _, time = event.rpartition(":")
        try:
            timed.append((float(time), item))
        except ValueError:
            raise TrainingError(f"{path}, line {number}: {event!r} is no item:time.") from None
    history = [item for _, item in sorted(timed, key=lambda event: event[0])]
    return fields[0], [label.strip() for label in fields[1].split(",") if label.strip()], history


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that hold something, numbered from 1."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path} cannot be read ({error}).") from None
