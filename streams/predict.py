"""The role `predict`: closed sessions in, predictions out, in micro-batches; the loop never waits for the model."""

import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec
from aiokafka import ConsumerRecord

from streams import wire
from streams.forecasting import Answer, Answered, Loaded, Predictor, visit_of
from streams.metrics import Metrics
from streams.roles import Changes, Output, refused
from streams.settings import Settings
from streams.shadowing import Challenger, Shadows, prediction_id
from streams.store import Store

_encode = msgspec.json.Encoder().encode
_decode_session = msgspec.json.Decoder(wire.Session).decode


class PredictShard:
    """One partition of sessions: nothing to remember but the position, which the engine keeps."""

    def __init__(self) -> None:
        self.outputs: list[Output] = []

    def take(self) -> tuple[list[Output], Changes]:
        """The predictions since the last call."""
        outputs, self.outputs = self.outputs, []
        return outputs, []

    def urgent(self) -> bool:
        """A prediction should not wait."""
        return bool(self.outputs)

    def written(self) -> None:
        """Nothing is kept."""

    def tick(self, quiet_ms: int | None) -> None:
        """Time means nothing here."""


class _Job(NamedTuple):
    shard: PredictShard
    key: bytes | None
    closed_ms: int  # wall time when the session closed: its record's timestamp
    session: wire.Session | None  # None: the user is forgotten


class Predict:
    """Predicts the next session of whoever just closed one."""

    name = "predict"
    is_slow = True
    inputs = (wire.SESSIONS,)

    def __init__(self, settings: Settings, metrics: Metrics, champion: Predictor) -> None:
        """`champion` answers until `adopt`; `challenger` may be set at any time, and be taken away."""
        self.settings = settings
        self.batch_records, self.batch_ms = settings.batch_sessions, settings.batch_ms
        self.champion, self._metrics = champion, metrics
        self.challenger: Challenger | None = None
        metrics.model_loaded.labels(champion.loaded.version, champion.loaded.digest).set(1)

    def adopt(self, champion: Predictor) -> None:
        """From the next micro-batch on this one answers."""
        before, self.champion = self.champion.loaded, champion
        self._metrics.model_loaded.remove(before.version, before.digest)
        self._metrics.model_loaded.labels(champion.loaded.version, champion.loaded.digest).set(1)

    def needs(self, key: bytes, record: bytes) -> bool:
        """Nothing."""
        return False

    def open(self, partition: int, store: Store, records: Iterable[tuple[bytes, bytes]]) -> PredictShard:
        """A fresh shard."""
        return PredictShard()

    async def work(self, batch: Sequence[tuple[PredictShard, str, list[ConsumerRecord]]]) -> None:
        """Predict in micro-batches over all partitions."""
        jobs = [job for shard, _, records in batch for record in records for job in _jobs(shard, record)]
        size = self.settings.batch_sessions
        for start in range(0, len(jobs), size):
            await self._answer(jobs[start : start + size])

    async def _answer(self, jobs: list[_Job]) -> None:
        champion, sessions = self.champion, [job.session for job in jobs if job.session is not None]
        started = time.monotonic()
        answered, shadows = await self._ask(champion, sessions) if sessions else (Answered([]), {})
        self._metrics.batch_seconds.observe(time.monotonic() - started)
        self._metrics.batch_sessions.observe(len(sessions))
        for kind, count in answered.failures.items():
            self._metrics.model_failures.labels(kind).inc(count)
        self._metrics.show_items(answered.figures)
        answers, now = iter(answered.answers), time.time() * 1000
        for job in jobs:
            value = None
            if job.session is not None:
                shadow = shadows.get(job.session.session_id)
                value = self._publish(champion.loaded, job, job.session, next(answers), shadow, now)
            job.shard.outputs.append(Output(wire.PREDICTIONS, job.key, value, int(now)))

    async def _ask(self, champion: Predictor, sessions: list[wire.Session]) -> tuple[Answered, Shadows]:
        """All from one champion, though another may be adopted meanwhile; the challenger works at the same time."""
        challenger = self.challenger
        if challenger is None or challenger.loaded.digest == champion.loaded.digest:  # it was promoted just now
            challenger = None
        asked = None if challenger is None else challenger.ask(sessions)
        answered = await champion.answer([visit_of(session, champion.loaded.router_digest) for session in sessions])
        if challenger is None or asked is None:
            return answered, {}
        return answered, await challenger.shadows(asked)

    def _publish(
        self, model: Loaded, job: _Job, session: wire.Session, answer: Answer, shadow: wire.Shadow | None, now: float
    ) -> bytes:
        forecast = answer.forecast
        took_ms = max(0.0, now - job.closed_ms)
        self._metrics.close_to_prediction.observe(took_ms)
        self._metrics.predictions.labels(model.version, (answer.fallback or "none").split(":")[0]).inc()
        return _encode(
            wire.Prediction(
                prediction_id=prediction_id(session.session_id, model.digest),
                session_id=session.session_id,
                user_id=session.user_id,
                cluster=forecast.cluster,
                pages=[wire.PageProbability(page, p) for page, p in forecast.pages],
                path=forecast.path,
                cart=forecast.cart,
                purchase=forecast.purchase,
                model_version=model.version,
                model_digest=model.digest,
                fallback=answer.fallback,
                close_to_emit_ms=round(took_ms, 3),
                session_end_ms=session.end_ms,
                items=None if answer.items is None else [wire.RankedItem(*item) for item in answer.items],
                shadow=shadow,
            )
        )

    def report(self, partition: int, shard: PredictShard) -> None:
        """Nothing is kept that could be shown."""


def _jobs(shard: PredictShard, record: ConsumerRecord) -> list[_Job]:
    try:
        session = None if record.value is None else _decode_session(record.value)
    except msgspec.MsgspecError as error:
        shard.outputs.append(refused(record, "predict", str(error)))
        return []
    return [_Job(shard, record.key, record.timestamp, session)]
