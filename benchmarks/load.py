"""The load of the benchmarks and how it is measured: the same events, the same yardstick for every contestant.

An event has about 230 bytes of JSON, a user about 1.5 KB of state. CPU is that of the worker's process, all threads, as
the kernel counts it; a contestant has done an event when the group's committed offset is behind it.
"""

import json
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from confluent_kafka import Consumer, Producer, TopicPartition

from streams.clients import librdkafka
from streams.partitioner import partition_of
from streams.sessions import User, encode_user
from streams.settings import Settings
from streams.wire import CLICKS, Event

BASE_MS = 1_700_000_000_000
PAGES = [f"/product/{number:05d}" for number in range(2000)] + ["/", "/cart", "/checkout", "/search"]
HISTORY_SESSIONS, HISTORY_PAGES = 9, 8  # about 1.5 KB a user with page names of 14 characters, as msgpack
STEP_MS = 10  # of event time between two events
ACTIVE = 5_000  # visitors at a time: so each looks at a page for 50 s on average
PAGES_A_VISIT = 10
GAP_MS, GRACE_MS = 1_800_000, 300_000
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Rate:
    """What a run took: events per second of wall clock, and microseconds of the process's CPU an event."""

    events: int
    seconds: float
    cpu_seconds: float

    @property
    def per_second(self) -> float:
        """Events per second."""
        return self.events / self.seconds

    @property
    def cpu_us(self) -> float:
        """Microseconds of CPU an event."""
        return 1e6 * self.cpu_seconds / self.events

    def as_json(self) -> dict[str, float]:
        """For the last line."""
        return {"events": self.events, "events_per_s": round(self.per_second), "cpu_us": round(self.cpu_us, 1)}


def events(
    count: int, users: int, seed: int = 1, active: int = ACTIVE, items: int = 0, step_ms: int = STEP_MS
) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) of `count` clicks: visits of about ten pages, `active` of them at a time, each by one of `users`.

    With `items` each click is on one of them, i0, i1, ...; the few popular ones are half of what is looked at.
    """
    choose = random.Random(seed)
    rnd, below = choose.random, choose.randrange
    visitors = [f"u{below(users):07d}" for _ in range(active)]
    for number in range(count):
        place = int(rnd() * active)
        user = visitors[place]
        if rnd() * PAGES_A_VISIT < 1:
            visitors[place] = f"u{below(users):07d}"
        value = {
            "event_id": f"{seed:02d}-{number:010d}",
            "user_id": user,
            "ts": BASE_MS + number * step_ms,
            "page": PAGES[int(rnd() * len(PAGES))],
            "type": "view" if number % 11 else "cart",
            "device": "mobile",
            "category": "shoes",
            "attributes": {
                "ref": "google" if number % 7 == 0 else "direct",
                "dwell_ms": 1000 + number % 60000,
                "geo": "US-CA",
            },
        }
        if items:
            value["item_id"] = f"i{int(items * rnd() ** 4)}"
        yield user.encode(), json.dumps(value, separators=(",", ":")).encode()


def producer(settings: Settings) -> Producer:
    """An idempotent producer with large batches and Kafka's own partitioner."""
    options: dict[str, Any] = {
        "enable.idempotence": True,
        "partitioner": "murmur2_random",
        "linger.ms": 20,
        "batch.size": 900_000,
        "queue.buffering.max.messages": 1_000_000,
        "log_level": 0,
    }
    return Producer(librdkafka(settings) | options)


def publish(settings: Settings, records: Iterator[tuple[bytes, bytes]], per_second: float | None = None) -> int:
    """Send to `clicks`, at a pace if one is given, and wait for the acknowledgements; returns how many."""
    sender, topic, sent, began = producer(settings), settings.topic(CLICKS), 0, time.monotonic()
    for key, value in records:
        _produce(sender, topic, key, value)
        sent += 1
        if sent % 100 == 0 and per_second is not None:
            sender.poll(max(0.0, began + sent / per_second - time.monotonic()))
    sender.flush()
    return sent


