from math import log

import pytest

from streams.contest import LAST, OURS, OWN, Contest, Rates
from streams.wire import Context, Score, Session


def session(number: int, pages: list[str], history: list[list[str]], cart: bool = False) -> Session:
    context = Context(history, f"s-{number - 1}" if number > 1 else None, None, None)
    return Session(
        f"s-{number}", "u-1", number, number, number, pages, [number] * len(pages), None, cart, False, context
    )


def score(number: int, hr: int, iou: float) -> Score:
    return Score(f"p-{number}", f"s-{number}", "u-1", hr, 0.5, 0.5, iou, False, 0.5, 0.7, False, 0.5, 0.1, "v1")


def contest() -> Contest:
    return Contest({"shop": Rates(cart=0.25, purchase=0.0)}, lambda user: "shop")


def test_all_three_are_judged_on_the_same_pair() -> None:
    match = contest()
    match.session(session(1, ["home", "shoes"], [], cart=True))
    match.session(session(2, ["home", "sale"], [["home", "shoes"]]))
    match.score(score(2, hr=1, iou=0.5))
    standing = match.standings["shop"]
    assert [means.pairs for means in standing.values()] == [1, 1, 1]
    assert standing[OURS].figures() == (1.0, 0.5, 0.7, 0.1)
    hit_rate, iou, cart, purchase = standing[LAST].figures()
    assert (hit_rate, iou) == (1.0, 1 / 3)
    # One session with a cart, and a quarter of four more: (1 + 1) / 5; there was none.
    assert cart == pytest.approx(-log(1 - 0.4))
    assert purchase == pytest.approx(0.0, abs=1e-6)
    assert standing[OWN].figures() == standing[LAST].figures()


def test_a_score_may_be_read_before_its_session() -> None:
    match = contest()
    match.session(session(1, ["home"], []))
    match.score(score(2, hr=0, iou=0.0))
    assert match.pairs == 0
    match.session(session(2, ["sale"], [["home"]]))
    assert match.pairs == 1
    assert match.standings["shop"][LAST].figures()[0] == 0.0


def test_a_session_without_a_score_counts_for_nobody() -> None:
    match = contest()
    match.session(session(1, ["home"], []))
    match.session(session(2, ["home"], [["home"]]))
    assert match.sessions == 2
    assert match.pairs == 0
    assert match.has_outcomes("shop")
