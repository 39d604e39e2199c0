"""Asking the model: a batch too large for the memory is split, a failure tried again, the rest answered by frequencies.

Free of Kafka: the process of the model imports this.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import msgspec
import structlog

from models.visit import Forecast, Visit
from streams.wire import Session

log = structlog.get_logger()


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


class Loaded(msgspec.Struct, tag=True, frozen=True):
    """Which bundle answers. `version` is readable, `digest` exact; `router_digest`: whose routing sums it can use."""

    version: str
    digest: str
    router_digest: str


class Answer(NamedTuple):
    """A forecast, and why the model did not make it (None when it did)."""

    forecast: Forecast
    fallback: str | None


class Answered(msgspec.Struct, array_like=True):
    """One answer for each visit, in order; `failures` of the model on the way, by kind."""

    answers: list[Answer]
    failures: dict[str, int] = {}


class Predictor(Protocol):
    """A model in this process or another; it does not hold up the event loop."""

    @property
    def loaded(self) -> Loaded:
        """Which bundle it is."""

    async def answer(self, visits: Sequence[Visit]) -> Answered:
        """One answer for each visit, in order."""

    async def close(self) -> None:
        """Nobody asks any more."""


def visit_of(session: Session, router_digest: str) -> Visit:
    """What a model with this router is asked when the session has closed."""
    routing = session.context.routing
    # Sums of another bundle's router say nothing to this one, which then routes by the pages of the context.
    sums = routing.sums if routing is not None and routing.digest == router_digest else None
    return Visit(session.session_id, [*session.context.history, session.pages], sums)


class Forecasting:
    """A model that always answers."""

    def __init__(self, model: Model, is_out_of_memory: Callable[[BaseException], bool], retries: int) -> None:
        self.model = model
        self._is_out_of_memory, self._retries = is_out_of_memory, retries
        self._failures: Counter[str] = Counter()

    def answer(self, visits: Sequence[Visit]) -> Answered:
        """By the model where it can; never raises."""
        answers = self._answers(visits)
        failures, self._failures = self._failures, Counter()
        return Answered(answers, dict(failures))

    def frequencies(self, visits: Sequence[Visit], reason: str) -> Answered:
        """Without the model."""
        return Answered([Answer(forecast, reason) for forecast in self.model.fallback(visits)])

    def _answers(self, visits: Sequence[Visit]) -> list[Answer]:
        if not visits:
            return []
        try:
            return [Answer(forecast, None) for forecast in self._ask(visits)]
        except Exception as error:
            if self._is_out_of_memory(error):
                self._failures["memory"] += 1
                if len(visits) > 1:
                    middle = len(visits) // 2
                    return self._answers(visits[:middle]) + self._answers(visits[middle:])
                reason = "out_of_memory"
            else:
                reason = f"model_failed: {type(error).__name__}"
            log.error("the model failed, answering with frequencies", sessions=len(visits), error=repr(error)[:500])
            return self.frequencies(visits, reason).answers

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
                self._failures["error"] += 1
        raise AssertionError("unreachable")


def _is_sound(forecast: Forecast) -> bool:
    """NaN would be published as null, and no reader could take the record."""
    return all(0.0 <= p <= 1.0 for p in (forecast.cart, forecast.purchase, *(p for _, p in forecast.pages)))
