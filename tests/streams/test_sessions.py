"""The pure rules of a session, one visitor at a time, and each rule of the partition that one visitor can show."""

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest

from models.routing import CentroidRouter, Router, page_costs
from streams.channels import NO_CHANNELS, Channels
from streams.sessionizer import Sessionizer
from streams.sessions import (
    CART,
    ID_BYTES,
    PURCHASE,
    RECENT_IDS,
    Fate,
    Policy,
    User,
    close_due,
    decode_user,
    encode_user,
    event_id_hash,
    finish,
    history_of,
    is_duplicate,
    is_too_fast,
    next_due_ms,
    step,
)
from streams.settings import Settings
from streams.touched import NOTHING_TOUCHED
from streams.wire import Event, Seed, Session

BASE = 1_700_000_000_000
GAP, GRACE = 60_000, 200_000
EARLY = BASE - 10**9  # a watermark that nothing is behind


def policy(**changes: int) -> Policy:
    return Policy.of(Settings(gap_ms=GAP, grace_ms=GRACE, ahead_ms=3_600_000).but(**changes))


def nothing(key: bytes) -> bytes | None:
    """A store without records."""
    return None


def event(ms: int, page: str = "p", event_id: str | None = None, user: str = "u") -> Event:
    return Event(user, BASE + ms, page, event_id)


def take(user: User, times: Sequence[int], rules: Policy, watermark: int = EARLY) -> list[Fate]:
    return [step(user, event(ms, f"p{ms}"), event_id_hash(event(ms), ms % 2**40), 0, watermark, rules) for ms in times]


def spans(user: User) -> list[list[int]]:
    return [[ts - BASE for ts in visit.ts] for visit in user.open]


# ---------------------------------------------------------------- gap, grace, bridging


def test_a_gap_exactly_is_shared() -> None:
    user = User()
    take(user, [0, GAP, 2 * GAP], policy())
    assert spans(user) == [[0, GAP, 2 * GAP]]


def test_a_millisecond_more_than_a_gap_begins_a_session() -> None:
    user = User()
    take(user, [0, GAP + 1], policy())
    assert spans(user) == [[0], [GAP + 1]]


def test_the_gap_counts_before_the_session_too() -> None:
    user = User()
    take(user, [GAP, 0, -GAP - 1], policy())
    assert spans(user) == [[-GAP - 1], [0, GAP]]


def test_an_event_between_two_sessions_bridges_them() -> None:
    user = User()
    take(user, [0, 2 * GAP, GAP], policy())
    assert spans(user) == [[0, GAP, 2 * GAP]]
    assert user.open[0].pages == ["p0", f"p{GAP}", f"p{2 * GAP}"]
    assert (len(user.open[0].ids), len(user.open[0].marks)) == (3 * ID_BYTES, 3)


def test_a_bridge_joins_only_its_neighbours() -> None:
    user = User()
    take(user, [0, 2 * GAP, 5 * GAP, GAP], policy())
    assert spans(user) == [[0, GAP, 2 * GAP], [5 * GAP]]


def test_equal_times_stay_in_the_order_of_the_log() -> None:
    user, rules = User(), policy()
    for number, ms in enumerate([5, 0, 5, 0, 5]):
        step(user, event(ms, f"p{number}"), event_id_hash(event(ms), number), 0, EARLY, rules)
    assert user.open[0].pages == ["p1", "p3", "p0", "p2", "p4"]


def test_a_session_closes_only_when_the_watermark_is_beyond_end_and_gap() -> None:
    user, rules = User(), policy()
    take(user, [0, 10], rules)
    assert next_due_ms(user, rules) == BASE + 10 + GAP
    assert close_due(user, BASE + 10 + GAP, rules) == []
    assert [visit.ts for visit in close_due(user, BASE + 11 + GAP, rules)] == [[BASE, BASE + 10]]
    assert user.open == []


# ---------------------------------------------------------------- behind the watermark


