"""Exactly once: one Kafka transaction per partition and flush, whatever the role computes.

When partitions are assigned, before anything is read:
  1. open each partition's transactional producer: whoever owned it before is fenced (`fence`)
  2. commit an owner record to the changelog (`fence`)
  3. restore the local store from the changelog, read committed, up to that record (`recover`)
  4. go on reading where the state ends (`positions`)
Then for each flush of a partition:
  5. one transaction: outputs, changed state with the input positions; commit (`_commit`)
  6. only then RocksDB, with the changelog's offset in the same batch; then memory may let go (`_commit`)
Anything that fails in between ends the worker; the next start repeats it from the last commit.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import structlog
from aiokafka import AIOKafkaProducer, ConsumerRecord, TopicPartition
from aiokafka.errors import ProducerFenced
from faust.types import TP

from streams.errors import BrowsecastError, StateUnwritable
from streams.inbox import Delivery, Inbox
from streams.metrics import Metrics
from streams.ownership import Ownership
from streams.roles import Changes, Output, Role, Shard
from streams.settings import Settings
from streams.store import Store

POSITION_KEY = b"\x00position"
TICK_SECONDS = 0.1

log = structlog.get_logger()


class Partition:
    """A partition that this worker owns: the role's shard, its store, its producer and its input positions."""

    def __init__(self, number: int, store: Store, shard: Shard, positions: dict[str, int]) -> None:
        self.number, self.store, self.shard, self.positions = number, store, shard, positions
        self.moved = False  # since the group's offset was committed
        self.due = False  # for a transaction even if nothing is urgent
        self.flushing: asyncio.Task[None] | None = None
        self.fed_ms = time.time() * 1000

    def busy(self) -> bool:
        """Whether a transaction is under way; raises what the last one failed of."""
        if self.flushing is None or not self.flushing.done():
            return self.flushing is not None
        done, self.flushing = self.flushing, None
        done.result()
        return False


