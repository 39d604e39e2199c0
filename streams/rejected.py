"""What was rejected: look at it, and send it again once its cause is mended."""

import base64
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import msgspec
from confluent_kafka import KafkaException, Producer, TopicPartition

from streams import clients, tail, wire
from streams.errors import BrokerUnavailable, StateUnwritable
from streams.settings import Settings

TRANSACTION_S = 60.0
TRANSACTION_EVENTS = 10_000  # well within the producer's queue
_decode = msgspec.json.Decoder(wire.Rejected).decode


@dataclass(frozen=True, slots=True)
class Reject:
    """One rejected record and its own place in the topic `clicks.rejected`."""

    partition: int
    offset: int
    timestamp_ms: int
    record: wire.Rejected

    @property
    def original(self) -> bytes | None:
        """The event's bytes as they came."""
        return None if self.record.original is None else base64.b64decode(self.record.original)

    @property
    def original_key(self) -> bytes | None:
        """The event's key as it came."""
        return None if self.record.original_key is None else base64.b64decode(self.record.original_key)


def read(settings: Settings, reason: str | None = None) -> Iterator[Reject]:
    """Every rejected record that is there now, those of one reason only if it is given."""
    for message in tail.until_end(settings, settings.topic(wire.REJECTED)):
        record = _decode(message.value())
        if reason is None or record.reason == reason:
            yield Reject(message.partition(), message.offset(), message.timestamp()[1], record)


def last(settings: Settings, limit: int, reason: str | None = None) -> list[Reject]:
    """The newest `limit` rejected records, oldest first."""
    newest: dict[int, deque[Reject]] = defaultdict(lambda: deque(maxlen=limit))
    for reject in read(settings, reason):
        newest[reject.partition].append(reject)
    return sorted(chain.from_iterable(newest.values()), key=lambda reject: reject.timestamp_ms)[-limit:]


def resend(settings: Settings, reason: str | None = None, *, dry_run: bool = False) -> Counter[str]:
    """Publish the originals to `clicks` again, bytes and key unchanged, and return how many, by reason.

    Each goes once, however often this is called: one consumer group a reason remembers how far it was sent, events and
    positions go in one transaction, and a second resend at the same time fences the first. Raises StateUnwritable if a
    transaction fails; what it held was not sent then.
    """
    sent: Counter[str] = Counter()
    producer = None if dry_run else _open(settings)  # fences others before the positions are read
    positions: dict[str, dict[int, int]] = {}
    pending: list[Reject] = []
    for reject in read(settings, reason):
        known = positions.get(reject.record.reason)
        if known is None:
            known = positions[reject.record.reason] = _committed(settings, reject.record.reason)
        if reject.offset < known.get(reject.partition, 0):
            continue
        sent[reject.record.reason] += 1
        pending.append(reject)
        if len(pending) == TRANSACTION_EVENTS:
            _publish(settings, producer, pending)
            pending = []
    _publish(settings, producer, pending)
    return sent


def _group(settings: Settings, reason: str) -> str:
    return settings.application(f"resend-{reason}")


def _committed(settings: Settings, reason: str) -> dict[int, int]:
    """How far the rejected records of one reason were sent, by partition."""
    topic = settings.topic(wire.REJECTED)
    with tail.consumer(settings, group_id=_group(settings, reason)) as reader:
        places = [TopicPartition(topic, number) for number in tail.partitions_of(reader, topic, settings)]
        return {
            place.partition: place.offset for place in reader.committed(places, tail.METADATA_S) if place.offset >= 0
        }


def _open(settings: Settings) -> Any:
    producer = Producer(
        clients.librdkafka(settings)
        | {
            "transactional.id": settings.application("resend"),
            "transaction.timeout.ms": int(TRANSACTION_S * 1_000),
            "partitioner": "murmur2_random",
            "message.max.bytes": tail.MAX_FETCH_BYTES,
            "log_level": 0,
        }
    )
    try:
        producer.init_transactions(TRANSACTION_S)
    except KafkaException as error:
        raise BrokerUnavailable(
            f"no transaction could be opened at {settings.bootstrap_servers} ({_words(error)})"
        ) from error
    return producer


def _publish(settings: Settings, producer: Any, rejects: list[Reject]) -> None:
    """One transaction: the originals, and how far each reason was sent."""
    if producer is None or not rejects:
        return
    failed: list[str] = []

    def delivered(error: Any, _: Any) -> None:
        if error is not None:
            failed.append(error.str())

    try:
        producer.begin_transaction()
        for reject in rejects:
            producer.produce(settings.topic(wire.CLICKS), reject.original, reject.original_key, on_delivery=delivered)
        _remember(settings, producer, rejects)
        producer.commit_transaction(TRANSACTION_S)
    except KafkaException as error:
        reason = failed[0] if failed else _words(error)
        raise StateUnwritable(
            f"rejected events were not sent again ({reason}): mend it and repeat the command"
        ) from error


def _remember(settings: Settings, producer: Any, rejects: list[Reject]) -> None:
    """Put the positions reached into the transaction, one group a reason."""
    topic = settings.topic(wire.REJECTED)
    reached: dict[str, dict[int, int]] = defaultdict(dict)
    for reject in rejects:  # offsets of a partition only grow
        reached[reject.record.reason][reject.partition] = reject.offset + 1
    for reason, offsets in reached.items():
        with tail.consumer(settings, group_id=_group(settings, reason)) as reader:
            places = [TopicPartition(topic, number, offset) for number, offset in offsets.items()]
            producer.send_offsets_to_transaction(places, reader.consumer_group_metadata(), TRANSACTION_S)


def _words(error: KafkaException) -> str:
    return str(error.args[0].str())
