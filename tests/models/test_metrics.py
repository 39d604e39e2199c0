"""Metrics and baselines on cases worked out by hand."""

from math import log

import pytest

from models.baselines import last_session, own_frequencies, own_rate
from models.metrics import hr, ioa, iop, iou, log_loss
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
