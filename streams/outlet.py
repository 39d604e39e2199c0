"""Records published from outside the workers: an idempotent producer that waits for every confirmation."""

import time
from typing import Any

import msgspec
from confluent_kafka import KafkaError, KafkaException, Producer

from streams import clients, topics
from streams.errors import BrokerUnavailable, WrongTopics
from streams.settings import Settings

BROKER_S = 30.0
DELIVERY_MS = 120_000  # a broker may be away for so long while we publish
NAP_S = 0.2


class _Unconfirmed(msgspec.Struct):
    """What the brokers did not take. Apart from the producer, or the two would keep each other alive."""

    events: int = 0
    first: KafkaError | str | None = None

    def add(self, error: KafkaError | None, message: Any = None) -> None:
        """The producer's report on one record."""
        if error is not None:
            self.events += 1
            self.first = self.first or error

    def check(self) -> None:
        """Raise `BrokerUnavailable` if there is any."""
        if self.events:
            raise BrokerUnavailable(
                f"the brokers did not confirm {self.events} records ({self.first}): mend that and publish them again; "
                "events that arrived already are recognised by their event_id, and an item by its item_id"
            )


class Outlet:
    """An idempotent producer to one topic, `name` as in `wire`.

    Raises `BrokerUnavailable` if no broker answers or a record is not confirmed, `WrongTopics` without the topic.
    """

    def __init__(self, settings: Settings, name: str) -> None:
        self._topic = settings.topic(name)
        if self._topic not in topics.wait_for_broker(settings, BROKER_S).topics:
            raise WrongTopics(f"topic {self._topic} does not exist: create it with `browsecast topics create`")
        self._unconfirmed = _Unconfirmed()
        self._producer = Producer(
            clients.librdkafka(settings)
            | {
                "enable.idempotence": True,
                "partitioner": "murmur2_random",
                "compression.type": "lz4",
                "log_level": 0,
                "linger.ms": 20,
                "message.timeout.ms": DELIVERY_MS,
                "queue.buffering.max.messages": 200_000,
                "delivery.report.only.error": True,
                "on_delivery": self._unconfirmed.add,
            }
        )

    def poll(self, seconds: float) -> None:
        """Serve the producer for so long."""
        self._producer.poll(seconds)

    def send(self, key: bytes, value: bytes | None, timestamp_ms: int = 0) -> None:
        """Queue one record (timestamp 0: now; a null value removes); waits while the queue is full."""
        while True:
            try:
                self._producer.produce(self._topic, value, key, timestamp=timestamp_ms)
                return
            except BufferError:
                self._producer.poll(NAP_S)
            except KafkaException as error:
                self._unconfirmed.add(error.args[0])
            self._unconfirmed.check()

    def flush(self) -> None:
        """Wait for every confirmation. Raises `BrokerUnavailable` when one does not come."""
        deadline = time.monotonic() + DELIVERY_MS / 1_000
        while (left := self._producer.flush(1.0)) and time.monotonic() < deadline:
            self._unconfirmed.check()
        if left:
            self._unconfirmed.events += left
            self._unconfirmed.first = self._unconfirmed.first or "no answer in time"
        self._unconfirmed.check()
