"""Who is judged: the bundle, and the baselines beside it that need no fitting."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors import safe_open

from models.baselines import last_session, own_frequencies, own_rate
from models.forecaster import Forecaster
from models.visit import Forecast
from models.vocabulary import SPECIALS
from trainer.examples import Example
from trainer.rows import Rows, row

BUNDLE = "bundle"
LAST_SESSION = "last session again"
OWN_FREQUENCIES = "own page frequencies"
SHRUNK_FREQUENCIES = "shrunk frequencies"
POPULARITY = "popularity"
# Fitted baselines (trainer/baselines.py) that the verdict looks for by name: the controls of "do clusters help?".
SMALL_LM = "one small LM"  # a predictor's size, all users
LARGE_LM = "one large LM"  # at least as many parameters as the bundle's predictors together; 4 times those of one
KMEANS_LMS = "K-means clusterwise"
CHUNK = 128

Advance = Callable[[int], None]


class Contender(Protocol):
    """A predictor of next sessions that stands in a report."""

    @property
    def name(self) -> str:
        """Its row in the report's tables."""
        ...

    @property
    def parameters(self) -> int | None:
        """How many numbers were fitted; None where nothing is."""
        ...

    @property
    def thresholds(self) -> tuple[float, float]:
        """P(cart) and P(purchase) from which on it predicts them; never chosen on the users it is judged on."""
        ...

    def rows(self, seen: Sequence[Example], advance: Advance) -> Rows:
        """A row an example, in order (`trainer.rows.row`); calls `advance` with the number of examples just done.

        Paths empty in all rows mean that it has none, and so for expected sets: its figures are then null.
        """
        ...


class Bundle:
    """The bundle itself."""

    name = BUNDLE

    def __init__(self, forecaster: Forecaster, parameters: int | None = None) -> None:
        self.parameters = parameters
        cart, purchase = (head.outcome.threshold for head in forecaster.heads)
        self.thresholds = (cart, purchase)
        self._forecaster = forecaster

    def rows(self, seen: Sequence[Example], advance: Advance) -> Rows:
        """See Contender."""
        rows: Rows = []
        for start in range(0, len(seen), CHUNK):
            part = seen[start : start + CHUNK]
            visits = [example.visit for example in part]
            nats, tokens = self._forecaster.nll(visits, [example.target for example in part])
            forecasts = self._forecaster.forecast(visits)
            posterior = self._forecaster.posterior(visits).tolist()
            columns = zip(part, forecasts, nats.tolist(), tokens.tolist(), posterior, strict=True)
            rows += [row(self.name, *column) for column in columns]
            advance(len(part))
        return rows


@dataclass
class Unfitted:
    """A baseline that follows from a visitor's own history and the bundle's base rates."""

    name: str
    thresholds: tuple[float, float]
    forecast: Callable[[Sequence[Example]], list[Forecast]]
    parameters: int | None = None

    def rows(self, seen: Sequence[Example], advance: Advance) -> Rows:
        """See Contender."""
        rows: Rows = []
        for start in range(0, len(seen), CHUNK):
            part = seen[start : start + CHUNK]
            rows += [row(self.name, *pair) for pair in zip(part, self.forecast(part), strict=True)]
            advance(len(part))
        return rows


def unfitted(forecaster: Forecaster) -> list[Contender]:
    """The baselines that are always there. They predict an outcome for whoever is likelier to it than the average."""
    cart, purchase = base = _base_rates(forecaster)
    shares = forecaster.shares[len(SPECIALS) :]
    order = np.argsort(-shares, kind="stable")[: forecaster.config.decoding.fallback_pages]
    pages = [(forecaster.vocabulary.pages[i], float(shares[i])) for i in order.tolist()]
    popular = Forecast(None, pages, [page for page, _ in pages], cart, purchase)

    def last(seen: Sequence[Example]) -> list[Forecast]:
        return [
            last_session(e.visit, own_rate(e.cart_flags[-1:], cart), own_rate(e.purchase_flags[-1:], purchase))
            for e in seen
        ]

    def own(seen: Sequence[Example]) -> list[Forecast]:
        rates = [(own_rate(e.cart_flags, cart), own_rate(e.purchase_flags, purchase)) for e in seen]
        return [own_frequencies(e.visit, cart=p, purchase=q) for e, (p, q) in zip(seen, rates, strict=True)]

    def shrunk(seen: Sequence[Example]) -> list[Forecast]:
        # As a path its ranking, like the other frequencies; the live fallback repeats the last session there.
        return [
            Forecast(None, f.pages, [page for page, _ in f.pages], f.cart, f.purchase)
            for f in forecaster.fallback([example.visit for example in seen])
        ]

    return [
        Unfitted(LAST_SESSION, base, last),
        Unfitted(OWN_FREQUENCIES, base, own),
        Unfitted(SHRUNK_FREQUENCIES, base, shrunk),
        Unfitted(POPULARITY, base, lambda seen: [popular] * len(seen)),
    ]


def parameters_of(bundle: Path) -> int:
    """Numbers in a bundle's predictors, all clusters together."""
    total = 0
    for file in sorted(bundle.glob("predictors/**/*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            total += sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def _base_rates(forecaster: Forecaster) -> tuple[float, float]:
    cart, purchase = (head.outcome.base_rate for head in forecaster.heads)
    return cart, purchase