def closed_until(ms: int, rules: Policy) -> User:
    """A user whose only session was closed and ended at `ms`."""
    user = User()
    take(user, [ms], rules)
    for visit in close_due(user, None, rules):
        finish(user, "u", visit, None, rules)
    return user


def test_on_the_watermark_is_not_late() -> None:
    user = User()
    assert take(user, [0], policy(), watermark=BASE) == [Fate.ACCEPTED]
    assert take(user := User(), [0], policy(), watermark=BASE + 1) == [Fate.LATE]
    assert user == User()


def test_behind_the_watermark_joins_what_is_open() -> None:
    user = User()
    take(user, [0], policy())
    assert take(user, [-GAP], policy(), watermark=BASE + GAP) == [Fate.ACCEPTED]
    assert spans(user) == [[-GAP, 0]]


def test_behind_the_watermark_never_comes_near_a_closed_session() -> None:
    rules = policy()
    for ms, fate in [(-1, Fate.LATE), (0, Fate.LATE), (GAP, Fate.LATE), (GAP + 1, Fate.ACCEPTED)]:
        user = closed_until(0, rules)
        take(user, [2 * GAP], rules)
        assert take(user, [ms], rules, watermark=BASE + 2 * GAP) == [fate], ms


def test_behind_the_watermark_may_go_between_a_cut_and_its_rest() -> None:
    """The rest of a cut session is nearer to the closed piece than a gap; inside the rest there is still room."""
    rules = policy()
    user = closed_until(0, rules)
    take(user, [10, 30], rules)
    assert take(user, [20, 5], rules, watermark=BASE + 31) == [Fate.ACCEPTED, Fate.LATE]
    assert spans(user) == [[10, 20, 30]]


# ---------------------------------------------------------------- over-long sessions


def cut(times: Sequence[int], rules: Policy) -> list[list[int]]:
    one = Sessionizer(rules, nothing)
    for offset, ms in enumerate(times):
        one.apply(b"u", event(ms), 0, offset)
    one.end()
    assert one.late == []
    return [[ts - BASE for ts in session.page_ts_ms] for _, session in one.closed if session is not None]


def shuffled_within(times: Sequence[int], reach: int, seed: int) -> list[int]:
    jitter = np.random.default_rng(seed).integers(0, reach, len(times))
    return [ms for _, ms in sorted(zip((np.array(times) + jitter).tolist(), times, strict=True))]


@pytest.mark.parametrize("seed", range(5))
def test_cut_by_number_whatever_the_order_of_arrival(seed: int) -> None:
    times = [10_000 * number for number in range(50)]
    expected = [times[start : start + 7] for start in range(0, 50, 7)]
    assert cut(shuffled_within(times, GRACE, seed), policy(max_session_events=7)) == expected


@pytest.mark.parametrize("seed", range(5))
def test_cut_by_span_whatever_the_order_of_arrival(seed: int) -> None:
    times = [10_000 * number for number in range(50)]
    expected = [times[start : start + 8] for start in range(0, 50, 8)]  # 70 s fit, 80 s do not
    assert cut(shuffled_within(times, GRACE, seed), policy(max_session_ms=79_999)) == expected


def test_a_piece_waits_until_nothing_can_come_into_it() -> None:
    """The last event is not late, and within the span of the first piece."""
    times = [0, 60_000, 120_000, 180_000, 240_000, 270_000, 80_000]
    expected = [[0, 60_000, 80_000], [120_000, 180_000], [240_000, 270_000]]
    assert cut(times, policy(max_session_ms=90_000)) == expected


def test_a_span_exactly_is_not_cut() -> None:
    assert cut([0, GAP], policy(max_session_ms=GAP)) == [[0, GAP]]
    assert cut([0, GAP], policy(max_session_ms=GAP - 1)) == [[0], [GAP]]


