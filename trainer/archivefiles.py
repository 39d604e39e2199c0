"""The archive's directory: Parquet files by day, the manifest that says which of them count, and how they change.

    day=2026-11-22/sessions-0000000042.parquet    what everybody reads
    .archive/manifest.json                        the files, the positions in the topic, the users to forget: one moment
    .archive/staged/                              files of the next moment, written before it is there
    .archive/lock                                 held by the one who writes

A change is: stage new files; replace the manifest, which is the commit; remove the files that it dropped, then move the
staged ones to their days. A writer that died in between repeats the last two steps at its next start. A file is never
changed, and its name is never used again.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from streams import wire
from trainer.errors import ArchiveUnusable

SCHEMA_VERSION = 1
SCHEMA = wire.session_schema().with_metadata({"browsecast.archive": str(SCHEMA_VERSION)})
ROW_GROUP = 20_000


class File(msgspec.Struct, frozen=True):
    """A Parquet file of one day. `commit` made it; users forgotten up to that commit are not in it."""

    day: str  # of the sessions' ends, UTC, YYYY-MM-DD
    commit: int
    rows: int
    bytes: int
    written_ms: int
    clean: int  # users forgotten up to this commit are not in it: `commit` at first, later as far as was looked

    @property
    def place(self) -> str:
        """Where it lies, below the directory."""
        return f"day={self.day}/sessions-{self.commit:010d}.parquet"

    @property
    def staged(self) -> str:
        """Where it waits for its commit; the name does not end in .parquet, so nobody takes it for a session file."""
        return f".archive/staged/{self.day}.{self.commit:010d}"


class Forget(msgspec.Struct, frozen=True):
    """A user whose sessions of all files that are not clean since `commit` must go."""

    user_id: str
    commit: int
    at_ms: int  # wall clock, when the archive learned it


class Manifest(msgspec.Struct, frozen=True):
    """One moment of the archive."""

    version: int = SCHEMA_VERSION
    source: str = ""  # full name of the topic
    commit: int = 0
    positions: dict[int, int] = {}  # partition -> offset of the next record to read
    sessions: int = 0  # ever archived
    newest_ms: int = 0  # highest end of a session
    files: tuple[File, ...] = ()
    forgets: tuple[Forget, ...] = ()
    dropped: tuple[File, ...] = ()  # by this commit

    def users_to_leave_out(self, file: File) -> list[str]:
        """Forgotten users who may still be in the file."""
        return [forget.user_id for forget in self.forgets if forget.commit > file.clean]


class _Version(msgspec.Struct):
    version: int


class ArchiveFiles:
    """The steps of a change, each of which may be the last before the process dies."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.own = directory / ".archive"
        self._manifest = self.own / "manifest.json"

    def manifest(self) -> Manifest:
        """The archive's present moment; an empty one where there is no archive. Raises `ArchiveUnusable`."""
        try:
            text = self._manifest.read_bytes()
        except FileNotFoundError:
            return Manifest()
        try:
            version = msgspec.json.decode(text, type=_Version).version
            if version == SCHEMA_VERSION:
                return msgspec.json.decode(text, type=Manifest)
        except msgspec.MsgspecError as error:
            raise ArchiveUnusable(
                f"{self._manifest} is damaged ({error}). Move {self.directory} away: the next start archives anew what "
                "the topic still has"
            ) from error
        raise ArchiveUnusable(
            f"{self.directory} has schema version {version}, and this browsecast writes {SCHEMA_VERSION}. Use the "
            "browsecast that wrote it, or name another directory with BROWSECAST_ARCHIVE_DIR"
        )

    def prepare(self) -> None:
        """Make the directory ready for the first manifest. Raises `ArchiveUnusable` if it holds other files."""
        if not self._manifest.exists() and (stranger := next(self.directory.rglob("*.parquet"), None)) is not None:
            raise ArchiveUnusable(
                f"{self.directory} is no archive, but holds Parquet files ({stranger.name}): name another directory "
                "with BROWSECAST_ARCHIVE_DIR"
            )
        (self.own / "staged").mkdir(parents=True, exist_ok=True)

    def stage(self, table: pa.Table, day: str, commit: int, now_ms: int) -> File:
        """Write a file of the next moment, durably."""
        file = File(day, commit, table.num_rows, 0, now_ms, commit)
        path = self.directory / file.staged
        pq.write_table(table.cast(SCHEMA), path, compression="zstd", row_group_size=ROW_GROUP)
        sync(path)
        return msgspec.structs.replace(file, bytes=path.stat().st_size)

    def commit(self, manifest: Manifest) -> None:
        """Make the manifest the present moment: all or nothing."""
        sync(self.own / "staged")
        coming = self.own / "manifest.json.coming"
        coming.write_bytes(msgspec.json.encode(manifest))
        sync(coming)
        coming.replace(self._manifest)
        sync(self.own)

    def settle(self, manifest: Manifest) -> None:
        """Bring the days in line with the manifest: first what it dropped goes, then what is new comes."""
        days = {(self.directory / file.place).parent for file in manifest.dropped}
        for file in manifest.dropped:
            (self.directory / file.place).unlink(missing_ok=True)
        waiting = {path.name for path in (self.own / "staged").iterdir()}
        for file in manifest.files:
            staged, place = self.directory / file.staged, self.directory / file.place
            if staged.name in waiting:
                place.parent.mkdir(exist_ok=True)
                staged.replace(place)
                waiting.discard(staged.name)
                days.add(place.parent)
        for name in waiting:  # staged for a commit that never was
            (self.own / "staged" / name).unlink()
        self._tidy(days)

    def _tidy(self, days: Iterable[Path]) -> None:
        for day in days:
            if day.is_dir():
                if any(day.iterdir()):
                    sync(day)
                else:
                    day.rmdir()
        sync(self.directory)

    def open(self, file: File) -> pa.NativeFile:
        """A file of the present moment, wherever it lies just now. Raises FileNotFoundError once it was dropped."""
        for name in (file.place, file.staged, file.place):
            try:
                return pa.OSFile(str(self.directory / name))
            except FileNotFoundError:
                continue
        raise FileNotFoundError(file.place)


def sync(path: Path) -> None:
    """Have the disk keep a file, or the names in a directory, through a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
