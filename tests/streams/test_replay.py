import gzip
import threading
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import pandas
import pyarrow.parquet
import pytest

from streams import outlet, replay
from streams.errors import UsageError, WrongTopics
from streams.lines import BadLine
from streams.mock import MockCluster
from streams.partitioner import partition_of
from streams.profiles import SiteProfile, with_gap
from streams.readers import nasa_excerpt, read_log
from streams.settings import MINUTE_MS, Settings
from streams.shop import shop_events
from streams.tail import until_end
from streams.wire import CLICKS, Event
from tests.streams.logs_for_tests import real_log

START_MS = 1_760_000_000_000
COLUMNS = {
    "user_id": "string",
    "session_id": "string",
    "number": "int64",
    "start_ms": "int64",
    "end_ms": "int64",
    "pages": "list<element: string>",
    "page_ts_ms": "list<element: int64>",
    "cart": "bool",
    "purchase": "bool",
    "items": "list<element: string>",
}


def shop(visitors: int = 40) -> Iterator[Event]:
    return shop_events(visitors, 10, 1, START_MS)


def simple(records: Iterator[Event | BadLine], gap_ms: int) -> set[tuple[Any, ...]]:
    """The obvious way: all of a user's events by (time, place in the log), split at the gaps."""
    users: dict[str, list[Event]] = defaultdict(list)
    for record in records:
        if isinstance(record, Event):
            users[record.user_id].append(record)
    found = set()
    for user, events in users.items():
        events.sort(key=lambda event: event.ts)
        starts = [0, *(n for n in range(1, len(events)) if events[n].ts - events[n - 1].ts > gap_ms), len(events)]
        for number, (first, last) in enumerate(pairwise(starts), 1):
            part = events[first:last]
            types = {event.type for event in part}
            items = tuple(event.item_id for event in part)
            found.add(
                (
                    user,
                    number,
                    tuple(event.ts for event in part),
                    tuple(event.page for event in part),
                    items if any(items) else None,
                    "cart" in types,
                    "purchase" in types,
                )
            )
    return found


def cut(records: Iterator[Event | BadLine], settings: Settings, folder: Path) -> list[dict[str, Any]]:
    count = replay.cut(records, settings, folder)
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(folder / "sessions.parquet").to_pylist()
    assert count.sessions == len(rows)
    assert count.accepted == sum(len(row["pages"]) for row in rows)
    return rows


