"""Predictions beside what came, as rows: the table that every figure of a report is computed from."""

from typing import Any

import pyarrow as pa

from models.visit import Forecast
from trainer.examples import Example

_PAGES = pa.list_(pa.string())

# predictions.parquet, one row a user and predictor. `path` is the greedy sequence, `expected` the expected set with its
# probabilities; `nll` nats of the target session with its [EOS], `tokens` their number. Null: not said.
ROW = pa.schema(
    [
        ("predictor", pa.string()), ("user_id", pa.string()), ("session_id", pa.string()),
        ("input", pa.list_(_PAGES)), ("target", _PAGES), ("path", _PAGES), ("expected", _PAGES),
        ("expected_p", pa.list_(pa.float64())), ("cart", pa.bool_()), ("cart_p", pa.float64()),
        ("purchase", pa.bool_()), ("purchase_p", pa.float64()), ("nll", pa.float64()), ("tokens", pa.int64()),
        ("cluster", pa.int64()), ("cluster_p", pa.list_(pa.float64())),
    ]
)  # fmt: skip

Rows = list[dict[str, Any]]


def row(
    predictor: str,
    example: Example,
    forecast: Forecast,
    nll: float | None = None,
    tokens: int | None = None,
    cluster_p: list[float] | None = None,
) -> dict[str, Any]:
    """One row of ROW. `nll` in nats over `tokens` tokens, None for a predictor without a likelihood."""
    return {
        "predictor": predictor, "user_id": example.user_id, "session_id": example.session_id,
        "input": example.visit.sessions, "target": example.target, "path": forecast.path,
        "expected": [page for page, _ in forecast.pages], "expected_p": [p for _, p in forecast.pages],
        "cart": example.cart, "cart_p": forecast.cart, "purchase": example.purchase, "purchase_p": forecast.purchase,
        "nll": nll, "tokens": tokens, "cluster": forecast.cluster, "cluster_p": cluster_p,
    }  # fmt: skip


def table(rows: dict[str, Rows]) -> pa.Table:
    """All rows, by predictor, as the table of predictions.parquet."""
    return pa.Table.from_pylist([row for part in rows.values() for row in part], schema=ROW)
