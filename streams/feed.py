"""A topic read by one reader that keeps its positions itself: what the trainer's archive and judge read with."""

from collections.abc import Mapping
from contextlib import suppress

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from streams import clients, tail
from streams.errors import BrokerUnavailable, StateUnusable
from streams.settings import Settings
from streams.wire import Record

ANSWER_S = 10.0

log = structlog.get_logger(__name__)


class Feed:
    """All partitions of the topic `name` (as in `wire`), read committed; it is what `trainer.feeds.Feed` describes.

    `group` is the role whose lag the broker shows. A broker that goes away while records are read is waited for.
    """

    def __init__(self, settings: Settings, name: str, group: str) -> None:
        """Raises `WrongTopics` without the topic, `BrokerUnavailable` without a broker."""
        self.topic = settings.topic(name)
        self._servers = settings.bootstrap_servers
        config = {
            "group.id": settings.application(group),
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "isolation.level": "read_committed",
            "auto.offset.reset": "error",
            "fetch.max.bytes": tail.MAX_FETCH_BYTES,
            "log_level": 0,
        }
        self._consumer = Consumer(clients.librdkafka(settings) | config)
        self._reached: dict[int, int] = {}
        try:
            self._partitions = tail.partitions_of(self._consumer, self.topic, settings)
        except Exception:
            self.close()
            raise

    def assign(self, positions: Mapping[int, int]) -> None:
        """Go on at these positions; a partition that is not named is read from its beginning.

        Records that the broker has deleted before they were read are gone, which is logged. Raises `StateUnusable` when
        a position lies behind the end: the topic is not the one that the positions belong to.
        """
        self._reached = {number: self._start(number, positions.get(number)) for number in self._partitions}
        self._consumer.assign([TopicPartition(self.topic, *place) for place in self._reached.items()])

    def _start(self, number: int, position: int | None) -> int:
        low, high = self._limits(number)
        if position is None:
            return low
        if position > high:
            raise StateUnusable(
                f"{self.topic}/{number} ends at {high}, but was read up to {position} before: it was made anew, or is "
                "another cluster's. Put its records back, or begin with an empty directory"
            )
        if position < low:
            log.error("records were deleted unread", topic=self.topic, partition=number, first=position, end=low)
        return max(position, low)

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        """The next records, those of a partition in the order of their offsets; none when nothing came in time."""
        records = []
        for message in self._consumer.consume(max_records, timeout_s):
            error, number, offset = message.error(), message.partition(), message.offset()
            if error is None:
                self._reached[number] = offset + 1
                records.append(Record(number, offset, message.key(), message.value(), message.timestamp()[1]))
            elif error.code() == KafkaError._PARTITION_EOF:
                self._reached[number] = offset
            elif error.code() == KafkaError._AUTO_OFFSET_RESET:
                self.assign(dict(self._reached))
            elif error.fatal() or error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
                raise BrokerUnavailable(f"reading {self.topic} at {self._servers} failed: {error.str()}")
            else:
                log.warning("reading goes on when the broker is back", topic=self.topic, reason=error.str())
        return records

    def reached(self) -> dict[int, int]:
        """How far each partition has been read, Kafka's own control records included: compare this with `ends`."""
        return dict(self._reached)

    def ends(self) -> dict[int, int]:
        """Where each partition ends now, for those who read committed. Raises `BrokerUnavailable`."""
        return {number: self._limits(number)[1] for number in self._partitions}

    def commit(self, positions: Mapping[int, int]) -> None:
        """Tell the broker's group, for lag tools only: nobody starts from there. Failing is no error."""
        with suppress(KafkaException):
            self._consumer.commit(
                offsets=[TopicPartition(self.topic, *place) for place in positions.items()], asynchronous=True
            )

    def close(self) -> None:
        """Let go of the connection."""
        self._consumer.close()

    def _limits(self, number: int) -> tuple[int, int]:
        """First offset and end of a partition."""
        try:
            low, high = self._consumer.get_watermark_offsets(TopicPartition(self.topic, number), timeout=ANSWER_S)
        except KafkaException as error:
            raise BrokerUnavailable(
                f"{self._servers} did not say where {self.topic} ends ({error.args[0].str()}): try again when it is up"
            ) from error
        return low, high
