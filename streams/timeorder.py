"""A log that is not in order of time, put in order: a merge sort with runs on disk, so memory stays bounded."""

import heapq
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from typing import IO

import msgspec

from streams.lines import BadLine
from streams.wire import Event

RUN_EVENTS = 200_000


def in_time_order(records: Iterator[Event | BadLine], run_events: int = RUN_EVENTS) -> Iterator[Event | BadLine]:
    """The events by (time, place in the log); bad lines come out as they are met, before the first event.

    At most `run_events` events are in memory; what is more lies in temporary files.
    """
    run: list[Event] = []
    runs: list[IO[bytes]] = []
    with ExitStack() as files:
        for record in records:
            if isinstance(record, BadLine):
                yield record
                continue
            run.append(record)
            if len(run) >= run_events:
                runs.append(_written(files.enter_context(tempfile.TemporaryFile()), run))
                run = []
        run.sort(key=_time)
        # The merge is stable, and the runs are in the order of the log: equal times keep their places.
        yield from heapq.merge(*map(_read, runs), run, key=_time)


def _time(event: Event) -> int:
    return event.ts


def _written(file: IO[bytes], run: list[Event]) -> IO[bytes]:
    run.sort(key=_time)
    file.writelines(msgspec.json.encode(event) + b"\n" for event in run)
    file.seek(0)
    return file


def _read(file: IO[bytes]) -> Iterator[Event]:
    return map(msgspec.json.Decoder(Event).decode, file)
