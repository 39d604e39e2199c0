from collections import defaultdict
from itertools import pairwise

from streams.profiles import SiteProfile
from streams.settings import MINUTE_MS
from streams.shop import KINDS, kind_of, shop_events
from streams.wire import Event

START_MS = 1_760_000_000_000
VISITORS, DAYS, SEED = 150, 14, 3


def sessions(events: list[Event]) -> dict[str, list[list[Event]]]:
    """Each visitor's sessions, by the default gap."""
    found: dict[str, list[list[Event]]] = defaultdict(list)
    for event in events:
        mine = found[event.user_id]
        if mine and event.ts - mine[-1][-1].ts <= 30 * MINUTE_MS:
            mine[-1].append(event)
        else:
            mine.append([event])
    return found


def iou(left: set[str], right: set[str]) -> float:
    return len(left & right) / len(left | right)


def events_of(seed: int = SEED) -> list[Event]:
    return list(shop_events(VISITORS, DAYS, seed, START_MS))


def test_same_seed_same_shop() -> None:
    assert events_of() == events_of()
    assert events_of() != events_of(SEED + 1)


def test_more_visitors_change_nothing_for_the_others() -> None:
    few = list(shop_events(10, DAYS, SEED, START_MS))
    users = {event.user_id for event in few}
    assert [event for event in events_of() if event.user_id in users] == few


def test_events_come_in_order_and_in_time() -> None:
    events = events_of()
    assert all(left.ts <= right.ts for left, right in pairwise(events))
    assert events[0].ts >= START_MS
    assert events[-1].ts < START_MS + DAYS * 24 * 60 * MINUTE_MS
    assert len({event.event_id for event in events}) == len(events)


def test_visitors_come_back() -> None:
    counts = [len(mine) for mine in sessions(events_of()).values()]
    assert sum(count >= 4 for count in counts) > 0.9 * VISITORS


def test_events_carry_item_and_outcome_but_no_kind() -> None:
    events, profile = events_of(), SiteProfile.load("demo-shop")
    for event in events:
        assert profile.page(event.page) == event.page
        assert profile.outcome(event.page, "view") == (event.type == "cart", event.type == "purchase")
        assert (event.item_id is None) == (event.price is None)
    assert {"cart", "purchase", "view"} == {event.type for event in events}
    assert not any(kind in repr(event) for event in events for kind in KINDS)


def test_every_kind_visits() -> None:
    assert {kind_of(number, SEED) for number in range(VISITORS)} == set(KINDS)


def test_the_session_before_the_last_tells_more_than_the_last() -> None:
    """Habits are rings of visits: for most kinds the last session is a poor guide to the next."""
    visits = sessions(events_of())
    again, two_ago = [], []
    for number in range(VISITORS):
        if kind_of(number, SEED) == "quick buyer":  # by turns buys and looks where the order is
            pages = [{event.page for event in mine} for mine in visits[f"visitor-{SEED}-{number:05d}"]]
            again += [iou(last, now) for last, now in pairwise(pages)]
            two_ago += [iou(last, now) for last, now in zip(pages, pages[2:], strict=False)]
    assert sum(two_ago) / len(two_ago) > 2 * sum(again) / len(again)
