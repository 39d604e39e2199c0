"""The role `score`: a visitor's next session meets the prediction made for it, whichever of the two is read first."""

import time
from collections.abc import Iterable, Sequence

import msgspec
from aiokafka import ConsumerRecord

from streams import wire
from streams.metrics import Metrics
from streams.pairing import CLOCK_KEY, Clock, Pairing
from streams.roles import Changes, Output, refused
from streams.settings import Settings
from streams.store import Store

SWEEP_RECORDS = 500
SWEEP_SECONDS = 5.0

_encode = msgspec.json.Encoder().encode
_decode_prediction = msgspec.json.Decoder(wire.Prediction).decode
_decode_session = msgspec.json.Decoder(wire.Session).decode


class ScoreShard:
    """One partition of predictions and sessions."""

    def __init__(self, role: "Scoring", store: Store) -> None:
        clock = store.get(CLOCK_KEY)
        known = msgspec.msgpack.decode(clock, type=Clock) if clock else None
        self.pairing = Pairing(role.settings.expire_after_ms, store.get, known)
        self._role, self._store = role, store
        self._outputs: list[Output] = []
        self._sweep_key: bytes | None = None
        self._swept = time.monotonic()

    def apply(self, topic: str, records: Iterable[ConsumerRecord]) -> None:
        """Pair what came."""
        pairing = self.pairing
        for record in records:
            try:
                self._take_in(topic == wire.SESSIONS, record.key or b"", record.value)
            except msgspec.MsgspecError as error:
                self._outputs.append(refused(record, "score", str(error)))
        now = int(time.time() * 1000)
        for key, scored in pairing.scores:
            self._outputs.append(Output(wire.SCORES, key, _encode(scored), now))
            self._role.count(scored)
        pairing.scores.clear()

    def _take_in(self, is_session: bool, key: bytes, value: bytes | None) -> None:
        pairing = self.pairing
        if is_session:
            pairing.forget_session(key) if value is None else pairing.came(key, _decode_session(value))
        else:
            pairing.forget_prediction(key) if value is None else pairing.predicted(key, _decode_prediction(value))

    def take(self) -> tuple[list[Output], Changes]:
        """The scores since the last call, and who waits for what."""
        outputs, self._outputs = self._outputs, []
        return outputs, self.pairing.changes()

    def urgent(self) -> bool:
        """A score may wait for the next transaction: nobody acts on it at once."""
        return False

    def written(self) -> None:
        """Memory may let go."""
        self.pairing.evict()

    def tick(self, quiet_ms: int | None) -> None:
        """Now and then look for predictions that wait in vain."""
        if time.monotonic() - self._swept < SWEEP_SECONDS:
            return
        self._swept = time.monotonic()
        records = self._store.items_after(self._sweep_key, SWEEP_RECORDS)
        self._sweep_key = records[-1][0] if records else None
        self.pairing.expire(records)


class Scoring:
    """Scores predictions when the visitor's next session closes."""

    name = "score"
    is_slow = False
    inputs = (wire.SESSIONS, wire.PREDICTIONS)
    batch_records = 2_000
    batch_ms = 0

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self._metrics = settings, metrics

    def needs(self, key: bytes, record: bytes) -> bool:
        """Nothing."""
        return False

    def open(self, partition: int, store: Store, records: Iterable[tuple[bytes, bytes]]) -> ScoreShard:
        """Take up a partition from its restored state; its records are read again when they are needed."""
        return ScoreShard(self, store)

    async def work(self, batch: Sequence[tuple[ScoreShard, str, list[ConsumerRecord]]]) -> None:
        """Pair what came, per partition."""
        for shard, topic, records in batch:
            shard.apply(topic, records)

    def count(self, scored: wire.Score) -> None:
        """Show a score as metrics."""
        self._metrics.scored(scored.model_version, scored.hr, scored.cart_log_loss, scored.purchase_log_loss)

    def report(self, partition: int, shard: ScoreShard) -> None:
        """Show the shard's figures as metrics."""
        self._metrics.predictions_expired.inc(shard.pairing.expired)
        shard.pairing.expired = 0
        self._metrics.waiting_predictions.labels(partition).set(shard.pairing.clock.waiting)
