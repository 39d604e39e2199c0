"""The trainer's service: archive, refresh and judge in one process, each in a thread, until it is told to stop.

Each keeps its place on disk together with what belongs to it, so the process may be killed at any time.
"""

import fcntl
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Literal, Protocol

import structlog
from prometheus_client import start_http_server

from models.manifest import BundleRefused
from streams.wire import SCORES, SESSIONS, ModelAlias
from trainer.archive import Archive
from trainer.archiver import Archiver, Upkeep
from trainer.archivewriter import open_archive
from trainer.cycle import Cycle
from trainer.driftwatch import DriftWatch
from trainer.errors import TrainingError
from trainer.feeds import Feed
from trainer.judge import Judge
from trainer.plan import Done
from trainer.refresh_options import RefreshOptions
from trainer.registry import Aliases, Registry
from trainer.trainermetrics import TrainerMetrics
from trainer.trial import Rules

Role = Literal["archive", "judge", "refresh"]
ROLES: tuple[Role, ...] = ("archive", "judge", "refresh")  # in the order in which `once` plays them
LOOK_S = 5.0  # between two looks whether a refresh is due
RETRY_S = 60.0  # after one that could not be planned, or must wait

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class ServiceOptions:
    """Where the trainer keeps its things, and how each role does its work."""

    directory: Path  # of the cycles and the judge's evidence
    archive: Path
    registry: str
    flush_ms: int
    flush_sessions: int
    upkeep: Upkeep
    refresh: RefreshOptions
    rules: Rules


@dataclass(frozen=True)
class Connections:
    """What lies outside the process: topics by their name in `wire` and the reader's role, aliases, bundles, items."""

    feed: Callable[[str, Role], Feed]
    aliases: Aliases
    fetch: Callable[[ModelAlias], Path]  # the verified directory of a bundle
    items: Callable[[Path], int]  # writes what the topic `items` holds as JSON lines; how many items they are


class Part(Protocol):
    """A role at work."""

    def run(self, stop: Event) -> None:
        """Until `stop`."""

    def catch_up(self) -> None:
        """What there is to do now, and no more."""


class Refresh:
    """The role `refresh`: looks whether a refresh is due, and goes through it."""

    def __init__(self, cycle: Cycle, drift: DriftWatch, metrics: TrainerMetrics) -> None:
        self.cycle, self._drift, self._metrics = cycle, drift, metrics
        self.said = ""  # what came of the last look, in words

    def run(self, stop: Event) -> None:
        """Until `stop`."""
        while not stop.is_set():
            reason = self.cycle.due(self._drift.look())
            tried = reason is None or self._try(reason, stop)
            stop.wait(LOOK_S if tried else RETRY_S)

    def catch_up(self) -> None:
        """One cycle, unless nothing is new or a challenger is being tried."""
        reason = self.cycle.due(self._drift.look()) or self.cycle.asked()
        if reason is None:
            self.said = "no new sessions since the last refresh"
        else:
            self._try(reason, Event())

    def _try(self, reason: str, stop: Event) -> bool:
        """False when it must wait or could not be planned."""
        if (why := self.cycle.blocked()) is not None:
            self.said = f"no refresh: {why}"
            log.info("a refresh is due and must wait", due=reason, because=why)
            return False
        started = time.monotonic()
        try:
            done = self.cycle.run(reason, stop)
        except (TrainingError, BundleRefused) as error:
            self.said = f"no refresh: {error}"
            self._metrics.refreshes.labels("failed").inc()
            log.error("a refresh could not be planned", due=reason, error=str(error))
            return False
        if done is not None:
            self._tell(done, time.monotonic() - started)
        return True

    def _tell(self, done: Done, seconds: float) -> None:
        self.said = f"{done.result}: {done.reason}"
        self._metrics.refreshes.labels(done.result).inc()
        self._metrics.refresh_seconds.set(seconds)
        if done.result != "failed":
            self._metrics.decisions.labels(done.result).inc()


@contextmanager
def opened(
    roles: Sequence[Role], options: ServiceOptions, connections: Connections, metrics: TrainerMetrics
) -> Iterator[dict[Role, Part]]:
    """The roles, ready to run, in the order of ROLES. Raises TrainingError where another trainer works already."""
    registry, archive = Registry(options.registry), Archive(options.archive)
    parts: dict[Role, Part] = {}
    judge = None
    with ExitStack() as stack:

        def feed(topic: str, role: Role) -> Feed:
            return stack.enter_context(closing(connections.feed(topic, role)))

        if "archive" in roles:
            reader = feed(SESSIONS, "archive")
            writer = stack.enter_context(open_archive(options.archive, reader.topic))
            upkeep, flush = options.upkeep, (options.flush_ms, options.flush_sessions)
            parts["archive"] = Archiver(writer, reader, upkeep, *flush, metrics)
        if "judge" in roles:
            stack.enter_context(alone(options.directory / "judge"))
            path = options.directory / "judge" / "evidence.json"
            reader = feed(SCORES, "judge")
            judge = Judge(path, reader, connections.aliases, registry, metrics, options.rules)
            parts["judge"] = judge
        if "refresh" in roles:
            stack.enter_context(alone(options.directory / "cycles"))
            cycle = Cycle(
                options.directory / "cycles", archive, registry, connections.aliases, connections.fetch,
                options.refresh, items=connections.items,
            )  # fmt: skip
            window = (lambda: None) if judge is None else judge.window
            drift = DriftWatch(archive, connections.aliases, connections.fetch, window, metrics)
            parts["refresh"] = Refresh(cycle, drift, metrics)
        yield parts


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Nobody else works in the directory meanwhile. Raises TrainingError if somebody does."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(
                f"{directory} is in use by another trainer: give each its own BROWSECAST_TRAINER_DIR"
            ) from error
        yield


def serve(parts: Mapping[Role, Part], stop: Event) -> None:
    """Run every part in a thread until `stop`; the first error stops the others and is raised."""
    errors: list[BaseException] = []

    def work(part: Part) -> None:
        try:
            part.run(stop)
        except BaseException as error:
            errors.append(error)
        finally:
            stop.set()

    threads = [threading.Thread(target=work, args=(part,), name=role) for role, part in parts.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def once(options: ServiceOptions, connections: Connections) -> str:
    """Archive to the present end, judge what is there, and go through one cycle; returns what came of that."""
    with opened(ROLES, options, connections, TrainerMetrics()) as parts:
        for part in parts.values():
            part.catch_up()
        refresh = parts["refresh"]
        assert isinstance(refresh, Refresh)
        return refresh.said


def run(roles: Sequence[Role], options: ServiceOptions, connections: Connections, host: str, port: int) -> None:
    """Serve these roles, and /metrics at the port, until SIGTERM or SIGINT. Raises what ended one of them."""
    metrics, stop = TrainerMetrics(), Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with opened(roles, options, connections, metrics) as parts:
        log.info("trainer starting", roles=list(parts), port=show(metrics, host, port))
        serve(parts, stop)
    log.info("trainer left")


def show(metrics: TrainerMetrics, host: str, port: int) -> int:
    """Serve /metrics, and return the port (0 takes a free one). Raises TrainingError if it cannot listen there."""
    try:
        server, _ = start_http_server(port, host, metrics.registry)
    except OSError as error:
        raise TrainingError(
            f"cannot listen on {host}:{port} for /metrics: {error.strerror or error}. Give another port with --port or "
            "BROWSECAST_TRAINER_PORT (0 takes a free one)"
        ) from error
    return int(server.server_port)
