"""The demo: train on the past of two logs, start a worker, play the rest through Kafka, and watch how it predicts."""

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from streams import replay, screens, tail, topics, wire
from streams.contest import OURS, Contest, Rates
from streams.errors import UsageError
from streams.lines import BadLine
from streams.mock import MockCluster
from streams.profiles import SiteProfile
from streams.readers import nasa_excerpt, read_log
from streams.settings import DAY_MS, HOUR_MS, Settings
from streams.shop import shop_events
from streams.wire import Event
from streams.workerprocess import Worker, free_port, started

MARK = ".browsecast-demo"
SHOP, NASA = "demo shop", "NASA 1995"
SHOP_START_MS = 805_000_000_000  # 6 July 1995, after the excerpt of NASA's log, so that one worker can play both
SHOP_DAYS, SHOP_PAST_DAYS = 35.0, 21.0
NASA_PAST_MS = HOUR_MS
SEED = 1
PARTITIONS = 4
TRAINING: dict[str, Any] = {
    "epochs": 10,
    "fine_tune_epochs": 2,
    "batch": 16,
    "validation_share": 0.12,
    "minutes": 2.0,
    "seed": SEED,
}
# The in-process broker keeps 5 MiB a partition, so the log waits for the worker.
AHEAD_EVENTS, AHEAD_SESSIONS = 4_000, 400
CHECK_EVENTS = 500
QUIET_S, STUCK_S = 3.0, 60.0
LINE_S = 5.0

Train = Callable[[Path, Path, Any], object]


@dataclass(frozen=True, slots=True)
class Options:
    """Where the demo keeps its files, how many visitors the shop has, and whether it brings its own broker."""

    directory: Path
    visitors: int
    own_broker: bool


@dataclass(frozen=True, slots=True)
class Log:
    """A log in two parts: what the model is trained on, and what is played."""

    name: str
    past: list[Event]
    rest: list[Event]


def run(settings: Settings, options: Options, train: Train) -> None:
    """Run the demo to its end; `train(sessions, bundle, progress)` writes the bundle."""
    console, began = Console(), time.monotonic()
    _prepare(options.directory)
    logs = list(_logs(options.visitors))
    for log in logs:
        console.print(f"{log.name}: {len(log.past):,} clicks of the past to learn from, {len(log.rest):,} to play")
    changes = {"partitions": PARTITIONS, "clock": "log", "state_dir": options.directory / "state", "port": free_port()}
    settings = settings.but(**changes, bundle=options.directory / "bundle")
    rates = {log.name: _cut_past(log, settings, options.directory / "sessions") for log in logs}
    console.print("training a small bundle on the past …")
    with screens.progress() as progress:
        train(options.directory / "sessions", options.directory / "bundle", progress)
    console.print(f"trained after {time.monotonic() - began:.0f} s; starting the broker and the worker …")
    with _broker(settings, options) as settings, started(settings, options.directory) as worker:
        contest = _play(settings, logs, Contest(rates, _source), worker, console)
    _summary(console, contest, settings, options, time.monotonic() - began)


def _prepare(directory: Path) -> None:
    """Clear what an earlier demo left; refuse a directory that is somebody else's."""
    if directory.is_dir() and any(directory.iterdir()) and not (directory / MARK).exists():
        raise UsageError(f"{directory} holds other files: name an empty directory with --directory")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / MARK).write_text("made by browsecast demo, removed by the next one\n")


def _logs(visitors: int) -> Iterator[Log]:
    """NASA's access log and the made-up shop, each split at a moment."""
    profile = SiteProfile.load("nasa")
    with nasa_excerpt() as path:
        hits = [event for event in read_log(path, profile) if not isinstance(event, BadLine)]
    yield _split(NASA, hits, hits[0].ts + NASA_PAST_MS)
    clicks = list(shop_events(visitors, SHOP_DAYS, SEED, SHOP_START_MS))
    yield _split(SHOP, clicks, SHOP_START_MS + int(SHOP_PAST_DAYS * DAY_MS))


def _split(name: str, events: list[Event], moment_ms: int) -> Log:
    return Log(name, [e for e in events if e.ts < moment_ms], [e for e in events if e.ts >= moment_ms])


def _source(user_id: str) -> str:
    return SHOP if user_id.startswith("visitor-") else NASA


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