@pytest.mark.parametrize("limit", [{"max_session_events": 20}, {"max_session_ms": 19_000}])
def test_who_never_pauses_stays_bounded(limit: dict[str, int]) -> None:
    rules = policy(grace_ms=10_000, max_events_per_minute=10**6, **limit)
    one = Sessionizer(rules, nothing)
    for number in range(2_000):
        one.apply(b"u", event(number * 1_000, event_id=str(number)), 0, number)
        held = sum(len(visit.ts) for visit in one.users[b"u"].open)
        assert held <= 20 + 10 + 2  # the cut, what the grace allows, and the events of this very moment
        assert len(encode_user(one.users[b"u"])) < 10_000
    assert len(one._due) < 10


# ---------------------------------------------------------------- duplicates


def with_closed(ids: Sequence[str], rules: Policy) -> User:
    user = User()
    for number, name in enumerate(ids):
        at = event(number, event_id=name)
        step(user, at, event_id_hash(at, number), 0, EARLY, rules)
    for visit in close_due(user, None, rules):
        finish(user, "u", visit, None, rules)
    return user


def test_known_in_an_open_session() -> None:
    user, at = User(), event(0, event_id="a")
    step(user, at, event_id_hash(at, 0), 0, EARLY, policy())
    assert is_duplicate(user, event_id_hash(event(9, event_id="a"), 5))
    assert not is_duplicate(user, event_id_hash(event(9, event_id="b"), 5))


def test_known_among_the_last_of_closed_sessions() -> None:
    user = with_closed([f"e{number}" for number in range(RECENT_IDS + 1)], policy())
    assert not is_duplicate(user, event_id_hash(event(0, event_id="e0"), 0))
    assert all(is_duplicate(user, event_id_hash(event(0, event_id=f"e{n}"), 0)) for n in range(1, RECENT_IDS + 1))
    assert len(user.recent) == RECENT_IDS * ID_BYTES


def test_known_while_held() -> None:
    one = Sessionizer(policy(), nothing)
    one.apply(b"u", event(0, event_id="a"), 0, 0)
    assert one.apply(b"u", event(10**9, event_id="b"), 0, 1) is Fate.HELD
    assert one.apply(b"u", event(10**9, event_id="b"), 0, 2) is Fate.DUPLICATE


def test_the_id_of_a_held_event_is_its_users_own() -> None:
    one = Sessionizer(policy(), nothing)
    one.apply(b"u", event(0, event_id="a"), 0, 0)
    one.apply(b"u", event(10**9, event_id="b"), 0, 1)
    assert one.apply(b"v", event(1, event_id="b", user="v"), 0, 2) is Fate.ACCEPTED


def test_without_an_id_nothing_is_a_duplicate() -> None:
    one = Sessionizer(policy(), nothing)
    fates = [one.apply(b"u", event(0), 0, offset) for offset in range(3)]
    fates += [one.apply(b"u", event(10**9), 0, offset) for offset in range(3, 5)]
    assert fates == [Fate.ACCEPTED] * 3 + [Fate.HELD] * 2


# ---------------------------------------------------------------- rate limit


def test_rate_limit_counts_a_minute() -> None:
    user, rules = User(), policy(max_events_per_minute=3)
    assert [is_too_fast(user, event(ms), rules) for ms in (0, 1, 2, 3, 59_999)] == [False] * 3 + [True] * 2
    assert not is_too_fast(user, event(60_000), rules)


def test_over_the_rate_limit_is_rejected_and_told() -> None:
    one = Sessionizer(policy(max_events_per_minute=2), nothing)
    fates = [one.apply(b"u", event(ms), 0, ms) for ms in range(4)]
    assert fates == [Fate.ACCEPTED] * 2 + [Fate.REJECTED] * 2
    assert [(capped.offset, capped.reason) for capped in one.capped] == [(2, "rate_limited"), (3, "rate_limited")]
    assert len(one.users[b"u"].open[0].ts) == 2


# ---------------------------------------------------------------- the record of a closed session


def finished(times: Sequence[Sequence[int]], rules: Policy, router: Router | None = None) -> tuple[User, list[Session]]:
    user, sessions = User(), []
    for session in times:
        take(user, session, rules)
        user = decode_user(encode_user(user))
        sessions += [finish(user, "u", visit, router, rules) for visit in close_due(user, None, rules)]
    return user, sessions


