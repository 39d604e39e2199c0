"""One fault test from end to end: traffic flows, faults happen at given places of it, every record is accounted for."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from streams.settings import Settings
from tests.ledger import Ledger, log_faults, read_clicks, verdict
from tests.oracle import Expected, Record, replay_log
from tests.traffic import Publisher, Sent, Traffic
from tests.workers import Fleet, Worker

CHUNK, SLOW_CHUNK = 100, 2
CHUNK_SECONDS = 0.05  # so 2,000 events a second, or 40 while a fault waits for its worker
MOST_CHUNKS = 8  # between the moment a worker works again and its fault


@dataclass
class Fault:
    """What happens to a worker after `share` of the traffic, as soon as the worker is in the middle of its work."""

    share: float
    worker: Worker
    act: Callable[[], None]
    delay: int | None = None  # chunks still to send before it happens; None until the worker works

    def due(self, choose: random.Random) -> bool:
        """Whether it happens now. The worker must have committed something since it started."""
        if self.delay is None and metric(self.worker, "browsecast_flush_seconds_count") >= 2:
            self.delay = choose.randrange(MOST_CHUNKS)
        elif self.delay is not None:
            self.delay -= 1
        return self.delay is not None and self.delay <= 0


@dataclass
class Outcome:
    """What a play ended with. `faults`: every difference from the oracle, in words."""

    faults: list[str]
    expected: Expected
    ledger: Ledger
    log: list[Record]


def play(
    settings: Settings,
    fleet: Fleet,
    traffic: Traffic,
    faults: Sequence[Fault] = (),
    predicted: bool = False,
    patience_s: float = 60,
) -> Outcome:
    """Send the traffic while the faults happen, wait for what must come out, and compare. The fleet is running."""
    publisher, ledger, choose = Publisher(settings), Ledger(settings), random.Random(traffic.seed)
    records = list(traffic.records(settings.partitions, settings))
    waiting, sent = list(faults), 0
    while sent < len(records):
        pending = bool(waiting) and sent >= waiting[0].share * len(records)
        chunk = SLOW_CHUNK if pending and waiting[0].delay is None else CHUNK
        publisher.send(records[sent : sent + chunk])
        sent += chunk
        if pending and waiting[0].due(choose):
            waiting.pop(0).act()
        fleet.tick()
        ledger.read(CHUNK_SECONDS)
    assert not waiting, f"the traffic ended before {len(waiting)} of the faults:\n{waiting[0].worker.tail()}"
    publisher.flush()
    log = read_clicks(settings, len(publisher.manifest))
    void = log_faults(log, publisher.manifest)
    assert not void, f"the test itself is at fault: {void[:3]}"
    expected = replay_log(log, settings)
    ledger.read_until(lambda: complete(expected, ledger, predicted), fleet.tick, patience_s)
    return Outcome(verdict(expected, ledger, log, predicted), expected, ledger, log)


def complete(expected: Expected, ledger: Ledger, predicted: bool) -> bool:
    """Whether as much came out as must; `verdict` says whether it is the right thing."""
    sessions = len(expected.sessions)
    if len(ledger.sessions) < sessions or len(ledger.late) < len(expected.late):
        return False
    if len(ledger.rejected) < len(expected.reasons):
        return False
    users = len({session.user for session in expected.sessions})
    return not predicted or (len(ledger.predictions) >= sessions and len(ledger.scores) >= sessions - users)


def metric(worker: Worker, name: str, **labels: str) -> float:
    """The sum of a metric over all its label sets that contain `labels`."""
    total = 0.0
    for line in (worker.get("/metrics") or "").splitlines():
        found = re.match(rf"{name}(?:{{(.*)}})? (\S+)$", line)
        if found and all(f'{label}="{value}"' in (found[1] or "") for label, value in labels.items()):
            total += float(found[2])
    return total


def send_all(settings: Settings, records: list[Sent]) -> Publisher:
    """Publish everything at once."""
    publisher = Publisher(settings)
    publisher.send(records)
    publisher.flush()
    return publisher
