"""One partition's state in RocksDB: an exact prefix of its changelog, and how far it goes, in the same batch."""

import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import rocksdict

from streams.errors import StateUnusable, StateUnwritable

OFFSET_KEY = b"\x00offset"
SLICE = 2_000  # records a write: RocksDB holds the interpreter's lock while it writes
# The changelog forgets deletions a day after them (delete.retention.ms), so an older store would keep the dead.
MAX_AGE_MS = 12 * 3_600_000


class Store:
    """The RocksDB of one partition of a Faust table, opened by Faust and written by the engine alone."""

    def __init__(self, table: Any, partition: int) -> None:
        """Open the partition's database. Raises `StateUnusable` if another worker uses it."""
        self._faust, self.partition = table.data, partition
        self.path = Path(self._faust.partition_path(partition))
        self._no_wal = rocksdict.WriteOptions()
        self._no_wal.disable_wal = True  # a crash loses a tail, never the order: the changelog has it
        self._db = self._open()

    def _open(self) -> Any:
        try:
            return self._faust._db_for_partition(self.partition)
        except Exception as error:
            if "lock" in str(error).lower():
                raise StateUnusable(
                    f"{self.path} is in use by another worker: give each worker its own BROWSECAST_STATE_DIR"
                ) from error
            return self._begin_anew()

    def _begin_anew(self) -> Any:
        """A damaged or foreign database is thrown away; the changelog has all of it."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)
        try:
            return self._faust._db_for_partition(self.partition)
        except Exception as error:
            raise StateUnusable(f"{self.path} cannot be opened: {error}; check the disk and its rights") from error

    def wipe(self) -> None:
        """Drop everything, so that the whole changelog is read again."""
        self._db = self._begin_anew()

    def close(self) -> None:
        """Let go of the database and its lock."""
        database = self._faust._dbs.pop(self.partition, None)
        if database is not None:
            database.close()

    def get(self, key: bytes) -> bytes | None:
        """A record, or None."""
        value: bytes | None = self._db.get(key)
        return value

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All records but the store's own, in the order of their keys."""
        return ((key, value) for key, value in self._db.items() if key != OFFSET_KEY)

    def items_after(self, key: bytes | None, limit: int) -> list[tuple[bytes, bytes]]:
        """At most `limit` records behind `key`; an empty list at the end."""
        found = []
        for name, value in self._db.items(from_key=key) if key is not None else self._db.items():
            if name not in (key, OFFSET_KEY):
                found.append((name, value))
            if len(found) >= limit:
                break
        return found

    def end(self) -> int | None:
        """Offset of the last changelog record in here; None for an empty or an outdated store."""
        record = self._db.get(OFFSET_KEY)
        if record is None:
            return None
        offset, written_ms = msgspec.msgpack.decode(record, type=tuple[int, int])
        return None if time.time() * 1000 - written_ms > MAX_AGE_MS else offset

    def write(self, records: Iterable[tuple[bytes, bytes | None]], end: int) -> None:
        """Put the records (None deletes) and the changelog offset `end`. Raises `StateUnwritable`."""
        batch = rocksdict.WriteBatch(raw_mode=True)
        for key, value in records:
            if value is None:
                batch.delete(key)
            else:
                batch.put(key, value)
        batch.put(OFFSET_KEY, msgspec.msgpack.encode((end, int(time.time() * 1000))))
        try:
            self._db.write(batch, self._no_wal)
        except Exception as error:
            raise StateUnwritable(f"{self.path}: {error}; free or mend the disk, then start again") from error

    def sync(self) -> None:
        """Write what is in memory to disk, so that the next start reads less of the changelog."""
        self._db.flush()
