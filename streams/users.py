"""One visitor's state, from outside: show it, or have it forgotten."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from confluent_kafka import KafkaError, Producer

from streams import clients, tail, wire
from streams.channels import channels_of
from streams.errors import BrokerUnavailable
from streams.partitioner import partition_of
from streams.sessions import User, decode_user, history_of
from streams.settings import Settings
from streams.touched import touched_of

DELIVERY_S = 30.0


@dataclass(frozen=True, slots=True)
class UserState:
    """What is kept of a visitor, and where: partition and offset of its record in the changelog."""

    user_id: str
    partition: int
    offset: int
    user: User

    def lines(self) -> Mapping[str, Any]:
        """The state as plain values, for people and for JSON. Times are epoch milliseconds."""
        user, touched = self.user, touched_of(self.user.items)
        return {
            "user_id": self.user_id,
            "partition": self.partition,
            "changelog_offset": self.offset,
            "last_event_ms": user.last_ms,
            "sessions_closed": user.number,
            "last_session_id": user.closed_id,
            "last_session_end_ms": user.closed_end_ms,
            "open_sessions": [
                {"start_ms": visit.ts[0], "end_ms": visit.ts[-1], "pages": visit.pages}
                for visit in user.open
                if visit.ts
            ],
            "history": history_of(user),
            "routing": None if user.routing is None else {"router": user.routing.digest, "pages": user.routing.count},
            "channels": [
                {"item_id": one.item_id, "ts_ms": one.ts_ms, "weight": one.weight, "events_since": one.age}
                for one in channels_of(user.seeds)
            ],
            "recent_items": touched.items,
            "bought_items": [item_id for item_id, _ in touched.bought],
            "events_this_minute": user.window_events,
        }


def show(settings: Settings, user_id: str) -> UserState | None:
    """The visitor's last committed record, or None if nothing is kept. Reads one partition of the changelog, whole."""
    key = user_id.encode()
    partition = partition_of(key, settings.partitions)
    latest = None
    for message in tail.until_end(settings, settings.changelog("sessionize"), [partition]):
        if message.key() == key:
            latest = message
    if latest is None or latest.value() is None:
        return None
    return UserState(user_id, partition, latest.offset(), decode_user(latest.value()))


def forget(settings: Settings, user_id: str) -> tuple[int, int]:
    """Publish the null value that makes every table forget the visitor; its partition and offset in `clicks`."""
    placed: list[tuple[Any, Any]] = []
    producer = Producer(
        clients.librdkafka(settings)
        | {
            "enable.idempotence": True,
            "partitioner": "murmur2_random",
            "message.timeout.ms": int(DELIVERY_S * 1_000),
            "log_level": 0,
        }
    )
    producer.produce(
        settings.topic(wire.CLICKS), None, user_id.encode(), on_delivery=lambda *result: placed.append(result)
    )
    producer.flush(DELIVERY_S + 5.0)
    error, message = placed[0] if placed else (KafkaError(KafkaError._TIMED_OUT), None)
    if message is None or error is not None:
        raise BrokerUnavailable(
            f"user {user_id} is not forgotten: the broker at {settings.bootstrap_servers} did not take it "
            f"({error.str()}); try again when it is up"
        )
    return message.partition(), message.offset()
