"""From the close of a session to its published prediction, both transactions included, at half load.

`python -m benchmarks.latency --bundle DIR`. A worker with all roles gets a steady stream of clicks. An outside consumer
that reads committed takes the time of each prediction; a session's close is the acknowledgement of the click that moved
the watermark past it, so the figure holds everything that a shop waits for. `close_to_emit_ms` is the worker's own.
Without `--rate` the capacity is measured first, on a log that is there already, and half of it is the load.
"""

import asyncio
import json
import statistics
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from aiokafka import AIOKafkaProducer
from confluent_kafka import Consumer, Message, Producer, TopicPartition

from benchmarks.broker import broker, deployment, parser
from benchmarks.load import cpu_seconds, events, publish, scratch
from streams.clients import librdkafka
from streams.settings import Settings
from streams.wire import CLICKS, PREDICTIONS
from tests.bundle import make_bundle
from tests.play import metric
from tests.workers import Worker

PARTITIONS = 4
GAP_MS, GRACE_MS = 60_000, 10_000  # of event time: so that sessions close soon after the run begins
ROLES = ("sessionize", "predict", "score")
QUIET_SECONDS = 5
ACTIVE = 500  # visitors at a time: one page in five seconds of event time each, so visits stay whole


class Closes:
    """When each partition's watermark passed each event time, by the acknowledgements of the clicks."""

    def __init__(self) -> None:
        self._highest: dict[int, list[int]] = defaultdict(list)  # rising event times ...
        self._at: dict[int, list[float]] = defaultdict(list)  # ... and when the broker had them

    def acknowledge(self, partition: int, ts: int) -> None:
        """The broker has a click of this event time."""
        times = self._highest[partition]
        if not times or ts > times[-1]:
            times.append(ts)
            self._at[partition].append(time.time())

    def of(self, partition: int, end_ms: int) -> float | None:
        """Epoch seconds at which a session that ended at `end_ms` was closed; None if it was not."""
        place = bisect_right(self._highest[partition], end_ms + GAP_MS + GRACE_MS)
        return self._at[partition][place] if place < len(self._at[partition]) else None


class Seen:
    """Predictions as an outside consumer that reads committed gets them."""

    def __init__(self, settings: Settings) -> None:
        options: dict[str, Any] = {
            "group.id": f"{settings.topic_prefix}outside",
            "isolation.level": "read_committed",
            "auto.offset.reset": "earliest",
            "fetch.wait.max.ms": 5,
            "log_level": 0,
        }
        self._consumer = Consumer(librdkafka(settings) | options)
        topic = settings.topic(PREDICTIONS)
        self._consumer.assign([TopicPartition(topic, number, 0) for number in range(settings.partitions)])
        self.predictions: list[tuple[float, int, dict[str, Any]]] = []  # when, partition, what

    def read(self, seconds: float) -> None:
        """Take in what comes within `seconds`."""
        messages = self._consumer.consume(500, seconds)
        now = time.time()
        for message in messages:
            if message.error() is None:
                self.predictions.append((now, message.partition() or 0, json.loads(message.value() or b"{}")))


def stream(settings: Settings, records: Iterator[tuple[bytes, bytes]], rate: float, closes: Closes, seen: Seen) -> None:
    """Send at `rate` events a second while predictions are taken in."""
    options: dict[str, Any] = {"enable.idempotence": True, "partitioner": "murmur2_random", "linger.ms": 1}
    sender = Producer(librdkafka(settings) | options)
    topic, began, sent = settings.topic(CLICKS), time.monotonic(), 0

    def done(error: Any, message: Message) -> None:
        if error is None:
            closes.acknowledge(message.partition() or 0, json.loads(message.value() or b"{}")["ts"])

    while chunk := list(islice(records, max(1, int(rate / 100)))):
        for key, value in chunk:
            sender.produce(topic, value, key, on_delivery=done)
        sent += len(chunk)
        left = 1.0
        while left > 0:
            sender.poll(0)
            left = began + sent / rate - time.monotonic()
            seen.read(max(0.0, min(0.002, left)))
    sender.flush()


