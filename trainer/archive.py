"""The archive as readers see it: every closed session once, as Parquet files by day (UTC, of the session's end).

Sessions, the positions in the topic and the users to forget change together, by one manifest (`trainer.archivefiles`),
so whatever dies, nothing is lost and nothing is there twice. There are two ways to read:

`Archive` reads by the manifest: what it returns is of one moment, and forgotten users are left out from the moment that
the archive learned of them.

pandas, DuckDB, `datasets` and others read `day=*/*.parquet` and know no manifest. They never see a session twice, nor
half a file: a file comes whole, by a rename, after those that it replaces are gone. What they may see is too little:
while some files of a day are merged, the sessions of these files are missing for some milliseconds, and a reader that
has listed the directory before finds that a file is gone and must list it again. New sessions of several days come a
day at a time. Forgotten users are in the files until these are rewritten, within the time that `Upkeep` sets.
"""

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.archivefiles import SCHEMA, ArchiveFiles, File, Manifest
from trainer.errors import ArchiveUnusable

DAY_MS = 86_400_000
_EPOCH = date(1970, 1, 1)


class Archive:
    """A reader in any process, while others write. `directory` may not be there yet: then nothing is archived."""

    def __init__(self, directory: Path) -> None:
        self._files = ArchiveFiles(directory)

    def manifest(self) -> Manifest:
        """The present moment: positions, files, sessions ever archived. Raises `ArchiveUnusable`."""
        return self._files.manifest()

    def read_window(self, start_ms: int, end_ms: int) -> pa.Table:
        """The sessions that ended in [start_ms, end_ms), in no order, in the columns of session files.

        All are of one moment, that of the last manifest read: where a merge takes a file away meanwhile, what came in
        its place is read. Raises `ArchiveUnusable`.
        """
        inside = (pc.field("end_ms") >= start_ms) & (pc.field("end_ms") < end_ms)
        read: dict[str, pa.Table] = {}  # by place: no file ever changes
        before = None
        while True:
            manifest = self.manifest()
            wanted = [file for file in manifest.files if start_ms - DAY_MS < first_ms(file.day) < end_ms]
            try:
                for file in wanted:
                    if file.place not in read:
                        read[file.place] = read_file(self._files, file, inside)
            except FileNotFoundError as error:
                if before == manifest.commit:
                    raise missing(self._files, error) from error
                before = manifest.commit
                continue
            tables = [without(read[file.place], manifest.users_to_leave_out(file)) for file in wanted]
            return pa.concat_tables([SCHEMA.empty_table(), *tables]).replace_schema_metadata(None)


def first_ms(day: str) -> int:
    """When a day begins."""
    return (date.fromisoformat(day) - _EPOCH).days * DAY_MS


def read_file(files: ArchiveFiles, file: File, rows: Any = None, columns: Sequence[str] | None = None) -> pa.Table:
    """Rows of one file by an Arrow expression. Raises FileNotFoundError once a later commit has dropped the file."""
    with files.open(file) as source:
        return pq.read_table(source, filters=rows, columns=columns)


def without(table: pa.Table, users: Sequence[str]) -> pa.Table:
    """The sessions of everybody else."""
    if not users:
        return table
    return table.filter(pc.invert(pc.is_in(table["user_id"], pa.array(users, pa.string()))))


def missing(files: ArchiveFiles, error: FileNotFoundError) -> ArchiveUnusable:
    """A file that the manifest names is nowhere."""
    return ArchiveUnusable(
        f"{files.directory} lacks a file that its manifest names ({error}): somebody else removed it. Put it back, or "
        "move the whole directory away: the next start archives anew what the topic still has"
    )
