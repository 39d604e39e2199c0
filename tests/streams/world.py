"""The engine between a fake broker, a fake disk and small logs: all that a crash test needs."""

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import msgspec
from aiokafka import ConsumerRecord
from faust.types import TP

from models.visit import Forecast, Visit
from streams import wire
from streams.engine import Engine
from streams.errors import StateUnwritable
from streams.metrics import Metrics
from streams.predict import Predict
from streams.roles import Role
from streams.score import Scoring
from streams.sessionize import Sessionize
from streams.settings import Settings
from tests.streams.fakebroker import Broker, BrokerAway, Disk, FakeProducer, FakeReader, PowerCut
from tests.streams.inprocess import InProcess
from tests.streams.itemtable import Clusters
from tests.streams.test_score import prediction, session
from tests.streams.test_sessionizer_oracle import random_log

SETTINGS = Settings(gap_ms=60_000, grace_ms=10_000, ahead_ms=600_000, flush_events=1, cache_users=1, partitions=1)
METRICS = Metrics()
PUBLISHED = (wire.SESSIONS, wire.LATE, wire.REJECTED, wire.PREDICTIONS, wire.SCORES)


class Bench(Engine):
    """The engine on the fake broker."""

    broker: Broker

    def _new_producer(self, number: int) -> Any:
        return FakeProducer(self.broker, f"{self.group}-{number}")

    async def _restore(self, numbers: list[int], is_valid: Callable[[], bool]) -> int:
        reader: Any = FakeReader(self.broker, self.changelog)
        return await self._read_changelog(reader, numbers, is_valid)


class OneModel:
    version, digest, router_digest = "v1", "sha256:0", "r"

    def forecast(self, visits: Sequence[Visit]) -> list[Forecast]:
        return [Forecast(0, [(visit.sessions[-1][0], 0.5)], [visit.seed], 0.25, 0.5) for visit in visits]

    fallback = forecast


Inputs = dict[str, list[tuple[bytes | None, bytes | None, int]]]  # topic -> key, value, timestamp


@dataclass
class World:
    """What outlives a worker: the broker, the disk, the input topics."""

    make_role: Callable[[], Role]
    inputs: Inputs
    engine_type: type[Bench] = Bench
    seed: int = 0
    broker: Broker = field(default_factory=Broker)
    disk: Disk = field(default_factory=Disk)
    errors: list[BaseException] = field(default_factory=list)

    async def worker(self) -> Bench:
        one = self.engine_type(SETTINGS, self.make_role(), METRICS, self.errors.append)
        one.broker, one.app = self.broker, SimpleNamespace(state_table=lambda number: (self.broker, self.disk))
        await one.fence({0})
        await one.recover()
        if self.errors:
            raise self.errors[0]
        return one

    async def read_on(self, one: Bench) -> None:
        """Feed what the state has not seen, in chunks, topics in turn; flushes run beside the next chunk."""
        choose = random.Random(len(self.broker.steps) + self.seed)
        start = {topic: one.positions()[TP(topic, 0)] or 0 for topic in self.inputs}
        while topics := [topic for topic, records in self.inputs.items() if start[topic] < len(records)]:
            topic, count = choose.choice(topics), choose.randint(1, 15)
            part = [
                ConsumerRecord(topic, 0, offset, timestamp, 0, key, value, None, 0, 0, ())
                for offset, (key, value, timestamp) in enumerate(
                    self.inputs[topic][start[topic] :][:count], start[topic]
                )
            ]
            start[topic] += len(part)
            await one._apply([(0, topic, part)])
            await one._maybe_flush()
        await one._flush_now()

    async def run(self) -> None:
        await self.read_on(await self.worker())

    async def run_until_it_fails(self, at: int, error: BaseException, lost: int | None) -> bool:
        """False when the run came to its end before."""
        self.broker.fails_at = (at, error)
        one = None
        try:
            one = await self.worker()
            await self.read_on(one)
            return False
        except PowerCut:
            pass
        except (BrokerAway, StateUnwritable):
            if one is not None:
                await one.close()
        finally:
            await settle()
            self.broker.fails_at = None
            self.errors.clear()
        self.disk.crash(lost)
        self.broker.compact(SETTINGS.changelog(self.make_role().name))
        return True

    def published(self) -> list[tuple[str, bytes | None, Any]]:
        """All that a reader sees, without what depends on the wall clock, in order within each topic."""
        found = []
        for topic in PUBLISHED:
            for key, value in self.broker.committed(topic):
                document = None if value is None else json.loads(value)
                if topic == wire.PREDICTIONS and document is not None:
                    del document["close_to_emit_ms"]
                found.append((topic, key, document))
        return found


async def settle() -> None:
    """Let tasks of the dead end, and take their errors."""
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    await asyncio.gather(*others, return_exceptions=True)


# ---------------------------------------------------------------- the three roles with small logs


def clicks(seed: int, size: int = 50) -> Inputs:
    choose = random.Random(seed)
    log: list[tuple[bytes | None, bytes | None, int]] = [
        (record.key, record.value, record.timestamp_ms) for record in random_log(choose, size, tame=False)
    ]
    for wrong in [(None, b"{}", 0), (b"u1", b"{", 0), (b"\xff", b"\xff", 0), (b"u1", b"[1]", 0)]:
        log.insert(choose.randrange(len(log)), wrong)
    return {wire.CLICKS: log}


def sessions_and_predictions(seed: int) -> Inputs:
    choose, inputs = random.Random(seed), Inputs()
    inputs[wire.SESSIONS], inputs[wire.PREDICTIONS] = [], []
    last: dict[str, wire.Session] = {}
    for number in range(25):
        user, end_ms = choose.choice("abc"), 1_700_000_000_000 + number * 10**9
        known = last.get(user)
        pages = choose.sample(["home", "cart", "paid", "hats"], 2)
        last[user] = one = session(user, 1 if known is None else known.number + 1, end_ms, known, pages)
        inputs[wire.SESSIONS].append((user.encode(), msgspec.json.encode(one), end_ms))
        inputs[wire.PREDICTIONS].append((user.encode(), msgspec.json.encode(prediction(one, ["home"])), end_ms))
    for log in inputs.values():
        log.insert(choose.randrange(len(log)), (b"a", b"{", 0))
    return inputs


def sessionizing() -> Role:
    return Sessionize(SETTINGS, METRICS, items=Clusters({f"i{number}": number % 3 for number in range(6)}))


def predicting() -> Role:
    return Predict(SETTINGS, METRICS, InProcess(OneModel()))


def scoring() -> Role:
    return Scoring(SETTINGS, METRICS)


def world(role: Callable[[], Role], seed: int, engine_type: type[Bench] = Bench) -> World:
    if role is sessionizing:
        return World(role, clicks(seed), engine_type, seed)
    inputs = sessions_and_predictions(seed)
    if role is predicting:
        del inputs[wire.PREDICTIONS]
    return World(role, inputs, engine_type, seed)
