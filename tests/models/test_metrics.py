"""Metrics and baselines on cases worked out by hand."""

from collections import Counter
from math import log

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from models.baselines import last_session, own_frequencies, own_rate
from models.metrics import (
    Cases,
    Pages,
    auc,
    average_precision,
    calibration_error,
    hr,
    ioa,
    iop,
    iou,
    log_loss,
    page_scores,
    worst_share,
)
from models.visit import Visit


@pytest.mark.parametrize(
    ("actual", "predicted", "expected"),
    [
        (["a", "b", "b", "c"], ["b", "c", "d"], (1, 2 / 3, 2 / 3, 0.5)),
        (["a", "a"], ["a"], (1, 1.0, 1.0, 1.0)),
        (["a"], ["b"], (0, 0.0, 0.0, 0.0)),
        (["a"], [], (0, 0.0, 0.0, 0.0)),
        ([], ["a"], (0, 0.0, 0.0, 0.0)),
        (["a", "b"], ["a", "a", "c", "d"], (1, 0.5, 1 / 3, 0.25)),
    ],
)
def test_set_metrics(actual: list[str], predicted: list[str], expected: tuple[float, ...]) -> None:
    found = [metric(actual, predicted) for metric in (hr, ioa, iop, iou)]
    assert found == pytest.approx(list(expected))


def test_log_loss_is_clipped() -> None:
    assert log_loss(0.25, True) == pytest.approx(-log(0.25))
    assert log_loss(0.25, False) == pytest.approx(-log(0.75))
    assert log_loss(0.0, True) == log_loss(-3.0, True) == pytest.approx(-log(1e-7))
    assert log_loss(1.0, False) == pytest.approx(-log(1e-7), rel=1e-6)
    assert log_loss(1.0, True) == pytest.approx(1e-7, rel=1e-6)


def _pages(lists: list[list[int]]) -> Pages:
    flat = [(page, user) for user, pages in enumerate(lists) for page in pages]
    codes, users = zip(*flat, strict=True) if flat else ((), ())
    return Pages(np.array(codes, dtype=np.int64), np.array(users, dtype=np.int64))


def _lists(rng: np.random.Generator, users: int) -> list[list[int]]:
    return [rng.integers(0, 9, size=rng.integers(0, 6)).tolist() for _ in range(users)]


@pytest.mark.parametrize("multiset", [False, True])
def test_page_scores_of_many_users_are_those_of_each(multiset: bool) -> None:
    rng = np.random.default_rng(0)
    actual, predicted, seen = (_lists(rng, 200) for _ in range(3))
    valid = np.arange(9) % 3 > 0
    found = page_scores(_pages(actual), _pages(predicted), _pages(seen), 200, valid, multiset)
    for user, (came, said, known) in enumerate(zip(actual, predicted, seen, strict=True)):
        a, g = (Counter(came), Counter(said)) if multiset else (Counter(set(came)), Counter(set(said)))
        hits, union = (a & g).total(), (a | g).total()
        exist = [page for page in said if valid[page]]
        new = [page for page in exist if page not in known]
        plain = {
            "hr": float(hits > 0),
            "ioa": hits / max(a.total(), 1),
            "iop": hits / max(g.total(), 1),
            "iou": hits / max(union, 1),
            "val_p": len(exist) / max(len(said), 1),
            "new_p": len(set(new)) / max(len(set(exist)), 1),
            "any_new": float(bool(new)),
            "new_share": len(new) / max(len(said), 1),
        }
        assert {name: values[user] for name, values in found.items()} == pytest.approx(plain)
        if not multiset:
            named = [f(list(map(str, came)), list(map(str, said))) for f in (hr, ioa, iop, iou)]
            assert [plain[name] for name in ("hr", "ioa", "iop", "iou")] == pytest.approx(named)


def test_a_page_vocabulary_names_only_pages_that_exist() -> None:
    found = page_scores(_pages([[0], [1]]), _pages([[0, 0, 2], []]), _pages([[0], [1]]), 2)
    assert found["val_p"].tolist() == [1.0, 0.0]
    assert found["new_p"].tolist() == [0.5, 0.0]  # of two distinct pages one is new
    assert found["new_share"].tolist() == pytest.approx([1 / 3, 0.0])


def test_ranks_under_weights_are_those_of_repeated_cases() -> None:
    rng = np.random.default_rng(3)
    p, y = rng.integers(0, 12, size=60) / 12, (rng.random(60) < 0.4).astype(float)
    weights = rng.multinomial(60, np.full(60, 1 / 60), size=8).astype(float)
    cases = Cases.of(p, y, weights)
    areas, precisions, errors = auc(cases), average_precision(cases), calibration_error(cases, 5)
    worsts = worst_share(p, weights)
    for row, times in enumerate(weights.astype(int)):
        q, happened = np.repeat(p, times), np.repeat(y, times)
        assert areas[row] == pytest.approx(roc_auc_score(happened, q))
        assert precisions[row] == pytest.approx(average_precision_score(happened, q))
        bins = [int(5 * ((q < one).sum() + (q == one).sum() / 2) / len(q)) for one in q]
        gaps = [abs(sum(happened[i] - q[i] for i in range(len(q)) if bins[i] == k)) for k in range(5)]
        assert errors[row] == pytest.approx(sum(gaps) / len(q))
        assert worsts[row] == pytest.approx(np.sort(q)[:6].mean())


def test_calibration_error_of_what_is_right_and_of_what_is_not() -> None:
    p = np.repeat([0.25, 0.75], 40)
    right = np.concatenate([np.arange(40) < 10, np.arange(40) < 30]).astype(float)
    ones = np.ones((1, 80))
    assert calibration_error(Cases.of(p, right, ones))[0] == pytest.approx(0.0)
    assert calibration_error(Cases.of(p, 1 - right, ones))[0] == pytest.approx(0.5)


def test_ranks_are_undefined_where_nothing_or_everything_happened() -> None:
    for happened in (np.zeros(5), np.ones(5)):
        cases = Cases.of(np.linspace(0.1, 0.5, 5), happened, np.ones((1, 5)))
        assert np.isnan(auc(cases)[0])
        assert np.isnan(average_precision(cases)[0]) == (not happened.any())


VISIT = Visit("s", [["a", "b"], ["b", "c", "c"], ["d", "b", "d", "a"]])


def test_last_session_again() -> None:
    forecast = last_session(VISIT, cart=0.2, purchase=0.1)
    assert forecast.pages == [("b", 1.0), ("a", 2 / 3), ("d", 1 / 3)]
    assert (forecast.path, forecast.cart, forecast.purchase) == (["d", "b", "d", "a"], 0.2, 0.1)


def test_own_page_frequencies() -> None:
    assert own_frequencies(VISIT, size=3).pages == [("b", 1.0), ("a", 2 / 3), ("d", 1 / 3)]
    assert own_frequencies(VISIT).path == ["b", "a", "d", "c"]


def test_baselines_of_a_visit_without_pages() -> None:
    nothing: list[list[list[str]]] = [[], [[]]]
    for sessions in nothing:
        for baseline in (last_session, own_frequencies):
            forecast = baseline(Visit("s", sessions))
            assert (forecast.pages, forecast.path) == ([], [])


def test_own_rate_is_shrunk() -> None:
    assert own_rate([], 0.3) == pytest.approx(0.3)
    assert own_rate([1.0, 0.0], 0.3, 4.0) == pytest.approx((1 + 1.2) / 6)
