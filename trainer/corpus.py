"""Session files as one ordered corpus: users, their sessions in time order, their pages."""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.errors import TrainingError

TRAIN, VALIDATION, TEST = "train", "validation", "test"
COLUMNS = ("user_id", "session_id", "number", "start_ms", "end_ms", "pages", "cart", "purchase")


@dataclass(frozen=True)
class Corpus:
    """S sessions of U users, by user and start; sessions without a page are left out.

    Pages of session s are `pages[starts[s]:starts[s + 1]]`, indices into `names`. Sessions of user u are
    `first[u]` to `first[u + 1]`.
    """

    users: list[str]
    first: np.ndarray  # (U + 1,)
    session_ids: list[str]  # (S,)
    starts: np.ndarray  # (S + 1,)
    pages: np.ndarray  # (P,) int32
    names: list[str]
    cart: np.ndarray  # (S,) bool
    purchase: np.ndarray  # (S,) bool
    window_ms: tuple[int, int]  # first start, last end
    digest: str  # of users, sessions, pages and places; tells whether a checkpoint belongs to this corpus

    def sessions(self, user: int) -> range:
        """Session indices of a user, oldest first."""
        return range(int(self.first[user]), int(self.first[user + 1]))

    def page_ids(self, session: int) -> np.ndarray:
        """Page indices of a session."""
        return self.pages[self.starts[session] : self.starts[session + 1]]

    def page_names(self, session: int) -> list[str]:
        """Page names of a session."""
        return [self.names[page] for page in self.page_ids(session).tolist()]

    def returning(self) -> list[int]:
        """Users with at least two sessions: those with a target."""
        return np.flatnonzero(np.diff(self.first) >= 2).tolist()


def part(directory: Path, name: str) -> Path | None:
    """The part of a divided directory, `train`, `validation` or `test`: a directory or a Parquet file; None without."""
    places = (directory / name, directory / f"{name}.parquet")
    return next((place for place in places if place.exists()), None)


def training_parts(directory: Path) -> tuple[Path, Path | None]:
    """The training sessions, and those of the validation users where these are set apart.

    A directory divided into train, validation and test is used as such, and the test is left alone; in any other all
    sessions are for training. Raises TrainingError for one that has another part, but none to train on.
    """
    train = part(directory, TRAIN)
    if train is None:
        for name in (VALIDATION, TEST):
            if (place := part(directory, name)) is not None:
                raise TrainingError(
                    f"{directory} has a part for {name}, {place.name}, but none for {TRAIN}. Put the other sessions "
                    f"into {TRAIN}, or give their directory alone."
                )
    return (directory, None) if train is None else (train, part(directory, VALIDATION))


def read_training(directory: Path) -> tuple[Corpus, set[str] | None]:
    """The training and validation sessions of a directory, and the validation users where these are set apart.

    Raises TrainingError.
    """
    place, held = training_parts(directory)
    if held is None:
        return read_corpus(place), None
    return read_corpus(place, held), set(read_table(held)["user_id"].to_pylist())


def read_corpus(*places: Path) -> Corpus:
    """All Parquet files below the places, or files: each user's sessions are in one of the places.

    Raises TrainingError when they are no sessions, or when a user is in two places.
    """
    tables = [read_table(place) for place in places]
    parts = [set(pc.unique(table["user_id"]).to_pylist()) for table in tables]
    if both := sorted(user for user, count in Counter(user for part in parts for user in part).items() if count > 1):
        raise TrainingError(
            f"{len(both):,} users, {both[0]!r} among them, are in more than one of {' and '.join(map(str, places))}. "
            "Give each user's sessions to one part alone: a model that has seen a visitor cannot be validated on them."
        )
    table = pa.concat_tables(tables)
    _refuse_repeats(table)
    table = table.filter(pc.greater(pc.list_value_length(table["pages"]), 0))
    if table.num_rows == 0:
        where = " and ".join(str(place) for place in places)
        raise TrainingError(f"{where} holds no session with a page. Cut sessions with `replay --sessions` first.")
    order = pc.sort_indices(
        table, sort_keys=[("user_id", "ascending"), ("start_ms", "ascending"), ("number", "ascending")]
    )
    table = table.take(order).combine_chunks()
    lists = table["pages"].combine_chunks()
    if isinstance(lists, pa.ChunkedArray):
        lists = lists.chunk(0)
    encoded = lists.flatten().dictionary_encode()
    lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    codes = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int32)
    users = table["user_id"].combine_chunks().dictionary_encode()
    if isinstance(users, pa.ChunkedArray):
        users = users.chunk(0)
    session_ids, names = table["session_id"].to_pylist(), encoded.dictionary.to_pylist()
    user_codes = users.indices.to_numpy(zero_copy_only=False)
    digest = hashlib.sha256(json.dumps([session_ids, names, [sorted(part) for part in parts]]).encode())
    for column in (codes, lengths, user_codes):
        digest.update(column.tobytes())
    return Corpus(
        users=users.dictionary.to_pylist(),
        first=np.concatenate([[0], np.cumsum(np.bincount(user_codes, minlength=len(users.dictionary)))]),
        session_ids=session_ids,
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        pages=codes,
        names=names,
        cart=table["cart"].to_numpy(zero_copy_only=False).astype(bool),
        purchase=table["purchase"].to_numpy(zero_copy_only=False).astype(bool),
        window_ms=(pc.min(table["start_ms"]).as_py(), pc.max(table["end_ms"]).as_py()),
        digest=digest.hexdigest(),
    )


