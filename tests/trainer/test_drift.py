"""Drift: how often it alarms without a change, how often with one, and what it rests on."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from models.bundle import load_bundle
from models.routing import ChainRouter, Router
from models.vocabulary import Vocabulary
from streams.shop import kind_of, shop_events
from tests.trainer.behaviour import corpus_of
from tests.trainer.madesite import KINDS, Site, led_in, reference, renamed
from tests.trainer.scorelog import score
from trainer.drift import (
    LEAST_SESSIONS,
    LIMITS,
    WINDOW_SCORES,
    Outcomes,
    Reference,
    Window,
    Windows,
    alarms,
    figures,
    page_drift,
    score_drift,
)
from trainer.mixture import MixtureOptions, fit_chains, responsibilities
from trainer.visitors import pseudonym
from trainer.windows import page_tokens

SITES = 40
DAY_MS, START_MS = 86_400_000, 1_760_000_000_000
GONE = np.array([0.0, *KINDS[1:]])  # three visitors in ten leave, all of one kind

Figures = dict[str, list[dict[str, float]]]  # by what has changed: a site's figures


@pytest.fixture(scope="module")
def made() -> Figures:
    """The figures of all sites."""
    return figures_of(range(SITES))


def figures_of(seeds: Iterable[int]) -> Figures:
    """Of each site: a champion of 1,500 visitors, then a day of 250, and a window of 1,000 scores."""
    found: Figures = defaultdict(list)
    for seed in seeds:
        site = Site(seed)
        told, others = reference(site.sessions(1_500), site), site.with_kinds(GONE)
        today = site.sessions(250)
        found["nothing"].append(page_drift(told, today) | score_drift(told, site.window()))
        found["15 % of the clicks on new pages"].append(page_drift(told, renamed(today, 0.15, site.rng)))
        found["5 % of the clicks on new pages"].append(page_drift(told, renamed(today, 0.05, site.rng)))
        found["a third of the sessions led in"].append(page_drift(told, led_in(today, 1 / 3, site.rng)))
        found["a kind of 30 % gone"].append(score_drift(told, others.window()))
        found["carts half again"].append(score_drift(told, site.window(carts=1.5)))
        found["purchases doubled"].append(score_drift(told, site.window(purchases=2.0)))
    return found


def rate(made: Figures, change: str, kind: str) -> int:
    """In how many of the sites the kind alarms."""
    return sum(kind in alarms(one) for one in made[change])


@pytest.mark.slow
def test_without_a_change_nothing_alarms(made: Figures) -> None:
    assert {kind: rate(made, "nothing", kind) for kind in LIMITS} == dict.fromkeys(LIMITS, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ("15 % of the clicks on new pages", "unknown_pages"),
        ("a third of the sessions led in", "pages"),
        ("a kind of 30 % gone", "clusters"),
        ("carts half again", "cart_calibration"),
        ("purchases doubled", "purchase_calibration"),
    ],
)
def test_a_change_of_this_size_alarms_nearly_always_and_nothing_else_does(
    made: Figures, change: str, kind: str
) -> None:
    assert rate(made, change, kind) >= 0.9 * SITES
    assert [other for other in LIMITS if other != kind and rate(made, change, other)] == []


@pytest.mark.slow
def test_a_change_that_is_too_small_is_let_be(made: Figures) -> None:
    assert rate(made, "5 % of the clicks on new pages", "unknown_pages") == 0


def test_one_visitor_who_comes_often_is_no_drift() -> None:
    """A tenth of the day's sessions are of one visitor, who is like others but only one."""
    site = Site(1)
    told, today = reference(site.sessions(1_500), site), site.sessions(250)
    often = site.sessions(1, each=1.0).slice(0, 1)
    many = pa.concat_tables([today, *[often] * (len(today) // 10)])
    assert "pages" not in alarms(page_drift(told, many))


# ---------------------------------------------------------------- a shop, with a router that was fitted


def shop_sessions(visitors: int, days: int, seed: int) -> list[tuple[str, int, list[str]]]:
    """(visitor, end, pages) in the order of their begins."""
    found: list[tuple[str, int, list[str]]] = []
    last: dict[str, int] = {}
    for event in shop_events(visitors, days, seed, START_MS):
        place = last.get(event.user_id)
        if place is not None and event.ts - found[place][1] <= 1_800_000:
            user, _, pages = found[place]
            found[place] = user, event.ts, [*pages, event.page]
        else:
            last[event.user_id] = len(found)
            found.append((event.user_id, event.ts, [event.page]))
    return found


def fitted(past: dict[str, list[list[str]]], seed: int) -> tuple[Router, Reference]:
    """The router of a mixture of chains, fitted as a training does it, and what its bundle would tell."""
    corpus = corpus_of(list(past.values()))
    vocabulary = Vocabulary(corpus.names, [0.0] * len(corpus.names), 1)
    tokens, users = page_tokens(corpus, vocabulary.tokens()), np.arange(len(corpus.users))
    held, train = users[::12], np.delete(users, users[::12])
    how = MixtureOptions(clusters=range(1, 7), seed=seed)
    chains, _ = fit_chains(corpus, train, held, tokens, len(vocabulary), how)
    posterior = responsibilities(chains, corpus, train.tolist(), tokens)
    counts = np.bincount(posterior.argmax(axis=1), minlength=chains.clusters)
    sessions = [pages for own in past.values() for pages in own]
    shares = np.array([sum(page in pages for pages in sessions) / len(sessions) for page in vocabulary.pages])
    return ChainRouter(vocabulary, chains, ""), Reference(vocabulary.pages, shares, len(sessions), counts.astype(float))


@pytest.mark.slow
def test_a_made_shop_alarms_when_a_kind_of_its_visitors_stays_away_and_not_before() -> None:
    """Five shops; in each a quarter of the visitors are window shoppers, whom no event tells."""
    quiet, loud = [], []
    for seed in range(5):
        sessions = shop_sessions(400, 14, seed)
        cut_ms = START_MS + 9 * DAY_MS
        past: dict[str, list[list[str]]] = defaultdict(list)
        for user, end_ms, pages in sessions:
            if end_ms < cut_ms:
                past[user].append(pages)
        router, told = fitted(past, seed)

        def window(
            comes: Callable[[str], bool], router: Router = router, cut_ms: int = cut_ms, sessions: object = sessions
        ) -> Window:
            scored, sums = Window(), dict[str, list[float]]()
            assert isinstance(sessions, list)
            for user, end_ms, pages in sessions:
                if end_ms >= cut_ms and user in sums and comes(user):
                    scored.add(score((0.5, 0.2, 0.1), None, user, cluster=router.cluster(sums[user])))
                sums[user], _ = router.add(sums.get(user), 0, pages)
            return scored

        def strolls(user: str, seed: int = seed) -> bool:
            return kind_of(int(user.rpartition("-")[2]), seed) == "window shopper"

        now = [(user, pages) for user, end_ms, pages in sessions if end_ms >= cut_ms]
        table = pa.table({"user_id": [user for user, _ in now], "pages": [pages for _, pages in now]})
        quiet.append(page_drift(told, table) | {"clusters": score_drift(told, window(lambda user: True))["clusters"]})
        loud.append(score_drift(told, window(lambda user: not strolls(user)))["clusters"])
    assert [alarms(one) for one in quiet] == [[]] * 5
    assert all(figure > LIMITS["clusters"] for figure in loud)


# ---------------------------------------------------------------- what it rests on


def test_the_reference_is_what_the_bundle_tells(tiny_bundle: Path) -> None:
    told, loaded = Reference.of(tiny_bundle), load_bundle(tiny_bundle, "cpu")
    assert told.pages == loaded.vocabulary.pages
    assert told.shares.tolist() == loaded.vocabulary.shares
    assert told.sessions == loaded.vocabulary.sessions > 0
    assert told.cluster_users.tolist() == loaded.config.cluster_users


def two_pages(sessions: int = 1_000) -> Reference:
    return Reference(["home", "shoes"], np.array([0.9, 0.3]), sessions, np.array([60.0, 40.0]))


def table(*sessions: list[str]) -> pa.Table:
    lists = pa.array(sessions, pa.list_(pa.string()))
    return pa.table({"user_id": [f"u{number}" for number in range(len(sessions))], "pages": lists})


def test_unknown_pages_are_counted_by_clicks() -> None:
    found = page_drift(two_pages(), table(["home", "new", "new"], ["shoes"], ["other"]))
    assert found["unknown_pages"] == pytest.approx(3 / 5)


def test_nothing_known_is_as_far_away_as_can_be() -> None:
    found = page_drift(two_pages(), table(["a"], ["b", "c"]))
    assert found == {"unknown_pages": 1.0, "pages": 1.0}


def test_a_page_counts_once_a_session_as_in_the_shares() -> None:
    often = [["home"] * 9, ["home"], ["home", "shoes"]] * 300
    once = [["home"], ["home"], ["home", "shoes"]] * 300
    told = two_pages(10_000)
    assert page_drift(told, table(*often))["pages"] == page_drift(told, table(*once))["pages"]


def test_the_figures_are_the_same_each_time_and_distances_lie_between_0_and_1() -> None:
    site = Site(2)
    told, today = reference(site.sessions(400), site), site.sessions(200)
    assert page_drift(told, today) == page_drift(told, today)
    assert 0 <= page_drift(told, led_in(today, 0.9, site.rng))["pages"] <= 1


def test_calibration_is_in_standard_errors_and_one_case_is_no_error() -> None:
    outcomes = Outcomes()
    for happened in [True] * 40 + [False] * 60:
        outcomes.add(0.2, happened)
    assert outcomes.error == pytest.approx((40 - 20) / np.sqrt(100 * 0.2 * 0.8))
    rare = Outcomes()
    for happened in [True] + [False] * 99:
        rare.add(1e-6, happened)
    assert rare.error < 1.01


def test_too_few_sessions_and_no_window_say_nothing() -> None:
    few = table(*[["home"]] * (LEAST_SESSIONS - 1))
    assert figures(two_pages(), few, None) == {}
    assert set(figures(two_pages(), table(*[["home"]] * LEAST_SESSIONS), None)) == {"unknown_pages", "pages"}
    assert set(figures(two_pages(), few, Window())) == {"cart_calibration", "purchase_calibration"}


def test_clusters_of_another_model_say_nothing() -> None:
    window = Window()
    window.add(score((0.5, 0.2, 0.1), None, "u", cluster=2))
    assert "clusters" not in score_drift(two_pages(), window)
    window = Window()
    window.add(score((0.5, 0.2, 0.1), None, "u", cluster=1))
    assert "clusters" in score_drift(two_pages(), window)


def test_a_visitor_counts_once_by_the_last_cluster_and_a_forgotten_one_leaves() -> None:
    windows = Windows()
    for user, cluster in (("ann", 0), ("bob", 1), ("ann", 1), ("cem", None)):
        windows.add(score((0.5, 0.2, 0.1), None, user, cluster=cluster))
    windows.add(score((0.5, 0.2, 0.1), None, "dee", cluster=0, fallback="timeout"))
    assert windows.filling.clusters == {pseudonym("ann"): 1, pseudonym("bob"): 1}
    windows.forget(pseudonym("ann"))
    assert windows.filling.clusters == {pseudonym("bob"): 1}
    assert windows.filling.scores == 4


def test_a_full_window_stays_until_the_next_is_full_and_survives_a_restart() -> None:
    windows = Windows()
    for number in range(WINDOW_SCORES + 10):
        windows.add(score((0.5, 0.2, 0.1), None, f"u{number}", number % 5 == 0, cluster=0))
    again = msgspec.json.decode(msgspec.json.encode(windows), type=Windows)
    assert again == windows
    assert again.full is not None and again.full.scores == WINDOW_SCORES and again.filling.scores == 10
    assert again.full.cart.happened == WINDOW_SCORES / 5
    windows.forget(pseudonym("u1"))
    assert windows.full is not None and pseudonym("u1") not in windows.full.clusters


def test_only_what_is_over_its_limit_alarms() -> None:
    assert alarms(LIMITS) == []
    assert alarms({kind: limit * 1.01 for kind, limit in LIMITS.items()}) == list(LIMITS)
