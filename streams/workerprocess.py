"""A worker and a trainer as processes of their own, watched through their HTTP ports: how the demo runs them."""

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

from pydantic import SecretStr

from streams.errors import BrowsecastError
from streams.settings import Settings

BUSY = 1 << 30
START_S, STOP_S = 180.0, 25.0


class Progress(NamedTuple):
    """Clicks received, predictions made; sessions without theirs, and records that any role still has to read."""

    received: int
    predicted: int
    unpredicted: int
    lag: int


class Process:
    """`browsecast NAME`, and the file that holds what it says."""

    def __init__(self, name: str, settings: Settings, port: int, log: Path) -> None:
        """Start it with these settings."""
        self.name, self.log = name, log
        self._url = f"http://{settings.host}:{port}"
        command = [sys.executable, "-m", "streams.cli", name]
        with log.open("wb") as said:
            self._process = subprocess.Popen(command, stdout=said, stderr=said, env=_environment(settings))

    def check(self) -> None:
        """Raise BrowsecastError with the end of its log if it has ended."""
        if self._process.poll() is not None:
            lines = self.log.read_text(errors="replace").splitlines()
            said = [line for line in lines if line.startswith("error:") or '"level": "error"' in line] or lines
            ended = f"the {self.name} ended with exit code {self._process.returncode}; {self.log} says:"
            raise BrowsecastError("\n".join([ended, *said[-5:]]))

    def answers(self, path: str) -> bool:
        """Whether its port answers with success."""
        try:
            with urllib.request.urlopen(f"{self._url}{path}", timeout=2):
                return True
        except OSError:
            return False

    def wait_for(self, path: str) -> None:
        """Return once `path` answers. Raises BrowsecastError if that takes too long, or it ends."""
        deadline = time.monotonic() + START_S
        while not self.answers(path):
            self.check()
            if time.monotonic() > deadline:
                raise BrowsecastError(f"the {self.name} was not ready after {START_S:g} s; see {self.log}")
            time.sleep(0.2)

    def metrics(self) -> list[str] | None:
        """The lines of /metrics; None when it does not answer just now."""
        try:
            with urllib.request.urlopen(f"{self._url}/metrics", timeout=5) as answer:
                lines: list[str] = answer.read().decode().splitlines()
                return lines
        except OSError:
            self.check()
            return None

    def shows(self, start: str, label: str = "") -> int:
        """The sum of the samples that begin so and hold the label; 0 when it does not answer just now."""
        return _sum(self.metrics() or [], start, label)

    def stop(self) -> None:
        """SIGTERM, and the end of it one way or another."""
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Worker(Process):
    """A worker that plays all roles."""

    def progress(self) -> Progress:
        """How far it has come, from its metrics."""
        lines = self.metrics()
        if lines is None:
            return Progress(0, 0, BUSY, BUSY)
        return Progress(
            received=_sum(lines, "browsecast_received_events_total{"),
            predicted=_sum(lines, "browsecast_predictions_total{"),
            unpredicted=_sum(lines, "browsecast_lag_records{", 'role="predict"'),
            lag=_sum(lines, "browsecast_lag_records{"),
        )


@contextmanager
def started(settings: Settings, directory: Path) -> Iterator[tuple[Worker, Process]]:
    """A worker and a trainer that are ready, stopped by SIGTERM at the end; NAME.log lies in the directory."""
    worker = Worker("worker", settings, settings.port, directory / "worker.log")
    try:
        trainer = Process("trainer", settings, settings.trainer_port, directory / "trainer.log")
        try:
            worker.wait_for("/ready")
            trainer.wait_for("/metrics")
            yield worker, trainer
        finally:
            trainer.stop()
    finally:
        worker.stop()


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _environment(settings: Settings) -> dict[str, str]:
    """This process's environment, with every setting that is not left to its default."""
    values = {name: getattr(settings, name) for name in settings.model_fields_set}
    plain = {
        name: value.get_secret_value() if isinstance(value, SecretStr) else value
        for name, value in values.items()
        if value is not None
    }
    return os.environ | {f"BROWSECAST_{name.upper()}": str(value) for name, value in plain.items()}


def _sum(lines: list[str], start: str, label: str = "") -> int:
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith(start) and label in line))
