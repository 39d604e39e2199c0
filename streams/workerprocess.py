"""A worker as a process of its own, watched through its HTTP port: how the demo runs one."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from streams.errors import BrowsecastError
from streams.settings import Settings

BUSY = 1 << 30
START_S, STOP_S = 90.0, 25.0


class Progress(NamedTuple):
    """Clicks received, predictions made; sessions without theirs, and records that any role still has to read."""

    received: int
    predicted: int
    unpredicted: int
    lag: int


class Worker:
    """The worker's process, watched through its HTTP port."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, url: str) -> None:
        self.process, self.log, self._url = process, log, url

    def check(self) -> None:
        """Raise BrowsecastError with the end of its log if it has ended."""
        if self.process.poll() is not None:
            lines = self.log.read_text(errors="replace").splitlines()
            said = [line for line in lines if line.startswith("error:") or '"level": "error"' in line] or lines
            raise BrowsecastError(
                "\n".join([f"the worker ended with exit code {self.process.returncode}; {self.log} says:", *said[-5:]])
            )

    def ready(self) -> bool:
        """Whether it has taken over its partitions."""
        try:
            with urllib.request.urlopen(f"{self._url}/ready", timeout=2):
                return True
        except OSError:
            return False

    def progress(self) -> Progress:
        """How far it has come, from its metrics."""
        try:
            with urllib.request.urlopen(f"{self._url}/metrics", timeout=5) as answer:
                lines = answer.read().decode().splitlines()
        except OSError:
            self.check()
            return Progress(0, 0, BUSY, BUSY)
        return Progress(
            received=_sum(lines, "browsecast_received_events_total{"),
            predicted=_sum(lines, "browsecast_predictions_total{"),
            unpredicted=_sum(lines, "browsecast_lag_records{", 'role="predict"'),
            lag=_sum(lines, "browsecast_lag_records{"),
        )


def _sum(lines: list[str], start: str, label: str = "") -> int:
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith(start) and label in line))


@contextmanager
def started(settings: Settings, directory: Path) -> Iterator[Worker]:
    """A worker as its own process, stopped by SIGTERM at the end."""
    arguments = {
        "--bootstrap-servers": settings.bootstrap_servers,
        "--topic-prefix": settings.topic_prefix,
        "--bundle": settings.bundle,
        "--clock": settings.clock,
        "--port": settings.port,
        "--state-dir": settings.state_dir,
    }
    words = [str(word) for pair in arguments.items() if pair[1] != "" for word in pair]
    command = [sys.executable, "-m", "streams.cli", "worker", *words]
    path = directory / "worker.log"
    with path.open("wb") as log:
        environment = os.environ | {"BROWSECAST_PARTITIONS": str(settings.partitions)}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    worker = Worker(process, path, f"http://{settings.host}:{settings.port}")
    try:
        deadline = time.monotonic() + START_S
        while not worker.ready():
            worker.check()
            if time.monotonic() > deadline:
                raise BrowsecastError(f"the worker was not ready after {START_S:g} s; see {path}")
            time.sleep(0.2)
        yield worker
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
