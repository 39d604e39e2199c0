"""A broker and a disk in memory that a test can cut off at any step of the engine; transactions work as Kafka's do."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from aiokafka.errors import ProducerFenced

from streams.changelog import Part


def put(store: dict[bytes, bytes], changes: Iterable[tuple[bytes, bytes | None]]) -> None:
    """Write changed records as the engine does; None deletes."""
    for key, record in changes:
        if record is None:
            store.pop(key, None)
        else:
            store[key] = record


class PowerCut(BaseException):
    """The process is gone: nobody may handle this."""


class BrokerAway(Exception):
    """A step failed; the process lives on and has to leave by itself."""


@dataclass
class Entry:
    offset: int
    key: bytes | None
    value: bytes | None
    transaction: "Transaction"
    is_marker: bool = False


@dataclass
class Transaction:
    state: str = "open"
    places: set[tuple[str, int]] = field(default_factory=set)
    offsets: dict[Any, int] = field(default_factory=dict)


class Broker:
    """Logs, transactional ids, committed offsets. `fails_at`: the step that fails, with the error that it raises."""

    def __init__(self) -> None:
        self.logs: dict[tuple[str, int], list[Entry]] = defaultdict(list)
        self.owners: dict[str, FakeProducer] = {}
        self.committed_offsets: dict[Any, int] = {}
        self.steps: list[str] = []
        self.fails_at: tuple[int, BaseException] | None = None
        self.is_down = False

    async def step(self, name: str) -> None:
        """A boundary: the process may end here."""
        self.check(name)
        await asyncio.sleep(0)

    def check(self, name: str) -> None:
        self.steps.append(name)
        if self.fails_at is not None and len(self.steps) == self.fails_at[0]:
            raise self.fails_at[1]

    def append(self, place: tuple[str, int], key: bytes | None, value: bytes | None, of: Transaction) -> int:
        log = self.logs[place]
        of.places.add(place)
        log.append(Entry(log[-1].offset + 1 if log else 0, key, value, of))
        return log[-1].offset

    def end(self, transaction: Transaction, state: str) -> None:
        if transaction.state != "open":
            return
        transaction.state = state
        for place in transaction.places:
            self.append(place, None, None, transaction)
            self.logs[place][-1].is_marker = True
        if state == "committed":
            self.committed_offsets |= transaction.offsets

    def committed(self, topic: str, number: int = 0) -> list[tuple[bytes | None, bytes | None]]:
        """What a consumer that reads committed sees."""
        return [(e.key, e.value) for e in self.stable(topic, number) if self.is_visible(e)]

    def stable(self, topic: str, number: int) -> Iterator[Entry]:
        for entry in self.logs[topic, number]:
            if entry.transaction.state == "open":
                return
            yield entry

    @staticmethod
    def is_visible(entry: Entry) -> bool:
        return entry.transaction.state == "committed" and not entry.is_marker

    def compact(self, topic: str) -> None:
        """Keep the last committed record of each key, as the cleaner does."""
        for place in [place for place in self.logs if place[0] == topic]:
            last = {e.key: e.offset for e in self.logs[place] if self.is_visible(e)}
            self.logs[place] = [e for e in self.logs[place] if not self.is_visible(e) or last[e.key] == e.offset]


class FakeBatch:
    def __init__(self) -> None:
        self.records: list[tuple[bytes | None, bytes | None]] = []

    def append(self, *, key: bytes | None, value: bytes | None, timestamp: int) -> object | None:
        if len(self.records) == 3:  # small, so that several are needed
            return None
        self.records.append((key, value))
        return object()

    def close(self) -> None:
        pass

    def record_count(self) -> int:
        return len(self.records)


class FakeProducer:
    """As much of AIOKafkaProducer as the engine uses."""

    def __init__(self, broker: Broker, transactional_id: str) -> None:
        self.broker, self.id = broker, transactional_id
        self.transaction = Transaction(state="none")

    async def start(self) -> None:
        await self.broker.step("start")
        before = self.broker.owners.get(self.id)
        if before is not None:
            self.broker.end(before.transaction, "aborted")
        self.broker.owners[self.id] = self

    async def stop(self) -> None:
        pass

    async def _step(self, name: str) -> None:
        await self.broker.step(f"before {name}")
        if self.broker.owners[self.id] is not self:
            raise ProducerFenced

    async def begin_transaction(self) -> None:
        await self._step("begin")
        self.transaction = Transaction()

    async def send(self, topic: str, *, key: bytes, value: bytes, partition: int) -> "asyncio.Future[Any]":
        await self._step(f"send {topic}")
        return self._written(self.broker.append((topic, partition), key, value, self.transaction))

    def create_batch(self) -> FakeBatch:
        return FakeBatch()

    async def send_batch(self, batch: FakeBatch, topic: str, *, partition: int) -> "asyncio.Future[Any]":
        await self._step(f"send {topic}")
        offsets = [self.broker.append((topic, partition), *record, self.transaction) for record in batch.records]
        return self._written(offsets[0] if offsets else -1)

    async def send_offsets_to_transaction(self, offsets: dict[Any, int], group: str) -> None:
        await self._step("offsets")
        self.transaction.offsets |= {(group, tp): offset for tp, offset in offsets.items()}

    async def commit_transaction(self) -> None:
        await self._step("commit")
        self.broker.end(self.transaction, "committed")
        await self.broker.step("after commit")

    @staticmethod
    def _written(offset: int) -> "asyncio.Future[Any]":
        future = asyncio.get_running_loop().create_future()
        future.set_result(SimpleNamespace(offset=offset))
        return future


class FakeReader:
    """`streams.changelog.ChangelogReader` on such a broker: committed records, a few at a time."""

    def __init__(self, broker: Broker, topic: str) -> None:
        self.broker, self.topic = broker, topic
        self.positions: dict[int, int] = {}

    async def beginnings(self, numbers: Sequence[int]) -> dict[int, int]:
        return dict.fromkeys(numbers, 0)

    def start(self, offsets: Mapping[int, int]) -> None:
        self.positions = dict(offsets)

    async def take(self) -> dict[int, Part]:
        await self.broker.step("read changelog")
        parts = {}
        for number, position in self.positions.items():
            new = [e for e in self.broker.stable(self.topic, number) if e.offset >= position][:7]
            if new:
                self.positions[number] = new[-1].offset + 1
                records = [(entry.key or b"", entry.value) for entry in new if self.broker.is_visible(entry)]
                parts[number] = Part(records, self.positions[number])
        return parts


class Disk:
    """What is left of a store when its process is gone: any prefix of its writes, since it has no write-ahead log."""

    def __init__(self) -> None:
        self.states: list[tuple[dict[bytes, bytes], int | None]] = [({}, None)]

    def crash(self, lost_writes: int | None) -> None:
        """Lose the last writes, or everything (None)."""
        kept = 1 if lost_writes is None else max(1, len(self.states) - lost_writes)
        self.states = self.states[:kept]


class DiskStore:
    """`streams.store.Store` on such a disk. `table` is a function from a partition to its (broker, disk)."""

    def __init__(self, table: Callable[[int], tuple[Broker, Disk]], partition: int) -> None:
        self.broker, self.disk = table(partition)

    @property
    def _records(self) -> dict[bytes, bytes]:
        return self.disk.states[-1][0]

    def get(self, key: bytes) -> bytes | None:
        return self._records.get(key)

    def items(self) -> list[tuple[bytes, bytes]]:
        return sorted(self._records.items())

    def items_after(self, key: bytes | None, limit: int) -> list[tuple[bytes, bytes]]:
        return [item for item in self.items() if key is None or item[0] > key][:limit]

    def end(self) -> int | None:
        return self.disk.states[-1][1]

    def write(self, records: Any, end: int) -> None:
        self.broker.check("before store")
        after = dict(self._records)
        for key, value in records:
            if value is None:
                after.pop(key, None)
            else:
                after[key] = value
        self.disk.states.append((after, end))
        self.broker.check("after store")

    def wipe(self) -> None:
        self.disk.states = [({}, None)]

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass
