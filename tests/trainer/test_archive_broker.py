"""The archive's role as a process on a real broker, killed again and again: the files and the topic hold the same."""

import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from confluent_kafka import Producer

from streams import wire
from streams.clients import librdkafka
from streams.feed import Feed
from streams.settings import Settings
from tests.trainer.sessionlog import by_glob, by_manifest, names, sessions_log, truth
from tests.workers import Fleet, Trainer
from trainer.archive import Archive

BATCH, REST, KILLS, PAUSE_S = 6, 500, 5, 0.2
PATIENCE_S = 120.0

pytestmark = [pytest.mark.kafka, pytest.mark.slow]


class Sessionizer:
    """Writes sessions as the role does, in transactions; every fifth is aborted and then sent again."""

    def __init__(self, settings: Settings, log: Iterable[wire.Record]) -> None:
        self._topic, self._log = settings.topic(wire.SESSIONS), iter(log)
        self._producer = Producer(librdkafka(settings) | {"transactional.id": f"{settings.topic_prefix}writer"})
        self._producer.init_transactions(30)
        self._sent = 0

    def send(self, records: int) -> bool:
        """One transaction; False when all are sent."""
        batch = list(islice(self._log, records))
        self._sent += 1
        for is_last in (False, True) if self._sent % 5 == 0 else (True,):
            self._producer.begin_transaction()
            for one in batch:
                self._producer.produce(self._topic, one.value, one.key, one.partition)
            self._producer.flush(30)
            self._producer.commit_transaction(30) if is_last else self._producer.abort_transaction(30)
        return bool(batch)


def read_committed(settings: Settings) -> list[wire.Record]:
    """Everything in the topic."""
    feed, found = Feed(settings, wire.SESSIONS, "test"), list[wire.Record]()
    feed.assign({})
    ends = feed.ends()
    while any(feed.reached()[number] < end for number, end in ends.items()):
        found += feed.poll(1_000, 0.5)
    feed.close()
    return found


def wait_until(come: Callable[[], bool], fleet: Fleet, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not come():
        fleet.tick()
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def test_killed_again_and_again_the_archive_has_what_the_topic_has(
    settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = settings_for(partitions=3, archive_flush_ms=100, archive_forget_ms=1_000)
    log = sessions_log(7, 12_000, users=40, forgets=0.005)
    writer, choose = Sessionizer(settings, log), Random(7)
    with Fleet([Trainer(settings, tmp_path / "t", ("archive",))]) as fleet:
        fleet.start()
        (trainer,) = fleet.workers
        archive = Archive(trainer.settings.archive_dir)
        for _ in range(KILLS):
            since = archive.manifest().commit
            while archive.manifest().commit < since + 3:
                fleet.tick()
                assert writer.send(BATCH), "the log ended before the kills"
                time.sleep(PAUSE_S)
            time.sleep(choose.uniform(0, 0.3))  # anywhere in its work
            trainer.kill()
        while writer.send(REST):
            fleet.tick()
        expected = names(truth(read_committed(settings)))
        assert names(truth(log)) == expected
        place = trainer.settings.archive_dir
        wait_until(lambda: by_manifest(place) == expected, fleet, "the manifest names other sessions than the topic")
        wait_until(lambda: archive.manifest().forgets == (), fleet, "forgotten users are in the files for good")
        found = by_glob(place)
        print(
            f"{len(fleet.ended)} kills, {len(log)} records, {len(found)} sessions, {archive.manifest().commit} commits"
        )
        assert found == by_manifest(place) == expected
