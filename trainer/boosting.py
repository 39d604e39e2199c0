"""Gradient-boosted trees on simple features of a visitor's history: a baseline for cart and purchase only."""

from collections.abc import Callable, Sequence

import lightgbm as lgb
import numpy as np

from models.outcomes import EDGE, OUTCOMES
from models.visit import Forecast
from models.vocabulary import Vocabulary
from trainer.calibration import FEWEST, best_threshold
from trainer.contenders import Advance
from trainer.examples import Example
from trainer.rows import Rows, row

PAGES = 50  # most popular pages with features of their own
DECAY = 0.7  # a session's outcome weighs this much less with each session since
TREES, PATIENCE = 600, 30
PARAMETERS = {
    "objective": "binary", "learning_rate": 0.05, "num_leaves": 15, "min_data_in_leaf": 20, "lambda_l2": 1.0,
    "feature_fraction": 0.7, "bagging_fraction": 0.8, "bagging_freq": 1, "deterministic": True,
    "force_row_wise": True, "verbosity": -1,
}  # fmt: skip

Posterior = Callable[[Sequence[Example]], np.ndarray]


class Features:
    """A visitor's history as numbers. Of an example only the visit and the outcomes before it are looked at."""

    def __init__(self, vocabulary: Vocabulary, posterior: Posterior | None = None) -> None:
        """`posterior` gives further columns (B, K): how much the visitor is of each kind."""
        order = np.argsort(-np.array(vocabulary.shares), kind="stable")[:PAGES]
        self._columns = {vocabulary.pages[page]: column for column, page in enumerate(order.tolist())}
        self._posterior = posterior

    def __call__(self, seen: Sequence[Example]) -> np.ndarray:
        """Features of each example: (B, F) float64, NaN where there is nothing to count."""
        own = np.stack([np.concatenate([self._history(e), self._pages(e.visit.sessions)]) for e in seen])
        return own if self._posterior is None else np.concatenate([own, self._posterior(seen)], axis=1)

    def _history(self, example: Example) -> np.ndarray:
        sessions = example.visit.sessions
        lengths = np.array([len(session) for session in sessions], dtype=float)
        last = set(sessions[-1])
        before = {page for session in sessions[:-1] for page in session}
        numbers = [
            len(example.cart_flags), lengths.mean(), lengths.std(), lengths[-1], lengths.max(), lengths.min(),
            lengths.sum(), len(last | before), len(last | before) / lengths.sum(), len(last) / lengths[-1],
            len(last - before) / len(last),
        ]  # fmt: skip
        for flags in (example.cart_flags, example.purchase_flags):
            numbers += _recurrence(flags, lengths)
        return np.array(numbers)

    def _pages(self, sessions: Sequence[Sequence[str]]) -> np.ndarray:
        """Share of the sessions that hold each popular page, and its views in the last session."""
        numbers = np.zeros((2, len(self._columns)))
        for session in sessions:
            for page in set(session) & self._columns.keys():
                numbers[0, self._columns[page]] += 1.0 / len(sessions)
        for page in sessions[-1]:
            if page in self._columns:
                numbers[1, self._columns[page]] += 1.0
        return numbers.ravel()


def _recurrence(flags: Sequence[float], lengths: np.ndarray) -> list[float]:
    """How often an outcome came before, how lately, and how many sessions and pages ago it came last."""
    newest = np.array(flags[::-1])
    weights = DECAY ** np.arange(len(newest))
    held = np.flatnonzero(newest)
    ago = float(held[0]) if len(held) else np.nan
    pages = float(lengths[::-1][: int(ago)].sum()) if len(held) else np.nan
    second = newest[1] if len(newest) > 1 else np.nan
    return [
        float(newest.mean()), float(newest.sum()), float(newest[0]), float(second),
        float((weights * newest).sum() / weights.sum()), ago, pages,
    ]  # fmt: skip


class Boosting:
    """Trees for cart and for purchase; says nothing of pages (trainer.contenders.Contender)."""

    def __init__(
        self, name: str, features: Features, boosters: Sequence[lgb.Booster | float], thresholds: tuple[float, float]
    ) -> None:
        """`boosters`: for cart and purchase, or a constant probability where there was too little to learn from."""
        self.name, self.thresholds = name, thresholds
        self.parameters: int | None = sum(_leaves(booster) for booster in boosters)
        self._features, self._boosters = features, boosters

    def probabilities(self, seen: Sequence[Example]) -> np.ndarray:
        """P(cart) and P(purchase): (B, 2)."""
        x = self._features(seen)
        return np.stack([_predict(booster, x) for booster in self._boosters], axis=1)

    def rows(self, seen: Sequence[Example], advance: Advance) -> Rows:
        """See Contender. Path and expected set are empty."""
        chances = self.probabilities(seen).tolist()
        advance(len(seen))
        return [row(self.name, e, Forecast(None, [], [], *p)) for e, p in zip(seen, chances, strict=True)]


def fit_boosting(
    name: str, learned: Sequence[Example], held: Sequence[Example], features: Features, seed: int = 0, threads: int = 1
) -> Boosting:
    """Fit on `learned`; the number of trees and the thresholds come from `held`."""
    x, x_held = features(learned), features(held)
    boosters: list[lgb.Booster | float] = []
    thresholds = []
    for outcome in OUTCOMES:
        y, y_held = (np.array([getattr(e, outcome) for e in part], dtype=int) for part in (learned, held))
        booster = _fit(x, y, x_held, y_held, {**PARAMETERS, "seed": seed, "num_threads": threads})
        boosters.append(booster)
        thresholds.append(best_threshold(_predict(booster, x_held), y_held))
    return Boosting(name, features, boosters, (thresholds[0], thresholds[1]))


def _fit(
    x: np.ndarray, y: np.ndarray, x_held: np.ndarray, y_held: np.ndarray, parameters: dict[str, object]
) -> lgb.Booster | float:
    if min(y.sum(), len(y) - y.sum(), y_held.sum(), len(y_held) - y_held.sum()) < FEWEST:
        return float((y.sum() + 0.5) / (len(y) + 1))
    train = lgb.Dataset(x, y)
    return lgb.train(
        parameters, train, TREES, [lgb.Dataset(x_held, y_held, reference=train)],
        callbacks=[lgb.early_stopping(PATIENCE, verbose=False)],
    )  # fmt: skip


def _predict(booster: lgb.Booster | float, x: np.ndarray) -> np.ndarray:
    p = np.full(len(x), booster) if isinstance(booster, float) else np.asarray(booster.predict(x))
    inside: np.ndarray = np.clip(p, EDGE, 1.0 - EDGE)
    return inside


def _leaves(booster: lgb.Booster | float) -> int:
    if isinstance(booster, float):
        return 1
    trees = booster.dump_model(num_iteration=booster.best_iteration)["tree_info"]
    return sum(tree["num_leaves"] for tree in trees)
