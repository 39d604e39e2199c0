"""A partition's RocksDB: what it restores, what it does not trust, and who may have it open."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faust
import msgspec
import pytest

from streams.engine import Engine
from streams.errors import StateUnusable, StateUnwritable
from streams.metrics import Metrics
from streams.score import Scoring
from streams.settings import Settings
from streams.store import MAX_AGE_MS, OFFSET_KEY, Store
from streams.transport import make_app


def make_engine(directory: Path) -> Engine:
    settings = Settings(state_dir=directory, partitions=2)
    engine = Engine(settings, Scoring(settings, Metrics()), Metrics(), lambda error: None)
    engine.app = make_app(engine, engine.group, list(engine.topics))
    return engine


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """An engine with its real Faust table; nobody talks to a broker before an app is started."""
    one = make_engine(tmp_path)
    yield one
    for database in one.app.state_table.data._dbs.values():
        database.close()


def table(engine: Engine) -> faust.Table:
    return engine.app.state_table


def reopened(engine: Engine, partition: int = 0) -> Store:
    for database in table(engine).data._dbs.values():
        database.flush()
        database.close()
    table(engine).data._dbs.clear()
    return Store(table(engine), partition)


# ---------------------------------------------------------------- records and offsets


def test_an_empty_store_has_no_end(engine: Engine) -> None:
    store = Store(table(engine), 0)
    assert (store.end(), store.get(b"u"), list(store.items()), store.items_after(None, 10)) == (None, None, [], [])


def test_writes_and_deletes_with_the_offset(engine: Engine) -> None:
    store = Store(table(engine), 0)
    store.write([(b"a", b"1"), (b"b", b"2"), (b"\x00clock", b"3")], 17)
    store.write([(b"a", None), (b"b", b"4"), (b"never", None)], 21)
    assert (store.end(), store.get(b"a"), store.get(b"b")) == (21, None, b"4")
    assert list(store.items()) == [(b"\x00clock", b"3"), (b"b", b"4")]
    again = reopened(engine)
    assert (again.end(), list(again.items())) == (21, [(b"\x00clock", b"3"), (b"b", b"4")])


def test_partitions_are_apart(engine: Engine) -> None:
    stores = [Store(table(engine), number) for number in (0, 1)]
    stores[0].write([(b"a", b"0")], 1)
    stores[1].write([(b"a", b"1")], 2)
    assert [(store.get(b"a"), store.end()) for store in stores] == [(b"0", 1), (b"1", 2)]


def test_a_walk_sees_each_record_once(engine: Engine) -> None:
    store = Store(table(engine), 0)
    records = [(f"u{number:03}".encode(), b"x") for number in range(25)]
    store.write(records, 1)
    for limit in (1, 7, 25, 100):
        seen: list[tuple[bytes, bytes]] = []
        while found := store.items_after(seen[-1][0] if seen else None, limit):
            assert len(found) <= limit
            seen += found
        assert seen == records


def test_a_walk_goes_on_behind_a_record_that_is_gone(engine: Engine) -> None:
    store = Store(table(engine), 0)
    store.write([(b"a", b"1"), (b"c", b"3")], 1)
    assert store.items_after(b"b", 5) == [(b"c", b"3")]


def test_a_crash_loses_a_tail_and_nothing_else(engine: Engine, tmp_path: Path) -> None:
    """Without a write-ahead log: records and offset are lost together, or not at all."""
    program = f"""
import os
from tests.streams.test_store import Path, Store, make_engine
engine = make_engine(Path({str(tmp_path / "crash")!r}))
store = Store(engine.app.state_table, 0)
store.write([(b"a", b"1")], 1)
store.sync()
store.write([(b"a", b"2"), (b"b", b"2")], 2)
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 9
    store = Store(table(make_engine(tmp_path / "crash")), 0)
    state = (store.end(), store.get(b"a"), store.get(b"b"))
    assert state in [(1, b"1", None), (2, b"2", b"2")]
    store.close()


# ---------------------------------------------------------------- trust


