"""The role `sessionize`: clicks in; sessions, late and rejected events out."""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
from aiokafka import ConsumerRecord

from streams import wire
from streams.channels import Channels, ItemClusters
from streams.events import BadEvent, EventDecoder, check_key
from streams.metrics import Metrics
from streams.profiles import SiteProfile
from streams.roles import Changes, Output, refused
from streams.sessionizer import RESERVED, Capped, Sessionizer
from streams.sessions import Fate, Policy, has_open
from streams.settings import Settings
from streams.store import Store

SWEEP_RECORDS = 500  # records a sweep looks at for users to forget
SWEEP_SECONDS = 5.0

_encode = msgspec.json.Encoder().encode


class SessionizeShard:
    """One partition of clicks."""

    def __init__(
        self, role: "Sessionize", partition: int, store: Store, records: Iterable[tuple[bytes, bytes]]
    ) -> None:
        self._role, self._partition, self._store = role, partition, store
        self.sessionizer = Sessionizer(role.policy, store.get, records, role.router, role.channels)
        self.reasons: Counter[str] = Counter()
        self.closed_sessions = self.forgotten = self.expired = 0
        self._outputs: list[Output] = []
        self._base_ms: int | None = None
        self._sweep_key: bytes | None = None
        self._swept = time.monotonic()

    def apply(self, records: Iterable[ConsumerRecord]) -> None:
        """Decide the fate of each record, in order."""
        sessionizer, decode = self._served(), self._role.decoder.decode
        for record in records:
            sessionizer.clock.received += 1
            try:
                key = check_key(record.key)
                if record.value is None:
                    self.forgotten += 1
                    sessionizer.forget(key, key.decode())
                    continue
                event, mark = decode(key, record.value, record.timestamp)
            except BadEvent as error:
                self._reject(record, error.reason, error.stage, str(error))
                sessionizer.clock.fates[Fate.REJECTED] += 1
                continue
            sessionizer.apply(key, event, mark, record.offset)
            for capped in sessionizer.capped:
                self._cap(capped, record)
            sessionizer.capped.clear()
        self._base_ms = None
        self._collect()

    def _served(self) -> Sessionizer:
        """The sessionizer with what the bundle in use knows: between two calls another may have come."""
        self.sessionizer.router, self.sessionizer.channels = self._role.router, self._role.channels
        return self.sessionizer

    def _cap(self, capped: Capped, record: ConsumerRecord) -> None:
        """An event over a limit; one that was held is written anew, since its record is long gone."""
        if capped.offset != record.offset:
            record = replace(
                record, offset=capped.offset, key=capped.event.user_id.encode(), value=_encode(capped.event)
            )
        self._reject(record, capped.reason, "sessionize", capped.message)

    def _reject(self, record: ConsumerRecord, reason: str, stage: str, message: str) -> None:
        self.reasons[reason] += 1
        self._outputs.append(refused(record, stage, message, reason))

    def _collect(self) -> None:
        sessionizer, now = self.sessionizer, _now_ms()
        for key, session in sessionizer.closed:
            self.closed_sessions += session is not None
            self._outputs.append(Output(wire.SESSIONS, key, None if session is None else _encode(session), now))
        sessionizer.closed.clear()
        for key, late in sessionizer.late:
            self._outputs.append(Output(wire.LATE, key, _encode(late), now))
        sessionizer.late.clear()

    def take(self) -> tuple[list[Output], Changes]:
        """What came out and what changed since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs, list(self.sessionizer.changes())

    def urgent(self) -> bool:
        """A closed session should not wait."""
        return bool(self._outputs)

    def written(self) -> None:
        """Memory may let go of users that are in the store."""
        self.sessionizer.evict(self._role.cached_users)

    def tick(self, quiet_ms: int | None) -> None:
        """In live mode a quiet partition's event time runs on at wall speed; users long silent are swept out."""
        if self._role.settings.clock == "live":
            self._run_on(quiet_ms)
        if time.monotonic() - self._swept >= SWEEP_SECONDS:
            self._swept = time.monotonic()
            self._sweep()

    def _run_on(self, quiet_ms: int | None) -> None:
        high = self.sessionizer.clock.high_ms
        if quiet_ms is None or quiet_ms < self._role.settings.idle_ms or high is None:
            return
        if self._base_ms is None:
            self._base_ms = high  # event time when the quiet began
        self._served().run_on(min(self._base_ms + quiet_ms, _now_ms()))
        self._collect()

    def _sweep(self) -> None:
        records = self._store.items_after(self._sweep_key, SWEEP_RECORDS)
        self._sweep_key = records[-1][0] if records else None
        self.expired += self.sessionizer.forget_silent(records)