def test_a_closed_session_says_what_it_was() -> None:
    user, rules = User(), policy()
    step(user, Event("u", BASE + 5, "cart", item_id="7"), b"1" * 8, CART, EARLY, rules)
    step(user, Event("u", BASE, "home"), b"0" * 8, 0, EARLY, rules)
    (visit,) = close_due(user, None, rules)
    session = finish(user, "u", visit, None, rules)
    assert (session.number, session.start_ms, session.end_ms) == (1, BASE, BASE + 5)
    assert (session.pages, session.page_ts_ms) == (["home", "cart"], [BASE, BASE + 5])
    assert (session.items, session.cart, session.purchase) == ([None, "7"], True, False)
    assert (session.context.history, session.context.previous_session_id) == ([], None)
    step(user, Event("u", BASE + 10**6, "paid"), b"2" * 8, PURCHASE, EARLY, rules)
    (visit,) = close_due(user, None, rules)
    following = finish(user, "u", visit, None, rules)
    assert (following.number, following.items, following.cart, following.purchase) == (2, None, False, True)
    assert following.context.history == [["home", "cart"]]
    assert (following.context.previous_session_id, following.context.previous_end_ms) == (session.session_id, BASE + 5)


def test_session_ids_are_stable_and_differ() -> None:
    times = [[0, 5], [10**6], [2 * 10**6]]
    _, once = finished(times, policy())
    _, again = finished(times, policy())
    assert [s.session_id for s in once] == [s.session_id for s in again]
    assert len({s.session_id for s in once}) == 3
    other = User()
    take(other, times[0], policy())
    (visit,) = close_due(other, None, policy())
    assert finish(other, "v", visit, None, policy()).session_id != once[0].session_id


def test_history_keeps_within_its_tokens() -> None:
    rules = policy(history_tokens=30)
    user, sessions = finished([[10**6 * n + i for i in range(4)] for n in range(20)], rules)
    for session in sessions:
        assert sum(len(pages) + 2 for pages in session.context.history) <= 30
    assert history_of(user)[-1] == sessions[-1].pages
    assert len(history_of(user)) == 5
    assert len(encode_user(user)) < 1_000


@pytest.mark.parametrize("tokens", [30, 512])
def test_running_sums_equal_rebuilt_ones(tokens: int) -> None:
    draw = np.random.default_rng(3)
    pages = [f"p{ms}" for n in range(12) for ms in (10**6 * n, 10**6 * n + 1)]
    router = CentroidRouter(pages, page_costs(draw.normal(size=(24, 5)), draw.normal(size=(3, 5))), "r1")
    times = [[10**6 * n, 10**6 * n + 1, 10**6 * n + 2] for n in range(12)]
    _, sessions = finished(times, policy(history_tokens=tokens), router)
    seen: list[str] = []
    for session in sessions:
        seen += session.pages
        routing = session.context.routing
        assert routing is not None
        assert routing.digest == "r1"
        assert (routing.sums, routing.count) == router.add(None, 0, seen)


def test_another_router_starts_from_the_history() -> None:
    draw = np.random.default_rng(4)
    costs = page_costs(draw.normal(size=(3, 5)), draw.normal(size=(2, 5)))
    pages, rules = ["p0", "p1000000", "p2000000"], policy()
    user, _ = finished([[0], [10**6]], rules, CentroidRouter(pages, costs, "old"))
    take(user, [2 * 10**6], rules)
    (visit,) = close_due(user, None, rules)
    new = CentroidRouter(pages, costs * 2, "new")
    routing = finish(user, "u", visit, new, rules).context.routing
    assert routing is not None
    assert (routing.digest, routing.sums, routing.count) == ("new", *new.add(None, 0, pages))


# ---------------------------------------------------------------- seed events


class Shelves:
    """A table of items: each has the cluster of its first letter."""

    def cluster(self, item_id: str) -> int | None:
        return "abc".find(item_id[0]) if item_id[0] in "abc" else None