def _play(settings: Settings, logs: list[Log], contest: Contest, worker: Worker, console: Console) -> Contest:
    """Publish the rest of the logs while the topics are read, until nothing more comes."""
    events = [event for log in logs for event in log.rest]
    published = [0]
    failed: list[BaseException] = []

    def publish() -> None:
        try:
            replay.publish(_paced(events, published, worker), settings)
        except BaseException as error:
            failed.append(error)

    publisher = threading.Thread(target=publish, daemon=True)
    publisher.start()
    said = moved = time.monotonic()
    with Live(console=console, refresh_per_second=4) if console.is_terminal else nullcontext() as live:
        for change in _feed(settings, contest):
            now = time.monotonic()
            if change or publisher.is_alive():
                moved = now
            if failed:
                raise failed[0]
            worker.check()
            if live is not None:
                live.update(_screen(contest, published[0], len(events)))
            elif now - said > LINE_S:
                said = now
                console.print(_line(contest, published[0], len(events)))
            if now - moved > QUIET_S:
                done = worker.progress()
                if (done.lag == 0 and done.predicted >= contest.sessions) or now - moved > STUCK_S:
                    return contest
    return contest


def _paced(events: Iterable[Event], published: list[int], worker: Worker) -> Iterator[Event]:
    """The events, no further ahead of the worker than the in-process broker can hold."""
    for number, event in enumerate(events, 1):
        if number % CHECK_EVENTS == 0:
            while True:
                done = worker.progress()
                if number - done.received <= AHEAD_EVENTS and done.unpredicted <= AHEAD_SESSIONS:
                    break
                time.sleep(0.1)
        published[0] = number
        yield event


def _feed(settings: Settings, contest: Contest) -> Iterator[bool]:
    """Read sessions and scores into the contest; says whether something came."""
    decode_session = msgspec.json.Decoder(wire.Session).decode
    decode_score = msgspec.json.Decoder(wire.Score).decode
    sessions, scores = settings.topic(wire.SESSIONS), settings.topic(wire.SCORES)
    for message in tail.follow(settings, [sessions, scores], from_beginning=True):
        if message is not None and message.value() is not None:
            if message.topic() == sessions:
                contest.session(decode_session(message.value()))
            else:
                contest.score(decode_score(message.value()))
        yield message is not None


def _screen(contest: Contest, published: int, total: int) -> RenderableType:
    return Group(*(_table(name, contest) for name in contest.standings), Text(_line(contest, published, total), "dim"))


def _table(name: str, contest: Contest) -> Table:
    standing = contest.standings[name]
    table = Table(
        title=f"{name}: {standing[OURS].pairs:,} predictions scored", header_style="bold", title_justify="left"
    )
    table.add_column("predictor", min_width=32)
    columns = ("hit\nrate", "IoU\n", "cart\nlog loss", "purchase\nlog loss")
    shown = len(columns) if contest.has_outcomes(name) else 2  # a site without a cart has no outcomes to predict
    for column in columns[:shown]:
        table.add_column(column, justify="right")
    for predictor, means in standing.items():
        style = "bold green" if predictor == OURS else ""
        table.add_row(predictor, *(f"{figure:.3f}" for figure in means.figures()[:shown]), style=style)
    return table


def _line(contest: Contest, published: int, total: int) -> str:
    parts = [
        f"{published:,} of {total:,} clicks published",
        f"{contest.sessions:,} sessions closed",
        f"{contest.pairs:,} scored",
    ]
    return " · ".join(parts)


def _summary(console: Console, contest: Contest, settings: Settings, options: Options, seconds: float) -> None:
    for name in contest.standings:
        console.print(_table(name, contest))
    console.print(
        f"{contest.sessions:,} sessions, {contest.pairs:,} predictions scored, in {seconds:.0f} s. Higher hit rate and "
        "IoU are better, lower log loss is better."
    )
    command = Path(sys.argv[0]).name if shutil.which("browsecast") else os.path.relpath(sys.argv[0])
    broker = "HOST:9092" if options.own_broker else settings.bootstrap_servers
    if not options.own_broker:
        console.print(f"The demo's topics begin with {settings.topic_prefix} and are still there.")
    console.print("\nWith your own access log (other formats: see README, site profiles):\n", style="bold")
    for line in (
        f"{command} replay access.log --profile nasa --sessions sessions",
        f"{command} train --sessions sessions --bundle bundle",
        f"{command} topics create --bootstrap-servers {broker}",
        f"{command} worker --bundle bundle --clock log --bootstrap-servers {broker}",
        f"{command} replay access.log --profile nasa --speed 60 --bootstrap-servers {broker}",
        f"{command} watch --bootstrap-servers {broker}",
    ):
        console.print(f"  {line}", highlight=False, soft_wrap=True)