class Engine(Ownership):
    """Runs one role over the partitions that Kafka assigns to this worker."""

    def __init__(self, settings: Settings, role: Role, metrics: Metrics, fail: Callable[[BaseException], None]) -> None:
        super().__init__(settings, role)
        self.metrics, self._tell = metrics, fail
        self.topics = {settings.topic(name): name for name in role.inputs}
        self.app: Any = None
        self.partitions: dict[int, Partition] = {}
        self.recovered = False
        # Once set nothing may be committed: outputs may be gone while positions stand behind them.
        self.failed = False
        self.processed = 0
        self._leaving = False
        self._inbox = Inbox(role.batch_records)
        self._lock = asyncio.Lock()
        self._unflushed = 0
        self._flushed_at = time.monotonic()
        self._epoch = 0

    def fail(self, error: BaseException) -> None:
        """Commit nothing any more, and end the worker."""
        self.failed = True
        self._tell(error)

    # ------------------------------------------------------------ assignment

    async def recover(self) -> None:
        """Steps 3 and 4, called by Faust before it reads on."""
        self._epoch += 1
        epoch = self._epoch
        try:
            await self._recover(sorted(self._producers), epoch)
        except Exception as error:
            if epoch == self._epoch:
                self.fail(error)

    async def _recover(self, numbers: list[int], epoch: int) -> None:
        started = time.monotonic()
        self._stores = {number: Store(self.app.state_table, number) for number in numbers}
        restored = await self._restore(numbers, lambda: epoch == self._epoch)
        for number in numbers:
            if epoch != self._epoch:
                return
            self.partitions[number] = self._open(number)
            await asyncio.sleep(0)
        self.recovered = True
        seconds = time.monotonic() - started
        self.metrics.restore_seconds.labels(self.role.name).observe(seconds)
        self.metrics.restored_records.labels(self.role.name).inc(restored)
        log.info(
            "partitions taken over",
            role=self.role.name,
            partitions=numbers,
            records=restored,
            seconds=round(seconds, 2),
        )

    def _open(self, number: int) -> Partition:
        store = self._stores[number]
        position = store.get(POSITION_KEY)
        shard = self.role.open(number, store, self._needed.pop(number).items())
        return Partition(
            number, store, shard, msgspec.msgpack.decode(position, type=dict[str, int]) if position else {}
        )

    def positions(self) -> dict[TP, int | None]:
        """Where reading goes on, per input partition; None: at the beginning."""
        return {
            TP(topic, number): partition.positions.get(topic)
            for number, partition in self.partitions.items()
            for topic in self.topics
        }

    async def release(self) -> None:
        """The partitions are taken away: finish what is under way, flush once more, drop everything."""
        self._epoch += 1
        self._inbox.clear()
        async with self._lock:
            try:
                await self._flush_now()
            except Exception as error:
                self.fail(error)
            for number, partition in self.partitions.items():
                for name in self.topics.values():
                    self.metrics.drop_partition(self.role.name, name, number)
                partition.store.sync()
            for store in self._stores.values():
                store.close()
            self.partitions, self._stores, self.recovered = {}, {}, False

    async def close(self) -> None:
        """The worker leaves: finish the work under way, release, hand the producers back."""
        self._leaving = True
        self._inbox.wake()
        await self.release()
        await asyncio.gather(*(producer.stop() for producer in self._producers.values()))
        self._producers = {}

    # ------------------------------------------------------------ the way of the records

    async def feed(self, number: int, topic: str, records: list[ConsumerRecord]) -> None:
        """Called by the agent: take records in the order of the partition, and wait when there are enough."""
        if number not in self.partitions:
            return  # of an assignment that is gone; the next one seeks to the state's position
        await self._inbox.put(number, topic, records)

    async def run(self) -> None:
        """Work until `close`: batches, ticks, flushes."""
        try:
            await self._run()
        except BaseException:
            self.failed = True  # a batch may be half done
            raise

    async def _run(self) -> None:
        ticked = time.monotonic()
        while not self._leaving:
            batch = await self._inbox.take(TICK_SECONDS, self.role.batch_ms / 1000)
            async with self._lock:
                if batch:
                    await self._apply(batch)
                if time.monotonic() - ticked >= TICK_SECONDS:
                    ticked = time.monotonic()
                    self._tick()
                await self._maybe_flush()

    async def _apply(self, batch: list[Delivery]) -> None:
        fresh: list[tuple[Partition, str, list[ConsumerRecord]]] = []
        ends: dict[tuple[int, str], int] = {}
        for number, topic, records in batch:
            partition = self.partitions.get(number)
            if partition is None:
                continue
            end = ends.get((number, topic), partition.positions.get(topic, -1))
            if records[0].offset < end:  # delivered twice
                records = [record for record in records if record.offset >= end]
            if records:
                ends[number, topic] = records[-1].offset + 1
                fresh.append((partition, topic, records))
        await self.role.work([(partition.shard, self.topics[topic], records) for partition, topic, records in fresh])
        now = time.time() * 1000
        for partition, topic, records in fresh:  # only now: work that fails half way must not count as read
            partition.positions[topic] = records[-1].offset + 1
            partition.moved, partition.fed_ms = True, now
            self._unflushed += len(records)
            self.processed += len(records)

    def _tick(self) -> None:
        for number, partition in self.partitions.items():
            seen = [self.app.consumer.progress(TP(topic, number)) for topic in self.topics]
            for topic, progress in zip(self.topics.values(), seen, strict=True):
                if progress is not None:
                    self.metrics.lag.labels(self.role.name, topic, number).set(max(0, progress[1] - progress[0]))
            partition.shard.tick(self._quiet_ms(partition, seen))
            self.role.report(number, partition.shard)

    def _quiet_ms(self, partition: Partition, seen: list[tuple[int, int, int] | None]) -> int | None:
        """For how long the broker has confirmed that nothing new is there; None if something is, or it is silent."""
        if self._inbox.size or any(progress is None or progress[0] < progress[1] for progress in seen):
            return None
        confirmed = min(progress[2] for progress in seen if progress is not None)
        return max(0, int(confirmed - partition.fed_ms))

    def lag(self) -> int:
        """Records of our partitions that are not processed yet."""
        behind = 0
        for number, partition in self.partitions.items():
            for topic in self.topics:
                progress = self.app.consumer.progress(TP(topic, number))
                if progress is not None and progress[1] > progress[0]:
                    behind += progress[1] - partition.positions.get(topic, 0)
        return behind + self._inbox.size

    # ------------------------------------------------------------ the transaction

    async def _maybe_flush(self) -> None:
        """Begin the transactions that are due, one partition apart from the other."""
        if self.failed:
            return
        full = self._unflushed >= self.settings.flush_events
        if full:
            await self._settle()  # no more than this waits in memory
        if full or (time.monotonic() - self._flushed_at) * 1000 >= self.settings.flush_ms:
            self._all_due()
        idle = self.role.is_slow or not self._inbox.size  # in a backlog, larger transactions are cheaper
        for partition in self.partitions.values():
            if (partition.due or (idle and partition.shard.urgent())) and not partition.busy():
                self._begin(partition)

    async def _flush_now(self) -> None:
        """Finish what is under way, then one more of each partition; never after a failure: its outputs are lost."""
        await self._settle()
        if not self.failed:
            self._all_due()
            for partition in self.partitions.values():
                if partition.due or partition.shard.urgent():
                    self._begin(partition)
            await self._settle()

    async def _settle(self) -> None:
        """Wait for the transactions under way; raises what one failed of."""
        running = [one.flushing for one in self.partitions.values() if one.flushing is not None]
        if running:
            await asyncio.wait(running)  # unlike gather, this tears no transaction when it is cancelled itself
        for partition in self.partitions.values():
            partition.busy()

    def _all_due(self) -> None:
        self._flushed_at, self._unflushed = time.monotonic(), 0
        for partition in self.partitions.values():
            partition.due = partition.due or partition.moved

    def _begin(self, partition: Partition) -> None:
        """Take all from the partition at once, here, where no work is half done; the rest runs beside the next work."""
        outputs, changes = partition.shard.take()
        changes.append((POSITION_KEY, msgspec.msgpack.encode(partition.positions)))
        # The state has the position; the group's offset is for lag tools, and two requests that can wait.
        offsets = dict(partition.positions) if partition.due else {}
        if partition.due:
            partition.due = partition.moved = False
        partition.flushing = asyncio.create_task(self._flush(partition, outputs, changes, offsets))

    async def _flush(
        self, partition: Partition, outputs: list[Output], changes: Changes, offsets: dict[str, int]
    ) -> None:
        started = time.monotonic()
        try:
            await self._commit(partition, outputs, changes, offsets)
        except Exception as error:
            self.fail(_unwritable(self.role.name, error))
            raise
        self.metrics.flush_seconds.labels(self.role.name).observe(time.monotonic() - started)
        self._inbox.wake()  # whatever became urgent meanwhile goes at once

    async def _commit(
        self, partition: Partition, outputs: list[Output], changes: Changes, offsets: dict[str, int]
    ) -> None:
        producer = self._producers[partition.number]
        # 5. one transaction
        await producer.begin_transaction()
        sent = [
            await self._send(producer, self.settings.topic(topic), partition.number, records)
            for topic, records in _by_topic(outputs).items()
        ]
        now = int(time.time() * 1000)
        state = await self._send(
            producer, self.changelog, partition.number, [(key, value, now) for key, value in changes]
        )
        for futures in (*sent, state):
            for future, _ in futures:
                await future
        if offsets:
            places = {TopicPartition(topic, partition.number): offset for topic, offset in offsets.items()}
            await producer.send_offsets_to_transaction(places, self.group)
        await producer.commit_transaction()
        # 6. the store, and only then memory
        last, count = state[-1]
        partition.store.write(changes, last.result().offset + count - 1)
        partition.shard.written()
        self.metrics.flushed_records.labels(self.role.name).inc(len(outputs) + len(changes))

    async def _send(
        self,
        producer: AIOKafkaProducer,
        topic: str,
        number: int,
        records: Iterable[tuple[bytes | None, bytes | None, int]],
    ) -> list[tuple[asyncio.Future[Any], int]]:
        """Send whole batches; one future and count a batch."""
        batches = [producer.create_batch()]
        for key, value, timestamp in records:
            if batches[-1].append(key=key, value=value, timestamp=timestamp) is None:
                batches.append(producer.create_batch())
                batches[-1].append(key=key, value=value, timestamp=timestamp)
        for batch in batches:
            batch.close()
        return [(await producer.send_batch(batch, topic, partition=number), batch.record_count()) for batch in batches]


def _by_topic(outputs: list[Output]) -> dict[str, list[tuple[bytes | None, bytes | None, int]]]:
    topics: dict[str, list[tuple[bytes | None, bytes | None, int]]] = {}
    for output in outputs:
        topics.setdefault(output.topic, []).append((output.key, output.value, output.timestamp_ms))
    return topics


def _unwritable(role: str, error: Exception) -> BrowsecastError:
    if isinstance(error, BrowsecastError):
        return error
    if isinstance(error, ProducerFenced):
        return StateUnwritable(f"{role}: another worker took this one's partitions over; start it again to rejoin")
    return StateUnwritable(
        f"{role}: a transaction failed ({error!r}); start the worker again, it repeats from the last commit"
    )
