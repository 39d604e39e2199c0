"""Takes the time from the close of a session to its prediction, from outside the worker.

A session is closed when the broker has acknowledged the click that moves the watermark past its end; a prediction is
there when a consumer that reads committed has it.
"""

import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import msgspec
from confluent_kafka import Consumer, Message, Producer, TopicPartition

from benchmarks.load import BASE_MS, STEP_MS, events
from streams.clients import librdkafka
from streams.settings import Settings
from streams.wire import CLICKS, PREDICTIONS, Prediction

ACTIVE = 500  # visitors at a time: one page in five seconds of event time each, so visits stay whole


class Timed(NamedTuple):
    """A prediction: when it was seen (epoch seconds), and how long after its session's close (ms; None: not known)."""

    at: float
    after_ms: float | None
    prediction: Prediction


class Stopwatch:
    """Sends clicks at a rate that may change, and takes predictions in meanwhile."""

    def __init__(self, settings: Settings, users: int) -> None:
        """`settings` are those of the worker; the clicks go on where the last call of `run` ended."""
        self._settings, self._clicks = settings, enumerate(events(1 << 60, users, active=ACTIVE))
        self._highest: dict[int, list[int]] = defaultdict(list)  # rising event times of each partition ...
        self._acknowledged: dict[int, list[float]] = defaultdict(list)  # ... and when the broker had them
        self._seen: list[tuple[float, int, bytes]] = []
        options: dict[str, Any] = {"enable.idempotence": True, "partitioner": "murmur2_random", "linger.ms": 1}
        self._producer = Producer(librdkafka(settings) | options)
        options = {
            "group.id": f"{settings.topic_prefix}outside",
            "isolation.level": "read_committed",
            "fetch.wait.max.ms": 100,
            "log_level": 0,
        }
        self._consumer = Consumer(librdkafka(settings) | options)
        topic = settings.topic(PREDICTIONS)
        self._consumer.assign([TopicPartition(topic, number, 0) for number in range(settings.partitions)])

    def run(self, rate: float, seconds: float) -> float:
        """Send `rate` clicks a second for so long; returns the rate that the broker took."""
        topic, began, sent = self._settings.topic(CLICKS), time.monotonic(), 0
        clicks: Iterator[tuple[int, tuple[bytes, bytes]]] = islice(self._clicks, int(rate * seconds))
        while chunk := list(islice(clicks, max(1, int(rate / 100)))):
            for number, (key, value) in chunk:
                done = partial(self._acknowledge, BASE_MS + number * STEP_MS)
                self._producer.produce(topic, value, key, on_delivery=done)
            sent += len(chunk)
            left = 1.0
            while left > 0:
                self._producer.poll(0)
                left = began + sent / rate - time.monotonic()
                self._read(max(0.0, min(0.002, left)))
        self._producer.flush()
        return sent / (time.monotonic() - began)

    def linger(self, seconds: float) -> None:
        """Only take predictions in."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._read(0.1)

    def since(self, at: float) -> list[Timed]:
        """The predictions seen since `at` (epoch seconds)."""
        return [self._timed(*one) for one in self._seen if one[0] >= at]

    def _acknowledge(self, ts: int, error: Any, message: Message) -> None:
        number = message.partition() or 0
        times = self._highest[number]
        if error is None and (not times or ts > times[-1]):
            times.append(ts)
            self._acknowledged[number].append(time.time())

    def _read(self, seconds: float) -> None:
        messages = self._consumer.consume(500, seconds)
        now = time.time()
        self._seen += [(now, one.partition() or 0, one.value() or b"") for one in messages if one.error() is None]

    def _timed(self, at: float, number: int, value: bytes) -> Timed:
        one = msgspec.json.decode(value, type=Prediction)
        due_ms = one.session_end_ms + self._settings.gap_ms + self._settings.grace_ms
        place = bisect_right(self._highest[number], due_ms)
        closed = self._acknowledged[number][place : place + 1]
        return Timed(at, 1000 * (at - closed[0]) if closed else None, one)
