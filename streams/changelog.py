"""Reading a changelog back, committed records only, by librdkafka: its threads fetch while ours write to the store."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from confluent_kafka import KafkaError, KafkaException, TopicPartition

from streams import tail
from streams.settings import Settings

RECORDS = 5_000  # at a time
WAIT_S = 0.1
FETCH = {
    "enable_partition_eof": True,
    "max_partition_fetch_bytes": 8 << 20,
    "fetch_wait_max_ms": 100,
    "fetch_queue_backoff_ms": 5,  # else it pauses a second whenever it is ahead of us
}


class Part(NamedTuple):
    """Records of one partition in order, and the offset behind all that has been read of it."""

    records: list[tuple[bytes, bytes | None]]
    position: int


class ChangelogReader:
    """Some partitions of one changelog, read from given offsets on."""

    def __init__(self, consumer: Any, topic: str) -> None:
        """`consumer` is one of confluent_kafka's, `topic` the changelog's full name."""
        self._consumer, self._topic = consumer, topic

    async def beginnings(self, numbers: Sequence[int]) -> dict[int, int]:
        """The first offset of each partition."""
        return await asyncio.to_thread(lambda: {number: self._beginning(number) for number in numbers})

    def start(self, offsets: Mapping[int, int]) -> None:
        """Read these partitions from these offsets on."""
        self._consumer.assign([TopicPartition(self._topic, number, offset) for number, offset in offsets.items()])

    async def take(self) -> dict[int, Part]:
        """What has come, by partition; nothing when nothing comes for a moment."""
        messages = await asyncio.to_thread(self._consumer.consume, RECORDS, WAIT_S)
        parts: dict[int, Part] = {}
        for message in messages:
            error, number, offset = message.error(), message.partition(), message.offset()
            part = parts.get(number) or Part([], 0)
            if error is None:
                part.records.append((message.key(), message.value()))
                offset += 1
            elif error.code() != KafkaError._PARTITION_EOF:
                if error.fatal():
                    raise KafkaException(error)
                continue  # librdkafka tries again
            parts[number] = Part(part.records, offset)
        return parts

    def _beginning(self, number: int) -> int:
        low, _ = self._consumer.get_watermark_offsets(TopicPartition(self._topic, number), timeout=tail.METADATA_S)
        return int(low)


@contextmanager
def open_changelog(settings: Settings, topic: str) -> Iterator[ChangelogReader]:
    """A reader that is closed at the end."""
    with tail.consumer(settings, **FETCH) as consumer:
        yield ChangelogReader(consumer, topic)
