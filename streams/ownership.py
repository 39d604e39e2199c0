"""Owning partitions: fencing whoever had them before, and bringing their state here, before anything is read.

Steps 1 to 3 of the protocol that `engine` describes.
"""

import asyncio
from collections.abc import Callable

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.producer import sender

from streams import clients
from streams.changelog import ChangelogReader, Part, open_changelog
from streams.roles import Role
from streams.settings import Settings
from streams.store import Store

OWNER_KEY = b"\x00owner"
BATCH_BYTES = 900_000
REQUEST_BYTES = 32 << 20

# A transaction that begins while the last one's markers are still being written is asked to come back; aiokafka waits
# 20 ms for that, which is most of a short transaction.
sender.BACKOFF_OVERRIDE = 0.002

log = structlog.get_logger()


class Ownership:
    """A role's transactional producers and stores, one a partition."""

    def __init__(self, settings: Settings, role: Role) -> None:
        self.settings, self.role = settings, role
        self.group, self.changelog = settings.application(role.name), settings.changelog(role.name)
        self._producers: dict[int, AIOKafkaProducer] = {}
        self._owner_offsets: dict[int, int] = {}
        self._stores: dict[int, Store] = {}
        self._needed: dict[int, dict[bytes, bytes]] = {}  # records that the role takes a partition up from

    async def fence(self, numbers: set[int]) -> None:
        """Steps 1 and 2: nobody but us can write for these partitions any more, and the changelog has an end."""
        for producer in self._producers.values():
            await producer.stop()
        self._producers = {number: self._new_producer(number) for number in numbers}
        await asyncio.gather(*(producer.start() for producer in self._producers.values()))
        await asyncio.gather(*(self._own(number) for number in numbers))

    def _new_producer(self, number: int) -> AIOKafkaProducer:
        return AIOKafkaProducer(
            transactional_id=f"{self.group}-{number}",
            transaction_timeout_ms=self.settings.transaction_timeout_ms,
            acks="all",
            max_batch_size=BATCH_BYTES,
            max_request_size=REQUEST_BYTES,
            metadata_max_age_ms=10_000,
            **clients.aiokafka(self.settings),
        )

    async def _own(self, number: int) -> None:
        producer = self._producers[number]
        await producer.begin_transaction()
        sent = await producer.send(self.changelog, key=OWNER_KEY, value=b"", partition=number)
        metadata = await sent
        await producer.commit_transaction()
        self._owner_offsets[number] = metadata.offset

    async def _restore(self, numbers: list[int], is_valid: Callable[[], bool]) -> int:
        """Bring each local store to its owner record with a consumer of our own; Faust's loses records."""
        if not numbers:
            return 0
        with open_changelog(self.settings, self.changelog) as reader:
            return await self._read_changelog(reader, numbers, is_valid)

    async def _read_changelog(self, reader: ChangelogReader, numbers: list[int], is_valid: Callable[[], bool]) -> int:
        beginnings = await reader.beginnings(numbers)
        start = {number: self._resume_at(number, beginnings[number]) for number in numbers}
        behind = {number for number in numbers if start[number] <= self._owner_offsets[number]}
        reader.start({number: start[number] for number in behind})
        restored = 0
        while behind and is_valid():
            for number, part in (await reader.take()).items():
                restored += len(part.records)
                self._take(number, part)
                if part.position > self._owner_offsets[number]:
                    behind.discard(number)
                await asyncio.sleep(0)
        return restored

    def _take(self, number: int, part: Part) -> None:
        needed, needs = self._needed[number], self.role.needs
        records = [record for record in part.records if record[0] != OWNER_KEY]
        for key, value in records:
            if value is not None and needs(key, value):
                needed[key] = value
            elif key in needed:
                del needed[key]
        self._stores[number].write(records, part.position - 1)

    def _resume_at(self, number: int, beginning: int) -> int:
        """Behind the store's end; from the beginning when the store is empty, outdated, damaged or another topic's."""
        store, needs = self._stores[number], self.role.needs
        needed = self._needed[number] = {}
        try:
            end = store.end()
            # This reads every block, so damage shows here and not in the middle of work.
            needed.update(record for record in store.items() if needs(*record))
        except Exception as error:
            log.warning("state damaged, rebuilding it", group=self.group, partition=number, error=str(error))
            end = None
        if end is None or not beginning <= end + 1 <= self._owner_offsets[number] + 1:
            needed.clear()
            store.wipe()
            return beginning
        return end + 1