def test_an_outdated_store_is_not_trusted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deletions written meanwhile may be gone from the changelog: the store would keep the dead."""
    store, now = Store(table(engine), 0), time.time()
    store.write([(b"a", b"1")], 17)
    for age_ms, end in [(MAX_AGE_MS - 5_000, 17), (MAX_AGE_MS + 5_000, None)]:
        monkeypatch.setattr("streams.store.time.time", lambda age_ms=age_ms: now + age_ms / 1000)
        assert store.end() == end


@pytest.mark.parametrize(
    ("end", "owner", "beginning", "resume"),
    [
        (17, 20, 0, 18),
        (17, 17, 0, 18),
        (17, 20, 18, 18),
        (17, 16, 0, 0),  # ahead of the changelog: another topic's
        (17, 20, 19, 19),  # the changelog was cut behind it
        (None, 20, 3, 3),
    ],
)
def test_where_the_restore_goes_on(engine: Engine, end: int | None, owner: int, beginning: int, resume: int) -> None:
    store = Store(table(engine), 0)
    if end is not None:
        store.write([(b"a", b"1")], end)
    engine._stores[0], engine._owner_offsets[0] = store, owner
    assert engine._resume_at(0, beginning) == resume
    assert store.get(b"a") == (b"1" if resume == 18 else None)


def damage(directory: Path) -> int:
    """Overwrite the middle of every data file; how many there are."""
    files = list(directory.glob("*.sst"))
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[:20] + b"\xff" * (len(content) // 2) + content[20 + len(content) // 2 :])
    return len(files)


def test_damage_is_found_at_the_start_and_the_store_rebuilt(engine: Engine) -> None:
    store = Store(table(engine), 0)
    store.write([(f"u{number}".encode(), bytes(50)) for number in range(500)], 17)
    store.sync()
    store.close()
    assert damage(store.path) > 0
    store = Store(table(engine), 0)
    engine._stores[0], engine._owner_offsets[0] = store, 20
    assert engine._resume_at(0, 0) == 0
    assert (store.end(), list(store.items())) == (None, [])
    store.write([(b"a", b"1")], 3)  # as good as new
    assert reopened(engine).get(b"a") == b"1"


def test_a_foreign_directory_is_thrown_away(engine: Engine) -> None:
    path = Path(table(engine).data.partition_path(0))
    path.mkdir(parents=True)
    (path / "CURRENT").write_text("nonsense")
    store = Store(table(engine), 0)
    assert store.end() is None
    store.write([(b"a", b"1")], 1)
    assert store.get(b"a") == b"1"


def test_wiped(engine: Engine) -> None:
    store = Store(table(engine), 0)
    store.write([(b"a", b"1")], 5)
    store.wipe()
    assert (store.end(), list(store.items())) == (None, [])
    store.write([(b"b", b"1")], 6)
    assert list(reopened(engine).items()) == [(b"b", b"1")]


# ---------------------------------------------------------------- who else


def test_a_store_in_use_is_refused_and_left_alone(engine: Engine, tmp_path: Path) -> None:
    store = Store(table(engine), 0)
    store.write([(b"a", b"1")], 5)
    program = f"""
from tests.streams.test_store import Path, StateUnusable, Store, make_engine
try:
    Store(make_engine(Path({str(tmp_path)!r})).app.state_table, 0)
except StateUnusable as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert str(store.path) in done.stdout
    assert "BROWSECAST_STATE_DIR" in done.stdout
    assert store.get(b"a") == b"1"
    store.write([(b"a", b"2")], 6)
    assert reopened(engine).get(b"a") == b"2"


def test_a_disk_that_refuses_is_told(engine: Engine) -> None:
    class Full:
        def write(self, *_: Any) -> None:
            raise OSError("No space left on device")

    store = Store(table(engine), 0)
    store._db = Full()
    with pytest.raises(StateUnwritable, match="No space left"):
        store.write([(b"a", b"1")], 1)


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    def refuse(partition: int) -> Any:
        raise OSError("Permission denied")

    data = SimpleNamespace(partition_path=lambda number: tmp_path / "x", _db_for_partition=refuse, _dbs={})
    with pytest.raises(StateUnusable, match="Permission denied"):
        Store(SimpleNamespace(data=data), 0)


def test_the_offset_is_the_stores_own_record(engine: Engine) -> None:
    store = Store(table(engine), 0)
    store.write([(b"a", b"1")], 5)
    record = store.get(OFFSET_KEY)
    assert record is not None
    assert msgspec.msgpack.decode(record, type=tuple[int, int])[0] == 5
    assert OFFSET_KEY not in dict(store.items())
    assert OFFSET_KEY not in dict(store.items_after(None, 10))
