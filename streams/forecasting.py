"""Asking the model: a batch too large for the memory is split, a failure tried again, the rest answered by frequencies.

Free of Kafka: the process of the model imports this.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from math import isfinite
from typing import NamedTuple, Protocol

import msgspec
import structlog

from models.visit import Forecast, Interest, Visit
from streams.itemfigures import Figures
from streams.wire import Context, Session

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


# Item, score, and the item of the seed event that brought it (None: popularity did).
Ranked = tuple[str, float, str | None]


class Ranker(Protocol):
    """What ranks items: `models.retriever.Retriever`."""

    def rank(self, interests: Sequence[Interest]) -> Sequence[Sequence[Ranked]]:
        """The best items for each visitor, best first."""

    def popular(self, interests: Sequence[Interest]) -> Sequence[Sequence[Ranked]]:
        """Those clicked most."""


class Answer(NamedTuple):
    """A forecast, and why the model did not make it (None when it did); `items` are None if the model knows none."""

    forecast: Forecast
    fallback: str | None
    items: Sequence[Ranked] | None = None


class Answered(msgspec.Struct, array_like=True):
    """One answer for each visit, in order; `failures` of the model on the way, by kind; how it is about the items."""

    answers: list[Answer]
    failures: dict[str, int] = {}
    figures: Figures | None = None


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
    return Visit(session.session_id, [*session.context.history, session.pages], sums, _interest(session))


def _interest(session: Session) -> Interest:
    context: Context = session.context
    return Interest(
        seeds=[(seed.item_id, seed.channel, seed.weight) for seed in context.seeds or ()],
        recent=context.recent_items,
        session=list(dict.fromkeys(item for item in session.items or () if item is not None)),
        bought=context.bought_items,
    )


class Forecasting:
    """A model that always answers."""

    def __init__(
        self,
        model: Model,
        is_out_of_memory: Callable[[BaseException], bool],
        retries: int,
        ranker: Ranker | None = None,
    ) -> None:
        """`ranker`: None for a model that knows no items."""
        self.model, self.ranker = model, ranker
        self._is_out_of_memory, self._retries = is_out_of_memory, retries
        self._failures: Counter[str] = Counter()

    def answer(self, visits: Sequence[Visit]) -> Answered:
        """By the model where it can; never raises."""
        return self._told(self._with_items(visits, self._answers(visits)))

    def frequencies(self, visits: Sequence[Visit], reason: str) -> Answered:
        """Without the model."""
        return self._told(self._with_items(visits, self._frequencies(visits, reason)))

    def _told(self, answers: list[Answer]) -> Answered:
        failures, self._failures = self._failures, Counter()
        return Answered(answers, dict(failures))

    def _frequencies(self, visits: Sequence[Visit], reason: str) -> list[Answer]:
        return [Answer(forecast, reason) for forecast in self.model.fallback(visits)]

    def _with_items(self, visits: Sequence[Visit], answers: list[Answer]) -> list[Answer]:
        """A fallback carries what is popular, and so does everything while the ranker fails."""
        if self.ranker is None:
            return answers
        by_model = [answer.fallback is None for answer in answers]
        ranked = self._ranked(self.ranker, [visit.interest for visit in visits], by_model)
        return [answer._replace(items=items) for answer, items in zip(answers, ranked, strict=True)]

    def _ranked(self, ranker: Ranker, interests: list[Interest], by_model: list[bool]) -> list[Sequence[Ranked]]:
        lists: list[Sequence[Ranked]] = [()] * len(interests)
        for rank, wanted in ((ranker.rank, True), (ranker.popular, False)):
            places = [place for place, made in enumerate(by_model) if made is wanted]
            if not places:
                continue
            try:
                found = rank([interests[place] for place in places])
                if not all(isfinite(score) for one in found for _, score, _ in one):
                    raise ValueError("a score is no number")
                for place, one in zip(places, found, strict=True):
                    lists[place] = one
            except Exception as error:
                self._failures["items"] += 1
                log.error("items could not be ranked", popular=not wanted, error=repr(error)[:500])
                if wanted:
                    return self._ranked(ranker, interests, [False] * len(interests))
        return lists

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
            return self._frequencies(visits, reason)

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
