"""What streams/ needs of the private parts of Faust, mode, aiokafka and rocksdict: one test each.

A new version may change any of them without notice, so the versions are pinned, and this file says what to look at
before moving a pin: each message tells what streams/ does with the name.
"""

import asyncio
import importlib.metadata
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiokafka
import faust
import pytest
import rocksdict
from aiokafka.consumer.fetcher import Fetcher as KafkaFetcher
from aiokafka.consumer.subscription_state import SubscriptionState, TopicPartitionState
from aiokafka.producer.message_accumulator import BatchBuilder
from aiokafka.record.memory_records import MemoryRecords
from faust.app.base import App
from faust.streams import Stream
from faust.tables.manager import TableManager
from faust.tables.recovery import Recovery
from faust.transport import conductor
from faust.transport.consumer import Consumer as AbstractConsumer
from faust.transport.consumer import Fetcher
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage
from mode import Service

from streams.engine import Engine
from streams.metrics import Metrics
from streams.ownership import BATCH_BYTES
from streams.score import Scoring
from streams.settings import Settings
from streams.transport import BatchConsumer, ConsumerThread, RoleApp, StateTable, make_app


@pytest.fixture
def app(tmp_path: Path) -> RoleApp:
    settings = Settings(state_dir=tmp_path, partitions=2)
    engine = Engine(settings, Scoring(settings, Metrics()), Metrics(), lambda error: None)
    engine.app = make_app(engine, engine.group, list(engine.topics))
    return engine.app  # type: ignore[no-any-return]


def source(thing: Any) -> str:
    return inspect.getsource(thing)


def arguments(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("package", "version"),
    [("faust-streaming", "0.15.3"), ("mode-streaming", "0.7.1"), ("aiokafka", "0.14.0"), ("rocksdict", "0.3.29")],
)
def test_versions(package: str, version: str) -> None:
    assert importlib.metadata.version(package) == version, (
        f"{package} is not the version that this file was checked with"
    )


# ---------------------------------------------------------------- Faust: consumer and fetcher


def test_the_thread_makes_its_consumer_in_create_worker_consumer() -> None:
    thread = driver.AIOKafkaConsumerThread
    assert arguments(thread._create_worker_consumer) == ["self", "transport"], "we make our own consumer there"
    assert "_create_worker_consumer(" in source(thread._create_consumer), "the thread's consumer must be ours"
    assert "self._consumer =" in source(thread.on_start), "`progress` reads it from there"
    assert ConsumerThread._create_worker_consumer is not thread._create_worker_consumer


def test_the_consumer_makes_its_thread_in_new_consumer_thread() -> None:
    assert arguments(driver.Consumer._new_consumer_thread) == ["self"], "we make our own thread there"
    init = source(AbstractConsumer.__init__) + source(driver.Consumer.__mro__[1].__init__)
    assert "self._thread = self._new_consumer_thread()" in init
    assert "__post_init__" not in source(driver.Consumer), "BatchConsumer's would have to call it"
    assert issubclass(BatchConsumer, driver.Consumer)


def test_the_fetcher_runs_drain_messages() -> None:
    assert "await consumer._drain_messages(self)" in source(Fetcher), "batch delivery replaces this loop"
    assert arguments(AbstractConsumer._drain_messages) == ["self", "fetcher"]


def test_the_next_records_come_by_partition_and_only_while_the_flow_is_active() -> None:
    text = source(AbstractConsumer._wait_next_records)
    assert arguments(AbstractConsumer._wait_next_records) == ["self", "timeout"]
    assert "if not self.flow_active:" in text, "it must wait while the flow is stopped"
    assert "return records, active_partitions" in text, "we take (records by partition, partitions)"
    assert "self.not_waiting_next_records" in text, "a rebalance waits for the fetch under way"


def test_the_flow_is_an_attribute_and_an_event() -> None:
    stop, resume = source(AbstractConsumer.stop_flow), source(AbstractConsumer.resume_flow)
    assert "self.flow_active = False" in stop, "delivery ends when the flow stops"
    assert "self.suspend_flow.set()" in stop, "a delivery that waits for room is given up then"
    assert "self.flow_active = True" in resume
    assert "self.suspend_flow.clear()" in resume


