"""The archive is cut off at every step of its work, and goes on: nothing lost, nothing twice, nobody remembered."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from streams.wire import Record
from tests.trainer.sessionlog import BASE_MS, by_glob, by_manifest, kept, names, session, sessions_log, truth
from trainer import archivefiles
from trainer.archive import DAY_MS, Archive
from trainer.archiver import REST_MS, Upkeep
from trainer.archivewriter import open_archive
from trainer.errors import ArchiveUnwritable

UPKEEP = Upkeep(retention_days=1, forget_within_ms=10)


class PowerCut(BaseException):
    """The process is gone: nobody may handle this."""


class Disk:
    """Everything the archive does to its disk, step by step; the process ends before step `cut`, for good.

    A write has two steps: it may be cut off before its first byte, and half-way. `watch` is called before each step.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.cut: int | None = None
        self.watch: Callable[[], None] = lambda: None
        self.steps: list[str] = []
        self._unsynced: set[Path] = set()
        for name in ("replace", "unlink", "rmdir", "mkdir"):
            patch.setattr(Path, name, self._changes(name, getattr(Path, name)))
        patch.setattr(Path, "write_bytes", self._writes("write_bytes", Path.write_bytes))
        table = pq.write_table
        patch.setattr(pq, "write_table", lambda t, path, **o: self._writes("table", lambda p: table(t, p, **o))(path))
        sync = archivefiles.sync

        def synced(path: Path) -> None:
            self._step("sync")
            sync(path)
            self._unsynced.discard(path)

        patch.setattr(archivefiles, "sync", synced)

    def power_on(self, cut: int | None = None) -> None:
        """A new process, which will be cut off before the step of that number, counted from 1."""
        self.cut, self.steps = cut, []

    def places(self) -> list[int]:
        """Where the life that was lived can be cut off: before each step that leaves something else on the disk."""
        return [number for number, name in enumerate(self.steps, 1) if name != "sync"]

    def _step(self, name: str) -> None:
        if self.cut is not None and len(self.steps) >= self.cut - 1:
            raise PowerCut  # and at every step after it: the dead do nothing
        self.watch()
        self.steps.append(name)

    def _changes(self, name: str, change: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(path: Path, *arguments: Any, **options: Any) -> Any:
            self._step(name)
            assert name != "replace" or path not in self._unsynced, f"{path} is named before it is on the disk"
            return change(path, *arguments, **options)

        return stepped

    def _writes(self, name: str, write: Callable[..., Any]) -> Callable[..., Any]:
        def stepped(path: Path, *arguments: Any) -> Any:
            self._step(name)
            self._unsynced.add(path)
            done = write(path, *arguments)
            try:
                self._step(f"half of {name}")
            except PowerCut:
                with path.open("r+b") as file:
                    file.truncate(path.stat().st_size // 2)
                raise
            return done

        return stepped

    def _writes_tables(self, write: Callable[..., None]) -> Callable[..., None]:
        def stepped(table: pa.Table, path: Path, **options: Any) -> None:
            self._writes("table", lambda path: write(table, path, **options))(path)

        return stepped

    def _sync(self, path: Path) -> None:
        self._step("sync")
        self._unsynced.discard(path)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """The disk under the archive."""
    return Disk(monkeypatch)


def a_log() -> list[Record]:
    """Three days of five users. One leaves, one leaves and comes back; a sixth is gone before the first commit."""
    log = sessions_log(31, 34, partitions=2, users=5, days=3.0, forgets=0.0)
    log.insert(2, Record(9, 0, b"u9", msgspec.json.encode(session("u9", "gone", BASE_MS)), 0))
    log.insert(7, Record(9, 1, b"u9", None, 0))
    behind, end_ms = max(one.offset for one in log), BASE_MS + 3 * DAY_MS
    back = msgspec.json.encode(session("u0", "back", end_ms))
    for user, value in ((b"u0", None), (b"u0", back), (b"u1", None)):
        behind += 1
        log.append(Record(int(user[1:]) % 2, behind, user, value, 0))
    return log


def live(directory: Path, log: list[Record]) -> None:
    """A process's life: take up the archive, archive what is new in three commits, and do all upkeep."""
    with open_archive(directory, "sessions", lambda: BASE_MS / 1000) as archive:
        positions = archive.manifest.positions
        new = [one for one in log if one.offset >= positions.get(one.partition, 0)]
        for start in range(0, len(new), 16):
            archive.append(new[start : start + 16])
            archive.flush()
        while UPKEEP.step(archive, BASE_MS + REST_MS):
            pass


def check(directory: Path, log: list[Record]) -> None:
    """What readers may find at any time: one moment by the manifest, nothing twice or half by listing."""
    sessions = truth(log, Archive(directory).manifest().positions)
    assert by_manifest(directory) in (names(sessions), names(kept(sessions, UPKEEP.retention_days)))
    listed = by_glob(directory)
    assert len(set(listed)) == len(listed)


def check_end(directory: Path, log: list[Record]) -> None:
    """What must be there when all is done."""
    left = names(kept(truth(log), UPKEEP.retention_days))
    assert by_manifest(directory) == by_glob(directory) == left
    assert Archive(directory).manifest().forgets == ()
    assert not list((directory / ".archive" / "staged").iterdir())


def test_readers_at_every_step(tmp_path: Path, disk: Disk) -> None:
    log = a_log()
    disk.watch = lambda: check(tmp_path, log)
    live(tmp_path, log)
    check_end(tmp_path, log)
    assert {"replace", "unlink", "rmdir", "sync", "half of table", "half of write_bytes"} <= set(disk.steps)


def test_cut_off_at_every_step(tmp_path: Path, disk: Disk) -> None:
    log = a_log()
    live(tmp_path / "whole", log)
    cuts = disk.places()
    assert len(cuts) > 50
    for cut in cuts:
        directory = tmp_path / str(cut)
        disk.power_on(cut)
        with pytest.raises(PowerCut):
            live(directory, log)
        check(directory, log)
        disk.power_on()
        live(directory, log)
        check_end(directory, log)


def test_cut_off_again_while_it_takes_up(tmp_path: Path, disk: Disk) -> None:
    log, cut_off, lives = a_log(), 0, 0
    live(tmp_path / "whole", log)
    for cut in disk.places()[::6]:
        directory = tmp_path / str(cut)
        for again in (cut, 2, 4, 7, 11):
            disk.power_on(again)
            lives += 1
            try:
                live(directory, log)
            except PowerCut:
                cut_off += 1  # else too little was left to do for so many steps
            check(directory, log)
        disk.power_on()
        live(directory, log)
        check_end(directory, log)
    assert cut_off > 0.8 * lives


@pytest.mark.parametrize("step", ["table", "sync", "replace", "write_bytes"])
def test_a_full_disk_is_said_aloud_and_loses_nothing(tmp_path: Path, disk: Disk, step: str) -> None:
    log = a_log()

    def full() -> None:
        if len(disk.steps) > 30 and disk.steps[-1] == step:
            raise OSError(errno.ENOSPC, "No space left on device")

    disk.watch = full
    with pytest.raises(ArchiveUnwritable, match=r"No space left on device.*Free or mend the disk") as error:
        live(tmp_path, log)
    assert error.value.exit_code == 7
    disk.watch = lambda: None
    check(tmp_path, log)
    live(tmp_path, log)
    check_end(tmp_path, log)
