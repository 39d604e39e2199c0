"""One fault test from end to end: traffic flows, faults happen at given places of it, every record is accounted for."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from streams.settings import Settings
from tests.ledger import Ledger, log_faults, read_clicks, verdict
from tests.oracle import Expected, Record, replay_log
from tests.traffic import Publisher, Sent, Traffic
from tests.workers import Fleet, Worker

CHUNK = 100
CHUNK_SECONDS = 0.05  # so 2,000 events a second: slow enough for faults to fall into the middle of work
Fault = tuple[float, Callable[[], None]]  # share of the traffic after which it happens


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
    faults: list[Fault] = [],  # noqa: B006 - only read
    predicted: bool = False,
    patience_s: float = 60,
) -> Outcome:
    """Send the traffic while the faults happen, wait for what must come out, and compare. The fleet is running."""
    publisher, ledger = Publisher(settings), Ledger(settings)
    records = list(traffic.records(settings.partitions, settings))
    waiting = sorted(faults, key=lambda fault: fault[0])
    for start in range(0, len(records), CHUNK):
        publisher.send(records[start : start + CHUNK])
        while waiting and start >= waiting[0][0] * len(records):
            waiting.pop(0)[1]()
        fleet.tick()
        ledger.read(CHUNK_SECONDS)
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


def once_ready(worker: Worker, fleet: Fleet, act: Callable[[], None]) -> Callable[[], None]:
    """The fault `act`, held back until the worker serves: so that it is hit in the middle of its work."""

    def fault() -> None:
        deadline = time.monotonic() + 90
        while worker.get("/ready") is None and time.monotonic() < deadline:
            fleet.tick()
            time.sleep(0.1)
        act()

    return fault


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
