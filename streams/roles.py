"""What a role is to the engine: pure work on partitions, records out, state changes out."""

import base64
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import msgspec
from aiokafka import ConsumerRecord

from streams import wire
from streams.store import Store


class Output(msgspec.Struct, gc=False):
    """A record to publish: `topic` as in `wire`, `value` None for a user who is forgotten."""

    topic: str
    key: bytes | None
    value: bytes | None
    timestamp_ms: int


def refused(record: ConsumerRecord, stage: str, message: str, reason: str = "invalid_record") -> Output:
    """A record that cannot be used, whole, for `clicks.rejected`: whatever is wrong with it, the worker goes on."""
    rejected = wire.Rejected(
        reason=reason,
        stage=stage,
        message=message[:2_000],
        original=_base64(record.value),
        original_key=_base64(record.key),
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
    )
    return Output(wire.REJECTED, record.key, msgspec.json.encode(rejected), int(time.time() * 1000))


def _base64(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode()


Changes = list[tuple[bytes, bytes | None]]


class Shard(Protocol):
    """A role's work on one partition: pure but for the store that it reads."""

    def take(self) -> tuple[list[Output], Changes]:
        """What came out and what changed since the last call."""

    def urgent(self) -> bool:
        """Whether something waits to be published."""

    def written(self) -> None:
        """What `take` gave is in the store: memory may let go of it."""

    def tick(self, quiet_ms: int | None) -> None:
        """Time passed; `quiet_ms`: for how long the partition is known to have nothing new (None: it has)."""


class Role(Protocol):
    """What a worker does: sessionize, predict or score."""

    name: str
    batch_records: int  # a batch is handed to `work` when it has so many records ...
    batch_ms: int  # ... or has waited so long
    is_slow: bool  # a batch takes longer than a transaction: publish each at once, while the next is at work

    @property
    def inputs(self) -> tuple[str, ...]:
        """The topics that it reads, by their names in `wire`."""

    def needs(self, key: bytes, record: bytes) -> bool:
        """Whether `open` must see this record of the state; the others are read when they are needed."""

    def open(self, partition: int, store: Store, records: Iterable[tuple[bytes, bytes]]) -> Shard:
        """Take up a partition from its restored state; `records` are those that `needs` asked for."""

    async def work(self, batch: Sequence[tuple[Any, str, list[ConsumerRecord]]]) -> None:
        """Apply the records to their shards, which are what `open` gave."""

    def report(self, partition: int, shard: Any) -> None:
        """Show the shard's figures as metrics."""
