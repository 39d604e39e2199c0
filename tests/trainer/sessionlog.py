"""A topic `sessions` in memory, what must be left of it, and what readers find in an archive's directory."""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
import pyarrow.parquet as pq

from streams.wire import Context, Record, Session
from trainer.archive import DAY_MS, Archive

BASE_MS = 1_700_006_400_000  # 2023-11-15, midnight
EVER = 1 << 62


def session(user: str, name: str, end_ms: int, number: int = 1) -> Session:
    """A session of two pages."""
    times = [end_ms - 60_000, end_ms]
    context = Context([["home"]], None, None, None)
    items = None if number % 2 else ["i1", None]
    pages = ["home", f"p{number}"]
    start_ms, _ = times
    return Session(name, user, number, start_ms, end_ms, pages, times, items, number % 3 == 0, False, context)


def sessions_log(
    seed: int, records: int, partitions: int = 3, users: int = 8, days: float = 3.0, forgets: float = 0.1
) -> list[Record]:
    """Records of all partitions, mixed, about in the order of the sessions' ends; offsets have gaps as on Kafka."""
    choose = random.Random(seed)
    offsets: Counter[int] = Counter()
    log = []
    for place in range(records):
        user = choose.randrange(users)
        partition, key = user % partitions, f"u{user}"
        offsets[partition] += choose.choice((1, 1, 1, 2))
        end_ms = int(BASE_MS + place / records * days * DAY_MS) + choose.randrange(600_000)
        forgets_now = choose.random() < forgets
        value = None if forgets_now else msgspec.json.encode(session(key, f"s{place}", end_ms, place))
        log.append(Record(partition, offsets[partition], key.encode(), value, end_ms))
    return log


def truth(log: Iterable[Record], positions: Mapping[int, int] | None = None) -> list[Session]:
    """The sessions of the log, up to the positions, of users who were not forgotten after them: slow and obvious."""
    kept: dict[str, list[Session]] = defaultdict(list)
    for record in log:
        if positions is not None and record.offset >= positions.get(record.partition, 0):
            continue
        user = (record.key or b"").decode()
        if record.value is None:
            kept[user] = []
        else:
            kept[user].append(msgspec.json.decode(record.value, type=Session))
    return [one for sessions in kept.values() for one in sessions]


def kept(sessions: list[Session], retention_days: int) -> list[Session]:
    """The sessions of days that ended at most so many days before the newest session did."""
    newest_ms = max((one.end_ms for one in sessions), default=0)
    return [one for one in sessions if (one.end_ms // DAY_MS + 1) * DAY_MS >= newest_ms - retention_days * DAY_MS]


def names(sessions: Iterable[Session]) -> list[str]:
    """Session ids, sorted; a repeated one twice."""
    return sorted(one.session_id for one in sessions)


def by_manifest(directory: Path) -> list[str]:
    """What `Archive` reads: session ids, sorted."""
    found: list[str] = Archive(directory).read_window(0, EVER)["session_id"].to_pylist()
    return sorted(found)


def by_glob(directory: Path) -> list[str]:
    """What those read who list the directory: session ids, sorted."""
    return sorted(
        name for path in directory.rglob("*.parquet") for name in pq.read_table(path)["session_id"].to_pylist()
    )


class FakeFeed:
    """`trainer.feeds.Feed` on such a log; the records of `later` are there once all before them were read."""

    topic = "sessions"

    def __init__(self, log: list[Record], later: list[Record] | None = None) -> None:
        self.log, self.later = log, later or []
        self.committed: dict[int, int] = {}
        self._reached: dict[int, int] = {}
        self._unread: list[Record] = []

    def assign(self, positions: Mapping[int, int]) -> None:
        self._unread = [one for one in self.log if one.offset >= positions.get(one.partition, 0)]
        self._reached = {number: positions.get(number, 0) for number in self.ends()}

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        if not self._unread and self.later:
            self.log, self._unread, self.later = self.log + self.later, self.later, []
            return []
        polled, self._unread = self._unread[: min(max_records, 7)], self._unread[min(max_records, 7) :]
        for record in polled:
            self._reached[record.partition] = record.offset + 1
        return polled

    def reached(self) -> dict[int, int]:
        return dict(self._reached)

    def ends(self) -> dict[int, int]:
        return {number: max(r.offset for r in self.log if r.partition == number) + 1 for number in self._partitions()}

    def commit(self, positions: Mapping[int, int]) -> None:
        self.committed = dict(positions)

    def close(self) -> None:
        pass

    def _partitions(self) -> set[int]:
        return {record.partition for record in self.log}
