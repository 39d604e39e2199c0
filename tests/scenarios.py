"""Situations in which workers must be exact; each returns every difference from the oracle, in words.

The fault tests run them with the real worker, the tests of the tests with broken ones.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from confluent_kafka import Consumer, KafkaException, TopicPartition

from streams import clients
from streams.settings import Settings
from streams.wire import CLICKS
from tests.ledger import Ledger, read_clicks, verdict
from tests.oracle import replay_log
from tests.play import Fault, complete, metric, play, send_all
from tests.traffic import Traffic
from tests.workers import Fleet, Worker

ROLES = ("sessionize",)
FROZEN_SECONDS = 10  # longer than the session timeout of the tests
Module = Sequence[str]


def killed(settings: Settings, directory: Path, module: Module, seed: int) -> list[str]:
    """kill -9 six times in the middle of the stream, with transactions as often as can be."""
    busy = settings.but(flush_ms=1, flush_events=50)
    with Fleet([Worker(busy, directory / f"w{seed}", ROLES, module)]) as fleet:
        fleet.start()
        (worker,) = fleet.workers
        faults = [Fault(share / 10, worker, worker.kill) for share in range(1, 7)]
        return play(settings, fleet, Traffic(seed=seed), faults, patience_s=15).faults


def frozen(settings: Settings, directory: Path, module: Module, seed: int) -> list[str]:
    """Each of two workers sleeps in the middle of its work until the other has taken over, and wakes."""
    busy = settings.but(flush_ms=100)
    with Fleet([Worker(busy, directory / f"w{seed}-{number}", ROLES, module) for number in range(2)]) as fleet:
        fleet.start()
        faults = [Fault(0.3 + 0.4 * n, worker, freeze(worker, fleet)) for n, worker in enumerate(fleet.workers)]
        return play(settings, fleet, Traffic(seed=seed), faults, patience_s=40).faults


def freeze(worker: Worker, fleet: Fleet) -> Callable[[], None]:
    """SIGSTOP, wait until the others have taken over, SIGCONT."""

    def fault() -> None:
        worker.freeze()
        time.sleep(FROZEN_SECONDS)
        worker.thaw()
        fleet.tick()

    return fault


def undisturbed(settings: Settings, directory: Path, module: Module, seed: int) -> list[str]:
    """No fault at all, but transactions and new events at the same time."""
    with Fleet([Worker(settings.but(flush_ms=1), directory / f"w{seed}", ROLES, module)]) as fleet:
        fleet.start()
        fleet.workers[0].wait_ready()
        return play(settings, fleet, Traffic(seed=seed, events=6_000, users=50), patience_s=15).faults


def offsets_moved(settings: Settings, directory: Path, module: Module, seed: int) -> list[str]:
    """While the worker is dead, somebody moves its group's offsets to the end of the log."""
    traffic = list(Traffic(seed=seed).records(settings.partitions, settings))
    half = len(traffic) // 2
    with Fleet([Worker(settings, directory / f"w{seed}", ROLES, module)]) as fleet:
        (worker,) = fleet.workers
        send_all(settings, traffic[:half])
        worker.start()
        deadline = time.monotonic() + 60
        while metric(worker, "browsecast_received_events_total") < half and time.monotonic() < deadline:
            time.sleep(0.1)
        worker.kill()
        send_all(settings, traffic[half:])
        log = read_clicks(settings, len(traffic))
        expected, ledger = replay_log(log, settings), Ledger(settings)
        move_to_end(settings)
        worker.start()
        ledger.read_until(lambda: complete(expected, ledger, False), fleet.tick, patience_s=20)
    return verdict(expected, ledger, log, predicted=False)


def move_to_end(settings: Settings) -> None:
    """Commit the end of `clicks` as the sessionizers' offsets, as tools for Kafka can, once the group is empty."""
    topic, group = settings.topic(CLICKS), settings.application("sessionize")
    consumer = Consumer(clients.librdkafka(settings) | {"group.id": group, "enable.auto.commit": False})
    ends = [TopicPartition(topic, number) for number in range(settings.partitions)]
    for end in ends:
        end.offset = consumer.get_watermark_offsets(end, timeout=10.0)[1]
    deadline = time.monotonic() + 60
    while True:
        try:
            consumer.commit(offsets=ends, asynchronous=False)
            consumer.close()
            return
        except KafkaException:  # the dead worker still counts as a member
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def early_rebalance(settings: Settings, directory: Path, module: Module, seed: int) -> list[str]:
    """The log is there before anybody reads it; more workers come while the first begins, before a commit; it dies."""
    traffic = list(Traffic(seed=seed).records(settings.partitions, settings))
    send_all(settings, traffic)
    log = read_clicks(settings, len(traffic))
    expected, ledger = replay_log(log, settings), Ledger(settings)
    slow = settings.but(flush_ms=60_000, flush_events=1_000_000)  # only a rebalance or a closed session commits
    workers = [
        Worker(slow if not number else settings, directory / f"w{seed}-{number}", ROLES, module) for number in range(3)
    ]
    with Fleet(workers) as fleet:
        workers[0].start()
        deadline = time.monotonic() + 20
        while not metric(workers[0], "browsecast_received_events_total") and time.monotonic() < deadline:
            time.sleep(0.05)
        workers[1].start()
        workers[2].start()
        workers[1].wait_ready()
        workers[0].kill()
        ledger.read_until(lambda: complete(expected, ledger, False), fleet.tick, patience_s=20)
    return verdict(expected, ledger, log, predicted=False)
