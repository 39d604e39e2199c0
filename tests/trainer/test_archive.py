"""The archive holds every session once, whoever reads it, and lets go of what it should."""

import threading
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import duckdb
import msgspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from streams import sessionfiles
from streams.wire import Record
from tests.trainer.sessionlog import (
    BASE_MS,
    EVER,
    FakeFeed,
    by_glob,
    by_manifest,
    kept,
    names,
    session,
    sessions_log,
    truth,
)
from trainer import archiver
from trainer.archive import DAY_MS, Archive, first_ms
from trainer.archivefiles import File, Manifest
from trainer.archiver import REST_MS, Archiver, Upkeep, to_merge
from trainer.archivewriter import ArchiveWriter, open_archive
from trainer.corpus import read_corpus
from trainer.errors import ArchiveUnusable, ArchiveUnwritable
from trainer.trainermetrics import TrainerMetrics

KEEP = Upkeep(retention_days=3_650, forget_within_ms=DAY_MS)
LONG = 10**9


class Clock:
    """Wall time that a test moves."""

    def __init__(self) -> None:
        self.s = BASE_MS / 1000

    def __call__(self) -> float:
        return self.s

    @property
    def ms(self) -> int:
        return int(self.s * 1000)


def write(directory: Path, log: list[Record], batch: int = 20, clock: Clock | None = None) -> None:
    """Archive the log, a commit every `batch` records."""
    with open_archive(directory, "sessions", clock or Clock()) as archive:
        for start in range(0, len(log), batch):
            archive.append(log[start : start + batch])
            archive.flush()


def keep_all(archive: ArchiveWriter, upkeep: Upkeep, now_ms: int) -> int:
    """Do all that is due; how many steps that was."""
    steps = 0
    while upkeep.step(archive, now_ms):
        steps += 1
        assert steps < 1_000
    return steps


def test_files_by_day_in_the_columns_of_session_files(tmp_path: Path) -> None:
    log = sessions_log(1, 200, forgets=0.0)
    write(tmp_path, log)
    table = Archive(tmp_path).read_window(0, EVER)
    assert table.schema.equals(sessionfiles.SCHEMA, check_metadata=True)
    expected = sorted(truth(log), key=lambda one: one.session_id)
    rows = sorted(table.to_pylist(), key=lambda row: str(row["session_id"]))
    assert rows == [{name: getattr(one, name) for name in table.column_names} for one in expected]
    for path in tmp_path.rglob("*.parquet"):
        start_ms = first_ms(path.parent.name.removeprefix("day="))
        ends = pq.ParquetFile(path).read()["end_ms"].to_pylist()
        assert all(start_ms <= end < start_ms + DAY_MS for end in ends)
    assert Archive(tmp_path).manifest().sessions == len(expected)


def test_pandas_duckdb_and_datasets_open_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    log = sessions_log(2, 120, forgets=0.0)
    write(tmp_path / "archive", log)
    with open_archive(tmp_path / "archive", "sessions") as archive:  # a writer is there, with a file half written
        archive._files.stage(Archive(tmp_path / "archive").read_window(0, EVER), "2023-11-15", 99, 0)
        place, expected = str(tmp_path / "archive"), names(truth(log))
        frame = pd.read_parquet(place)
        assert sorted(frame["session_id"]) == expected
        assert set(frame["day"].astype(str)) == {"2023-11-15", "2023-11-16", "2023-11-17", "2023-11-18"} - (
            {"2023-11-18"} if frame["end_ms"].max() < BASE_MS + 3 * DAY_MS else set()
        )
        with duckdb.connect() as connection:
            found = connection.sql(f"select session_id, pages[1], day from read_parquet('{place}/**/*.parquet')")
            assert found is not None
            rows = found.fetchall()
        assert sorted(row[0] for row in rows) == expected
        loaded = datasets.load_dataset(place, split="train", cache_dir=str(tmp_path / "cache"))
        assert sorted(loaded["session_id"]) == expected
        assert loaded[0]["pages"][0] == "home"
    assert sorted(read_corpus(tmp_path / "archive").session_ids) == expected