class Sessionize:
    """Cuts clicks into sessions."""

    name = "sessionize"
    is_slow = False
    inputs = (wire.CLICKS,)
    batch_records = 5_000
    batch_ms = 0

    def __init__(
        self, settings: Settings, metrics: Metrics, router: Any = None, items: ItemClusters | None = None
    ) -> None:
        """`router` keeps the routing sums of each user (`models.routing.Router`), `items` knows the clusters of items.

        None without a bundle, or when it knows no items.
        """
        self.settings = settings
        self.adopt(router, items)
        self.policy = Policy.of(settings)
        self.decoder = EventDecoder(SiteProfile.load(settings.profile), settings.ahead_ms)
        self.cached_users = max(1, settings.cache_users // settings.partitions)
        self._metrics = metrics
        self._shown: dict[tuple[int, str], int] = {}

    def adopt(self, router: Any, items: ItemClusters | None) -> None:
        """From here on closed sessions carry what this bundle needs; each user's sums are made anew at the next one."""
        self.router = router
        self.channels = None if items is None else Channels.of(self.settings, items)

    def needs(self, key: bytes, record: bytes) -> bool:
        """The partition's own records, and those of users with an open session."""
        return key.startswith(RESERVED) or has_open(record)

    def open(self, partition: int, store: Store, records: Iterable[tuple[bytes, bytes]]) -> SessionizeShard:
        """Take up a partition from its restored state."""
        # The counts are part of the state: the metrics show the partition's whole life, on whichever worker it is.
        self._shown = {place: count for place, count in self._shown.items() if place[0] != partition}
        return SessionizeShard(self, partition, store, records)

    async def work(self, batch: Sequence[tuple[SessionizeShard, str, list[ConsumerRecord]]]) -> None:
        """Apply the records to their shards."""
        for shard, _, records in batch:
            shard.apply(records)

    def report(self, partition: int, shard: SessionizeShard) -> None:
        """Show the shard's figures as metrics."""
        metrics, sessionizer = self._metrics, shard.sessionizer
        fates = sessionizer.clock.fates
        for fate in (Fate.ACCEPTED, Fate.DUPLICATE, Fate.LATE, Fate.REJECTED):
            metrics.events.labels(partition, fate.name.lower()).inc(self._since(partition, fate.name, fates[fate]))
        metrics.received.labels(partition).inc(self._since(partition, "received", sessionizer.clock.received))
        metrics.held_events.labels(partition).set(fates[Fate.HELD])
        for reason, count in shard.reasons.items():
            metrics.rejected.labels(partition, reason).inc(count)
        metrics.capped_users.labels(partition).inc(shard.reasons["rate_limited"])
        shard.reasons.clear()
        metrics.sessions_closed.labels(partition).inc(shard.closed_sessions)
        metrics.forgotten.labels(partition).inc(shard.forgotten)
        metrics.expired_users.labels(partition).inc(shard.expired)
        shard.closed_sessions = shard.forgotten = shard.expired = 0
        metrics.cached_users.labels(partition).set(len(sessionizer.users))
        metrics.open_sessions.labels(partition).set(sessionizer.open_sessions)
        if sessionizer.watermark_ms is not None:
            metrics.watermark.labels(partition).set(sessionizer.watermark_ms / 1000)

    def _since(self, partition: int, name: str, total: int) -> int:
        before = self._shown.get((partition, name), 0)
        self._shown[partition, name] = total
        return max(0, total - before)


def _now_ms() -> int:
    return int(time.time() * 1000)
