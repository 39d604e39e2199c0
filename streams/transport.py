"""How Faust reads for us: a list of records a fetch, not a message a task; read committed; from where the state ends.

Every private name of Faust and aiokafka used here is covered by tests/streams/test_contract.py.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

import faust
from aiokafka import AIOKafkaConsumer, ConsumerRecord
from faust.events import Event
from faust.tables.recovery import Recovery
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage

from streams import clients
from streams.settings import Settings

FETCH_WAIT_MS = 500  # an idle partition hears from its broker at least so often
DELIVERED_RECORDS = 1_000  # most records handed over at once: bounds how long the loop is held


class ConsumerThread(driver.AIOKafkaConsumerThread):
    """Faust's consumer thread with a consumer that reads committed and speaks TLS and SASL as the settings say."""

    def _create_worker_consumer(self, transport: Any) -> AIOKafkaConsumer:
        self._assignor = self.app.assignor
        settings: Settings = self.app.engine.settings
        return AIOKafkaConsumer(
            group_id=self.app.conf.id,
            client_id=self.app.conf.id,
            partition_assignment_strategy=[self._assignor],
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=FETCH_WAIT_MS,
            max_partition_fetch_bytes=self.app.conf.consumer_max_fetch_size,
            session_timeout_ms=settings.session_timeout_ms,
            rebalance_timeout_ms=max(60_000, settings.session_timeout_ms),
            heartbeat_interval_ms=max(100, settings.session_timeout_ms // 6),
            max_poll_interval_ms=600_000,
            metadata_max_age_ms=10_000,
            **clients.aiokafka(settings),
        )


class BatchConsumer(driver.Consumer):
    """Delivers lists of records; commits nothing itself, since offsets are part of the engine's transactions."""

    def __post_init__(self) -> None:
        """Called by Faust at the end of its constructor."""
        self._next: dict[TP, int] = {}  # where delivery stands
        self._settled = False  # whether the last seek is done: nothing is fetched before
        self.token = 0  # a fetch or a delivery begun before the last rebalance is void

    def _new_consumer_thread(self) -> ConsumerThread:
        return ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    async def commit(self, *args: Any, **kwargs: Any) -> bool:
        """Nothing to do: the input position is committed with the outputs."""
        return True

    async def verify_all_partitions_active(self) -> None:
        """Faust's own watch on acks does not fit; ours watches lag against progress."""

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """A rebalance begins: what is under way from here on belongs to nobody."""
        self._unsettle()
        await super().on_partitions_revoked(revoked)

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        """New partitions: Faust lets the flow go on before their state is restored; we do not."""
        self._unsettle()
        await super().on_partitions_assigned(assigned, generation_id)

    def _unsettle(self) -> None:
        self._settled = False
        self.token += 1

    async def perform_seek(self) -> None:
        """The input position is part of the state: go on where it ends, whatever the group's offset says."""
        token = self.token
        known = self.app.engine.positions()
        fresh = [tp for tp, position in known.items() if position is None]
        earliest = await self.earliest_offsets(*fresh) if fresh else {}
        start = {tp: earliest.get(tp, 0) if position is None else position for tp, position in known.items()}
        self._next = dict(start)
        if start:
            await self.seek_wait(start)
        self._settled = token == self.token  # else the next rebalance has begun already

    async def _rewind(self, records: Mapping[TP, list[ConsumerRecord]]) -> None:
        """The records were not all delivered: fetch again from where delivery stands."""
        back = {tp: self._next[tp] for tp in records if tp in self._next and tp in self.assignment()}
        if back:
            await self.seek_wait(back)

    async def _deliver(self, tp: TP, records: list[ConsumerRecord]) -> None:
        await self.app.flow_control.acquire()
        last = records[-1]
        message = ConsumerMessage(
            tp.topic, tp.partition, last.offset, last.timestamp / 1000.0, last.timestamp_type, None, None, records,
            None, 0, 0, tp, generation_id=self.app.consumer_generation_id,
        )  # fmt: skip
        for channel in self.app.topics._tp_index[tp]:
            await channel.queue.put(Event(self.app, None, (self.token, records), None, message))

    async def _drain_messages(self, fetcher: Any) -> None:
        while not (self._stopped.is_set() or fetcher._stopped.is_set()):
            await asyncio.sleep(0 if self._settled else 0.01)
            if not self._settled:
                continue
            token = self.token
            try:
                records, _ = await self._wait_next_records(1.0)
            except (asyncio.CancelledError, *self.consumer_stopped_errors):
                if self.transport.app.should_stop:
                    return
                raise
            if not records or self.should_stop:
                continue
            if not await self._hand_over(records, token):
                await self._rewind(records)

    async def _hand_over(self, records: Mapping[TP, list[ConsumerRecord]], token: int) -> bool:
        """Deliver in parts; False when a rebalance came between, so that some were not delivered, or to nobody."""
        for tp, fetched in records.items():
            for start in range(0, len(fetched), DELIVERED_RECORDS):
                if not self.flow_active or token != self.token:
                    return False
                part = fetched[start : start + DELIVERED_RECORDS]
                await self.wait_first(self._deliver(TP(*tp), part), self.suspend_flow.wait())
                if not self.flow_active or token != self.token:
                    return False
                self._next[TP(*tp)] = part[-1].offset + 1
        return True

    def progress(self, tp: TP) -> tuple[int, int, int] | None:
        """(position, end, time of the last answer in epoch ms) of a partition; None before the first answer."""
        consumer = self._thread._consumer
        assignment = consumer._subscription.subscription.assignment if consumer._subscription.subscription else None
        state = assignment.state_value(tp) if assignment is not None and tp in assignment.tps else None
        if state is None or not state.has_valid_position or state.lso is None or state.timestamp is None:
            return None
        return state.position, state.lso if state.lso >= 0 else state.highwater, state.timestamp


class IdleProducer(driver.Producer):
    """Faust starts a producer of its own; we send nothing through it, but it has to get past TLS and SASL."""

    def _settings_auth(self) -> dict[str, Any]:
        config = clients.aiokafka(self.app.engine.settings)
        del config["bootstrap_servers"]
        return config


class BatchTransport(driver.Transport):
    """Faust's transport with our consumer and producer."""

    Consumer = BatchConsumer
    Producer = IdleProducer


class _NothingToRecover(Recovery):
    """Faust's recovery never ends behind a transaction's control record; the engine restores with its own consumer."""

    async def _build_highwaters(self, consumer: Any, tps: Any, destination: Any, title: str) -> None:
        for tp in tps:
            destination[tp] = None


class StateTable(faust.Table):
    """The Faust table of a role: its changelog, its RocksDB stores, and the moment of a rebalance in which we fence."""

    async def on_rebalance(
        self, assigned: set[TP], revoked: set[TP], newly_assigned: set[TP], generation_id: int = 0
    ) -> None:
        """Fence whoever owned the partitions before anything of them is read."""
        try:
            await self.app.engine.fence({tp.partition for tp in assigned if tp.topic in self.app.input_topics})
        except Exception as error:
            self.app.engine.fail(error)
            raise


class RoleApp(faust.App):
    """A Faust app of one role, wired to its engine."""

    engine: Any
    input_topics: frozenset[str]
    state_table: faust.Table

    def _new_transport(self) -> BatchTransport:
        return BatchTransport(self.conf.broker_consumer, self)

    def _new_producer_transport(self) -> BatchTransport:
        return BatchTransport(self.conf.broker_producer, self)


def make_app(engine: Any, name: str, input_topics: list[str]) -> RoleApp:
    """The Faust app that reads `input_topics` into the engine: group, assignor, agents, table and changelog."""
    settings: Settings = engine.settings
    app = RoleApp(
        name,
        broker=[f"kafka://{server}" for server in settings.bootstrap_servers.split(",")],
        datadir=str(settings.state_dir / name),
        store="rocksdb://?driver=rocksdict",
        topic_partitions=settings.partitions,
        topic_allow_declare=False,
        topic_disable_leader=True,
        table_standby_replicas=0,
        stream_wait_empty=False,
        stream_recovery_delay=0.0,
        broker_session_timeout=settings.session_timeout_ms / 1000,
        consumer_auto_offset_reset="earliest",
        consumer_max_fetch_size=4 << 20,
        key_serializer="raw",
        value_serializer="raw",
        web_enabled=False,
        worker_redirect_stdouts=False,
    )
    app.engine, app.input_topics = engine, frozenset(input_topics)
    app.tables._recovery = _NothingToRecover(app, app.tables, beacon=app.tables.beacon, loop=app.tables.loop)
    options = {"block_cache_size": 32 << 20, "write_buffer_size": 16 << 20, "bloom_filter_size": 10}
    app.state_table = app.tables.add(
        StateTable(app, name="state", partitions=settings.partitions, key_type=bytes, value_type=bytes, options=options)
    )
    app.state_table.on_recover(engine.recover)

    @app.on_partitions_revoked.connect
    async def revoked(*_: Any, **__: Any) -> None:
        await engine.release()

    for topic in input_topics:
        _agent(app, topic)
    return app


def _agent(app: RoleApp, topic: str) -> None:
    channel = app.topic(topic, key_type=bytes, value_type=bytes, acks=False, maxsize=4)

    @app.agent(channel, name=f"{app.engine.role.name}:{topic}")
    async def read(stream: Any) -> None:
        async for event in stream.noack().events():
            try:
                token, records = event.value
                if token == app.consumer.token:
                    await app.engine.feed(event.message.partition, topic, records)
            except Exception as error:  # Faust would restart the agent and lose the batch
                app.engine.fail(error)
                raise
