"""Publishing and replaying with progress and a summary: `browsecast publish`, `replay` and `items publish`."""

import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.text import Text

from streams import itemtopic, screens, topics, wire
from streams import replay as logs
from streams.errors import UsageError, WrongTopics
from streams.lines import BadLine, LogCount
from streams.profiles import SiteProfile, with_gap
from streams.readers import read_log
from streams.replay import ReplayCount
from streams.settings import DAY_MS, Settings
from streams.wire import Event

SHOWN_BAD_LINES = 20
MAX = "max"


def publish(settings: Settings, file: str) -> None:
    """Publish JSON lines to clicks; each line that cannot be is named on standard error and counted."""
    bad = _BadLines()
    started = time.monotonic()
    with screens.progress() as bar:
        task = bar.add_task("publish", total=None)
        count = logs.publish_lines(file, settings, lambda done: bar.update(task, completed=done.published), bad)
    _summary(f"published {count.published} events to {settings.topic(wire.CLICKS)}", bad, started)


def publish_items(settings: Settings, file: str) -> None:
    """Publish JSON lines of items; each line that cannot be is named on standard error and counted.

    Raises UsageError when that is every line.
    """
    bad, started = _BadLines(), time.monotonic()
    published = itemtopic.publish(settings, file, bad)
    if bad.count and not published:
        raise UsageError(
            f'{file}: none of its {bad.count} lines is an item. Give {{"item_id": "42", "text": "Red shoes"}} on each'
        )
    _summary(f"published {published} items to {settings.topic(wire.ITEMS)}", bad, started)


def replay(settings: Settings, log: str, speed: str, sessions: Path | None) -> None:
    """Play the log through Kafka at `speed` (a number, or max), or cut it into `sessions` off line."""
    pace = _pace(speed)
    profile = SiteProfile.load(settings.profile)
    settings = with_gap(settings, profile)
    count, bad, started = LogCount(), _BadLines(), time.monotonic()
    with screens.progress() as bar:
        task = bar.add_task("cut sessions" if sessions else "replay", total=None)

        def tell(done: ReplayCount) -> None:
            bar.update(task, completed=count.bytes_read, total=count.bytes_total)

        records = read_log(log, profile, count)
        if sessions is not None:
            done = logs.cut(records, settings, sessions, tell, bad)
        else:
            done = logs.publish(_kept(records, settings), settings, pace, tell, bad)
        bar.update(task, completed=count.bytes_total or count.bytes_read, total=count.bytes_total or count.bytes_read)
    if sessions is not None:
        fates = ", ".join(f"{getattr(done, fate)} {fate}" for fate in ("accepted", "duplicate", "late", "rejected"))
        _summary(
            f"{done.sessions} sessions in {sessions} ({count.skipped} lines skipped by the profile; {fates})",
            bad,
            started,
        )
    else:
        where = settings.topic(wire.CLICKS)
        _summary(
            f"published {done.published} events to {where} ({count.skipped} lines skipped by the profile)",
            bad,
            started,
        )


class _BadLines:
    """Names the first lines that could not be read on standard error, and counts all."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, line: BadLine) -> None:
        self.count += 1
        if self.count <= SHOWN_BAD_LINES:
            Console(stderr=True).print(Text(str(line), "yellow"), soft_wrap=True)
        elif self.count == SHOWN_BAD_LINES + 1:
            Console(stderr=True).print(Text("more such lines are only counted", "yellow"))


def _pace(speed: str) -> float | None:
    if speed == MAX:
        return None
    try:
        return float(speed)
    except ValueError:
        raise UsageError(f"--speed {speed!r} is neither a number nor max: 60 plays an hour in a minute") from None


def _kept(records: Iterator[Event | BadLine], settings: Settings) -> Iterator[Event | BadLine]:
    """The records, once it is clear that the broker will not delete them for their age: a replay keeps their time."""
    limit_ms = topics.retention_ms(settings)
    before: list[Event | BadLine] = []
    for record in records if limit_ms is not None else ():
        before.append(record)
        if isinstance(record, Event):
            age_ms = time.time() * 1000 - record.ts
            if limit_ms is not None and age_ms > limit_ms:
                name = settings.topic(wire.CLICKS)
                raise WrongTopics(
                    f"{name} keeps records for {limit_ms / DAY_MS:g} days, but the log begins {age_ms / DAY_MS:,.0f} "
                    "days ago and a replayed event keeps its time: the broker would delete it. To mend it: "
                    + topics.alter_command(settings, name, "retention.ms", -1)
                )
            break
    return chain(before, records)


def _summary(text: str, bad: _BadLines, started: float) -> None:
    unread = f"; {bad.count} lines could not be read" if bad.count else ""
    print(f"{text}{unread}, in {time.monotonic() - started:.1f} s")