async def test_wait_first_returns_when_either_is_done() -> None:
    service, event = Service(), asyncio.Event()
    forever = asyncio.Event()
    event.set()
    result = await service.wait_first(forever.wait(), event.wait())
    assert len(result.done) == 1, "a delivery that waits for ever is given up when the flow is suspended"


def test_seeks_are_waited_for() -> None:
    assert inspect.iscoroutinefunction(driver.Consumer.seek_wait), "no record may be read before the seek is done"
    assert inspect.iscoroutinefunction(driver.AIOKafkaConsumerThread.seek_wait)
    assert "await self.perform_seek()" in source(Recovery) or "perform_seek" in source(Recovery), (
        "after recovery we seek"
    )
    assert arguments(AbstractConsumer.perform_seek) == ["self"]


def test_the_hooks_of_a_rebalance() -> None:
    assert arguments(AbstractConsumer.on_partitions_revoked) == ["self", "revoked"]
    assert arguments(AbstractConsumer.on_partitions_assigned) == ["self", "assigned", "generation_id"]
    assert "verify_all_partitions_active" in dir(AbstractConsumer), "we switch Faust's watch on acks off"
    assert "commit" in dir(AbstractConsumer), "we switch Faust's commits off"


def test_stopped_errors_are_known_to_the_consumer() -> None:
    assert issubclass(driver.Consumer.consumer_stopped_errors[0], BaseException)


# ---------------------------------------------------------------- Faust: from the consumer to the agent


def test_channels_of_a_partition_are_in_the_conductors_index(app: RoleApp) -> None:
    assert "_tp_index" in source(conductor.Conductor.__init__), "we put batches into the channels of a partition"
    assert "self._tp_index.clear()" in source(conductor.Conductor.on_partitions_assigned)
    assert list(app.topics._tp_index[TP("clicks", 0)]) == []


def test_a_message_may_carry_a_list_and_its_generation() -> None:
    names = arguments(ConsumerMessage.__init__)
    assert names[1:13] == [
        "topic", "partition", "offset", "timestamp", "timestamp_type", "headers", "key", "value", "checksum",
        "serialized_key_size", "serialized_value_size", "tp",
    ]  # fmt: skip
    message = ConsumerMessage("t", 0, 5, 1.0, 0, None, None, ["a"], None, 0, 0, TP("t", 0), generation_id=7)
    assert (message.value, message.generation_id) == (["a"], 7)


def test_a_stream_skips_events_of_an_old_generation() -> None:
    compiled = Path(inspect.getfile(faust)).parent / "_cython" / "streams.pyx"  # the one that runs where it was built
    for text in (source(Stream._py_aiter), compiled.read_text()):
        assert "message.generation_id != self.app.consumer_generation_id" in text, (
            "old batches would be fed after a rebalance"
        )
    listener = source(driver.ConsumerRebalanceListener.on_partitions_assigned)
    assert "consumer_generation_id = generation" in listener, "we stamp each batch with it"


def test_the_streams_of_agents_hand_over_events_without_acks() -> None:
    assert arguments(Stream.noack) == ["self"], "offsets are not acked but part of our transactions"
    assert arguments(Stream.events) == ["self"]
    assert "acks" in arguments(App.topic)
    assert "maxsize" in arguments(App.topic), "the channel is short, so the agent's pace bounds what is in memory"


def test_flow_control_can_be_waited_for(app: RoleApp) -> None:
    assert inspect.iscoroutinefunction(app.flow_control.acquire), "no delivery while the app is rebalancing"


# ---------------------------------------------------------------- Faust: tables, recovery, stores


def test_the_tables_take_our_recovery_and_our_table(app: RoleApp) -> None:
    assert TableManager._recovery is None, "we set it before the manager makes one"
    assert "if self._recovery is None" in source(TableManager.recovery.fget)
    assert type(app.tables.recovery).__name__ == "_NothingToRecover"
    assert isinstance(app.tables[app.state_table.name], StateTable)


