"""The role `sessionize` on one partition: what is published of what was refused or held, and how time passes."""

import base64
import json
import time
from typing import Any

import msgspec
import pytest
from aiokafka import ConsumerRecord

from streams import wire
from streams.metrics import Metrics
from streams.sessionize import Sessionize, SessionizeShard
from streams.sessions import Fate
from streams.settings import Settings
from tests.streams.itemtable import Clusters

BASE = 1_700_000_000_000
SETTINGS = Settings(gap_ms=60_000, grace_ms=100_000, ahead_ms=600_000, clock="live", idle_ms=1_000, partitions=1)


class MemoryStore:
    """As much of a store as a shard uses."""

    def __init__(self) -> None:
        self.records: dict[bytes, bytes] = {}

    def get(self, key: bytes) -> bytes | None:
        return self.records.get(key)

    def items_after(self, key: bytes | None, limit: int) -> list[tuple[bytes, bytes]]:
        return [item for item in sorted(self.records.items()) if key is None or item[0] > key][:limit]


def open_shard(settings: Settings = SETTINGS) -> tuple[Sessionize, SessionizeShard, MemoryStore]:
    store: Any = MemoryStore()
    role = Sessionize(settings, Metrics())
    return role, role.open(0, store, []), store


def record(offset: int, user: str, ms: int, **changes: Any) -> ConsumerRecord:
    value = json.dumps({"user_id": user, "ts": BASE + ms, "page": "p", "event_id": f"e{offset}"} | changes).encode()
    return ConsumerRecord("shop.clicks", 0, offset, BASE + ms, 0, user.encode(), value, None, 0, 0, ())


def flush(shard: SessionizeShard, store: MemoryStore) -> list[tuple[str, Any]]:
    outputs, changes = shard.take()
    for key, value in changes:
        if value is None:
            store.records.pop(key, None)
        else:
            store.records[key] = value
    shard.written()
    return [(o.topic, None if o.value is None else json.loads(o.value)) for o in outputs]


def test_refused_at_once_and_late() -> None:
    _, shard, store = open_shard()
    early = record(2, "u", -500_000)
    shard.apply([record(0, "u", 0), record(1, "u", 1, user_id="v"), early])
    outputs = flush(shard, store)
    assert [topic for topic, _ in outputs] == [wire.REJECTED, wire.LATE]
    assert (outputs[0][1]["reason"], outputs[0][1]["offset"]) == ("key_mismatch", 1)
    assert base64.b64decode(outputs[0][1]["original"]) == record(1, "u", 1, user_id="v").value
    assert outputs[1][1]["event"]["event_id"] == "e2"
    assert outputs[1][1]["late_by_ms"] == 400_000
    assert set(outputs[1][1]["event"]) == set(wire.Event.__struct_fields__)


def test_a_held_event_that_is_refused_later_is_written_anew() -> None:
    """Its record is long gone; what is published has its own place and content, not those of the event at hand."""
    _, shard, store = open_shard(SETTINGS.but(max_events_per_minute=1))
    held = [record(1, "w", 700_000), record(2, "w", 700_001, attributes={"a": 1})]
    shard.apply([record(0, "u", 0), *held])
    assert flush(shard, store) == []
    shard.apply([record(3, "u", 300_000)])
    (rejected,) = [value for topic, value in flush(shard, store) if topic == wire.REJECTED]
    assert (rejected["reason"], rejected["stage"], rejected["offset"]) == ("rate_limited", "sessionize", 2)
    assert base64.b64decode(rejected["original_key"]) == b"w"
    original = msgspec.json.decode(base64.b64decode(rejected["original"]), type=wire.Event)
    assert original == wire.Event("w", BASE + 700_001, "p", "e2", attributes={"a": 1})


def test_a_quiet_partition_closes_its_sessions_in_live_mode() -> None:
    _, shard, store = open_shard()
    shard.apply([record(0, "u", 0)])
    for quiet_ms, closed in [(None, 0), (999, 0), (160_000, 0), (None, 0), (160_001, 1), (500_000, 0)]:
        shard.tick(quiet_ms)
        assert len([topic for topic, _ in flush(shard, store) if topic == wire.SESSIONS]) == closed, quiet_ms
    assert shard.sessionizer.watermark_ms == BASE + 400_000


def test_quiet_times_are_counted_from_the_last_event() -> None:
    _, shard, store = open_shard()
    shard.apply([record(0, "u", 0)])
    shard.tick(50_000)
    shard.tick(100_000)
    assert shard.sessionizer.watermark_ms == BASE
    shard.apply([record(1, "u", 1_000)])
    shard.tick(100_000)
    assert shard.sessionizer.watermark_ms == BASE + 100_000  # of the time reached, not of what was added before
    assert [topic for topic, _ in flush(shard, store)] == [wire.SESSIONS]


