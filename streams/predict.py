"""The role `predict`: closed sessions in, predictions out, in micro-batches; the loop never waits for the model."""

import time
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import NamedTuple, Protocol

import msgspec
from aiokafka import ConsumerRecord

from models.visit import Visit
from streams import wire
from streams.forecasting import Answer, Answered, Loaded
from streams.metrics import Metrics
from streams.roles import Changes, Output, refused
from streams.settings import Settings
from streams.store import Store

_encode = msgspec.json.Encoder().encode
_decode_session = msgspec.json.Decoder(wire.Session).decode


class Predictor(Protocol):
    """What answers, in this process or another; it does not hold up the event loop."""

    @property
    def loaded(self) -> Loaded:
        """Which bundle it is."""

    async def answer(self, visits: Sequence[Visit]) -> Answered:
        """One answer for each visit, in order."""


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

    def __init__(self, settings: Settings, metrics: Metrics, predictor: Predictor) -> None:
        self.settings = settings
        self.batch_records, self.batch_ms = settings.batch_sessions, settings.batch_ms
        self._predictor, self._model, self._metrics = predictor, predictor.loaded, metrics
        metrics.model_loaded.labels(self._model.version, self._model.digest).set(1)

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
        visits = [_visit(job.session, self._model.router_digest) for job in jobs if job.session is not None]
        started = time.monotonic()
        answered = await self._predictor.answer(visits) if visits else Answered([])
        self._metrics.batch_seconds.observe(time.monotonic() - started)
        self._metrics.batch_sessions.observe(len(visits))
        for kind, count in answered.failures.items():
            self._metrics.model_failures.labels(kind).inc(count)
        answers, now = iter(answered.answers), time.time() * 1000
        for job in jobs:
            value = None if job.session is None else self._publish(job, job.session, next(answers), now)
            job.shard.outputs.append(Output(wire.PREDICTIONS, job.key, value, int(now)))

    def _publish(self, job: _Job, session: wire.Session, answer: Answer, now: float) -> bytes:
        model, forecast = self._model, answer.forecast
        took_ms = max(0.0, now - job.closed_ms)
        self._metrics.close_to_prediction.observe(took_ms)
        self._metrics.predictions.labels(model.version, (answer.fallback or "none").split(":")[0]).inc()
        return _encode(
            wire.Prediction(
                prediction_id=blake2b(f"{session.session_id}\0{model.digest}".encode(), digest_size=16).hexdigest(),
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


def _visit(session: wire.Session, router_digest: str) -> Visit:
    routing = session.context.routing
    # Sums of another bundle's router say nothing to this one, which then routes by the pages of the context.
    sums = routing.sums if routing is not None and routing.digest == router_digest else None
    return Visit(session.session_id, [*session.context.history, session.pages], sums)