@pytest.mark.parametrize(("start_ms", "end_ms"), [(0, EVER), (BASE_MS, BASE_MS), (BASE_MS + 1, BASE_MS + DAY_MS)])
def test_a_window_is_cut_by_the_ends_of_sessions(tmp_path: Path, start_ms: int, end_ms: int) -> None:
    log = sessions_log(3, 200)
    edges = [session("edge", f"e{ms}", ms) for ms in (BASE_MS, BASE_MS + 1, BASE_MS + DAY_MS - 1, BASE_MS + DAY_MS)]
    log += [Record(9, place, b"edge", msgspec.json.encode(one), 0) for place, one in enumerate(edges)]
    write(tmp_path, log)
    table = Archive(tmp_path).read_window(start_ms, end_ms)
    assert sorted(table["session_id"].to_pylist()) == names(
        one for one in truth(log) if start_ms <= one.end_ms < end_ms
    )


def test_there_is_nothing_before_the_first_commit(tmp_path: Path) -> None:
    assert Archive(tmp_path / "none").manifest() == Manifest()
    assert Archive(tmp_path / "none").read_window(0, EVER).num_rows == 0


def test_what_is_archived_is_passed_over(tmp_path: Path) -> None:
    log = sessions_log(4, 100)
    write(tmp_path, log[:60])
    write(tmp_path, log[30:])
    assert by_manifest(tmp_path) == names(truth(log))
    assert Archive(tmp_path).manifest().positions == {
        number: max(one.offset for one in log if one.partition == number) + 1 for number in range(3)
    }


def test_records_that_are_no_sessions_are_left_out(tmp_path: Path) -> None:
    bad = [Record(0, 0, b"u", b"{", 0), Record(0, 1, b"u", b"{}", 0), Record(0, 2, b"\xff", None, 0)]
    good = Record(0, 3, b"u", msgspec.json.encode(session("u", "s", BASE_MS)), 0)
    with open_archive(tmp_path, "sessions") as archive:
        archive.append([*bad, good])
        archive.flush()
        assert archive.unreadable == 3
    assert by_manifest(tmp_path) == ["s"]
    assert Archive(tmp_path).manifest().positions == {0: 4}


# ---------------------------------------------------------------- upkeep


def test_many_small_files_become_few(tmp_path: Path) -> None:
    """A commit for each record or two: the days never have many files, and at rest each has one."""
    log, clock, most = sessions_log(5, 400, forgets=0.0, days=1.5), Clock(), 0
    with open_archive(tmp_path, "sessions", clock) as archive:
        for start in range(0, len(log), 2):
            archive.append(log[start : start + 2])
            archive.flush()
            keep_all(archive, KEEP, clock.ms)
            most = max(most, *(len(list(day.iterdir())) for day in tmp_path.glob("day=*")))
        assert 16 <= most + 1 <= 2 * 15
        clock.s += REST_MS / 1000
        assert keep_all(archive, KEEP, clock.ms) > 0
        assert [len(list(day.iterdir())) for day in sorted(tmp_path.glob("day=*"))] == [1, 1]
        assert keep_all(archive, KEEP, clock.ms + 10 * REST_MS) == 0
    assert by_glob(tmp_path) == by_manifest(tmp_path) == names(truth(log))


def test_large_files_are_merged_no_more() -> None:
    def day_of(*sizes: int) -> Manifest:
        return Manifest(files=tuple(File("2023-11-15", n, 1, size, 0, n) for n, size in enumerate(sizes)))

    large, half = archiver.MERGED_BYTES, archiver.MERGED_BYTES // 2 + 1
    assert to_merge(day_of(large, large, 1), REST_MS) == []
    assert len(to_merge(day_of(large, 2, 1), REST_MS)) == 2
    assert len(to_merge(day_of(half, half, half), REST_MS)) == 2
    assert to_merge(day_of(*[1_000] * 15), REST_MS - 1) == []
    assert len(to_merge(day_of(*[1_000] * 16, *[70_000] * 15), REST_MS - 1)) == 16


