"""Sessions as Parquet, in the columns that the trainer, pandas and DuckDB read."""

from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow
import pyarrow.parquet

from streams import wire
from streams.errors import UsageError

FILE = "sessions.parquet"
GROUP_SESSIONS = 20_000
SCHEMA = wire.session_schema()
_row = attrgetter(*SCHEMA.names)


class SessionWriter:
    """Writes sessions into `directory`/sessions.parquet as they come, a row group at a time.

    The file takes its name only when the writer is left without an error, so a half-written one is never read; an
    older one is replaced.
    """

    def __init__(self, directory: Path) -> None:
        """Raises `UsageError` if the directory cannot be made, or holds other Parquet files."""
        self._path = directory / FILE
        self._partial = directory / f".{FILE}.partial"
        self._waiting: list[tuple[Any, ...]] = []  # only the columns: a session's context may be large
        self.written = 0  # sessions so far
        try:
            directory.mkdir(parents=True, exist_ok=True)
            others = [path.name for path in directory.glob("*.parquet") if path.name != FILE]
            if others:
                raise UsageError(f"{directory} holds other Parquet files ({others[0]}): choose another directory")
            self._file = pyarrow.parquet.ParquetWriter(self._partial, SCHEMA, compression="zstd")
        except OSError as error:
            raise UsageError(f"{directory}: sessions cannot be written there ({error})") from error

    def write(self, sessions: Iterable[wire.Session]) -> None:
        """Take some more sessions."""
        before = len(self._waiting)
        self._waiting.extend(_row(session) for session in sessions)
        self.written += len(self._waiting) - before
        if len(self._waiting) >= GROUP_SESSIONS:
            self._flush()

    def _flush(self) -> None:
        columns = zip(*self._waiting, strict=True) if self._waiting else ([] for _ in SCHEMA)
        arrays = [pyarrow.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
        self._file.write_table(pyarrow.Table.from_arrays(arrays, schema=SCHEMA))
        self._waiting = []

    def __enter__(self) -> "SessionWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._flush()
        self._file.close()
        if error is None:
            self._partial.replace(self._path)
        else:
            self._partial.unlink()
