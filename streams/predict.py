"""The role `predict`: closed sessions in, predictions out, in micro-batches; the loop never waits for the model."""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import NamedTuple, Protocol

import msgspec
import structlog
from aiokafka import ConsumerRecord

from models.visit import Forecast, Visit
from streams import wire
from streams.metrics import Metrics
from streams.roles import Changes, Output, refused
from streams.settings import Settings
from streams.store import Store

log = structlog.get_logger()

_encode = msgspec.json.Encoder().encode
_decode_session = msgspec.json.Decoder(wire.Session).decode


class Model(Protocol):
    """What predicts: a bundle."""

    version: str
    digest: str

    @property
    def router_digest(self) -> str:
        """Whose running routing sums it can use."""

    def forecast(self, visits: Sequence[Visit]) -> list[Forecast]:
        """What the next session of each visit should look like."""

    def fallback(self, visits: Sequence[Visit]) -> list[Forecast]:
        """The same from frequencies alone; cannot fail."""


class Answer(NamedTuple):
    """A forecast, and why the model did not make it (None when it did)."""

    forecast: Forecast
    fallback: str | None


class Forecasting:
    """Asks the model: splits a batch that does not fit the memory, tries again, falls back; never raises."""

    def __init__(
        self, model: Model, is_out_of_memory: Callable[[BaseException], bool], retries: int, metrics: Metrics
    ) -> None:
        self.model = model
        self._is_out_of_memory, self._retries, self._metrics = is_out_of_memory, retries, metrics

    def answer(self, visits: Sequence[Visit]) -> list[Answer]:
        """One answer for each visit, in order."""
        if not visits:
            return []
        try:
            return [Answer(forecast, None) for forecast in self._ask(visits)]
        except Exception as error:
            if self._is_out_of_memory(error):
                self._metrics.model_failures.labels("memory").inc()
                if len(visits) > 1:
                    middle = len(visits) // 2
                    return self.answer(visits[:middle]) + self.answer(visits[middle:])
                reason = "out_of_memory"
            else:
                reason = f"model_failed: {type(error).__name__}"
            log.error("the model failed, answering with frequencies", sessions=len(visits), error=repr(error)[:500])
            return [Answer(forecast, reason) for forecast in self.model.fallback(visits)]

    def _ask(self, visits: Sequence[Visit]) -> list[Forecast]:
        for attempt in range(self._retries + 1):
            try:
                forecasts = self.model.forecast(visits)
                if len(forecasts) != len(visits):
                    raise RuntimeError(f"{len(forecasts)} forecasts for {len(visits)} visits")
                if not all(map(_is_sound, forecasts)):
                    raise ValueError("a forecast holds a number that is no probability")
                return forecasts
            except Exception as error:
                if self._is_out_of_memory(error) or attempt == self._retries:
                    raise
                self._metrics.model_failures.labels("error").inc()
        raise AssertionError("unreachable")


def _is_sound(forecast: Forecast) -> bool:
    """NaN would be published as null, and no reader could take the record."""
    return all(0.0 <= p <= 1.0 for p in (forecast.cart, forecast.purchase, *(p for _, p in forecast.pages)))


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

    def __init__(
        self, settings: Settings, metrics: Metrics, model: Model, is_out_of_memory: Callable[[BaseException], bool]
    ) -> None:
        self.settings = settings
        self.batch_records, self.batch_ms = settings.batch_sessions, settings.batch_ms
        self._forecasting = Forecasting(model, is_out_of_memory, settings.model_retries, metrics)
        self._metrics = metrics
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        metrics.model_loaded.labels(model.version, model.digest).set(1)

    def open(self, partition: int, store: Store, records: Iterable[tuple[bytes, bytes]]) -> PredictShard:
        """A fresh shard."""
        return PredictShard()

    async def work(self, batch: Sequence[tuple[PredictShard, str, list[ConsumerRecord]]]) -> None:
        """Predict in micro-batches over all partitions, in a thread of its own."""
        jobs = [job for shard, _, records in batch for record in records for job in _jobs(shard, record)]
        size = self.settings.batch_sessions
        for start in range(0, len(jobs), size):
            await self._answer(jobs[start : start + size])

    async def _answer(self, jobs: list[_Job]) -> None:
        router = self._forecasting.model.router_digest
        visits = [_visit(job.session, router) for job in jobs if job.session is not None]
        started = time.monotonic()
        answers = iter(await asyncio.get_running_loop().run_in_executor(self._thread, self._forecasting.answer, visits))
        self._metrics.batch_seconds.observe(time.monotonic() - started)
        self._metrics.batch_sessions.observe(len(visits))
        now = time.time() * 1000
        for job in jobs:
            value = None if job.session is None else self._publish(job, job.session, next(answers), now)
            job.shard.outputs.append(Output(wire.PREDICTIONS, job.key, value, int(now)))

    def _publish(self, job: _Job, session: wire.Session, answer: Answer, now: float) -> bytes:
        model, forecast = self._forecasting.model, answer.forecast
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
