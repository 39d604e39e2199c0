"""A real broker for the benchmarks: one that is given, or one started for the run.

`python -m benchmarks.broker` starts one and keeps it until it is interrupted, so that several runs share it.
"""

import argparse
import itertools
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from streams import topics
from streams.settings import Settings
from tests.kafka import BRIEF, LASTING, open_kafka

_runs = itertools.count()


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments that every benchmark has."""
    arguments = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    arguments.add_argument("--bootstrap-servers", help="a Kafka to use; without it one is started for the run")
    return arguments


@contextmanager
def broker(bootstrap_servers: str | None, jvm: Sequence[str] = BRIEF) -> Iterator[str]:
    """HOST:PORT of the given broker, or of one that is started and stopped here. Raises `tests.kafka.Unavailable`.

    With `LASTING` its compiler optimises as that of a broker which runs for days, but needs a minute of work for it.
    """
    if bootstrap_servers is not None:
        yield bootstrap_servers
        return
    kafka = open_kafka(jvm)
    try:
        yield kafka.bootstrap_servers
    finally:
        kafka.stop()


def deployment(bootstrap_servers: str, directory: Path, **changes: Any) -> Settings:
    """Settings with topics of their own, created: every measurement begins on empty topics."""
    settings = Settings(
        bootstrap_servers=bootstrap_servers,
        topic_prefix=f"bench-{os.getpid()}-{int(time.time())}-{next(_runs)}.",
        state_dir=directory / "state",
        clock="log",
        **changes,
    )
    topics.create(settings)
    return settings


def main() -> None:
    """Start a broker, print its address, and stop it on SIGINT or SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    with broker(None, LASTING) as bootstrap_servers:
        print(bootstrap_servers, flush=True)
        while True:
            signal.pause()


if __name__ == "__main__":
    main()
