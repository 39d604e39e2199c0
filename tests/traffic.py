"""Clicks for tests: a seeded shop with all that goes wrong, and a producer that writes down what the broker took.

The producer is idempotent: else it would reorder when the broker comes back, and its events would rightly be late.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from confluent_kafka import KafkaError, Message, Producer

from streams.clients import librdkafka
from streams.settings import Settings
from streams.wire import CLICKS

BASE_MS = 1_700_000_000_000
PAGES = ("home", "shoes", "shirts", "hats", "sale", "search", "about", "basket", "checkout")
DAY_MS = 86_400_000


@dataclass(frozen=True)
class Sent:
    """A record to send; `kind` says what is wrong with it. `timestamp_ms` is its Kafka timestamp."""

    key: bytes | None
    value: bytes | None
    timestamp_ms: int
    kind: str = "good"
    partition: int | None = None


@dataclass
class Traffic:
    """A log to be: `disorder_ms` must stay within the grace for events not to be late."""

    seed: int = 1
    events: int = 12_000
    users: int = 300
    step_ms: int = 200
    disorder_ms: int = 8_000
    duplicates: float = 0.02
    poison: float = 0.01
    late: float = 0.002
    forgets: float = 0.0  # null values: their users are forgotten, and their sessions numbered anew
    items: int = 0  # `i0`, `i1`, ...: each click but a few is on one; 0: none is
    wild: int = 2  # users with clocks days ahead; fewer than `ahead_users`, so the watermark must not move

    def records(self, partitions: int, settings: Settings) -> Iterator[Sent]:
        """The shop's clicks, then closing events in every partition that bring all sessions to their end."""
        choose = random.Random(self.seed)
        now = BASE_MS
        recent: list[Sent] = []
        wild_at = {choose.randrange(200, self.events): f"w{number}" for number in range(self.wild)}
        for number in range(self.events):
            now += self.step_ms
            yield from self._disturbances(choose, recent, now, number)
            if number in wild_at:
                ts = now + 3 * DAY_MS
                yield click(wild_at[number], ts, "home", f"wild{number}", kind="wild")
            user = f"u{int(self.users * choose.random() ** 2):05d}"
            back = choose.random()
            ts = now - (choose.randrange(1, self.disorder_ms) if back < 0.2 else 0)
            if back > 1 - self.late:
                ts = now - settings.gap_ms - settings.grace_ms - choose.randrange(60_000)
            kind = choose.choices(("view", "cart", "purchase"), (20, 3, 1))[0]
            item = f"i{int(self.items * choose.random() ** 2)}" if self.items and choose.random() < 0.9 else None
            recent.append(click(user, ts, choose.choice(PAGES), f"e{self.seed}-{number}", kind=kind, item_id=item))
            del recent[:-40]
            yield recent[-1]
        yield from closing(partitions, now, settings)

    def _disturbances(self, choose: random.Random, recent: Sequence[Sent], now: int, number: int) -> Iterator[Sent]:
        if recent and choose.random() < self.duplicates:
            yield choose.choice(recent)
        if recent and choose.random() < self.forgets:
            yield Sent(choose.choice(recent).key, None, now, "forget")
        if choose.random() < self.poison:
            poison = POISON[choose.randrange(len(POISON))]
            yield Sent(poison.key, poison.value, now, poison.kind)


def click(user: str, ts: int, page: str, event_id: str, kind: str = "view", item_id: str | None = None) -> Sent:
    """A good event whose record has the event's own time, as `replay` writes it."""
    known = kind if kind in ("view", "cart", "purchase") else "view"
    value = {"event_id": event_id, "user_id": user, "ts": ts, "page": page, "type": known}
    value |= {} if item_id is None else {"item_id": item_id}
    return Sent(user.encode(), json.dumps(value).encode(), ts, kind)


