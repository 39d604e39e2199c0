"""Exactly once, in process: the engine is cut off at every single step, started again, and must publish the same."""

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from aiokafka import ConsumerRecord, TopicPartition
from faust.types import TP

from models.visit import Forecast, Visit
from streams import engine as engine_module
from streams import wire
from streams.engine import OWNER_KEY, Engine
from streams.errors import StateUnwritable
from streams.metrics import Metrics
from streams.predict import Predict
from streams.roles import Role
from streams.score import Scoring
from streams.sessionize import Sessionize, SessionizeShard
from streams.settings import Settings
from tests.streams.fakebroker import Broker, BrokerAway, Disk, DiskStore, FakeConsumer, FakeProducer, PowerCut
from tests.streams.test_score import prediction, session
from tests.streams.test_sessionizer_oracle import random_log

SETTINGS = Settings(gap_ms=60_000, grace_ms=10_000, ahead_ms=600_000, flush_events=1, cache_users=1, partitions=1)
PUBLISHED = (wire.SESSIONS, wire.LATE, wire.REJECTED, wire.PREDICTIONS, wire.SCORES)
METRICS = Metrics()
LOST: tuple[int | None, ...] = (0, 1, None)  # store writes that a crash loses; None: the whole disk


@pytest.fixture(autouse=True)
def stores_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "Store", DiskStore)


class Bench(Engine):
    """The engine on the fake broker."""

    broker: Broker

    def _new_producer(self, number: int) -> Any:
        return FakeProducer(self.broker, f"{self.group}-{number}")

    async def _restore(self, numbers: list[int], epoch: int) -> int:
        consumer: Any = FakeConsumer(self.broker)
        return await self._read_changelog(consumer, numbers, epoch)


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
    return Sessionize(SETTINGS, METRICS)


def predicting() -> Role:
    return Predict(SETTINGS, METRICS, OneModel(), lambda error: False)


def scoring() -> Role:
    return Scoring(SETTINGS, METRICS)


def world(role: Callable[[], Role], seed: int, engine_type: type[Bench] = Bench) -> World:
    if role is sessionizing:
        return World(role, clicks(seed), engine_type, seed)
    inputs = sessions_and_predictions(seed)
    if role is predicting:
        del inputs[wire.PREDICTIONS]
    return World(role, inputs, engine_type, seed)


def ordered(records: list[tuple[str, bytes | None, Any]]) -> list[str]:
    """For comparison: scores come in the order in which two topics were read, the others in the order of one."""
    return sorted(map(repr, records))


async def difference(role: Callable[[], Role], seed: int, engine_type: type[Bench] = Bench) -> str | None:
    """The first step whose failure changes what is published. Every step is tried, with every kind of loss."""
    straight = world(role, seed, engine_type)
    await straight.run()
    expected = straight.published()
    assert len(expected) > 10
    for at in range(1, len(straight.broker.steps) + 20):
        for lost, error in zip(LOST, (PowerCut(), BrokerAway(), PowerCut()), strict=True):
            one = world(role, seed, engine_type)
            failed = await one.run_until_it_fails(at, error, lost)
            place = one.broker.steps[-1]
            if failed:
                await one.run()
            same = one.published() == expected if role is not scoring else True
            if not same or ordered(one.published()) != ordered(expected):
                return f"step {at} ({place}), {error!r}, lost writes {lost}"
    return None


@pytest.mark.parametrize(("role", "seed"), [(sessionizing, 1), (sessionizing, 2), (predicting, 1), (scoring, 1)])
async def test_a_crash_at_any_step_changes_nothing(role: Callable[[], Role], seed: int) -> None:
    assert await difference(role, seed) is None


@pytest.mark.parametrize("role", [sessionizing, scoring])
async def test_crash_after_crash(role: Callable[[], Role]) -> None:
    """Failures that follow one another, in the recovery too."""
    straight = world(role, 3)
    await straight.run()
    for seed in range(30):
        choose, one = random.Random(seed), world(role, 3)
        for _ in range(6):
            at = len(one.broker.steps) + choose.randint(1, 40)
            error: BaseException = choose.choice([PowerCut(), BrokerAway()])
            if not await one.run_until_it_fails(at, error, choose.choice(LOST)):
                break
        else:
            await one.run()
        assert ordered(one.published()) == ordered(straight.published()), f"seed {seed}"


async def test_positions_and_offsets_are_committed_with_the_outputs() -> None:
    one = world(sessionizing, 1)
    await one.run()
    assert one.broker.committed_offsets == {
        ("browsecast-sessionize", TopicPartition(wire.CLICKS, 0)): len(one.inputs[wire.CLICKS])
    }
    again = await one.worker()
    assert again.positions() == {TP(wire.CLICKS, 0): len(one.inputs[wire.CLICKS])}
    await again.close()


