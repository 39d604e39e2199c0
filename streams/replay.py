"""A log played again: through Kafka at any speed, or cut into sessions off line. Both ways give the same sessions.

They do because both read the log in the same order, give an event without an id the same one (`streams.readers`),
spread the users over as many partitions by the same hash, check each event with the worker's own decoder and cut with
the worker's own `Sessionizer`. What differs is only who carries the events.
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
import rocksdict

from streams.envelopes import unwrap
from streams.errors import UsageError
from streams.events import BadEvent, EventDecoder, check_key
from streams.lines import BadLine, LogCount, bad_line, log_files, read_lines
from streams.outlet import NAP_S, Outlet
from streams.partitioner import partition_of
from streams.profiles import SiteProfile
from streams.sessionfiles import SessionWriter
from streams.sessionizer import Sessionizer
from streams.sessions import Fate, Policy
from streams.settings import Settings
from streams.wire import CLICKS, Event

STEP_EVENTS = 4_096  # progress is told, and changed users are written, every so many events


class ReplayCount(msgspec.Struct):
    """How far a replay has come. `published` counts for Kafka; the fates and `sessions` for a cut off line."""

    published: int = 0
    sessions: int = 0
    accepted: int = 0
    duplicate: int = 0
    late: int = 0
    rejected: int = 0
    bad: int = 0  # lines that could not be read
    first_ms: int | None = None
    last_ms: int | None = None  # highest event time so far

    def saw(self, ts: int) -> None:
        """Widen the span of event times."""
        self.first_ms = ts if self.first_ms is None else min(self.first_ms, ts)
        self.last_ms = ts if self.last_ms is None else max(self.last_ms, ts)


Progress = Callable[[ReplayCount], None]
OnBad = Callable[[BadLine], None]
encode_event = msgspec.json.Encoder().encode


def publish(
    records: Iterable[Event | BadLine],
    settings: Settings,
    speed: float | None = None,
    progress: Progress | None = None,
    on_bad: OnBad | None = None,
) -> ReplayCount:
    """Publish every event to `clicks` and wait until the brokers have all of them.

    speed: event time over wall time (60: a log's hour in a minute); None: as fast as it goes. progress: told every few
    thousand events, and while waiting. on_bad: given each line that could not be read.
    Raises `BrokerUnavailable` if no broker answers or an event is not confirmed, `WrongTopics` without the topic, and
    `UsageError` for a speed that is not above zero.
    """
    if speed is not None and not speed > 0:
        raise UsageError(f"speed {speed} is not above zero: 60 plays an hour in a minute, max as fast as it goes")
    count = ReplayCount()
    outlet = Outlet(settings, CLICKS)
    tell = progress or _nothing

    def nap(seconds: float) -> None:
        outlet.poll(seconds)
        tell(count)

    pace = _Pace(speed, nap)
    for event in _events(records, count, on_bad):
        pace.wait(event.ts)
        outlet.send(event.user_id.encode(), encode_event(event), record_ms(event.ts))
        count.saw(event.ts)
        count.published += 1
        if count.published % STEP_EVENTS == 0:
            tell(count)
    outlet.flush()
    tell(count)
    return count


def publish_lines(
    path: str | Path, settings: Settings, progress: Progress | None = None, on_bad: OnBad | None = None
) -> ReplayCount:
    """Publish JSON lines, bytes unchanged, to `clicks`: events of the wire or known envelopes, keyed by their user.

    path: a file, a directory or `-` for standard input. A line that is no JSON object or names no user is given to
    `on_bad` and counted; all else is for the worker to judge. Raises as `publish` does.
    """
    files = log_files(path)
    count, outlet = ReplayCount(), Outlet(settings, CLICKS)
    tell = progress or _nothing
    for file in files:
        for number, line in read_lines(file, LogCount()):
            keyed = line if isinstance(line, BadLine) else _keyed(number, line)
            if isinstance(keyed, BadLine):
                count.bad += 1
                if on_bad:
                    on_bad(keyed)
            elif keyed:
                outlet.send(*keyed, timestamp_ms=0)
                count.published += 1
                if count.published % STEP_EVENTS == 0:
                    tell(count)
    outlet.flush()
    tell(count)
    return count


def cut(
    records: Iterable[Event | BadLine],
    settings: Settings,
    directory: Path,
    progress: Progress | None = None,
    on_bad: OnBad | None = None,
) -> ReplayCount:
    """Cut the log's sessions without Kafka into `directory`/sessions.parquet, those still open at its end included.

    Users beyond the cache lie in a temporary RocksDB, so memory stays bounded. Raises `UsageError` if the directory
    holds other sessions.
    """
    count, decoder = ReplayCount(), EventDecoder(SiteProfile.load(settings.profile), settings.ahead_ms)
    tell = progress or _nothing
    with tempfile.TemporaryDirectory() as scratch, SessionWriter(directory) as writer:
        partitions = _Partitions(settings, scratch, writer)
        for at, event in enumerate(_events(records, count, on_bad), 1):
            count.saw(event.ts)
            try:
                key = check_key(event.user_id.encode())
                checked, mark = decoder.decode(key, encode_event(event), record_ms(event.ts))
            except BadEvent:
                partitions.refused += 1
                continue
            partitions.apply(key, checked, mark)
            if at % STEP_EVENTS == 0:
                partitions.write()
                tell(partitions.counted(count))
        partitions.end()
        partitions.counted(count)
    tell(count)
    return count


def record_ms(ts: int) -> int:
    """The Kafka timestamp of a replayed event: its own time, but never later than now."""
    return max(1, min(ts, time.time_ns() // 1_000_000))


class _Pace:
    """Lets event time run at `speed`; `nap` is called to wait, `clock` tells the seconds."""

    def __init__(
        self, speed: float | None, nap: Callable[[float], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._speed, self._nap, self._clock = speed, nap, clock
        self._start: tuple[float, int] | None = None

    def wait(self, ts: int) -> None:
        """Return when it is time for an event of `ts`."""
        if self._speed is None:
            return
        started, first = self._start = self._start or (self._clock(), ts)
        due = started + (ts - first) / 1_000 / self._speed
        while (rest := due - self._clock()) > 0:
            self._nap(min(max(rest, 0.001), NAP_S))  # the producer counts in milliseconds: less would spin


class _Partitions:
    """The sessionizers of all simulated partitions over one scratch database."""

    def __init__(self, settings: Settings, scratch: str, writer: SessionWriter) -> None:
        options = rocksdict.Options(raw_mode=True)
        self._database = rocksdict.Rdict(scratch, options)
        self._no_wal = rocksdict.WriteOptions()
        self._no_wal.disable_wal = True
        self._writer = writer
        self.refused = 0  # events that the decoder did not take
        self._keep = max(settings.cache_users // settings.partitions, 1)
        self._offsets = [0] * settings.partitions
        policy = Policy.of(settings)
        self._all = [Sessionizer(policy, self._reader(p)) for p in range(settings.partitions)]

    def _reader(self, partition: int) -> Callable[[bytes], bytes | None]:
        prefix, get = _prefix(partition), self._database.get
        return lambda key: get(prefix + key)

    def apply(self, key: bytes, event: Event, mark: int) -> None:
        """One event, in the order of the log."""
        partition = partition_of(key, len(self._all))
        self._all[partition].apply(key, event, mark, self._offsets[partition])
        self._offsets[partition] += 1

    def write(self) -> None:
        """Write changed users and closed sessions; forget users beyond the cache."""
        batch = rocksdict.WriteBatch(raw_mode=True)
        for partition, sessions in enumerate(self._all):
            prefix = _prefix(partition)
            for key, record in sessions.changes():
                if record is None:
                    batch.delete(prefix + key)
                else:
                    batch.put(prefix + key, record)
            self._take(sessions)
        self._database.write(batch, self._no_wal)
        for sessions in self._all:
            sessions.evict(self._keep)

    def _take(self, sessions: Sessionizer) -> None:
        self._writer.write(session for _, session in sessions.closed if session is not None)
        sessions.closed.clear()
        sessions.late.clear()
        sessions.capped.clear()

    def end(self) -> None:
        """The log has ended: close everything."""
        self.write()
        for sessions in self._all:
            sessions.end()
            self._take(sessions)
        self._database.close()

    def counted(self, count: ReplayCount) -> ReplayCount:
        """Put the fates so far into `count`."""
        fates = [sum(s.clock.fates[fate] for s in self._all) for fate in Fate]
        count.rejected = fates[Fate.REJECTED] + self.refused
        count.accepted, count.duplicate, count.late = fates[Fate.ACCEPTED], fates[Fate.DUPLICATE], fates[Fate.LATE]
        count.sessions = self._writer.written
        return count


def _prefix(partition: int) -> bytes:
    return partition.to_bytes(4, "big")


def _events(records: Iterable[Event | BadLine], count: ReplayCount, on_bad: OnBad | None) -> Iterator[Event]:
    for record in records:
        if isinstance(record, BadLine):
            count.bad += 1
            if on_bad:
                on_bad(record)
        else:
            yield record


def _keyed(number: int, line: str) -> tuple[bytes, bytes] | BadLine | None:
    """Key and value of a JSON line; None for an empty one."""
    if not line or line.isspace():
        return None
    try:
        document = msgspec.json.decode(line)
        if not isinstance(document, dict):
            return bad_line(number, "is no JSON object", line)
        user = (unwrap(document) or document).get("user_id")
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        return bad_line(number, str(error), line)
    if not isinstance(user, str) or not user:
        return bad_line(number, "has no user_id that is a text", line)
    return user.encode(), line.rstrip("\r").encode()


def _nothing(count: ReplayCount) -> None:
    """No progress asked for."""
