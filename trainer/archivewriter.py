"""The one who writes the archive: takes records of the topic `sessions`, and brings files and positions on together."""

import fcntl
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import structlog

from streams import wire
from trainer.archive import missing, read_file, without
from trainer.archivefiles import SCHEMA, ArchiveFiles, File, Forget, Manifest
from trainer.errors import ArchiveUnusable, ArchiveUnwritable

_types = {field.name: field.type for field in msgspec.structs.fields(wire.Session)}
# No file keeps a session's context, which may be large.
_decode = msgspec.json.Decoder(msgspec.defstruct("Row", [(name, _types[name]) for name in SCHEMA.names])).decode
_columns = attrgetter(*SCHEMA.names)

log = structlog.get_logger(__name__)


@contextmanager
def open_archive(directory: Path, source: str, clock: Callable[[], float] = time.time) -> Iterator["ArchiveWriter"]:
    """The only writer of the directory, which holds sessions of the topic `source` (its full name) and no other.

    What a killed writer left half done is finished or removed first. `clock` gives epoch seconds. Raises
    `ArchiveUnusable` when another writer is there, or for a directory of another topic or schema version.
    """
    files = ArchiveFiles(directory)
    with _unwritable(files):
        files.prepare()
    with (files.own / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ArchiveUnusable(
                f"{directory} is in use by another archiver: give each its own BROWSECAST_ARCHIVE_DIR"
            ) from error
        manifest = files.manifest()
        if manifest.source not in ("", source):
            raise ArchiveUnusable(
                f"{directory} holds the sessions of {manifest.source}, not of {source}: give each deployment its own "
                "BROWSECAST_ARCHIVE_DIR"
            )
        with _unwritable(files):
            files.settle(manifest)
        yield ArchiveWriter(files, msgspec.structs.replace(manifest, source=source), clock)


class ArchiveWriter:
    """Sessions wait in memory until `flush`; every other change begins with the files of the last commit.

    After `ArchiveUnwritable` the writer is of no more use: open the archive anew.
    """

    def __init__(self, files: ArchiveFiles, manifest: Manifest, clock: Callable[[], float]) -> None:
        """Use `open_archive`."""
        self.manifest = manifest  # the present moment
        self.waiting = 0  # records since the last flush
        self.unreadable = 0  # records that were no sessions
        self._files, self._clock = files, clock
        self._positions = dict(manifest.positions)
        self._rows: dict[str, list[tuple[Any, ...]]] = {}  # by user, in the order of the topic
        self._forgotten: set[str] = set()

    def append(self, records: Iterable[wire.Record]) -> None:
        """Take records, those of a partition in order; what is archived already is passed over."""
        for record in records:
            if record.offset < self._positions.get(record.partition, 0):
                continue
            self._positions[record.partition] = record.offset + 1
            self.waiting += 1
            try:
                self._take(record)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                self.unreadable += 1
                log.error(
                    "a record is no session and is left out",
                    topic=self.manifest.source, partition=record.partition, offset=record.offset, error=str(error),
                )  # fmt: skip

    def _take(self, record: wire.Record) -> None:
        if record.value is None:
            user_id = (record.key or b"").decode()
            self._rows.pop(user_id, None)
            self._forgotten.add(user_id)
        else:
            row = _columns(_decode(record.value))
            self._rows.setdefault(row[0], []).append(row)

    def flush(self) -> None:
        """Commit what waits: new files, positions and forgotten users. Raises `ArchiveUnwritable`."""
        if not self.waiting:
            return
        rows = [row for of_user in self._rows.values() for row in of_user]
        now = self._now_ms()
        commit = self.manifest.commit + 1
        with _unwritable(self._files):
            new = [self._files.stage(table, day, commit, now) for day, table in _by_day(_table(rows))]
            self._commit(
                (*self.manifest.files, *new),
                positions=dict(self._positions),
                sessions=self.manifest.sessions + len(rows),
                newest_ms=max([self.manifest.newest_ms, *(row[SCHEMA.names.index("end_ms")] for row in rows)]),
                forgets=(*self.manifest.forgets, *(Forget(user, commit, now) for user in sorted(self._forgotten))),
            )
        self.waiting, self._rows, self._forgotten = 0, {}, set()

    def rewrite(self, files: Sequence[File]) -> None:
        """Put one file, without the forgotten users, in the place of some of one day. Raises `ArchiveUnwritable`."""
        with _unwritable(self._files):
            parts = [without(read_file(self._files, file), self.manifest.users_to_leave_out(file)) for file in files]
            table = pa.concat_tables(parts)
            new = []
            if table.num_rows:
                new.append(self._files.stage(_sorted(table), files[0].day, self.manifest.commit + 1, self._now_ms()))
            self._commit((*self._all_but(files), *new), dropped=tuple(files))

    def drop(self, files: Sequence[File]) -> None:
        """Remove files and their sessions. Raises `ArchiveUnwritable`."""
        with _unwritable(self._files):
            self._commit(self._all_but(files), dropped=tuple(files))

    def forget_next(self) -> None:
        """Rewrite the next file that holds a forgotten user. Where none does, the users' names go too.

        Raises `ArchiveUnwritable`.
        """
        for file in self.manifest.files:
            users = self.manifest.users_to_leave_out(file)
            if users and self._holds(file, users):
                self.rewrite([file])
                return
            self._mark_clean(file)
        with _unwritable(self._files):
            self._commit(self.manifest.files)

    def _holds(self, file: File, users: Sequence[str]) -> bool:
        # Files are sorted by user, so the statistics of their row groups spare most of the reading.
        with _unwritable(self._files):
            found = read_file(self._files, file, pc.field("user_id").isin(users), ["user_id"])
        return bool(found.num_rows)

    def _mark_clean(self, file: File) -> None:
        """Remember that no forgotten user is in the file; the next commit writes it down."""
        clean = msgspec.structs.replace(file, clean=self.manifest.commit)
        files = tuple(clean if other is file else other for other in self.manifest.files)
        self.manifest = msgspec.structs.replace(self.manifest, files=files)

    def _all_but(self, files: Sequence[File]) -> tuple[File, ...]:
        return tuple(file for file in self.manifest.files if file not in files)

    def _commit(self, files: tuple[File, ...], **changes: Any) -> None:
        coming = msgspec.structs.replace(
            self.manifest, **{"commit": self.manifest.commit + 1, "files": files, "dropped": (), **changes}
        )
        pending = tuple(forget for forget in coming.forgets if any(file.clean < forget.commit for file in files))
        coming = msgspec.structs.replace(coming, forgets=pending)
        self._files.commit(coming)
        self.manifest = coming
        self._files.settle(coming)

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)


@contextmanager
def _unwritable(files: ArchiveFiles) -> Iterator[None]:
    """What the disk refuses, as an error that says what to do."""
    try:
        yield
    except FileNotFoundError as error:
        raise missing(files, error) from error
    except (OSError, pa.ArrowException) as error:
        raise ArchiveUnwritable(
            f"{files.directory} cannot be written ({error}). Free or mend the disk, then start again: nothing is lost"
        ) from error


def _table(rows: Sequence[tuple[Any, ...]]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else ([] for _ in SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _by_day(table: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """The sessions of each day, sorted."""
    days = pc.strftime(table["end_ms"].cast(pa.timestamp("ms")), "%Y-%m-%d")
    for day in sorted(pc.unique(days).to_pylist()):
        yield day, _sorted(table.filter(pc.equal(days, day)))


def _sorted(table: pa.Table) -> pa.Table:
    """By user, oldest first: Parquet packs that best, and finds a user without reading all."""
    return table.sort_by([("user_id", "ascending"), ("end_ms", "ascending")])
