"""The demo: train on the past of two logs, start a worker and a trainer, play the rest, and watch the models change.

Everything that happens on the way is the product's own work. The demo only publishes, reads the topics, and holds the
replay back at a few moments, so that what takes its time is seen before the logs are over: `Hold`.
"""

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rich.console import Console
from rich.live import Live

from streams import demologs, demoscreens, replay, screens, tail, topics, wire
from streams.contest import Contest, Rates
from streams.demoholds import Hold, Tell, holds, wait
from streams.demologs import SEED, SEEN, Log, at_day
from streams.errors import UsageError
from streams.mock import MockCluster
from streams.settings import Settings
from streams.succession import Succession
from streams.wire import Event
from streams.workerprocess import Process, Worker, free_port, started

MARK = ".browsecast-demo"
PARTITIONS = 4
TRAINING: dict[str, Any] = {
    "epochs": 10,
    "fine_tune_epochs": 2,
    "batch": 16,
    "validation_share": 0.12,
    "minutes": 4.0,
    "seed": SEED,
}
RETRIEVAL: dict[str, Any] = {"epochs": 3, "patience": 1}  # of the operators: the shop has 48 items
# Log losses of 300 visitors are known to a fifth of their size, Brier scores of their sessions hardly better: finer
# margins refuse every candidate. The challenger predicts for all and is waited for, so that the judge soon has sessions
# enough.
TRIAL: dict[str, Any] = {
    "refresh_margin": 0.25, "judge_margin": 0.05, "shadow_share": 1.0, "shadow_wait_ms": 10_000,
    "archive_flush_ms": 1_000,
}  # fmt: skip
REFRESH_SHARE = 0.95  # of the sessions before SEEN: so many make a refresh due
# The in-process broker keeps 5 MiB a partition, so the log waits for the worker.
AHEAD_EVENTS, AHEAD_SESSIONS = 4_000, 400
CHECK_EVENTS = 500
QUIET_S, STUCK_S = 3.0, 60.0
LINE_S = 5.0


class Models(NamedTuple):
    """What the room of the trainer does for the demo."""

    train: Callable[[Path, Path, Any], object]  # sessions, bundle, progress: writes the bundle
    publish: Callable[[Settings, Path], object]  # makes the bundle the first champion


@dataclass(frozen=True, slots=True)
class Options:
    """Where the demo keeps its files, how many visitors the shop has, and whether it brings its own broker."""

    directory: Path
    visitors: int
    own_broker: bool


def run(settings: Settings, options: Options, models: Models) -> None:
    """Run the demo to its end."""
    console, began = Console(), time.monotonic()

    def tell(line: str) -> None:
        console.print(f"{time.monotonic() - began:4.0f} s  {line}", highlight=False, soft_wrap=True)

    _prepare(options.directory)
    logs = list(demologs.logs(options.visitors))
    for log in logs:
        tell(f"{log.name}: {len(log.past):,} clicks of the past to learn from, {len(log.rest):,} to play")
    settings = _settings(settings, options.directory, logs)
    rates = {log.name: _cut_past(log, settings, options.directory / "sessions") for log in logs}
    tell("training a small bundle on the past …")
    with screens.progress() as progress:
        models.train(options.directory / "sessions", options.directory / "bundle", progress)
    tell("starting the broker, the worker and the trainer …")
    contest, succession = Contest(rates, demologs.source), Succession(tell)
    with _broker(settings, options) as settings:
        models.publish(settings, options.directory / "bundle")
        with started(settings, options.directory) as (worker, trainer):
            play = _Play(settings, [event for log in logs for event in log.rest], contest, succession, tell)
            play.run(worker, trainer, holds(succession, worker, trainer), console)
    seconds = time.monotonic() - began
    demoscreens.summary(console, contest, succession, settings, options.own_broker, seconds)


def _prepare(directory: Path) -> None:
    """Clear what an earlier demo left; refuse a directory that is somebody else's."""
    if directory.is_dir() and any(directory.iterdir()) and not (directory / MARK).exists():
        raise UsageError(f"{directory} holds other files: name an empty directory with --directory")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / MARK).write_text("made by browsecast demo, removed by the next one\n")


def _settings(settings: Settings, directory: Path, logs: Sequence[Log]) -> Settings:
    """Everything below the directory; a refresh is due when the replay has come to SEEN."""
    places = {name: directory / name.removesuffix("_dir") for name in ("state_dir", "archive_dir", "trainer_dir")}
    changed = settings.but(
        partitions=PARTITIONS, clock="log", port=free_port(), trainer_port=free_port(),
        registry=str(directory / "registry"), **places, **TRIAL,
    )  # fmt: skip
    before = [event for log in logs for event in log.rest if event.ts < at_day(SEEN)]
    with tempfile.TemporaryDirectory() as scratch:
        sessions = replay.cut(before, changed, Path(scratch) / "before").sessions
    return changed.but(refresh_sessions=max(1, int(REFRESH_SHARE * sessions)))


