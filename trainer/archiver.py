"""The role `archive`: the topic `sessions` into the archive, and the archive kept in order."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from threading import Event

import structlog

from trainer.archive import DAY_MS, first_ms
from trainer.archivefiles import File, Manifest
from trainer.archivewriter import ArchiveWriter
from trainer.feeds import Feed
from trainer.trainermetrics import TrainerMetrics

POLL_RECORDS = 5_000
POLL_S = 0.2
UPKEEP_S = 5.0  # between two looks at the files
MERGED_FILES = 16  # so many files of a day, of about one size, become one
MERGED_BYTES = 64 << 20  # larger files are merged no more
REST_MS = 3_600_000  # a day without a new file for so long is merged into as few files as may be

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Upkeep:
    """How long sessions are kept, and how soon forgotten users are gone from the files.

    Retention counts from the newest session, not from the wall clock: an old log that is replayed stays. A day has at
    most 15 files for each power of 16 in their sizes while it grows, and about one for every 64 MiB afterwards.
    """

    retention_days: int
    forget_within_ms: int

    def step(self, archive: ArchiveWriter, now_ms: int) -> bool:
        """Do one thing that is due, in a commit of its own; False when nothing is. Raises `ArchiveUnwritable`."""
        manifest = archive.manifest
        if expired := self.expired(manifest):
            archive.drop(expired)
        elif self.must_forget(manifest, now_ms):
            archive.forget_next()
        elif files := to_merge(manifest, now_ms):
            archive.rewrite(files)
        else:
            return False
        return True

    def expired(self, manifest: Manifest) -> list[File]:
        """Files whose day is over for more than `retention_days`."""
        oldest_ms = manifest.newest_ms - (self.retention_days + 1) * DAY_MS
        return [file for file in manifest.files if first_ms(file.day) < oldest_ms]

    def must_forget(self, manifest: Manifest, now_ms: int) -> bool:
        """Whether somebody waits for half of the time: the other half is for the rewriting."""
        return any(now_ms - forget.at_ms >= self.forget_within_ms / 2 for forget in manifest.forgets)


def to_merge(manifest: Manifest, now_ms: int) -> list[File]:
    """Files of a day that should be one: many of about one size, or all that are small once the day is at rest."""
    small = sorted((file for file in manifest.files if file.bytes < MERGED_BYTES), key=attrgetter("day", "bytes"))
    for _, grouped in groupby(small, attrgetter("day")):
        files = list(grouped)
        at_rest = now_ms - max(file.written_ms for file in files) >= REST_MS
        for chosen in [files] if at_rest else _tiers(files):
            if len(chosen) >= (2 if at_rest else MERGED_FILES):
                return _up_to_size(chosen)
    return []


def _tiers(files: Sequence[File]) -> Iterator[list[File]]:
    """Files of about one size together, so that a session is written again once for each power of 16."""
    for _, tier in groupby(files, lambda file: int(math.log(file.bytes, MERGED_FILES))):
        yield list(tier)


def _up_to_size(files: Sequence[File]) -> list[File]:
    """The first of them that are large enough together, two at least."""
    total, chosen = 0, []
    for file in files:
        chosen.append(file)
        total += file.bytes
        if total >= MERGED_BYTES and len(chosen) >= 2:
            break
    return chosen


class Archiver:
    """Reads the topic into the archive: commits every `flush_ms`, or as soon as `flush_sessions` records wait."""

    def __init__(
        self,
        archive: ArchiveWriter,
        feed: Feed,
        upkeep: Upkeep,
        flush_ms: int,
        flush_sessions: int,
        metrics: TrainerMetrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.archive, self.feed = archive, feed
        self._upkeep, self._flush_s, self._flush_sessions = upkeep, flush_ms / 1000, flush_sessions
        self._metrics, self._clock = metrics, clock
        self._waits_since: float | None = None
        self._closed_ms: list[int] = []  # when the sessions that wait were closed
        self._next_upkeep = 0.0
        self._unreadable = 0  # records that are shown already

    def run(self, stop: Event) -> None:
        """Until `stop`, then commit what waits. Raises `ArchiveUnwritable` when the disk refuses."""
        self.feed.assign(self.archive.manifest.positions)
        self._show()
        while not stop.is_set():
            self._read()
            self._keep()
        self._flush()

    def catch_up(self) -> None:
        """Up to where the topic ends now, and all upkeep that is due."""
        self.feed.assign(self.archive.manifest.positions)
        ends = self.feed.ends()
        while any(self.feed.reached()[partition] < end for partition, end in ends.items()):
            self._read()
        self._flush()
        while self._upkeep.step(self.archive, self._now_ms()):
            pass
        self._show()

    def lag(self) -> dict[int, int]:
        """Records of each partition that are not read yet."""
        reached = self.feed.reached()
        return {partition: max(0, end - reached[partition]) for partition, end in self.feed.ends().items()}

    def _read(self) -> None:
        records = self.feed.poll(POLL_RECORDS, POLL_S)
        self.archive.append(records)
        self._closed_ms += [record.timestamp_ms for record in records if record.value is not None]
        if not self.archive.waiting:
            return
        now = time.monotonic()
        self._waits_since = self._waits_since or now
        if self.archive.waiting >= self._flush_sessions or now - self._waits_since >= self._flush_s:
            self._flush()

    def _flush(self) -> None:
        before, began = self.archive.manifest, time.monotonic()
        self.archive.flush()
        self._waits_since = None
        after = self.archive.manifest
        if after is before:
            return
        self._metrics.archive_flush_seconds.observe(time.monotonic() - began)
        now_ms, closed, self._closed_ms = self._now_ms(), self._closed_ms, []
        for closed_ms in closed:
            self._metrics.archive_delay.observe(max(0, now_ms - closed_ms) / 1000)
        log.info("archived", sessions=after.sessions - before.sessions, commit=after.commit, files=len(after.files))
        self._show()
        self.feed.commit(after.positions)

    def _keep(self) -> None:
        """One thing at a time, so that reading goes on meanwhile."""
        if time.monotonic() < self._next_upkeep:
            return
        if not self._upkeep.step(self.archive, self._now_ms()):
            self._next_upkeep = time.monotonic() + UPKEEP_S
            self._show_lag()
        self._show()

    def _show(self) -> None:
        metrics, manifest = self._metrics, self.archive.manifest
        metrics.archived_sessions.set(manifest.sessions)
        metrics.archive_files.set(len(manifest.files))
        metrics.archive_bytes.set(sum(file.bytes for file in manifest.files))
        metrics.archive_commit.set(manifest.commit)
        metrics.archive_forgets.set(len(manifest.forgets))
        metrics.archive_unreadable.inc(self.archive.unreadable - self._unreadable)
        self._unreadable = self.archive.unreadable

    def _show_lag(self) -> None:
        try:
            lag = self.lag()
        except Exception as error:  # the broker is away: the reader waits for it, and so does this figure
            log.warning("how far the archive is behind is not known", error=str(error))
            return
        for partition, records in lag.items():
            self._metrics.archive_lag.labels(partition).set(records)

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)