def closing(partitions: int, now: int, settings: Settings) -> Iterator[Sent]:
    """In each partition a visitor of its own, who comes back until everything before has closed, twice over."""
    step = min(settings.ahead_ms // 2, settings.gap_ms * 2)
    for partition in range(partitions):
        for number in range(1, 3 + (2 * settings.gap_ms + settings.grace_ms) // step):
            sent = click(f"z{partition}", now + number * step, "home", f"close{partition}-{number}")
            yield Sent(sent.key, sent.value, sent.timestamp_ms, "closing", partition)


def _poison(kind: str, value: bytes, key: bytes | None = b"u1") -> Sent:
    return Sent(key, value, BASE_MS, kind)


_GOOD = {"user_id": "u1", "ts": BASE_MS, "page": "home"}
POISON = (
    _poison("not_json", b'{"user_id": "u1", '),
    _poison("not_utf8", b'{"user_id": "u1", "ts": 1700000000000, "page": "\xff\xfe"}'),
    _poison("no_user", json.dumps({"ts": BASE_MS, "page": "home"}).encode()),
    _poison("no_page", json.dumps({"user_id": "u1", "ts": BASE_MS}).encode()),
    _poison("wrong_ts", json.dumps(_GOOD | {"ts": "yesterday"}).encode()),
    _poison("wrong_price", json.dumps(_GOOD | {"price": "cheap"}).encode()),
    _poison("nan", b'{"user_id": "u1", "ts": 1700000000000, "page": "home", "price": NaN}'),
    _poison("year_1970", json.dumps(_GOOD | {"ts": 1}).encode()),
    _poison("year_2100", json.dumps(_GOOD | {"ts": 4_102_444_800_000}).encode()),
    _poison("other_key", json.dumps(_GOOD).encode(), key=b"u2"),
    _poison("no_key", json.dumps(_GOOD).encode(), key=None),
    _poison("key_not_utf8", json.dumps(_GOOD).encode(), key=b"\xff\xfe"),
    _poison("too_large", json.dumps(_GOOD | {"query": "x" * 270_000}).encode()),
    _poison("too_deep", json.dumps(_GOOD).encode()[:-1] + b', "attributes": ' + b'{"a":' * 40 + b"1" + b"}" * 41),
    _poison("not_an_object", b"[1, 2, 3]"),
    _poison("empty", b""),
)


@dataclass
class Publisher:
    """Sends to `clicks` in order and keeps a manifest: where the broker acknowledged each record."""

    settings: Settings
    manifest: dict[tuple[int, int], Sent] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        options: dict[str, str | int | float | bool] = {
            "enable.idempotence": True,
            "partitioner": "murmur2_random",
            "linger.ms": 5,
            "message.timeout.ms": 120_000,
            # A single broker that was restarted may otherwise be unknown for five minutes.
            "topic.metadata.refresh.interval.ms": 2_000,
            "log_level": 0,
        }
        self._producer = Producer(librdkafka(self.settings) | options)

    def send(self, records: Sequence[Sent]) -> None:
        """Hand the records over; acknowledgements come later."""
        topic = self.settings.topic(CLICKS)
        for record in records:
            arguments = {} if record.partition is None else {"partition": record.partition}

            def done(error: KafkaError | None, message: Message, record: Sent = record) -> None:
                self._acknowledge(error, message, record)

            while True:
                try:
                    self._producer.produce(
                        topic, record.value, record.key, timestamp=record.timestamp_ms, on_delivery=done, **arguments
                    )
                    break
                except BufferError:
                    self._producer.poll(0.1)
        self._producer.poll(0)

    def flush(self) -> None:
        """Wait for every acknowledgement. Raises AssertionError if a record was given up: then the test is void."""
        left = self._producer.flush(120)
        assert not left and not self.failures, f"{left} records unsent, {self.failures[:3]}"

    def _acknowledge(self, error: KafkaError | None, message: Message, record: Sent) -> None:
        partition, offset = message.partition(), message.offset()
        if error is not None or partition is None or offset is None:
            self.failures.append(str(error))
        else:
            self.manifest[partition, offset] = record
