"""Figures from rows: against plain code, under resampling, and on what is known of the paper's tables."""

from typing import Any

import numpy as np
import pytest

from tests.trainer import plainfigures
from tests.trainer.invented import MARKS, invented, row
from trainer import figures as bootstrap
from trainer.figures import figures, resampled
from trainer.judging import score
from trainer.measures import MEASURES
from trainer.scores import Scores

THRESHOLDS = {"bundle": (0.6, 0.4), "one large LM": (0.5, 0.5), "popularity": (0.3, 0.2), "trees": (0.7, 0.9)}


@pytest.mark.parametrize("marks", [MARKS, {"cart": ["basket"], "purchase": []}])
def test_every_figure_is_what_plain_code_finds(marks: dict[str, list[str]]) -> None:
    rows = invented(83)
    alone, against = figures(score(rows, THRESHOLDS, marks), "bundle", resamples=3)
    assert list(alone) == list(rows) and set(alone["bundle"]) == set(MEASURES)
    for name, found in alone.items():
        plain = plainfigures.figures(rows[name], THRESHOLDS[name], marks)
        told = {key: figure.mean for key, figure in found.items() if figure is not None}
        assert told == pytest.approx({key: value for key, value in plain.items() if value is not None})
        for key, difference in against.get(name, {}).items():
            ours, theirs = alone["bundle"][key], found[key]
            if ours is None or theirs is None:
                assert difference is None
            else:
                assert difference is not None and difference.mean == pytest.approx(ours.mean - theirs.mean)
    assert alone["trees"]["iou"] is None and alone["trees"]["cart_auc"] is not None
    assert alone["popularity"]["nll_per_token"] is None


def test_intervals_are_those_of_a_plain_paired_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, resamples, seed = invented(40, seed=1), 12, 5
    monkeypatch.setattr(bootstrap, "BLOCK", 40 * 5)  # three blocks
    alone, against = figures(score(rows, THRESHOLDS, MARKS), "bundle", seed, resamples)
    drawn: dict[str, list[dict[str, float]]] = {"bundle": [], "popularity": []}
    for picks in np.random.default_rng(seed).integers(0, 40, size=(resamples, 40)):
        for name, found in drawn.items():
            plain = plainfigures.figures([rows[name][i] for i in picks], THRESHOLDS[name], MARKS)
            found.append({key: np.nan if value is None else value for key, value in plain.items()})
    for key, figure in alone["bundle"].items():
        if figure is not None:
            values = np.array([found[key] for found in drawn["bundle"]])
            assert [figure.low, figure.high] == pytest.approx(np.nanquantile(values, [0.025, 0.975]).tolist()), key
    for key, figure in against["popularity"].items():
        if figure is not None:
            values = np.array([a[key] - b[key] for a, b in zip(*drawn.values(), strict=True)])
            assert [figure.low, figure.high] == pytest.approx(np.nanquantile(values, [0.025, 0.975]).tolist()), key


def test_a_predictor_less_itself_is_nothing() -> None:
    rows = invented(30)["bundle"]
    _, against = figures(score({"a": rows, "b": rows}, {"a": (0.5, 0.5), "b": (0.5, 0.5)}, MARKS), "a", resamples=50)
    for figure in against["b"].values():
        assert figure is None or (figure.mean, figure.low, figure.high) == (0.0, 0.0, 0.0)


def test_an_outcome_that_never_happened_has_no_auc() -> None:
    scores = score({"bundle": [row(cart_p=0.1), row(cart_p=0.2)]}, THRESHOLDS, MARKS)
    alone, _ = figures(scores, "bundle", resamples=10)
    assert alone["bundle"]["cart_auc"] is None and alone["bundle"]["cart_average_precision"] is None
    assert alone["bundle"]["cart_recall"] == bootstrap.Figure(0.0, 0.0, 0.0)


def test_resamples_hold_as_many_users_as_there_are() -> None:
    weights = np.concatenate(list(resampled(7, 30, seed=0)))
    assert weights.shape == (30, 7) and set(weights.sum(axis=1)) == {7.0}


# HeTLM (5, 9) on OPT-350M: users, hit rate and its variance by cluster, and combined (spec, section 1.10, T2 and T5).
CLUSTERS = [(305, 0.879, 0.107), (4797, 0.819, 0.148), (151, 0.570, 0.245)]
COMBINED = (5253, 0.816, 0.150)


def _hits(users: int, share: float) -> list[dict[str, Any]]:
    hits = round(users * share)
    return [row(expected=["home"])] * hits + [row(expected=["shoes"])] * (users - hits)


def test_clusters_combine_as_in_the_papers_tables() -> None:
    parts = [_hits(users, share) for users, share, _ in CLUSTERS]
    together = [one for part in parts for one in part]
    for rows, (users, share, variance) in zip([*parts, together], [*CLUSTERS, COMBINED], strict=True):
        found = Scores(rows, (0.5, 0.5), MARKS).measure(np.ones((1, users)))
        assert found["hr"][0] == pytest.approx(share, abs=0.002)
        assert found["hr_var"][0] == pytest.approx(variance, abs=0.002)
        assert found["hr_var"][0] == pytest.approx(found["hr"][0] * (1 - found["hr"][0]))


@pytest.mark.parametrize(
    ("name", "base", "accuracy", "recall", "precision"),
    [  # OPT-2.7B and Qwen HeTLM on data set I, HeTLM on II (spec, section 1.10, T4, T9 and T10)
        ("cart", 0.278, 0.740, 0.550, 0.532),
        ("purchase", 0.074, 0.869, 0.402, 0.255),
        ("cart", 0.278, 0.740, 0.580, 0.531),
        ("cart", 0.292, 0.705, 0.578, 0.496),
        ("purchase", 0.085, 0.875, 0.508, 0.343),
    ],
)
def test_accuracy_follows_from_base_rate_recall_and_precision(
    name: str, base: float, accuracy: float, recall: float, precision: float
) -> None:
    users = 5253
    came = round(base * users)
    hits = round(recall * came)
    false = round(hits * (1 - precision) / precision)
    kinds = [(True, 0.9)] * hits + [(True, 0.1)] * (came - hits) + [(False, 0.9)] * false
    kinds += [(False, 0.1)] * (users - len(kinds))
    said: list[dict[str, Any]] = [{name: happened, f"{name}_p": p} for happened, p in kinds]
    rows = [row(**one) for one in said]
    found = Scores(rows, (0.5, 0.5), MARKS).measure(np.ones((1, users)))
    assert found[f"{name}_accuracy"][0] == pytest.approx(accuracy, abs=0.002)
    assert found[f"{name}_recall"][0] == pytest.approx(recall, abs=0.002)
    assert found[f"{name}_precision"][0] == pytest.approx(precision, abs=0.002)


def test_either_right_is_not_the_union_label() -> None:
    # Cart missed and purchase rightly denied: one of the two is right, the union is not.
    found = Scores([row(cart=True, cart_p=0.1, purchase_p=0.1)], (0.5, 0.5), MARKS).measure(np.ones((1, 1)))
    assert (found["acc_either"][0], found["union_accuracy"][0]) == (1.0, 0.0)
    assert (found["path_acc_either"][0], found["path_union_accuracy"][0]) == (1.0, 0.0)
