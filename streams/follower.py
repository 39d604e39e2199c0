"""A topic followed in a thread, from where the caller wants on: what beside the event loop must stay up to date."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from streams import tail
from streams.errors import BrokerUnavailable, BrowsecastError
from streams.settings import Settings

AT_ONCE = 500  # records handed over
AGAIN_S = 5.0  # after the topic could not be read

log = structlog.get_logger(__name__)

# From a consumer that nothing is assigned to, the topic and its partitions: the offset to begin at in each partition.
Start = Callable[[Any, str, Sequence[int]], Mapping[int, int]]


def from_beginning(reader: Any, topic: str, partitions: Sequence[int]) -> dict[int, int]:
    """All that is there."""
    return dict.fromkeys(partitions, tail.BEGINNING)


class Follower:
    """Hands over committed records as they come, and says when it has come to the end for the first time.

    A broker that goes away is waited for; reading goes on where it was.
    """

    def __init__(self, settings: Settings, name: str, start: Start, take: Callable[[Sequence[Any]], None]) -> None:
        """`name` as in `wire`. `take` gets some messages, those of a partition in order; it is called in the thread."""
        self._settings, self._topic = settings, settings.topic(name)
        self._start, self._take = start, take
        self._positions: dict[int, int] = {}
        self._unread: set[int] = set()
        self._stopped = threading.Event()
        self.at_end = threading.Event()

    def start(self) -> None:
        """Begin."""
        threading.Thread(target=self._follow, daemon=True).start()

    def stop(self) -> None:
        """Take nothing more."""
        self._stopped.set()

    def _follow(self) -> None:
        while not self._stopped.is_set():
            try:
                with tail.consumer(self._settings, enable_partition_eof=True) as reader:
                    self._read(reader)
            except (BrowsecastError, KafkaException) as error:
                log.warning("a topic cannot be read, what is known of it stays", topic=self._topic, error=str(error))
                self._stopped.wait(AGAIN_S)

    def _read(self, reader: Any) -> None:
        partitions = tail.partitions_of(reader, self._topic, self._settings)
        if not self._positions:
            self._positions = dict(self._start(reader, self._topic, partitions))
            self._unread = set(partitions)
        reader.assign([TopicPartition(self._topic, *place) for place in self._positions.items()])
        while not self._stopped.is_set():
            messages = reader.consume(AT_ONCE, tail.POLL_S)
            records = [message for message in messages if message.error() is None]
            if records:
                self._hand_over(records)
            for message in messages:
                if (error := message.error()) is not None:
                    self._hear(message, error)
            if not self._unread:
                self.at_end.set()

    def _hand_over(self, records: Sequence[Any]) -> None:
        try:
            self._take(records)
        except Exception:  # the thread must go on; whoever takes them has counted what is wrong with a record
            log.exception("records could not be taken", topic=self._topic, records=len(records))
        for message in records:
            self._positions[message.partition()] = message.offset() + 1

    def _hear(self, message: Any, error: Any) -> None:
        if error.code() == KafkaError._PARTITION_EOF:
            self._unread.discard(message.partition())
        elif error.fatal() or error.code() == KafkaError.TOPIC_AUTHORIZATION_FAILED:
            raise BrokerUnavailable(error.str())
        else:
            log.warning("reading goes on when the broker is back", topic=self._topic, reason=error.str())