def test_quiet_time_never_runs_ahead_of_the_wall_clock() -> None:
    _, shard, _ = open_shard()
    now = int(time.time() * 1000)
    shard.apply([record(0, "u", now - BASE)])
    shard.tick(10**9)
    assert (shard.sessionizer.watermark_ms or 0) <= time.time() * 1000 - SETTINGS.grace_ms


def test_in_log_mode_only_the_log_moves_time() -> None:
    _, shard, store = open_shard(SETTINGS.but(clock="log"))
    shard.apply([record(0, "u", 0)])
    shard.tick(10**9)
    assert shard.sessionizer.watermark_ms == BASE - SETTINGS.grace_ms
    assert flush(shard, store) == []


def test_metrics_show_the_fates_of_the_partitions_whole_life() -> None:
    role, shard, store = open_shard(SETTINGS.but(clock="log"))
    shard.apply([record(0, "u", 0), record(0, "u", 0), record(1, "u", -500_000), record(2, "u", 0, ts="x")])
    shard.apply([record(3, "w", 700_000)])
    flush(shard, store)
    role.report(0, shard)
    again = Sessionize(SETTINGS, Metrics())
    shown: Any = store
    again.report(0, again.open(0, shown, list(store.records.items())))
    for metrics in (role._metrics, again._metrics):
        value = metrics.registry.get_sample_value
        fates = {
            fate.name.lower(): value("browsecast_events_total", {"partition": "0", "fate": fate.name.lower()})
            for fate in Fate
        }
        assert fates == {"accepted": 1, "duplicate": 1, "late": 1, "rejected": 1, "held": None}
        assert value("browsecast_held_events", {"partition": "0"}) == 1
        assert value("browsecast_received_events_total", {"partition": "0"}) == 5
    reasons = role._metrics.registry.get_sample_value(
        "browsecast_rejected_events_total", {"partition": "0", "reason": "invalid_timestamp"}
    )
    assert reasons == 1


@pytest.mark.parametrize("again", [False, True])
def test_users_long_silent_are_swept_out(again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.sessionize.SWEEP_SECONDS", 0.0)
    _, shard, store = open_shard(SETTINGS.but(forget_after_ms=200_000, clock="log"))
    shard.apply([record(n, "u", 0) if n == 0 else record(n, "v", 60_000 * n) for n in range(8)])
    flush(shard, store)
    assert b"u" in store.records
    if again:
        shard.apply([record(9, "u", 60_000 * 8)])
    shard.tick(None)
    shard.tick(None)
    flush(shard, store)
    assert (b"u" in store.records) is again
    assert b"v" in store.records
    assert shard.expired == (0 if again else 1)


def seeds_of(outputs: list[tuple[str, Any]]) -> list[list[tuple[str, int]] | None]:
    sessions = [value for topic, value in outputs if topic == wire.SESSIONS and value is not None]
    found = [session["context"]["seeds"] for session in sessions]
    return [None if one is None else [(seed["item_id"], seed["channel"]) for seed in one] for one in found]


def test_seeds_are_published_by_the_bundle_in_use_and_forgotten_with_the_user() -> None:
    """Another table maps them anew at the next close; a bundle without items publishes none."""
    role, shard, store = open_shard(SETTINGS.but(clock="log", ahead_ms=10**9))
    role.adopt(None, Clusters({"shoe": 1, "boot": 1}))
    shard.apply([record(0, "u", 0, item_id="shoe"), record(1, "v", 500_000)])
    assert seeds_of(flush(shard, store)) == [[("shoe", 1)]]
    role.adopt(None, Clusters({"shoe": 7, "hat": 7}))
    shard.apply([record(2, "u", 600_000, item_id="boot"), record(3, "v", 1_100_000, item_id="hat")])
    assert seeds_of(flush(shard, store)) == [[], [("shoe", 7)]]
    role.adopt(None, None)
    shard.apply([record(4, "w", 1_700_000)])
    assert seeds_of(flush(shard, store)) == [None]
    shard.apply([ConsumerRecord("shop.clicks", 0, 5, BASE, 0, b"u", None, None, 0, 0, ())])
    flush(shard, store)
    assert b"u" not in store.records
    role.adopt(None, Clusters({"shoe": 1, "boot": 1}))
    shard.apply([record(6, "u", 1_700_000, item_id="boot"), record(7, "w", 2_500_000)])
    assert [("boot", 1)] in seeds_of(flush(shard, store))
