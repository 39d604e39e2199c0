"""Bundles that differ in their digests only, aliases that name them, and traffic that flows while they change."""

import shutil
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import msgspec
from confluent_kafka import Producer

from models.config import CARD
from models.manifest import MANIFEST, open_manifest, write_bundle
from streams.clients import librdkafka
from streams.settings import Settings
from streams.wire import MODELS, ModelAlias
from tests.ledger import Ledger, log_faults, read_clicks, verdict
from tests.oracle import replay_log
from tests.play import Outcome, complete, metric
from tests.traffic import Publisher, Traffic, closing
from tests.workers import Fleet, Worker

WORKER = ("tests.swapmodel", "worker")
CHUNK, CHUNK_SECONDS = 20, 0.05  # so at most 400 events a second
PATIENCE_S = 120.0


def variant(bundle: Path, directory: Path, card: str) -> Path:
    """The same bundle with another card, and so with another digest."""

    def fill(work: Path) -> None:
        shutil.copytree(bundle, work, ignore=shutil.ignore_patterns(MANIFEST, CARD), dirs_exist_ok=True)
        (work / CARD).write_text(card)

    write_bundle(directory, fill)
    return directory


def digest(bundle: Path) -> str:
    """Of a bundle."""
    return open_manifest(bundle).digest


def name(settings: Settings, alias: str, bundle: Path | None) -> None:
    """Let the alias name the bundle; None: it names none."""
    producer = Producer(librdkafka(settings))
    value = None
    if bundle is not None:
        value = msgspec.json.encode(ModelAlias(alias, bundle.name, digest(bundle), bundle.as_uri()))
    producer.produce(settings.topic(MODELS), value, alias.encode())
    assert producer.flush(30) == 0


def until(reached: Iterable[bool]) -> Iterator[None]:
    """Hand over until a condition, looked at each time anew, holds. Raises AssertionError when it does not come."""
    deadline = time.monotonic() + PATIENCE_S
    for yes in reached:
        if yes:
            return
        assert time.monotonic() < deadline, "it did not come to pass"
        yield


def shows(worker: Worker, least: float, metric_name: str, **labels: str) -> Iterator[None]:
    """Hand over until the worker's metric has come so far."""
    return until(metric(worker, f"browsecast_{metric_name}", **labels) >= least for _ in iter(int, 1))


def play_on(settings: Settings, fleet: Fleet, traffic: Traffic, steps: Iterator[None]) -> Outcome:
    """Some of the traffic whenever the steps hand over, as long as it lasts; checked to its end when they are done."""
    publisher, ledger = Publisher(settings), Ledger(settings)
    records, now = traffic.records(settings.partitions, settings), 0
    for _ in steps:
        chunk = list(islice(records, CHUNK))
        publisher.send(chunk)
        now = max([now, *(sent.timestamp_ms for sent in chunk if sent.kind != "wild")])
        fleet.tick()
        ledger.read(CHUNK_SECONDS)
    return finish(settings, fleet, publisher, ledger, now)


def finish(settings: Settings, fleet: Fleet, publisher: Publisher, ledger: Ledger, now_ms: int) -> Outcome:
    """Close all sessions of what was sent up to `now_ms`, wait for what must come out, and compare."""
    publisher.send(list(closing(settings.partitions, now_ms, settings)))
    publisher.flush()
    log = read_clicks(settings, len(publisher.manifest))
    void = log_faults(log, publisher.manifest)
    assert not void, f"the test itself is at fault: {void[:3]}"
    expected = replay_log(log, settings)
    ledger.read_until(lambda: complete(expected, ledger, True), fleet.tick)
    return Outcome(verdict(expected, ledger, log), expected, ledger, log)