def _cut_past(log: Log, settings: Settings, directory: Path) -> Rates:
    """Cut the past's sessions off line, for the trainer; the outcome rates are the baselines'."""
    import pyarrow.compute
    import pyarrow.parquet

    target = directory / log.name.replace(" ", "-")
    replay.cut(log.past, settings, target)
    table = pyarrow.parquet.read_table(target, columns=["cart", "purchase"])
    cart, purchase = (pyarrow.compute.mean(table[name]).as_py() or 0.0 for name in ("cart", "purchase"))
    return Rates(cart, purchase)


@contextmanager
def _broker(settings: Settings, options: Options) -> Iterator[Settings]:
    """The settings with a broker: an in-process one, or topics of our own on the one that was named."""
    if not options.own_broker:
        settings = settings.but(topic_prefix=f"demo-{time.strftime('%Y%m%d-%H%M%S')}.")
        topics.create(settings)
        yield settings
        return
    with MockCluster(dict.fromkeys(topics.specs(settings), settings.partitions)) as cluster:
        yield settings.but(bootstrap_servers=cluster.bootstrap_servers)


class _Play:
    """Publishes the events while the topics are read, until nothing more comes."""

    def __init__(
        self, settings: Settings, events: list[Event], contest: Contest, succession: Succession, tell: Tell
    ) -> None:
        self._settings, self._events, self._tell = settings, events, tell
        self._contest, self._succession = contest, succession
        self._published = 0
        self._failed: list[BaseException] = []

    def run(self, worker: Worker, trainer: Process, held: list[Hold], console: Console) -> None:
        """Play to the end."""
        publisher = threading.Thread(target=self._publish, args=(self._paced(worker, held),), daemon=True)
        publisher.start()
        said = moved = time.monotonic()
        last = ""
        with Live(console=console, refresh_per_second=4) if console.is_terminal else nullcontext() as live:
            for change in self._read():
                now = time.monotonic()
                if change or publisher.is_alive():
                    moved = now
                if self._failed:
                    raise self._failed[0]
                worker.check()
                trainer.check()
                if live is not None:
                    live.update(demoscreens.screen(self._contest, self._succession, self._line()))
                elif now - said > LINE_S and self._line() != last:
                    said, last = now, self._line()
                    self._tell(last)
                if now - moved > QUIET_S:
                    done = worker.progress()
                    if (done.lag == 0 and done.predicted >= self._contest.sessions) or now - moved > STUCK_S:
                        return

    def _publish(self, events: Iterable[Event]) -> None:
        try:
            replay.publish(events, self._settings)
        except BaseException as error:
            self._failed.append(error)

    def _paced(self, worker: Worker, held: list[Hold]) -> Iterator[Event]:
        """The events, held where they must be, and no further ahead than the in-process broker can hold."""
        waiting = list(held)
        for number, event in enumerate(self._events, 1):
            if waiting and event.ts >= waiting[0].moment_ms:
                wait(waiting.pop(0), self._tell)
            if number % CHECK_EVENTS == 0:
                while True:
                    done = worker.progress()
                    if number - done.received <= AHEAD_EVENTS and done.unpredicted <= AHEAD_SESSIONS:
                        break
                    time.sleep(0.1)
            self._published = number
            yield event

    def _read(self) -> Iterator[bool]:
        """Read the topics into contest and succession; says whether something came."""
        takes: dict[str, Callable[[bytes], None]] = {
            wire.SESSIONS: _taker(wire.Session, self._contest.session),
            wire.PREDICTIONS: _taker(wire.Prediction, self._succession.predicted),
            wire.SCORES: _taker(wire.Score, self._scored),
        }
        take = {self._settings.topic(name): one for name, one in takes.items()}
        models = self._settings.topic(wire.MODELS)
        for message in tail.follow(self._settings, [*take, models], from_beginning=True):
            if message is not None and message.topic() == models:
                self._succession.record(message.key() or b"", message.value())
            elif message is not None and message.value() is not None:
                take[message.topic()](message.value())
            yield message is not None

    def _scored(self, score: wire.Score) -> None:
        self._contest.score(score)
        self._succession.scored(score)

    def _line(self) -> str:
        parts = [
            f"{self._published:,} of {len(self._events):,} clicks published",
            f"{self._contest.sessions:,} sessions closed",
            f"{self._contest.pairs:,} scored",
        ]
        return " · ".join(parts)


def _taker(kind: type[Any], take: Callable[[Any], None]) -> Callable[[bytes], None]:
    decode = msgspec.json.Decoder(kind).decode
    return lambda value: take(decode(value))
