"""Gradient boosting learns an obvious rule, and sees nothing of what it predicts."""

from dataclasses import replace

import numpy as np
import pytest

from models.visit import Visit
from models.vocabulary import Vocabulary
from trainer.boosting import Boosting, Features, fit_boosting
from trainer.examples import Example

VOCABULARY = Vocabulary(["home", "shoes", "basket"], [0.9, 0.5, 0.2], 10)
PER_OUTCOME = 7  # features of how an outcome recurs


def example(
    sessions: list[list[str]], carts: list[int], purchases: list[int] | None = None, cart: bool = False
) -> Example:
    purchases = purchases or [0] * len(carts)
    visit = Visit("s", sessions, None)
    flags = [[float(flag) for flag in part] for part in (carts, purchases)]
    return Example("u", "s", visit, ["home"], cart, False, *flags)


def visitors(count: int, seed: int) -> list[Example]:
    """A cart follows exactly on a cart in the session before, whatever came earlier; nobody buys."""
    rng = np.random.default_rng(seed)
    seen = []
    for _ in range(count):
        carts = rng.integers(0, 2, size=int(rng.integers(1, 6))).tolist()
        sessions = [["home"] + ["shoes"] * int(rng.integers(0, 3)) + ["basket"] * flag for flag in carts]
        seen.append(example(sessions, carts, cart=bool(carts[-1])))
    return seen


@pytest.fixture(scope="module")
def fitted() -> Boosting:
    return fit_boosting("trees", visitors(400, 0), visitors(100, 1), Features(VOCABULARY))


def test_features_by_hand() -> None:
    sessions = [["home", "shoes", "basket"], ["home"], ["shoes", "shoes", "home", "shoes"]]
    (x,) = Features(VOCABULARY)([example(sessions, [1, 0, 0], [0, 0, 1])])
    np.testing.assert_allclose(x[:3], [3, 8 / 3, float(np.std([3, 1, 4]))])
    np.testing.assert_allclose(x[3:11], [4, 4, 1, 8, 3, 3 / 8, 2 / 4, 0 / 2])
    cart, purchase = x[11 : 11 + PER_OUTCOME], x[11 + PER_OUTCOME : 11 + 2 * PER_OUTCOME]
    decayed = 0.7**2 / (1 + 0.7 + 0.7**2)
    np.testing.assert_allclose(cart, [1 / 3, 1, 0, 0, decayed, 2, 5])  # two sessions and five pages ago
    np.testing.assert_allclose(purchase, [1 / 3, 1, 1, 0, 1 / (1 + 0.7 + 0.7**2), 0, 0])
    np.testing.assert_allclose(x[-6:], [1, 2 / 3, 1 / 3, 1, 3, 0])  # home, shoes, basket: of sessions, in the last


def test_what_never_was_is_unknown() -> None:
    (x,) = Features(VOCABULARY)([example([["home"]], [0])])
    assert np.isnan(x[11 : 11 + PER_OUTCOME]).tolist() == [False, False, False, True, False, True, True]


def test_features_do_not_see_the_target() -> None:
    features = Features(VOCABULARY, lambda seen: np.array([[len(e.visit.sessions), 1.0] for e in seen]))
    before = example([["home"], ["shoes", "basket"]], [0, 1])
    after = replace(before, target=["basket", "shoes"], cart=True, purchase=True, session_id="other")
    x, y = features([before, after])
    np.testing.assert_array_equal(x, y)
    assert x[-2:].tolist() == [2.0, 1.0]  # the posterior's columns come last


def test_an_obvious_rule_is_learned(fitted: Boosting) -> None:
    seen = visitors(200, 2)
    happened = np.array([e.cart for e in seen])
    p = fitted.probabilities(seen)[:, 0]
    assert p[happened].min() > 0.9 and p[~happened].max() < 0.1
    assert ((p >= fitted.thresholds[0]) == happened).all()


def test_an_outcome_that_never_happens_keeps_its_base_rate(fitted: Boosting) -> None:
    np.testing.assert_allclose(fitted.probabilities(visitors(20, 3))[:, 1], 0.5 / 401)


def test_rows_say_nothing_of_pages(fitted: Boosting) -> None:
    seen, done = visitors(5, 4), list[int]()
    rows = fitted.rows(seen, done.append)
    assert sum(done) == 5 and [row["predictor"] for row in rows] == ["trees"] * 5
    assert all(row["expected"] == [] and row["path"] == [] and row["nll"] is None for row in rows)
    np.testing.assert_array_equal([[row["cart_p"], row["purchase_p"]] for row in rows], fitted.probabilities(seen))


def test_fitting_again_gives_the_same(fitted: Boosting) -> None:
    again = fit_boosting("trees", visitors(400, 0), visitors(100, 1), Features(VOCABULARY))
    np.testing.assert_array_equal(again.probabilities(visitors(50, 5)), fitted.probabilities(visitors(50, 5)))
    assert again.parameters == fitted.parameters and again.thresholds == fitted.thresholds