def seed_state(settings: Settings, users: int) -> int:
    """Give every user a past in the changelog, so that work begins with full states. Returns the bytes of one state."""
    choose, sender, topic = random.Random(0), producer(settings), settings.changelog("sessionize")
    encode, size = msgspec.msgpack.Encoder().encode, 0
    for number in range(users):
        key = f"u{number:07d}".encode()
        past = [choose.choices(PAGES, k=HISTORY_PAGES) for _ in range(HISTORY_SESSIONS)]
        user = User(last_ms=BASE_MS, number=HISTORY_SESSIONS, closed_end_ms=BASE_MS - 2 * GAP_MS, closed_id="0" * 32)
        user.history, user.recent = msgspec.Raw(encode(past)), choose.randbytes(8 * 32)
        record = encode_user(user)
        size += len(record)
        _produce(sender, topic, key, record, partition_of(key, settings.partitions))
    sender.flush()
    return size // users


def _produce(sender: Producer, topic: str, key: bytes, value: bytes, partition: int = -1) -> None:
    while True:
        try:
            sender.produce(topic, value, key, partition)
            sender.poll(0)
            return
        except BufferError:
            sender.poll(0.1)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


class Position:
    """How far a consumer group has committed, over all partitions of a topic."""

    def __init__(self, settings: Settings, group: str, topic: str) -> None:
        """`topic` and `group` by their full names."""
        options: dict[str, Any] = {"group.id": group, "isolation.level": "read_uncommitted", "log_level": 0}
        self._consumer = Consumer(librdkafka(settings) | options)
        self._partitions = [TopicPartition(topic, number) for number in range(settings.partitions)]

    def __call__(self) -> int:
        """Records committed."""
        return sum(max(0, tp.offset) for tp in self._consumer.committed(self._partitions, timeout=30))


def measure(
    process: "subprocess.Popen[bytes]", position: Position, until: int, log: Path, limit_s: float = 600
) -> Rate:
    """From the first commit seen to `until` committed records. Raises RuntimeError if the process ends or hangs."""
    began, first, cpu, deadline = 0.0, 0, 0.0, time.monotonic() + limit_s
    while True:
        done, now = position(), time.monotonic()
        if done and not began:
            began, first, cpu = now, done, cpu_seconds(process.pid)
        elif done >= until:
            return Rate(done - first, now - began, cpu_seconds(process.pid) - cpu)
        if process.poll() is not None or now > deadline:
            raise RuntimeError(f"stopped at {done} of {until} events:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.1)


def bare_rate(settings: Settings, count: int) -> Rate:
    """The ceiling: the same records consumed and decoded, and nothing else, in this process."""
    consumer = Consumer(librdkafka(settings) | {"group.id": "bare", "auto.offset.reset": "earliest", "log_level": 0})
    consumer.assign([TopicPartition(settings.topic(CLICKS), number, 0) for number in range(settings.partitions)])
    decode = msgspec.json.Decoder(Event).decode
    read, began, cpu = 0, 0.0, 0.0
    while read < count:
        messages = consumer.consume(5000, 5.0)
        for message in messages:
            decode(message.value() or b"")
        if messages and not began:
            began, cpu, count = time.monotonic(), time.process_time(), count - len(messages)
            continue
        if not messages:
            raise RuntimeError(f"only {read} of {count} records came")
        read += len(messages)
    rate = Rate(read, time.monotonic() - began, time.process_time() - cpu)
    consumer.close()
    return rate


def table(title: str, rows: list[tuple[str, Rate]]) -> None:
    """Print the rates side by side."""
    print(f"\n{title}\n{'':44} {'events/s':>10} {'CPU µs':>8}")
    for name, rate in rows:
        print(f"{name:44} {rate.per_second:>10,.0f} {rate.cpu_us:>8.1f}")


def scratch() -> "tempfile.TemporaryDirectory[str]":
    """A directory that is removed at the end."""
    return tempfile.TemporaryDirectory(prefix="browsecast-bench-")


Contestant = Callable[[Settings, int], Rate]
