"""Rows of predictors that do not exist, for tests of what is computed from rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np

PAGES = ["home", "shoes", "boots", "guitar", "drums", "basket", "thank you"]
MARKS = {"cart": ["basket"], "purchase": ["thank you"]}


def row(target: Sequence[str] = ("home",), **columns: Any) -> dict[str, Any]:
    """A row with what is given, and something in every other column."""
    plain: dict[str, Any] = {
        "predictor": "bundle", "user_id": "u", "session_id": "s", "input": [["home"]], "target": list(target),
        "path": ["home"], "expected": ["home"], "expected_p": None, "cart": False, "cart_p": 0.5, "purchase": False,
        "purchase_p": 0.5, "nll": 2.0, "tokens": 2, "cluster": 0, "cluster_p": [1.0],
    }  # fmt: skip
    made = plain | columns
    if made["expected_p"] is None:
        made["expected_p"] = [0.5] * len(made["expected"])
    return made


def invented(users: int, seed: int = 0, clusters: int = 3) -> dict[str, list[dict[str, Any]]]:
    """A bundle and three others on the same sessions: one in ties and without a likelihood, one with outcomes only."""
    rng = np.random.default_rng(seed)

    def some(least: int, most: int, repeats: bool) -> list[str]:
        size = int(rng.integers(least, most))
        return [str(page) for page in rng.choice(PAGES, size=size, replace=repeats)]

    rows: dict[str, list[dict[str, Any]]] = {"bundle": [], "one large LM": [], "popularity": [], "trees": []}
    for user in range(users):
        target = some(1, 7, True)
        came: dict[str, Any] = {
            "user_id": f"u{user:03d}", "session_id": f"s{user:03d}", "target": target,
            "input": [some(1, 6, True) for _ in range(int(rng.integers(1, 4)))],
            "cart": "basket" in target, "purchase": "thank you" in target, "tokens": len(target) + 1,
        }  # fmt: skip
        for name, part in rows.items():
            p, q = rng.uniform(0.01, 0.99, size=2)
            nll = float(rng.uniform(1, 3) * came["tokens"])
            said: dict[str, Any] = {
                "predictor": name, "path": some(0, 7, True), "expected": some(0, 5, False), "cart_p": float(p),
                "purchase_p": float(q), "nll": nll, "cluster": None, "cluster_p": None,
            }  # fmt: skip
            if name == "bundle":
                posterior = rng.dirichlet(np.ones(clusters))
                said |= {"cluster": int(posterior.argmax()), "cluster_p": posterior.tolist()}
            elif name != "one large LM":
                said |= {"nll": None, "tokens": None, "cart_p": round(said["cart_p"], 1)}
            if name == "trees":
                said |= {"path": [], "expected": []}
            part.append(row(**{**came, **said}))
    return rows
