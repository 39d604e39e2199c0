"""Exactly once, in process: the engine is cut off at every single step, started again, and must publish the same."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from aiokafka import ConsumerRecord, TopicPartition
from faust.types import TP

from streams import engine as engine_module
from streams import wire
from streams.errors import StateUnwritable
from streams.ownership import OWNER_KEY
from streams.roles import Role
from streams.sessionize import SessionizeShard
from tests.streams.fakebroker import BrokerAway, Disk, DiskStore, FakeProducer, PowerCut
from tests.streams.world import SETTINGS, Bench, World, predicting, scoring, sessionizing, world

LOST: tuple[int | None, ...] = (0, 1, None)  # store writes that a crash loses; None: the whole disk


@pytest.fixture(autouse=True)
def stores_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "Store", DiskStore)


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
