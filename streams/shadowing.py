"""The challenger in the champion's shadow: asked for a share of the visitors, heard if it is there in time.

Whatever becomes of it, the champion's prediction goes out: late by the wait at most.
"""

import asyncio
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import structlog

from models.visit import Forecast
from streams import wire
from streams.forecasting import Loaded, Predictor, visit_of
from streams.metrics import Metrics
from streams.settings import Settings

GIVE_UP_S = 60.0  # for one answer, starts of its process included
HASHES = 1 << 64

log = structlog.get_logger(__name__)


def in_share(user_id: str, share: float) -> bool:
    """Whether the challenger predicts for this visitor: the same answer from every worker, at any time."""
    return int.from_bytes(blake2b(user_id.encode(), digest_size=8).digest()) < share * HASHES


def prediction_id(session_id: str, digest: str) -> str:
    """A session and a model have one prediction, however often it is made anew."""
    return blake2b(f"{session_id}\0{digest}".encode(), digest_size=16).hexdigest()


Shadows = dict[str, wire.Shadow]  # by the id of the session that closed


class Asked(NamedTuple):
    """Sessions that the challenger is at work on."""

    sessions: int
    answer: asyncio.Task[Shadows]


class Challenger:
    """Asks one model for the share of visitors; at most one micro-batch at a time."""

    def __init__(self, settings: Settings, metrics: Metrics, model: Predictor) -> None:
        """`model` is started, and belongs to the challenger from here on."""
        self.loaded: Loaded = model.loaded
        self._model, self._metrics = model, metrics
        self._share, self._wait_s = settings.shadow_share, settings.shadow_wait_ms / 1000
        self._under_way: asyncio.Task[Shadows] | None = None
        self._lost = False
        metrics.challenger_loaded.labels(self.loaded.version, self.loaded.digest).set(1)

    def ask(self, sessions: Sequence[wire.Session]) -> Asked | None:
        """Begin to answer for the share; None if nobody is in it, or if the challenger is still busy or is lost."""
        chosen = [session for session in sessions if in_share(session.user_id, self._share)]
        if not chosen:
            return None
        if self._lost or (self._under_way is not None and not self._under_way.done()):
            self._count("failed" if self._lost else "busy", len(chosen))
            return None
        self._under_way = asyncio.create_task(self._answer(chosen))
        return Asked(len(chosen), self._under_way)

    async def shadows(self, asked: Asked) -> Shadows:
        """Those that are there within the wait. Raises nothing."""
        await asyncio.wait([asked.answer], timeout=self._wait_s)
        if not asked.answer.done():
            self._count("late", asked.sessions)
            return {}
        made = {} if asked.answer.cancelled() else asked.answer.result()
        self._count("made", len(made))
        self._count("failed", asked.sessions - len(made))
        return made

    async def close(self) -> None:
        """End the model, whatever it is at."""
        if self._under_way is not None:
            self._under_way.cancel()
        if not self._lost:
            self._metrics.challenger_loaded.remove(self.loaded.version, self.loaded.digest)
        await self._model.close()

    async def _answer(self, sessions: Sequence[wire.Session]) -> Shadows:
        visits = [visit_of(session, self.loaded.router_digest) for session in sessions]
        try:
            async with asyncio.timeout(GIVE_UP_S):
                answered = await self._model.answer(visits)
        except Exception as error:
            await self._give_up(error)
            return {}
        return {
            session.session_id: self._shadow(session, answer.forecast)
            for session, answer in zip(sessions, answered.answers, strict=True)
            if answer.fallback is None  # it would be judged by what is not its own
        }

    async def _give_up(self, error: Exception) -> None:
        self._lost = True
        why = repr(error) if isinstance(error, TimeoutError) else str(error)
        log.error("the challenger failed and is given up until another is named", digest=self.loaded.digest, error=why)
        self._metrics.models_refused.labels("challenger").inc()
        self._metrics.challenger_loaded.remove(self.loaded.version, self.loaded.digest)
        await self._model.close()

    def _shadow(self, session: wire.Session, forecast: Forecast) -> wire.Shadow:
        return wire.Shadow(
            prediction_id=prediction_id(session.session_id, self.loaded.digest),
            cluster=forecast.cluster,
            pages=[wire.PageProbability(page, p) for page, p in forecast.pages],
            path=forecast.path,
            cart=forecast.cart,
            purchase=forecast.purchase,
            model_version=self.loaded.version,
            model_digest=self.loaded.digest,
        )

    def _count(self, outcome: str, sessions: int) -> None:
        self._metrics.shadow_predictions.labels(outcome).inc(sessions)
