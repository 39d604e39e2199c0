"""Reading our own topics from outside, read committed: up to the present end, or on and on."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from streams import clients
from streams.errors import BrokerUnavailable, WrongTopics
from streams.settings import Settings

BEGINNING, END = -2, -1  # librdkafka's logical offsets
POLL_S = 0.2
METADATA_S = 10.0
SILENCE_S = 60.0
MAX_FETCH_BYTES = 16 << 20
AT_END_MS = 10  # the broker tells of an end only when it has waited so long for more


@contextmanager
def consumer(settings: Settings, **config: Any) -> Iterator[Any]:
    """A consumer that reads committed records and belongs to no group; `config` in librdkafka's names, dots as `_`."""
    base = clients.librdkafka(settings) | {
        "group.id": f"{settings.topic_prefix}browsecast-tail",
        "enable.auto.commit": False,
        "isolation.level": "read_committed",
        "auto.offset.reset": "earliest",
        "fetch.max.bytes": MAX_FETCH_BYTES,
        "log_level": 0,
    }
    opened = Consumer(base | {name.replace("_", "."): value for name, value in config.items()})
    try:
        yield opened
    finally:
        opened.close()


def until_end(settings: Settings, topic: str, partitions: Iterable[int] | None = None) -> Iterator[Any]:
    """Every committed record of the topic (its full name) that is there now; WrongTopics if there is no such topic."""
    with consumer(settings, enable_partition_eof=True, fetch_wait_max_ms=AT_END_MS) as reader:
        there = partitions_of(reader, topic, settings)
        unfinished = set(there if partitions is None else partitions)
        if not unfinished <= set(there):
            raise WrongTopics(f"{topic} has {len(there)} partitions, not PARTITIONS: see browsecast topics check")
        reader.assign([TopicPartition(topic, number, BEGINNING) for number in unfinished])
        heard = time.monotonic()
        while unfinished:
            message = reader.poll(POLL_S)
            if message is not None:
                heard = time.monotonic()
                if message.error() is not None and message.error().code() == KafkaError._PARTITION_EOF:
                    unfinished.discard(message.partition())
                elif message.partition() in unfinished:
                    yield _checked(message)
            elif time.monotonic() - heard > SILENCE_S:
                raise BrokerUnavailable(f"{settings.bootstrap_servers} fell silent while {topic} was read; try again")


def follow(settings: Settings, topics: Iterable[str], *, from_beginning: bool = False) -> Iterator[Any]:
    """The topics' committed records as they come; None whenever nothing came for a moment, so that callers can act."""
    with consumer(settings) as reader:
        start = BEGINNING if from_beginning else END
        names = list(topics)
        found = {name: partitions_of(reader, name, settings) for name in names}
        reader.assign([TopicPartition(name, number, start) for name in names for number in found[name]])
        while True:
            message = reader.poll(POLL_S)
            yield None if message is None else _checked(message)


def partitions_of(reader: Any, topic: str, settings: Settings) -> list[int]:
    """The topic's partitions. BrokerUnavailable without a broker, WrongTopics without the topic."""
    try:
        found = reader.list_topics(topic, timeout=METADATA_S).topics[topic]
    except KafkaException as error:
        raise BrokerUnavailable(
            f"no Kafka broker answered at {settings.bootstrap_servers} ({error.args[0].str()}): start it, or name "
            "another with --bootstrap-servers or BROWSECAST_BOOTSTRAP_SERVERS"
        ) from error
    if found.error is not None:
        raise WrongTopics(
            f"topic {topic} is not there: browsecast topics create makes it, or name the right --topic-prefix"
        )
    return sorted(found.partitions)


def _checked(message: Any) -> Any:
    error = message.error()
    if error is not None:
        raise BrokerUnavailable(f"reading {message.topic()} failed: {error.str()}")
    return message