def as_simple(rows: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
    assert all((row["start_ms"], row["end_ms"]) == (row["page_ts_ms"][0], row["page_ts_ms"][-1]) for row in rows)
    return {
        (
            row["user_id"],
            row["number"],
            tuple(row["page_ts_ms"]),
            tuple(row["pages"]),
            None if row["items"] is None else tuple(row["items"]),
            row["cart"],
            row["purchase"],
        )
        for row in rows
    }


# ---------------------------------------------------------------- off line


def test_sessions_are_those_of_the_obvious_way(tmp_path: Path) -> None:
    rows = cut(shop(), Settings(), tmp_path)
    assert as_simple(rows) == simple(shop(), 30 * MINUTE_MS)
    assert len({row["session_id"] for row in rows}) == len(rows)


def test_neither_partitions_nor_memory_change_the_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = cut(shop(), Settings(), tmp_path / "a")
    monkeypatch.setattr(replay, "STEP_EVENTS", 7)
    small = cut(shop(), Settings(partitions=3, cache_users=3), tmp_path / "b")
    assert sorted(rows, key=str) == sorted(small, key=str)


@pytest.mark.parametrize("name", ["kechinov", "nasa"])
def test_sessions_of_real_logs(name: str, tmp_path: Path) -> None:
    log, profile = real_log(name), SiteProfile.load(name)
    rows = cut(read_log(log, profile), Settings(profile=name), tmp_path)
    assert as_simple(rows) == simple(read_log(log, profile), 30 * MINUTE_MS)


def test_sessions_of_a_sparse_log_that_had_to_be_sorted(tmp_path: Path) -> None:
    log, profile = real_log("eshop"), SiteProfile.load("eshop")
    settings = with_gap(Settings(profile="eshop"), profile)
    rows = cut(read_log(log, profile), settings, tmp_path)
    assert as_simple(rows) == simple(read_log(log, profile), 10 * MINUTE_MS)
    assert sum(row["purchase"] for row in rows) > 300


def test_pandas_and_duckdb_open_the_file(tmp_path: Path) -> None:
    rows = cut(shop(5), Settings(), tmp_path)
    file = tmp_path / "sessions.parquet"
    assert {field.name: str(field.type) for field in pyarrow.parquet.read_schema(file)} == COLUMNS
    assert len(pandas.read_parquet(file)) == len(rows)
    clicks = duckdb.execute(f"select sum(len(pages)) from '{file}'").fetchone()
    assert clicks is not None
    assert clicks[0] == sum(len(row["pages"]) for row in rows)


def test_what_is_wrong_is_counted(tmp_path: Path) -> None:
    good = Event("u", START_MS, "p", "1")
    records: list[Event | BadLine] = [
        good,
        good,
        BadLine(3, "is odd", "x"),
        Event("u", 1, "p", "2"),
        Event("u", 5_000_000_000_000, "p", "3"),
        Event("\0u", START_MS, "p", "4"),
        Event("u", START_MS + 10 * 60 * MINUTE_MS, "p", "5"),
        Event("v", START_MS + 10 * 60 * MINUTE_MS, "p", "6"),
        Event("w", START_MS + 10 * 60 * MINUTE_MS, "p", "7"),
        Event("u", START_MS, "p", "8"),
    ]
    reported: list[BadLine] = []
    count = replay.cut(iter(records), Settings(partitions=1), tmp_path, on_bad=reported.append)
    fates = (count.accepted, count.duplicate, count.late, count.rejected, count.bad)
    assert fates == (4, 1, 1, 3, 1)
    assert [bad.number for bad in reported] == [3]


def test_other_sessions_are_not_mixed_in(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"")
    with pytest.raises(UsageError, match=r"train\.parquet"):
        replay.cut(shop(), Settings(), tmp_path)


def test_a_failed_cut_leaves_no_file(tmp_path: Path) -> None:
    def broken() -> Iterator[Event]:
        yield from shop(3)
        raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError):
        replay.cut(broken(), Settings(), tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- through Kafka


@pytest.fixture
def settings() -> Iterator[Settings]:
    with MockCluster({CLICKS: 8}) as cluster:
        yield Settings(bootstrap_servers=cluster.bootstrap_servers)


def test_published_log_gives_the_same_sessions(settings: Settings, tmp_path: Path) -> None:
    profile = SiteProfile.load("nasa")
    with nasa_excerpt() as path:
        log = list(read_log(path, profile))
        count = replay.publish(iter(log), settings)
    messages = list(until_end(settings, CLICKS))
    assert count.published == len(messages) == len(log)
    for message in messages:
        event = msgspec.json.decode(message.value(), type=Event)
        assert message.key() == event.user_id.encode()
        assert message.timestamp()[1] == event.ts
        assert message.partition() == partition_of(message.key(), 8)
    arrived = [msgspec.json.decode(message.value(), type=Event) for message in messages]
    # Within a partition the order is the log's, so one after the other they are the log as each partition has it.
    by_partition = sorted((r for r in log if isinstance(r, Event)), key=lambda e: partition_of(e.user_id.encode(), 8))
    assert sorted(arrived, key=lambda e: partition_of(e.user_id.encode(), 8)) == by_partition


def test_timestamps_are_never_later_than_now() -> None:
    assert replay.record_ms(START_MS) == START_MS
    assert replay.record_ms(9_999_999_999_999) < 9_999_999_999_999
    assert replay.record_ms(-5) == 1  # 0 would mean now


def test_speed_waits_for_event_time() -> None:
    clock = [100.0]
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        clock[0] += seconds

    pace = replay._Pace(60, nap, lambda: clock[0])
    passed = []
    for second in (0, 60, 30, 120):
        pace.wait(START_MS + second * 1_000)
        passed.append(clock[0] - 100)
    assert passed == pytest.approx([0, 1, 1, 2], abs=0.01)  # two minutes of the log in two seconds
    assert 0 < min(naps) <= max(naps) <= outlet.NAP_S


def test_progress_is_told_while_waiting(settings: Settings) -> None:
    events = [Event("u", START_MS + second * 1_000, "p", str(second)) for second in range(3)]
    told: list[int] = []
    replay.publish(iter(events), settings, speed=20, progress=lambda count: told.append(count.published))
    assert {1, 2, 3} <= set(told)


def test_speed_must_be_above_zero(settings: Settings) -> None:
    with pytest.raises(UsageError, match="speed 0"):
        replay.publish(iter([]), settings, speed=0)


def test_missing_topic_is_named(settings: Settings) -> None:
    with pytest.raises(WrongTopics, match=r"shop\.clicks does not exist.*topics create"):
        replay.publish(iter([]), settings.but(topic_prefix="shop."))


def test_lines_are_published_as_they_are(settings: Settings, tmp_path: Path) -> None:
    segment = b'{"type": "page", "userId": "s",  "timestamp": "2024-02-23T22:28:57Z", "messageId": "m"}'
    lines = [b'{"user_id":"a",  "ts": "bad", "page": 3}', b"[1]", b"", b'{"ts": 1}', segment, b'{"user_id": 5}', b"{"]
    path = tmp_path / "events.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(lines)))
    reported: list[BadLine] = []
    count = replay.publish_lines(path, settings, on_bad=reported.append)
    assert (count.published, count.bad) == (2, 4)
    assert [bad.number for bad in reported] == [2, 4, 6, 7]
    messages = {message.key(): message.value() for message in until_end(settings, CLICKS)}
    assert messages == {b"a": lines[0], b"s": segment}


def test_no_thread_is_left_behind(settings: Settings) -> None:
    before = threading.active_count()
    replay.publish(shop(3), settings)
    assert threading.active_count() == before