def _refuse_repeats(table: pa.Table) -> None:
    """A session that stands twice would be its own history. Raises TrainingError."""
    counts = table.group_by(["user_id", "session_id"]).aggregate([([], "count_all")])
    repeated = counts.filter(pc.greater(counts["count_all"], 1))
    if repeated.num_rows:
        raise TrainingError(
            f"{repeated.num_rows:,} sessions are there more than once, {repeated['session_id'][0].as_py()!r} of user "
            f"{repeated['user_id'][0].as_py()!r} among them. Is a file there twice?"
        )


def split(
    corpus: Corpus, share: float, seed: int, held: Collection[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation users: those of `held` with a target, or else a share of those with a target.

    The share is at least 20 users or a third of them, and who comes first hangs on the user id alone. Raises
    TrainingError with fewer than two users with a target, or when `held` leaves none of them on one side.
    """
    returning = corpus.returning()
    if len(returning) < 2:
        raise TrainingError(
            f"{len(returning)} of {len(corpus.users)} users have two sessions or more, and two such users are needed: "
            "a session is predicted from the ones before it. Give a longer stretch of the log, or a shorter gap."
        )
    if held is not None:
        apart = np.isin(np.array(corpus.users, dtype=object), list(held))
        if len({bool(apart[user]) for user in returning}) < 2:
            side = VALIDATION if apart[returning[0]] else TRAIN
            raise TrainingError(
                f"All {len(returning)} users with two sessions or more are in the part {side}, but both {TRAIN} and "
                f"{VALIDATION} need such users. Divide them anew, or take {VALIDATION} away to have some set apart."
            )
        return np.flatnonzero(~apart), np.intersect1d(np.flatnonzero(apart), returning)
    count = max(round(share * len(returning)), min(20, len(returning) // 3), 1)
    first = sorted(sorted(returning, key=lambda user: place_of(f"{seed}:{corpus.users[user]}"))[:count])
    chosen = np.isin(np.arange(len(corpus.users)), first)
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def place_of(text: str) -> bytes:
    """A place in an order that only the text decides."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def read_table(directory: Path) -> pa.Table:
    """All session files below the directory, or one file, as one table. Raises TrainingError."""
    return pa.concat_tables(list(_tables(directory)))


def _tables(directory: Path) -> Iterator[pa.Table]:
    if not directory.exists():
        raise TrainingError(f"{directory} does not exist. Cut sessions into it with `replay --sessions` first.")
    files = [directory] if directory.is_file() else sorted(directory.rglob("*.parquet"))
    if not files:
        raise TrainingError(f"{directory} holds no Parquet file. Cut sessions into it with `replay --sessions` first.")
    for file in files:
        try:
            schema = pq.read_schema(file)
            absent = [name for name in COLUMNS if name not in schema.names]
            if absent:
                raise TrainingError(
                    f"{file} lacks the columns {', '.join(absent)}. Session files have {', '.join(COLUMNS)}."
                )
            table = pq.read_table(file, columns=list(COLUMNS), partitioning=None)
            yield _whole(table.cast(_schema()), file)
        except (pa.ArrowException, OSError) as error:
            raise TrainingError(
                f"{file} cannot be read as sessions ({error}). Write it again, or take it out of the directory."
            ) from None


def _whole(table: pa.Table, file: Path) -> pa.Table:
    for name in COLUMNS:
        if table[name].null_count:
            raise TrainingError(f"{file}: {table[name].null_count} rows have null in the column {name}. Take them out.")
    return table


def _schema() -> pa.Schema:
    text, number = pa.large_string(), pa.int64()
    types = (text, text, number, number, number, pa.large_list(text), pa.bool_(), pa.bool_())
    return pa.schema(list(zip(COLUMNS, types, strict=True)))