async def _transactions(settings: Settings, count: int) -> list[float]:
    sender = AIOKafkaProducer(
        bootstrap_servers=settings.bootstrap_servers, transactional_id=f"{settings.topic_prefix}bare"
    )
    await sender.start()
    times = []
    try:
        for _ in range(count):
            began = time.perf_counter()
            async with sender.transaction():
                for _ in range(20):
                    await sender.send(settings.topic(PREDICTIONS), b"{}", partition=0)
            times.append(1000 * (time.perf_counter() - began))
    finally:
        await sender.stop()
    return times


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50 and p99 in the unit of the values."""
    cuts = statistics.quantiles(values, n=100)
    return {"p50": round(cuts[49], 1), "p99": round(cuts[98], 1)}


def capacity(servers: str, bundle: Path, count: int, users: int) -> float:
    """Events a second of a log that is there already, from the moment the worker serves to the last prediction."""
    with scratch() as name:
        settings = _deployment(servers, Path(name), bundle)
        publish(settings, events(count, users, active=ACTIVE))
        worker, seen = Worker(settings, Path(name) / "w", ROLES), Seen(settings)
        worker.start()
        try:
            worker.wait_ready(180)
            began = time.time()
            while not seen.predictions or time.time() - seen.predictions[-1][0] < QUIET_SECONDS:
                seen.read(0.2)
                if not seen.predictions and time.time() - began > 120:
                    raise RuntimeError(f"no prediction came:\n{worker.tail()}")
        finally:
            worker.stop()
        return count / (seen.predictions[-1][0] - began)


def at_load(servers: str, bundle: Path, rate: float, seconds: float, users: int, apart: bool) -> dict[str, Any]:
    """The steady run: latencies of the predictions of its second half, in milliseconds."""
    with scratch() as name:
        settings = _deployment(servers, Path(name), bundle)
        seen, closes, plays = Seen(settings), Closes(), [(role,) for role in ROLES] if apart else [ROLES]
        workers = [Worker(settings, Path(name) / roles[0], roles) for roles in plays]
        of = {role: worker for worker, roles in zip(workers, plays, strict=True) for role in roles}
        for worker in workers:
            worker.start()
        try:
            for worker in workers:
                worker.wait_ready(180)
            began = time.time()
            stream(settings, events(int(rate * seconds), users, active=ACTIVE), rate, closes, seen)
            end = time.time() + 3
            while time.time() < end:
                seen.read(0.1)
            cpu = sum(cpu_seconds(worker.process.pid) for worker in workers)
            inside = {
                "batch_sessions": mean(of["predict"], "browsecast_batch_sessions"),
                "batch_ms": 1000 * mean(of["predict"], "browsecast_batch_seconds"),
                **{f"{role}_flush_ms": 1000 * mean(of[role], "browsecast_flush_seconds", role) for role in ROLES},
                **{f"{role}_flushes": metric(of[role], "browsecast_flush_seconds_count", role=role) for role in ROLES},
                **{f"{role}_lag": metric(of[role], "browsecast_lag_records", role=role) for role in ROLES},
            }
        finally:
            for worker in workers:
                worker.stop()
        bare = asyncio.run(_transactions(settings, 200))
    late = [(at, partition, one) for at, partition, one in seen.predictions if at > began + seconds / 2]
    outside = [
        1000 * (at - closed) for at, n, one in late if (closed := closes.of(n, one["session_end_ms"])) is not None
    ]
    return {
        "predictions": len(outside),
        "predictions_per_s": round(len(seen.predictions) / seconds, 1),
        "fallbacks": sum(one["fallback"] is not None for _, _, one in late),
        "outside_ms": percentiles(outside),
        "close_to_emit_ms": percentiles([one["close_to_emit_ms"] for _, _, one in late]),
        "bare_transaction_ms": percentiles(bare),
        "cpu_s": round(cpu, 1),
        "means": {name: round(value, 1) for name, value in inside.items()},
    }


def mean(worker: Worker, name: str, role: str | None = None) -> float:
    """Mean of a histogram that the worker shows."""
    labels = {} if role is None else {"role": role}
    return metric(worker, f"{name}_sum", **labels) / max(1.0, metric(worker, f"{name}_count", **labels))


def _deployment(servers: str, directory: Path, bundle: Path) -> Settings:
    return deployment(servers, directory, partitions=PARTITIONS, gap_ms=GAP_MS, grace_ms=GRACE_MS, bundle=bundle)


def main() -> None:
    """Print the table, then one JSON line."""
    arguments = parser(__doc__)
    arguments.add_argument("--bundle", type=Path, help="a model bundle; without it a tiny one is trained")
    arguments.add_argument("--rate", type=float, help="events a second; half of what the worker can do unless given")
    arguments.add_argument("--seconds", type=float, default=60)
    arguments.add_argument("--users", type=int, default=20_000)
    arguments.add_argument("--events", type=int, default=30_000, help="events of the run that measures the capacity")
    arguments.add_argument("--apart", action="store_true", help="each role in a worker of its own")
    given = arguments.parse_args()
    with broker(given.bootstrap_servers) as servers, scratch() as name:
        bundle = given.bundle or make_bundle(Path(name))
        most = None if given.rate else capacity(servers, bundle, given.events, given.users)
        rate = given.rate or (most or 0) / 2
        found = at_load(servers, bundle, rate, given.seconds, given.users, given.apart)
    print(f"load of {rate:,.0f} events/s" + (f", half of {most:,.0f}" if most else ""))
    print(
        f"{found['predictions']:,} predictions, {found['predictions_per_s']} a second\n{'ms':44} {'p50':>8} {'p99':>8}"
    )
    for title, key in (
        ("a bare transaction of 20 records (floor)", "bare_transaction_ms"),
        ("close to published prediction, outside", "outside_ms"),
        ("close to emission, the worker's own figure", "close_to_emit_ms"),
    ):
        print(f"{title:44} {found[key]['p50']:>8} {found[key]['p99']:>8}")
    print("means: " + ", ".join(f"{name} {value}" for name, value in found["means"].items()))
    print(json.dumps({"benchmark": "latency", "events_per_s": round(rate), "capacity_events_per_s": most, **found}))


if __name__ == "__main__":
    main()
