"""The clock of a partition: users ahead of it, quiet times, silence. Each rule by an example."""

from streams.sessionizer import CLOCK_KEY
from streams.sessions import Fate
from streams.wire import Event
from tests.streams.test_sessionizer import AHEAD, BASE, GAP, GRACE, RULES, STRICT, YEAR, Entry, Run


def click(user: str, ms: int) -> Entry:
    return user.encode(), Event(user, BASE + ms, "p", f"{user}-{ms}")


def test_one_wild_clock_does_not_move_the_watermark() -> None:
    wild_ones = [click("w", 75 * YEAR), click("w", 75 * YEAR + 1), click("x", 75 * YEAR)]
    run = Run(RULES).feed([click("a", 0), *wild_ones, click("a", 5)])
    assert run.fates == [Fate.ACCEPTED, Fate.HELD, Fate.HELD, Fate.HELD, Fate.ACCEPTED]
    assert run.one.watermark_ms == BASE + 5 - GRACE


def test_three_users_ahead_do() -> None:
    """A quiet night in a log; the watermark moves to the first of them."""
    night = 8 * 3_600_000
    run = Run(RULES).feed([click("a", 0), click("b", night + 9), click("c", night), click("d", night + 5)])
    assert run.fates[1:] == [Fate.HELD] * 3
    assert run.one._held == []
    assert run.one.watermark_ms == BASE + night + 9 - GRACE
    assert [s.user_id for s in run.contents()] == ["a"]
    assert run.one.clock.fates[Fate.ACCEPTED] == 4


def test_what_was_held_comes_out_when_its_time_is_near() -> None:
    hours = [click("a", number * 300_000) for number in range(1, 13)]
    run = Run(RULES).feed([click("a", 0), click("w", 3_600_000), *hours]).end()
    assert run.fates[1] is Fate.HELD
    assert [s.start_ms - BASE for s in run.contents() if s.user_id == "w"] == [3_600_000]


def test_an_ordinary_event_in_between_takes_the_others_word_away() -> None:
    run = Run(RULES).feed([click("a", 0), click("b", YEAR), click("c", YEAR), click("a", 5), click("d", YEAR)])
    assert run.one.watermark_ms == BASE + 5 - GRACE
    assert run.one.clock.fates[Fate.HELD] == 3


def test_a_sparse_log_is_never_rejected() -> None:
    """Days between any two events, each of another user: the clock goes on with them, and few are held at a time."""
    run, day = Run(RULES), 86_400_000
    for number in range(300):
        run.feed([click(f"u{number}", number * day)], number)
        assert run.one.clock.fates[Fate.HELD] <= RULES.ahead_users
    assert run.one.clock.fates[Fate.ACCEPTED] >= 300 - RULES.ahead_users
    assert len(run.end().contents()) == 300


def test_too_many_held_are_refused() -> None:
    run = Run(STRICT).feed([click("a", 0), *(click("w", YEAR + ms) for ms in range(5))])
    assert run.fates[1:] == [Fate.HELD] * 3 + [Fate.REJECTED] * 2
    assert run.capped == [(4, "too_far_ahead"), (5, "too_far_ahead")]


def test_one_wild_clock_that_fills_the_held_ones_does_not_stop_the_clock() -> None:
    """Nobody else can be held then, but their word counts: after a quiet night the log goes on."""
    run, night = Run(STRICT), 8 * 3_600_000
    run.feed([click("a", 0), *(click("w", 75 * YEAR + ms) for ms in range(3))])
    run.feed([click(f"u{number}", night + 1_000 * number) for number in range(20)], 4)
    assert run.fates[4:6] == [Fate.REJECTED, Fate.HELD]
    assert run.fates[6:] == [Fate.ACCEPTED] * 18
    assert run.one.watermark_ms == BASE + night + 19_000 - GRACE


def test_a_quiet_partition_runs_on() -> None:
    run = Run(RULES).feed([click("a", 0), click("w", 2 * AHEAD)])
    run.one.run_on(BASE + GAP + GRACE)
    assert run.drain().contents() == []
    run.one.run_on(BASE + GAP + GRACE + 1)
    assert [s.user_id for s in run.drain().contents()] == ["a"]
    run.one.run_on(BASE)  # never back
    assert run.one.watermark_ms == BASE + GAP + 1
    run.one.run_on(BASE + 3 * AHEAD)
    assert [s.user_id for s in run.drain().contents()] == ["a", "w"]  # held until then, and not late
    assert run.one.clock.fates[Fate.ACCEPTED] == 2


def test_forgotten_leaves_no_trace() -> None:
    run = Run(RULES).feed([click("a", 5), click("secret", 0), click("secret", YEAR)])
    run.write()
    run.feed([(b"secret", None)], 3)
    run.write()
    assert b"secret" in run.sessions
    assert not any(b"secret" in key + record for key, record in run.store.items())
    assert CLOCK_KEY in run.store
    run.feed([click("secret", 10)], 4)
    assert [s.number for s in run.end().contents() if s.user_id == "secret"] == [1]


def test_forgotten_after_silence() -> None:
    """Counted from the user's last event to the watermark; the user then begins anew with session 1."""
    silence = 10**8
    for later, number in [(silence + GRACE - 1, 2), (silence + GRACE, 1)]:
        run = Run(RULES.but(forget_after_ms=silence))
        run.feed([click("u", 0), *(click(user, later) for user in "vwx"), click("u", later + 1)]).end()
        assert [s.number for s in run.contents() if s.user_id == "u"] == sorted([1, number]), later


def test_a_sweep_forgets_nobody_before_the_time() -> None:
    """Nor a user whose only events were late: the rate limit would count anew, at a moment that no log says."""
    late = [click("u", -GRACE - number - 1) for number in range(3)]
    straight, swept = Run(STRICT).feed([click("a", 0), *late]), Run(STRICT).feed([click("a", 0), *late[:2]])
    swept.write()
    swept.disturb("sweep")
    assert straight.fates[1:] == [Fate.LATE, Fate.LATE, Fate.REJECTED]
    assert swept.feed(late[2:], 3).fates == straight.fates