def test_recovery_with_nothing_to_recover_calls_us_back() -> None:
    assert arguments(Recovery._build_highwaters) == ["self", "consumer", "tps", "destination", "title"]
    text = source(Recovery)
    assert text.count("_build_highwaters)(") == 2, "for active and standby partitions"
    assert "active_highwaters[tp]" in text, "None there means: nothing to recover"
    assert "on_recovery_completed" in text


def test_the_engine_is_called_when_faust_thinks_that_it_has_recovered(app: RoleApp) -> None:
    assert app.engine.recover in app.state_table._recover_callbacks
    assert "await fun()" in source(faust.Table.call_recover_callbacks), "it must be awaited before reading goes on"


def test_a_table_hears_of_a_rebalance_before_recovery() -> None:
    assert arguments(faust.Table.on_rebalance) == ["self", "assigned", "revoked", "newly_assigned", "generation_id"]
    text = source(TableManager.on_rebalance)
    assert text.index("table.on_rebalance") < text.index("self.recovery.on_rebalance"), "fencing comes before restoring"
    assert arguments(StateTable.on_rebalance) == arguments(faust.Table.on_rebalance)


def test_the_store_opens_a_database_a_partition(app: RoleApp) -> None:
    data: Any = app.state_table.data
    path = Path(data.partition_path(1))
    database = data._db_for_partition(1)
    assert path.exists(), "the engine wipes this directory"
    assert isinstance(database, rocksdict.Rdict)
    assert data._dbs == {1: database}, "the engine closes what it opened, and takes it out of here"
    assert data._db_for_partition(1) is database
    database.close()
    data._dbs.clear()


def test_a_crash_of_an_app_is_shown(app: RoleApp) -> None:
    assert app.crash_reason is None, "the watchdog ends the worker when it is set"
    assert "self.crash_reason = reason" in source(Service)


def test_faust_makes_transports_and_assignor_through_our_app(app: RoleApp) -> None:
    assert type(app.transport).__name__ == "BatchTransport"
    assert type(app.producer_transport).__name__ == "BatchTransport"
    assert "_new_transport()" in source(App), "our consumer comes with our transport"
    assert app.assignor is not None, "our consumer is given Faust's assignor, which places tables with their topics"
    assert "_settings_auth" in source(driver.Producer), "Faust's own producer must get past TLS and SASL"


# ---------------------------------------------------------------- aiokafka


async def test_lag_is_known_from_the_subscriptions_state() -> None:
    """`progress`: where reading stands, where the partition ends, and when the broker last said so."""
    subscriptions = SubscriptionState()
    tp = aiokafka.TopicPartition("t", 0)
    subscriptions.assign_from_user([tp])
    assignment = subscriptions.subscription.assignment
    assert tp in assignment.tps
    state = assignment.state_value(tp)
    assert isinstance(state, TopicPartitionState)
    assert (state.has_valid_position, state.lso, state.highwater, state.timestamp) == (False, None, None, None)
    state.seek(5)
    assert (state.has_valid_position, state.position) == (True, 5)
    text = source(KafkaFetcher)
    for name in ("lso", "highwater", "timestamp"):
        assert f"tp_state.{name} =" in text, f"each fetch answer must set {name}, else quiet partitions never close"
    consumer = source(aiokafka.AIOKafkaConsumer.__init__)
    assert "self._subscription =" in consumer


def builder(batch_bytes: int) -> BatchBuilder:
    """As `AIOKafkaProducer.create_batch` makes it for us."""
    return BatchBuilder(batch_bytes, 0, is_transactional=True)


