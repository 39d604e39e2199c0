"""Predictions beside what came, as rows, and the figures that follow from the rows alone."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa

from models.baselines import last_session, own_frequencies, own_rate
from models.forecaster import Forecaster
from models.metrics import hr, ioa, iop, iou, log_loss
from models.visit import Forecast
from trainer.examples import Example

BUNDLE = "bundle"
LAST_SESSION = "last session again"
OWN_FREQUENCIES = "own page frequencies"
PREDICTORS = (BUNDLE, LAST_SESSION, OWN_FREQUENCIES)
FIGURES = ("hr", "ioa", "iop", "iou", "cart_log_loss", "purchase_log_loss", "nll_per_token")
RESAMPLES = 1_000
CHUNK = 128

ROW = pa.schema(
    [
        ("predictor", pa.string()), ("user_id", pa.string()), ("session_id", pa.string()),
        ("target", pa.list_(pa.string())), ("path", pa.list_(pa.string())), ("expected", pa.list_(pa.string())),
        ("expected_p", pa.list_(pa.float64())), ("cart", pa.bool_()), ("cart_p", pa.float64()),
        ("purchase", pa.bool_()), ("purchase_p", pa.float64()), ("nll", pa.float64()), ("tokens", pa.int64()),
        ("cluster", pa.int64()), ("cluster_p", pa.list_(pa.float64())),
    ]
)  # fmt: skip

Rows = list[dict[str, Any]]


class Figure(msgspec.Struct, frozen=True):
    """A mean over users with its 95 % bootstrap interval; null where a predictor has no such number."""

    mean: float
    low: float
    high: float


Figures = dict[str, dict[str, Figure | None]]


def predict(
    forecaster: Forecaster,
    seen: Sequence[Example],
    rates: dict[str, float],
    advance: Callable[[int], None] = lambda done: None,
) -> dict[str, Rows]:
    """Rows of every predictor on the examples. `rates`: base rates of the outcomes for the baselines."""
    rows: dict[str, Rows] = {name: [] for name in PREDICTORS}
    for start in range(0, len(seen), CHUNK):
        part = seen[start : start + CHUNK]
        visits = [example.visit for example in part]
        nats, tokens = forecaster.nll(visits, [example.target for example in part])
        for example, forecast, nll, count in zip(
            part, forecaster.forecast(visits), nats.tolist(), tokens.tolist(), strict=True
        ):
            routed = [float(k == forecast.cluster) for k in range(forecaster.config.clusters)]
            rows[BUNDLE].append(_row(BUNDLE, example, forecast, nll, count, routed))
            cart = [own_rate(example.cart_flags, rates["cart"]), own_rate(example.cart_flags[-1:], rates["cart"])]
            purchase = [
                own_rate(example.purchase_flags, rates["purchase"]),
                own_rate(example.purchase_flags[-1:], rates["purchase"]),
            ]
            last = last_session(example.visit, cart=cart[1], purchase=purchase[1])
            own = own_frequencies(example.visit, cart=cart[0], purchase=purchase[0])
            rows[LAST_SESSION].append(_row(LAST_SESSION, example, last))
            rows[OWN_FREQUENCIES].append(_row(OWN_FREQUENCIES, example, own))
        advance(len(part))
    return rows


def table(rows: dict[str, Rows]) -> pa.Table:
    """All rows as the table of predictions.parquet."""
    return pa.Table.from_pylist([row for part in rows.values() for row in part], schema=ROW)


def figures(rows: dict[str, Rows], seed: int = 0) -> tuple[Figures, Figures]:
    """Every predictor's figures, and the bundle's less each baseline's on the same users (paired)."""
    per_user = {name: scores(part) for name, part in rows.items()}
    users = len(rows[BUNDLE])
    picks = np.random.default_rng(seed).integers(0, users, size=(RESAMPLES, users))
    alone: Figures = {
        name: {key: _interval(*columns[key], picks) if key in columns else None for key in FIGURES}
        for name, columns in per_user.items()
    }
    ours = per_user[BUNDLE]
    against: Figures = {
        name: {
            key: _interval(ours[key][0] - columns[key][0], ours[key][1], picks) if key in columns else None
            for key in FIGURES
        }
        for name, columns in per_user.items()
        if name != BUNDLE
    }
    return alone, against


def scores(rows: Rows) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per user a value and a weight for each figure; the figure is sum(value) / sum(weight)."""
    ones = np.ones(len(rows))
    columns: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, metric in (("hr", hr), ("ioa", ioa), ("iop", iop), ("iou", iou)):
        columns[name] = (np.array([float(metric(row["target"], row["expected"])) for row in rows]), ones)
    for name in ("cart", "purchase"):
        losses = [log_loss(row[f"{name}_p"], row[name]) for row in rows]
        columns[f"{name}_log_loss"] = (np.array(losses), ones)
    if all(row["nll"] is not None for row in rows):
        nats = np.array([row["nll"] for row in rows])
        columns["nll_per_token"] = (nats, np.array([float(row["tokens"]) for row in rows]))
    return columns


def _interval(values: np.ndarray, weights: np.ndarray, picks: np.ndarray) -> Figure:
    sampled = values[picks].sum(axis=1) / weights[picks].sum(axis=1)
    low, high = np.quantile(sampled, [0.025, 0.975])
    return Figure(float(values.sum() / weights.sum()), float(low), float(high))


def _row(
    predictor: str,
    example: Example,
    forecast: Forecast,
    nll: float | None = None,
    tokens: int | None = None,
    routed: list[float] | None = None,
) -> dict[str, Any]:
    return {
        "predictor": predictor, "user_id": example.user_id, "session_id": example.session_id,
        "target": example.target, "path": forecast.path,
        "expected": [page for page, _ in forecast.pages], "expected_p": [p for _, p in forecast.pages],
        "cart": example.cart, "cart_p": forecast.cart, "purchase": example.purchase, "purchase_p": forecast.purchase,
        "nll": nll, "tokens": tokens, "cluster": forecast.cluster, "cluster_p": routed,
    }  # fmt: skip
