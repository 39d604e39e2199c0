"""The topic `items` as a file: what a refresh learns the items' texts from."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka import Producer
from structlog.testing import capture_logs

from streams import itemtopic, wire
from streams.clients import librdkafka
from streams.mock import MockCluster
from streams.settings import Settings
from streams.topics import specs
from trainer.catalogue import read_texts


@pytest.fixture
def settings() -> Iterator[Settings]:
    made = Settings(topic_prefix="topic.", partitions=2)
    with MockCluster(dict.fromkeys(specs(made), made.partitions)) as cluster:
        yield made.but(bootstrap_servers=cluster.bootstrap_servers)


def test_the_file_holds_what_is_said_of_each_item_now(settings: Settings, tmp_path: Path) -> None:
    lines = [{"item_id": str(number), "text": f"shoe {number}", "price": 1.5} for number in range(20)]
    (tmp_path / "catalogue.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    itemtopic.publish(settings, tmp_path / "catalogue.jsonl", print)
    itemtopic.remove(settings, ["3", "17", "never there"])
    producer = Producer(librdkafka(settings) | {"partitioner": "murmur2_random"})
    for key, value in (
        (b"5", b'{"item_id": "5",\n "text": "boot",\n "category": "winter", "size": 40}'),
        (b"6", b"{"),
        (b"7", b'{"item_id": "8", "text": "of another"}'),
        (b"\xff", b'{"item_id": "x"}'),
        (None, b'{"item_id": "y"}'),
    ):
        producer.produce(settings.topic(wire.ITEMS), value, key)
    assert producer.flush(30) == 0
    with capture_logs() as logs:
        assert itemtopic.save(settings, tmp_path / "items.jsonl") == 18
    assert len([one for one in logs if "cannot be read" in one["event"]]) == 4
    wanted = {line["item_id"]: line["text"] for line in lines if line["item_id"] not in ("3", "17")}
    assert read_texts(tmp_path / "items.jsonl") == wanted | {"5": "boot winter"}


def test_without_items_or_the_topic_there_is_no_file(settings: Settings, tmp_path: Path) -> None:
    for empty in (settings, settings.but(topic_prefix="other.")):
        assert itemtopic.save(empty, tmp_path / "items.jsonl") == 0
        assert not (tmp_path / "items.jsonl").exists()