def test_batches_take_milliseconds_and_count_their_records() -> None:
    batch = builder(BATCH_BYTES)
    now = int(time.time() * 1000)
    assert batch.append(timestamp=now, key=b"k", value=b"v") is not None
    assert batch.append(timestamp=now + 1, key=b"gone", value=None) is not None
    assert batch.record_count() == 2, "the last record's offset is the first's plus the count less one"
    batch.close()
    assert batch.append(timestamp=now, key=b"k", value=b"v") is None, "a closed batch takes nothing"
    (records,) = _batches(bytes(batch._build()))
    assert [(r.key, r.value, r.timestamp) for r in records] == [(b"k", b"v", now), (b"gone", None, now + 1)]


def _batches(data: bytes) -> list[list[Any]]:
    memory, found = MemoryRecords(data), []
    while memory.has_next():
        found.append(list(memory.next_batch()))
    return found


def test_a_record_larger_than_a_batch_has_one_of_its_own() -> None:
    batch = builder(1_000)
    assert batch.append(timestamp=1, key=b"k", value=bytes(5_000)) is not None, (
        "else the engine would lose it in silence"
    )
    assert batch.append(timestamp=1, key=b"k", value=b"v") is None, "a full batch says so; the engine makes another"


def test_the_transactional_producer() -> None:
    producer = aiokafka.AIOKafkaProducer
    for name in (
        "begin_transaction",
        "commit_transaction",
        "send",
        "send_batch",
        "send_offsets_to_transaction",
        "stop",
    ):
        assert inspect.iscoroutinefunction(getattr(producer, name)), f"the engine awaits {name}"
    assert arguments(producer.send_batch) == ["self", "batch", "topic", "partition"]
    assert arguments(producer.send_offsets_to_transaction) == ["self", "offsets", "group_id"]
    assert not inspect.iscoroutinefunction(producer.create_batch)
    assert {"transactional_id", "transaction_timeout_ms", "max_batch_size", "max_request_size"} <= set(
        arguments(producer)
    )


def test_the_consumer_reads_committed_and_counts_markers() -> None:
    consumer = aiokafka.AIOKafkaConsumer
    assert {"isolation_level", "max_partition_fetch_bytes", "session_timeout_ms", "rebalance_timeout_ms"} <= set(
        arguments(consumer)
    )
    text = inspect.getsource(inspect.getmodule(KafkaFetcher))  # type: ignore[arg-type]
    assert "READ_COMMITTED" in text
    assert "is_control_batch" in text, "the position must move behind a marker, else the restore never ends"
    assert inspect.iscoroutinefunction(consumer.position)


# ---------------------------------------------------------------- rocksdict


def test_a_raw_batch_is_written_without_a_log(tmp_path: Path) -> None:
    options = rocksdict.Options(raw_mode=True)
    options.create_if_missing(True)
    database = rocksdict.Rdict(str(tmp_path / "db"), options)
    batch = rocksdict.WriteBatch(raw_mode=True)
    batch.put(b"a", b"1")
    batch.put(b"b", b"2")
    batch.delete(b"a")
    without_log = rocksdict.WriteOptions()
    without_log.disable_wal = True
    database.write(batch, without_log)
    assert list(database.items()) == [(b"b", b"2")], "a batch is applied in its order"
    assert list(database.items(from_key=b"b")) == [(b"b", b"2")], "a sweep goes on from its last key"
    database.flush()
    database.close()


def test_faust_opens_raw_databases(app: RoleApp) -> None:
    """Keys and values are bytes: a database in another mode would refuse the engine's batches."""
    database = app.state_table.data._db_for_partition(0)
    database[b"a"] = b"1"
    assert database.get(b"a") == b"1"
    with pytest.raises(Exception, match=r"(?i)lock"):  # `Store` knows a store in use by this word
        rocksdict.Rdict(str(app.state_table.data.partition_path(0)), rocksdict.Options(raw_mode=True))
    database.close()
    app.state_table.data._dbs.clear()


def test_the_wait_between_transactions_can_be_set() -> None:
    from aiokafka.producer import sender

    assert sender.BACKOFF_OVERRIDE == 0.002, "streams.ownership shortens aiokafka's wait between two transactions"
    assert "return BACKOFF_OVERRIDE" in inspect.getsource(sender), "aiokafka reads it when a transaction must wait"
