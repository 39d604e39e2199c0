"""The oracle itself: cases small enough to be seen through by eye, and its two forms against each other."""

import json
import random

from streams.settings import Settings
from tests.oracle import ACCEPTED, DUPLICATE, HELD, LATE, REJECTED, Click, Record, replay_log, simple_sessions

BASE = 1_700_000_000_000
RULES = Settings(gap_ms=60_000, grace_ms=10_000, ahead_ms=600_000)


def log_of(*events: tuple[str, int] | tuple[str, int, str]) -> list[Record]:
    """Records of (user, seconds after the base[, event_id]); each record's own time is its event's."""
    records = []
    for offset, (user, seconds, *rest) in enumerate(events):
        ts = BASE + seconds * 1000
        value = {"user_id": user, "ts": ts, "page": f"p{offset}", "event_id": rest[0] if rest else f"e{offset}"}
        records.append(Record(0, offset, ts, user.encode(), json.dumps(value).encode()))
    return records


def fates(log: list[Record]) -> list[str]:
    """The fate of each record in order."""
    return list(replay_log(log, RULES).fates.values())


def test_events_exactly_a_gap_apart_share_a_session() -> None:
    """61 s is one second more than the gap."""
    found = replay_log(log_of(("a", 0), ("a", 60), ("a", 121)), RULES, ended=True).sessions
    assert [(s.number, s.pages) for s in found] == [(1, ("p0", "p1")), (2, ("p2",))]


def test_disorder_within_the_grace_bridges_two_sessions() -> None:
    """The middle event comes last and joins both."""
    found = replay_log(log_of(("a", 0), ("b", 55), ("a", 61), ("a", 52)), RULES, ended=True).sessions
    assert [s.pages for s in found if s.user == "a"] == [("p0", "p3", "p2")]


def test_an_event_behind_the_watermark_is_late_unless_its_session_is_open() -> None:
    """The watermark stands at 190 s: a's session (to 200 s) is open, b's (to 100 s) is closed."""
    found = fates(log_of(("b", 100), ("a", 150), ("a", 200), ("b", 110), ("a", 155), ("c", 185)))
    assert found == [ACCEPTED, ACCEPTED, ACCEPTED, LATE, ACCEPTED, LATE]


def test_a_session_closes_strictly_after_the_gap() -> None:
    """End 0 s, gap 60 s: at a watermark of 60 s it is open, at 61 s closed."""
    assert not replay_log(log_of(("a", 0), ("b", 70)), RULES).sessions
    assert replay_log(log_of(("a", 0), ("b", 71)), RULES).sessions


def test_duplicates_do_not_move_anything() -> None:
    """The same id twice, however late."""
    assert fates(log_of(("a", 0, "x"), ("b", 5), ("a", 0, "x"))) == [ACCEPTED, ACCEPTED, DUPLICATE]


def test_a_wild_clock_is_held_and_three_users_move_the_time() -> None:
    """One user is a day ahead; then the log itself goes on two hours later."""
    log = log_of(("a", 0), ("w", 86_400), ("b", 7200), ("a", 10), ("b", 7201), ("c", 7202), ("d", 7203))
    assert fates(log) == [ACCEPTED, HELD, ACCEPTED, ACCEPTED, ACCEPTED, ACCEPTED, ACCEPTED]
    assert [s.user for s in replay_log(log, RULES).sessions] == ["a"]


def test_an_event_far_ahead_of_its_record_is_rejected() -> None:
    """Ten minutes are allowed."""
    good, wild = log_of(("a", 0), ("a", 601))
    assert fates([good, Record(0, 1, BASE, wild.key, wild.value)]) == [ACCEPTED, REJECTED]


def test_long_sessions_are_cut_in_order_of_time() -> None:
    """At most two events a piece."""
    rules = RULES.but(max_session_events=2)
    found = replay_log(log_of(("a", 4), ("a", 0), ("a", 2)), rules, ended=True).sessions
    assert [(s.number, s.pages) for s in found] == [(1, ("p1", "p2")), (2, ("p0",))]


def test_both_forms_agree_within_the_grace() -> None:
    """Random logs, disorder of at most the grace, over-long sessions included."""
    rules = RULES.but(max_session_events=5, max_session_ms=200_000)
    for seed in range(50):
        choose = random.Random(seed)
        events = [(choose.choice("abcd"), at + choose.randint(0, 10)) for at in range(0, 3000, choose.randint(5, 30))]
        log = log_of(*events)
        clicks = [Click(BASE + at * 1000, i, user, f"p{i}", "view", "") for i, (user, at) in enumerate(events)]
        assert sorted(replay_log(log, rules, ended=True).sessions) == sorted(simple_sessions(clicks, rules))