def test_sessions_are_kept_so_many_days(tmp_path: Path) -> None:
    """Counted from the newest session: the day of the newest less `retention_days` is the last that goes."""
    log = sessions_log(6, 300, forgets=0.0, days=5.0)
    write(tmp_path, log)
    with open_archive(tmp_path, "sessions") as archive:
        keep_all(archive, Upkeep(2, DAY_MS), BASE_MS)
        days = sorted(path.name for path in tmp_path.glob("day=*"))
    assert by_glob(tmp_path) == by_manifest(tmp_path) == names(kept(truth(log), 2))
    assert 3 <= len(days) <= 4 < len({one.end_ms // DAY_MS for one in truth(log)})


def test_a_forgotten_user_is_gone_within_the_set_time(tmp_path: Path) -> None:
    clock, upkeep = Clock(), Upkeep(3_650, forget_within_ms=1_000_000)
    log = sessions_log(7, 200, forgets=0.0)
    last = max(one.offset for one in log if one.partition == 1)
    forget = Record(1, last + 1, b"u1", None, 0)
    again = Record(1, last + 2, b"u1", msgspec.json.encode(session("u1", "again", BASE_MS)), 0)
    expected = names(truth([*log, forget, again]))
    write(tmp_path, log, clock=clock)
    with open_archive(tmp_path, "sessions", clock) as archive:
        archive.append([forget])
        archive.flush()
        archive.append([again])
        archive.flush()
        assert by_manifest(tmp_path) == expected  # at once, by the manifest
        assert not keep_all(archive, upkeep, clock.ms + 499_999)
        assert len(by_glob(tmp_path)) > len(expected)
        assert keep_all(archive, upkeep, clock.ms + 500_000)
        assert by_glob(tmp_path) == by_manifest(tmp_path) == expected
        assert archive.manifest.forgets == ()
    assert b"u1" not in (tmp_path / ".archive" / "manifest.json").read_bytes()


def test_a_merge_leaves_the_forgotten_out(tmp_path: Path) -> None:
    """Also where the files come from before and after the user was forgotten."""
    log = sessions_log(8, 300, forgets=0.05)
    write(tmp_path, log)
    clock = Clock()
    with open_archive(tmp_path, "sessions", clock) as archive:
        keep_all(archive, Upkeep(3_650, LONG * 1_000), clock.ms + REST_MS)
        assert len(archive.manifest.files) <= 4
    assert by_glob(tmp_path) == by_manifest(tmp_path) == names(truth(log))


# ---------------------------------------------------------------- readers beside the writer


def test_readers_see_one_moment_while_files_are_merged(tmp_path: Path) -> None:
    """Each window read meanwhile is the truth at some commit; each listing has nothing twice."""
    log, clock, failures, read = sessions_log(9, 600, forgets=0.02), Clock(), [], [0, 0]
    moments = {tuple(names(truth([])))}
    done = Event()

    def by_window() -> None:
        while not done.is_set():
            found = tuple(by_manifest(tmp_path))
            read[0] += 1
            if found not in moments:
                failures.append(f"{len(found)} sessions of no moment")

    def by_listing() -> None:
        while not done.is_set():
            try:
                found = by_glob(tmp_path)
            except FileNotFoundError:
                continue
            read[1] += 1
            if len(set(found)) < len(found):
                failures.append("a session twice")

    readers = [threading.Thread(target=target) for target in (by_window, by_listing)]
    for reader in readers:
        reader.start()
    try:
        with open_archive(tmp_path, "sessions", clock) as archive:
            for start in range(0, len(log), 10):
                archive.append(log[start : start + 10])
                moments.add(tuple(names(truth(log[: start + 10]))))
                archive.flush()
                keep_all(archive, Upkeep(3_650, 1), clock.ms + REST_MS)
    finally:
        done.set()
        for reader in readers:
            reader.join()
    assert not failures, failures[:5]
    assert min(read) > 3
    assert by_manifest(tmp_path) == by_glob(tmp_path) == names(truth(log))


# ---------------------------------------------------------------- refusals


def refused(directory: Path, source: str = "sessions") -> str:
    """Why the directory is refused."""
    with pytest.raises(ArchiveUnusable) as error, open_archive(directory, source):
        pass
    return str(error.value)


def test_only_one_archiver(tmp_path: Path) -> None:
    with open_archive(tmp_path, "sessions"):
        assert "in use by another archiver" in refused(tmp_path)
    with open_archive(tmp_path, "sessions"):
        pass


def test_directories_that_are_refused(tmp_path: Path) -> None:
    log = sessions_log(10, 20)
    write(tmp_path / "a", log)
    assert "holds the sessions of sessions, not of shop2.sessions" in refused(tmp_path / "a", "shop2.sessions")
    manifest = tmp_path / "a" / ".archive" / "manifest.json"
    text = manifest.read_bytes()
    manifest.write_bytes(text.replace(b'"version":1', b'"version":2'))
    assert "schema version 2, and this browsecast writes 1" in refused(tmp_path / "a")
    with pytest.raises(ArchiveUnusable, match="schema version 2"):
        Archive(tmp_path / "a").read_window(0, EVER)
    manifest.write_bytes(text[: len(text) // 2])
    assert "is damaged" in refused(tmp_path / "a")
    (tmp_path / "b").mkdir()
    pq.write_table(pa.table({"a": [1]}), tmp_path / "b" / "mine.parquet")
    assert "is no archive, but holds Parquet files (mine.parquet)" in refused(tmp_path / "b")
    (tmp_path / "c").write_text("a file")
    with pytest.raises(ArchiveUnwritable, match="cannot be written"), open_archive(tmp_path / "c", "sessions"):
        pass


def test_a_file_that_somebody_removed_is_named(tmp_path: Path) -> None:
    write(tmp_path, sessions_log(11, 60, forgets=0.0), batch=5)
    victim = next(tmp_path.rglob("*.parquet"))
    victim.unlink()
    with pytest.raises(ArchiveUnusable, match=victim.name):
        Archive(tmp_path).read_window(0, EVER)
    with open_archive(tmp_path, "sessions") as archive, pytest.raises(ArchiveUnusable, match=victim.name):
        keep_all(archive, KEEP, LONG * 10_000)


# ---------------------------------------------------------------- the role


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[ArchiveWriter]:
    """An empty archive, open."""
    with open_archive(tmp_path, "sessions") as opened:
        yield opened


def test_the_role_commits_what_waits_when_it_is_stopped(tmp_path: Path, archive: ArchiveWriter) -> None:
    log = sessions_log(12, 90)
    stop, feed = Event(), FakeFeed(log)
    feed.commit = lambda positions: pytest.fail("committed early") if not stop.is_set() else None  # type: ignore[method-assign]
    poll = feed.poll

    def last(max_records: int, timeout_s: float) -> list[Record]:
        polled = poll(max_records, timeout_s)
        if not polled:
            stop.set()
        return polled

    feed.poll = last  # type: ignore[method-assign]
    Archiver(archive, feed, KEEP, LONG, LONG, TrainerMetrics()).run(stop)
    assert by_manifest(tmp_path) == names(truth(log))


def test_the_role_commits_by_number(tmp_path: Path, archive: ArchiveWriter) -> None:
    feed = FakeFeed(sessions_log(13, 70))
    Archiver(archive, feed, KEEP, LONG, 7, TrainerMetrics()).catch_up()
    assert archive.manifest.commit == 10
    assert feed.committed == archive.manifest.positions


def test_the_role_commits_by_time(tmp_path: Path, archive: ArchiveWriter) -> None:
    feed = FakeFeed(sessions_log(14, 70))
    Archiver(archive, feed, KEEP, 0, LONG, TrainerMetrics()).catch_up()
    assert archive.manifest.commit == 10


def test_catching_up_ends_where_the_topic_ended_when_it_began(tmp_path: Path, archive: ArchiveWriter) -> None:
    log = sessions_log(15, 100)
    role = Archiver(archive, FakeFeed(log[:60], later=log[60:]), KEEP, LONG, LONG, TrainerMetrics())
    role.catch_up()
    assert by_manifest(tmp_path) == names(truth(log[:60]))
    assert set(role.lag().values()) == {0}
    role.catch_up()
    assert by_manifest(tmp_path) == names(truth(log[:60]))


def test_the_role_shows_what_it_has_done_and_how_soon(archive: ArchiveWriter) -> None:
    log = sessions_log(16, 80, partitions=2)
    log = [record._replace(timestamp_ms=BASE_MS + 1_000 * i) for i, record in enumerate(log)]
    bad = Record(0, max(one.offset for one in log) + 1, b"u1", b"no session", 0)
    now_ms, metrics = BASE_MS + 1_000 * len(log), TrainerMetrics()
    role = Archiver(archive, FakeFeed([*log, bad]), KEEP, LONG, LONG, metrics, lambda: now_ms / 1000)

    def shown(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"browsecast_{name}", labels)

    role.catch_up()
    closed = [record.timestamp_ms for record in log if record.value is not None]
    manifest = archive.manifest
    assert shown("archived_sessions") == manifest.sessions > 50
    assert (shown("archive_files"), shown("archive_commit")) == (len(manifest.files), manifest.commit)
    assert shown("archive_bytes") == sum(file.bytes for file in manifest.files)
    assert shown("archive_unreadable_records_total") == 1
    assert shown("archive_forgets") == len(manifest.forgets)
    assert shown("archive_delay_seconds_count") == len(closed) + 1  # the unreadable one was closed, too
    waited = sum(now_ms - at_ms for at_ms in closed) / 1000 + now_ms / 1000
    assert shown("archive_delay_seconds_sum") == pytest.approx(waited)
    role.catch_up()
    assert shown("archive_unreadable_records_total") == 1
    assert shown("archive_flush_seconds_count") == 1


class Interrupted(FakeFeed):
    """One poll, then the role is to stop; a broker that is `away` says where the topic ends only at the start."""

    def __init__(self, log: list[Record], stop: Event, away: bool) -> None:
        super().__init__(log)
        self._stop, self._away, self._asked = stop, away, 0

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        self._stop.set()
        return super().poll(max_records, timeout_s)

    def ends(self) -> dict[int, int]:
        self._asked += 1
        if self._away and self._asked > 1:
            raise ConnectionError("no broker")
        return super().ends()


@pytest.mark.parametrize("away", [False, True])
def test_the_lag_is_shown_and_a_broker_that_is_away_ends_nothing(
    tmp_path: Path, archive: ArchiveWriter, away: bool
) -> None:
    log, stop, metrics = sessions_log(17, 60, partitions=2, forgets=0.0), Event(), TrainerMetrics()
    feed = Interrupted(log, stop, away)
    Archiver(archive, feed, KEEP, LONG, LONG, metrics).run(stop)
    lag = {number: metrics.registry.get_sample_value("browsecast_archive_lag_records", {"partition": number})
           for number in "01"}  # fmt: skip
    if away:
        assert lag == {"0": None, "1": None}
    else:
        ends, reached = feed.ends(), feed.reached()
        assert lag == {str(number): ends[number] - reached[number] for number in ends}
        assert min(ends[number] - reached[number] for number in ends) > 0
    assert by_manifest(tmp_path) == names(truth(log[:7]))
