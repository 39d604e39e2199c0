"""Records on their way from the agents to the engine: bounded, taken out in batches."""

import asyncio
from collections import deque

from aiokafka import ConsumerRecord

Delivery = tuple[int, str, list[ConsumerRecord]]  # partition, topic, records in order


class Inbox:
    """At most about `limit` records wait; whoever brings more waits too."""

    def __init__(self, limit: int) -> None:
        self._limit, self._waiting = limit, deque[Delivery]()
        self._arrived, self._room = asyncio.Event(), asyncio.Event()
        self.size = 0

    async def put(self, number: int, topic: str, records: list[ConsumerRecord]) -> None:
        """Add records, then wait until there is room for more."""
        self._waiting.append((number, topic, records))
        self.size += len(records)
        self._arrived.set()
        while self.size >= self._limit:
            self._room.clear()
            await self._room.wait()

    async def take(self, timeout: float, gather: float) -> list[Delivery]:
        """At most `limit` records; waits `timeout` seconds for the first and `gather` for more. May be empty."""
        try:
            await asyncio.wait_for(self._arrived.wait(), timeout)
        except TimeoutError:
            return []
        if gather and 0 < self.size < self._limit:
            await asyncio.sleep(gather)
        batch, room = [], self._limit
        while self._waiting and room:
            number, topic, records = self._waiting.popleft()
            if len(records) > room:
                self._waiting.appendleft((number, topic, records[room:]))
                records = records[:room]
            batch.append((number, topic, records))
            room -= len(records)
        self._shrink(self._limit - room)
        return batch

    def wake(self) -> None:
        """Let `take` return, be it with nothing."""
        self._arrived.set()

    def clear(self) -> None:
        """Drop everything."""
        self._waiting.clear()
        self._shrink(self.size)

    def _shrink(self, taken: int) -> None:
        self.size -= taken
        self._room.set()
        if not self._waiting:
            self._arrived.clear()
