"""Workers that are broken on purpose: if the fault tests cannot tell them from the real one, they prove nothing.

`python -m tests.broken VARIANT worker ...` runs the command line with the variant in place.
"""

import asyncio
import os
import sys
from collections.abc import Callable
from typing import Any

from aiokafka import AIOKafkaProducer
from faust.transport.consumer import Consumer

from streams import clients, engine, ownership, sessionize, transport
from streams.cli import main

BUSY_S = 0.1  # a busy broker's transaction: so that few seeds are enough to fall into a gap


def offsets_outside() -> None:
    """The state with its input position in a transaction of its own, before that of the outputs."""
    whole = engine.Engine._commit

    async def commit(self: Any, partition: Any, outputs: Any, changes: Any, offsets: Any) -> None:
        await whole(self, partition, [], changes, offsets)
        await asyncio.sleep(BUSY_S)
        await whole(self, partition, outputs, [(ownership.OWNER_KEY, b"")], {})

    engine.Engine._commit = commit  # type: ignore[method-assign]


def no_fencing() -> None:
    """Each worker has transactional ids of its own, so that nobody is shut out."""

    def new_producer(self: Any, number: int) -> AIOKafkaProducer:
        return AIOKafkaProducer(
            transactional_id=f"{self.group}-{number}-{os.getpid()}",
            transaction_timeout_ms=self.settings.transaction_timeout_ms,
            acks="all",
            max_batch_size=ownership.BATCH_BYTES,
            max_request_size=ownership.REQUEST_BYTES,
            metadata_max_age_ms=10_000,
            **clients.aiokafka(self.settings),
        )

    engine.Engine._new_producer = new_producer  # type: ignore[method-assign]


def early_eviction() -> None:
    """A user is dropped from memory when the flush begins, not when it is written."""
    whole, write = sessionize.SessionizeShard.take, engine.Engine._commit

    def take(self: Any) -> Any:
        taken = whole(self)
        self.sessionizer.evict(0)
        return taken

    async def commit(self: Any, partition: Any, outputs: Any, changes: Any, offsets: Any) -> None:
        await asyncio.sleep(BUSY_S)
        await write(self, partition, outputs, changes, offsets)

    sessionize.SessionizeShard.take = take  # type: ignore[method-assign]
    engine.Engine._commit = commit  # type: ignore[method-assign]


def faust_seek() -> None:
    """Faust decides where reading goes on, by the group's offset."""

    async def perform_seek(self: Any) -> None:
        token = self.token
        await Consumer.perform_seek(self)
        self._next = {tp: offset for tp, offset in self._committed_offset.items() if offset is not None}
        self._settled = token == self.token

    transport.BatchConsumer.perform_seek = perform_seek  # type: ignore[method-assign]


def sound() -> None:
    """Nothing is broken: the control."""


VARIANTS: dict[str, Callable[[], None]] = {
    one.__name__: one for one in (sound, offsets_outside, no_fencing, early_eviction, faust_seek)
}

if __name__ == "__main__":
    VARIANTS[sys.argv.pop(1)]()
    main()