# ---------------------------------------------------------------- who slept and wakes


async def zombie(engine_type: type[Bench]) -> tuple[World, bool]:
    """A worker sleeps with work in hand, another takes over and ends the log, the first wakes and wants to commit."""
    one = world(sessionizing, 4, engine_type)
    sleeper = await one.worker()
    records = [
        ConsumerRecord(wire.CLICKS, 0, offset, timestamp, 0, key, value, None, 0, 0, ())
        for offset, (key, value, timestamp) in enumerate(one.inputs[wire.CLICKS])
    ]
    await sleeper._apply([(0, wire.CLICKS, records)])
    one.disk = Disk()
    await one.run()
    before = one.published()
    try:
        await sleeper._flush_now()
    except Exception:
        assert isinstance(one.errors[-1], StateUnwritable)
    await sleeper.close()
    return one, one.published() == before


async def test_who_slept_cannot_commit() -> None:
    one, same = await zombie(Bench)
    assert same
    assert "another worker took" in str(one.errors[0])


async def test_after_a_failure_nothing_is_committed() -> None:
    one = world(sessionizing, 4)
    worker = await one.worker()
    worker.fail(BrokerAway())
    await one.read_on(worker)
    await worker.close()
    assert one.published() == []
    changelog = one.broker.committed(SETTINGS.changelog("sessionize"))
    assert changelog == [(OWNER_KEY, b"")]


async def test_work_that_fails_half_way_does_not_count_as_read() -> None:
    one = world(predicting, 1)
    worker = await one.worker()

    async def fail(batch: object) -> None:
        raise BrokerAway

    worker.role.work = fail  # type: ignore[method-assign]
    with pytest.raises(BrokerAway):
        await one.read_on(worker)
    assert worker.positions() == {TP(wire.SESSIONS, 0): None}


async def test_records_delivered_twice_are_applied_once() -> None:
    straight, one = world(sessionizing, 5), world(sessionizing, 5)
    await straight.run()
    worker = await one.worker()
    records = [
        ConsumerRecord(wire.CLICKS, 0, offset, timestamp, 0, key, value, None, 0, 0, ())
        for offset, (key, value, timestamp) in enumerate(one.inputs[wire.CLICKS])
    ]
    await worker._apply([(0, wire.CLICKS, records[:20]), (0, wire.CLICKS, records[10:30]), (1, wire.CLICKS, records)])
    await worker._apply([(0, wire.CLICKS, records[:30]), (0, wire.CLICKS, records[25:])])
    await worker._flush_now()
    assert ordered(one.published()) == ordered(straight.published())


# ---------------------------------------------------------------- what these tests are worth


class StateFirst(Bench):
    """Broken: state and positions in one transaction, outputs in the next."""

    async def _commit(self, partition: Any, outputs: Any, changes: Any, positions: Any) -> None:
        await super()._commit(partition, [], changes, positions)
        await super()._commit(partition, outputs, [(OWNER_KEY, b"")], {})


class OutputsFirst(Bench):
    """Broken: outputs in one transaction, state and positions in the next."""

    async def _commit(self, partition: Any, outputs: Any, changes: Any, positions: Any) -> None:
        await super()._commit(partition, outputs, [(OWNER_KEY, b"")], {})
        await super()._commit(partition, [], changes, positions)


class Unfenced(Bench):
    """Broken: each worker has transactional ids of its own."""

    def _new_producer(self, number: int) -> Any:
        return FakeProducer(self.broker, f"{self.group}-{number}-{id(self)}")


@pytest.mark.parametrize("broken", [StateFirst, OutputsFirst])
@pytest.mark.parametrize("role", [sessionizing, predicting])
async def test_two_transactions_are_caught(broken: type[Bench], role: Callable[[], Role]) -> None:
    assert await difference(role, 1, broken) is not None


async def test_no_fencing_is_caught() -> None:
    _, same = await zombie(Unfenced)
    assert not same


async def test_eviction_before_the_write_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    straight, broken = world(sessionizing, 1), world(sessionizing, 1)
    await straight.run()
    take = SessionizeShard.take

    def too_early(shard: SessionizeShard) -> Any:
        taken = take(shard)
        shard.sessionizer.evict(0)
        return taken

    monkeypatch.setattr(SessionizeShard, "take", too_early)
    await broken.run()
    assert ordered(broken.published()) != ordered(straight.published())