def looked_at(items: Sequence[tuple[int, str | None]], user: User, rules: Policy, by: Channels | None) -> Session:
    """The session of these items, in the order given."""
    for ms, item in items:
        step(user, Event("u", BASE + ms, "p", item_id=item), ms.to_bytes(ID_BYTES), 0, EARLY, rules)
    (visit,) = close_due(user, None, rules)
    return finish(user, "u", visit, None, rules, by)


def test_seeds_go_from_session_to_session() -> None:
    """By event time within a session, and in the user's record between two."""
    user, rules, by = User(), policy(), Channels(Shelves(), 0.5, 3)
    first = looked_at([(2, "b1"), (1, "a1"), (3, None), (4, "x1")], user, rules, by)
    assert first.context.seeds == [Seed("b1", 1, 1.0, BASE + 2), Seed("a1", 0, 0.5, BASE + 1)]
    user = decode_user(encode_user(user))
    second = looked_at([(10**6, "a2")], user, rules, by)
    assert second.context.seeds == [Seed("a2", 0, 1.25, BASE + 10**6), Seed("b1", 1, 0.5, BASE + 2)]


def test_without_a_table_there_are_no_seeds_and_what_is_kept_stays() -> None:
    user, rules, by = User(), policy(), Channels(Shelves(), 0.5, 3)
    looked_at([(0, "a1")], user, rules, by)
    kept = bytes(user.seeds)
    assert looked_at([(10**6, "b1")], user, rules, None).context.seeds is None
    assert bytes(user.seeds) == kept


def test_who_touches_no_known_item_costs_no_bytes() -> None:
    rules, with_table, without = policy(), User(), User()
    session = looked_at([(0, None), (1, "x1")], with_table, rules, Channels(Shelves(), 0.5, 3))
    looked_at([(0, None), (1, "x1")], without, rules, None)
    assert session.context.seeds == []
    assert encode_user(with_table) == encode_user(without)


def test_records_from_before_the_seeds_are_read() -> None:
    """With the null that stood there, and from before there was a place for them."""
    user = User(last_ms=5, number=3)
    fields = msgspec.msgpack.decode(encode_user(user))
    assert fields[-2:] == [None, None]
    for before in (fields, fields[:-1], fields[:-2]):
        found = decode_user(msgspec.msgpack.encode(before))
        assert (found.number, bytes(found.seeds), bytes(found.items)) == (3, bytes(NO_CHANNELS), bytes(NOTHING_TOUCHED))


# ---------------------------------------------------------------- the items touched last


def test_the_newest_items_go_from_session_to_session() -> None:
    """By event time, each once and only so many; with or without a table of items."""
    user, rules = User(), policy(recent_items=3)
    first = looked_at([(2, "b"), (1, "a"), (3, None), (4, "b")], user, rules, None)
    assert first.context.recent_items == ["b", "a"]
    assert looked_at([(10**6, None)], user, rules, None).context.recent_items == ["b", "a"]
    user = decode_user(encode_user(user))
    third = looked_at([(2 * 10**6, "c"), (2 * 10**6 + 1, "a"), (2 * 10**6 + 2, "d")], user, rules, None)
    assert third.context.recent_items == ["d", "a", "c"]
    assert third.context.bought_items == []


def test_what_was_bought_is_known_for_three_sessions() -> None:
    user, rules, told = User(), policy(recent_items=2), []
    for number, bought in enumerate([["a", "b"], [], ["c"], [], ["a"], []]):
        at = number * 10**6
        for ms, item in enumerate([*bought, "seen"]):
            mark = PURCHASE if item in bought else CART
            step(user, Event("u", BASE + at + ms, "p", item_id=item), bytes([number, ms] * 4), mark, EARLY, rules)
        (visit,) = close_due(user, None, rules)
        told.append(finish(user, "u", visit, None, rules).context.bought_items)
        user = decode_user(encode_user(user))
    assert told == [["b", "a"], ["b", "a"], ["c", "b"], ["c"], ["a", "c"], ["a"]]
