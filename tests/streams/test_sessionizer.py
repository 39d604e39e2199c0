"""What must hold for a partition's sessionizer whatever the log, the batches and the restarts (hypothesis)."""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.channels import Channels
from streams.sessionizer import Sessionizer
from streams.sessions import CART, PURCHASE, Fate, Policy
from streams.settings import Settings
from streams.wire import Event, Session
from tests import oracle
from tests.streams.fakebroker import put
from tests.streams.itemtable import Clusters

BASE = 1_700_000_000_000
GAP, GRACE, AHEAD = 60_000, 100_000, 600_000
YEAR = 31_536_000_000
MARKS = {"view": 0, "cart": CART, "purchase": PURCHASE}
RULES = Settings(gap_ms=GAP, grace_ms=GRACE, ahead_ms=AHEAD, seed_events=2, recent_items=3)
CUTTING = RULES.but(max_session_events=3, max_session_ms=90_000)
STRICT = CUTTING.but(max_events_per_minute=2, forget_after_ms=400_000, held_events=3, seeds="recency")
FORGETFUL = RULES.but(ahead_users=2, forget_after_ms=400_000)
bounded = settings(max_examples=60, deadline=None)

ITEMS = ["i0", "i1", None, "i2", "i3", "unknown", "i4"]
CLUSTERS = {"i0": 0, "i1": 1, "i2": 2, "i3": 0, "i4": 1}

Entry = tuple[bytes, Event | None]  # None: the user is forgotten


@st.composite
def tame(draw: st.DrawFn) -> list[Entry]:
    """A log in order of time, each event with an id of its own, and no jump as long as the grace allows disorder."""
    steps = st.sampled_from([1, 1_000, 20_000, GAP, GAP + 1, 200_000])
    log: list[Entry] = []
    now = BASE
    for number, (user, step) in enumerate(draw(st.lists(st.tuples(st.integers(0, 2), steps), min_size=1, max_size=50))):
        now += step
        item = ITEMS[number % len(ITEMS)]
        log.append((f"u{user}".encode(), Event(f"u{user}", now, f"p{number % 5}", f"e{number}", item_id=item)))
    return log


@st.composite
def wild(draw: st.DrawFn) -> list[Entry]:
    """Anything: disorder beyond the grace, wild clocks, quiet nights, events sent again, forgotten users."""
    steps = st.sampled_from([0, 1, 3_000, 20_000, GAP, 70_000, 10 * AHEAD])
    shifts = st.sampled_from([0, 0, 0, -1, -GAP, -GRACE, -GRACE - 1, -2 * GRACE, AHEAD, 2 * AHEAD, YEAR])
    kinds = st.sampled_from(["new"] * 6 + ["without id", "again", "forget"])
    log: list[Entry] = []
    now = BASE
    for number, (kind, user, step, shift) in enumerate(
        draw(st.lists(st.tuples(kinds, st.integers(0, 4), steps, shifts), min_size=1, max_size=50))
    ):
        now += step
        name = f"u{user}"
        if kind == "again" and log:
            log.append(log[-1 - user % len(log)])
        elif kind == "forget":
            log.append((name.encode(), None))
        else:
            event_id = None if kind == "without id" else f"e{number}"
            type_, item = ("view", "cart", "purchase")[number % 3], ITEMS[number % len(ITEMS)]
            log.append((name.encode(), Event(name, now + shift, f"p{number % 5}", event_id, type_, item)))
    return log


@dataclass
class Run:
    """A sessionizer with its store, restarted and swept at will; everything that came out of it."""

    rules: Settings
    store: dict[bytes, bytes] = field(default_factory=dict)
    sessions: list[Session | bytes] = field(default_factory=list)  # bytes: the key of a forgotten user
    late: list[tuple[Event, int]] = field(default_factory=list)
    capped: list[tuple[int, str]] = field(default_factory=list)
    fates: list[Fate | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.begin([])

    def begin(self, records: list[tuple[bytes, bytes]]) -> None:
        channels = Channels.of(self.rules, Clusters(CLUSTERS))
        self.one = Sessionizer(Policy.of(self.rules), self.store.get, records, channels=channels)

    def feed(self, log: list[Entry], start: int = 0) -> "Run":
        for offset, (key, event) in enumerate(log, start):
            if event is None:
                self.one.forget(key, key.decode())
                self.fates.append(None)
            else:
                self.fates.append(self.one.apply(key, event, MARKS[event.type], offset))
        return self.drain()

    def end(self) -> "Run":
        self.one.end()
        return self.drain()

    def drain(self) -> "Run":
        one = self.one
        self.sessions += [key if session is None else session for key, session in one.closed]
        self.late += [(late.event, late.late_by_ms) for _, late in one.late]
        self.capped += [(capped.offset, capped.reason) for capped in one.capped]
        one.closed, one.late, one.capped = [], [], []
        return self

    def write(self) -> None:
        put(self.store, self.one.changes())

    def disturb(self, how: str) -> None:
        """What happens to a worker between two batches."""
        if how == "sweep":
            self.one.forget_silent(list(self.store.items()))
        elif how not in ("go on", "evict early"):
            self.write()
        if how.startswith("evict"):
            self.one.evict(0)
        elif how == "restart":
            self.begin(list(self.store.items()))

    def result(self) -> tuple[object, ...]:
        return self.sessions, self.late, self.capped, self.fates, self.one.clock

    def contents(self) -> list[Session]:
        return sorted((s for s in self.sessions if isinstance(s, Session)), key=lambda s: (s.user_id, s.number))


# ---------------------------------------------------------------- time is data


@bounded
@given(tame(), st.randoms(use_true_random=False), st.sampled_from([RULES, CUTTING]))
def test_any_order_within_the_grace_gives_the_same_sessions(log: list[Entry], choose: object, rules: Settings) -> None:
    jitter = {event.event_id: choose.randrange(GRACE + 1) for _, event in log if event}  # type: ignore[attr-defined]
    shuffled = sorted(log, key=lambda entry: entry[1].ts + jitter[entry[1].event_id] if entry[1] else 0)
    ordered, disordered = Run(rules).feed(log).end(), Run(rules).feed(shuffled).end()
    assert disordered.contents() == ordered.contents()
    assert disordered.late == []


@bounded
@given(wild(), st.data(), st.sampled_from([RULES, CUTTING, STRICT]))
def test_a_restart_anywhere_changes_nothing(log: list[Entry], data: st.DataObject, rules: Settings) -> None:
    """Nor does writing, evicting or sweeping: all that counts is in the records."""
    straight, broken = Run(rules).feed(log), Run(rules)
    ways = st.sampled_from(["go on", "go on", "write", "evict", "evict early", "restart", "sweep"])
    for offset, how in enumerate(data.draw(st.lists(ways, min_size=len(log), max_size=len(log)), label="disturbances")):
        broken.feed(log[offset : offset + 1], offset)
        broken.disturb(how)
    assert broken.result() == straight.result()
    assert broken.end().contents() == straight.end().contents()


@bounded
@given(wild(), st.integers(0, 50))
def test_one_restart_with_nothing_left_in_memory(log: list[Entry], place: int) -> None:
    straight, broken = Run(STRICT).feed(log), Run(STRICT)
    broken.feed(log[:place])
    broken.disturb("restart")
    assert broken.feed(log[place:], min(place, len(log))).result() == straight.result()
    assert broken.end().contents() == straight.end().contents()


@bounded
@given(wild(), st.sampled_from([RULES, CUTTING, STRICT]))
def test_the_watermark_never_goes_back(log: list[Entry], rules: Settings) -> None:
    run, before = Run(rules), 0
    for offset, entry in enumerate(log):
        run.feed([entry], offset)
        assert (run.one.watermark_ms or before) >= before
        before = run.one.watermark_ms or before


# ---------------------------------------------------------------- nothing twice, nothing lost


@bounded
@given(tame())
def test_the_log_sent_again_is_all_duplicates(log: list[Entry]) -> None:
    once = Run(RULES).feed(log)
    twice = Run(RULES).feed(log).feed(log, len(log))
    assert set(twice.fates[len(log) :]) == {Fate.DUPLICATE}
    assert twice.end().contents() == once.end().contents()


@bounded
@given(wild())
def test_each_event_sent_twice_at_once(log: list[Entry]) -> None:
    log = [(key, event) for key, event in log if event is None or event.event_id is not None]
    once, twice = Run(RULES).feed(log).end(), Run(RULES)
    for offset, (key, event) in enumerate(log):
        twice.feed([(key, event)] * 2 if event is not None else [(key, event)], offset)
        if event is not None and twice.fates[-2] in (Fate.ACCEPTED, Fate.HELD):
            assert twice.fates[-1] is Fate.DUPLICATE
    assert twice.end().sessions == once.sessions


@bounded
@given(wild(), st.sampled_from([RULES, CUTTING, STRICT]))
def test_every_event_received_has_one_fate(log: list[Entry], rules: Settings) -> None:
    run = Run(rules)
    for offset, entry in enumerate(log):
        run.feed([entry], offset)
        fates = run.one.clock.fates
        assert sum(fates) == offset + 1
        assert min(fates) >= 0
        assert fates[Fate.HELD] == len(run.one._held)
        assert fates[Fate.LATE] == len(run.late)
        assert fates[Fate.REJECTED] == len(run.capped)
        if not any(event is None for _, event in log):
            kept = sum(len(session.pages) for session in run.contents())
            opened = sum(len(visit.ts) for user in run.one.users.values() for visit in user.open)
            assert fates[Fate.ACCEPTED] == kept + opened
        assert run.one.open_sessions == sum(len(user.open) for user in run.one.users.values())
    assert run.end().one.clock.fates[Fate.HELD] == 0
    assert run.one.open_sessions == 0


@bounded
@given(wild(), st.sampled_from([RULES, CUTTING, STRICT]))
def test_sessions_of_a_user_never_overlap(log: list[Entry], rules: Settings) -> None:
    sessions: dict[str, list[Session]] = defaultdict(list)
    for session in Run(rules).feed(log).end().sessions:
        if isinstance(session, Session):
            sessions[session.user_id].append(session)
    for own in sessions.values():
        for before, after in pairwise(own):  # in the order in which they were published
            is_full = len(before.pages) == rules.max_session_events
            is_long = after.start_ms - before.start_ms > rules.max_session_ms
            if is_full or (is_long and rules is not RULES):
                assert after.start_ms >= before.end_ms
            else:
                assert after.start_ms > before.end_ms + GAP
            assert after.number in (before.number + 1, 1)
        assert all(s.page_ts_ms == sorted(s.page_ts_ms) and len(s.page_ts_ms) == len(s.pages) for s in own)
        assert len({s.session_id for s in own}) == len(own)


# ---------------------------------------------------------------- the oracle


@pytest.mark.parametrize("ended", [False, True])
@settings(max_examples=150, deadline=None)
@given(log=wild(), rules=st.sampled_from([RULES, RULES.but(grace_ms=0), FORGETFUL, RULES.but(seeds="recency")]))
def test_same_as_the_oracle(log: list[Entry], ended: bool, rules: Settings) -> None:
    records = []
    for offset, (key, event) in enumerate(log):
        value = (
            None if event is None else json.dumps({name: getattr(event, name) for name in event.__struct_fields__[:6]})
        )
        sent = event.ts if event is not None else 0
        records.append(oracle.Record(0, offset, sent, key, None if value is None else value.encode()))
    expected = oracle.replay_log(records, rules, ended=ended)
    run = Run(rules).feed(log)
    if ended:
        run.end()
    cuts = [
        oracle.Cut(s.user_id, s.number, s.start_ms, s.end_ms, tuple(s.pages), tuple(s.page_ts_ms), s.cart, s.purchase)
        for s in run.contents()
    ]
    assert sorted(cuts) == sorted(expected.sessions)
    published = [session for session in run.sessions if isinstance(session, Session)]
    seeds = oracle.seeds_of([msgspec.to_builtins(session) for session in published], CLUSTERS, rules)
    for session, wanted in zip(published, seeds, strict=True):
        found = session.context.seeds or []
        assert [(seed.item_id, seed.channel) for seed in found] == [one[:2] for one in wanted]
        assert [seed.weight for seed in found] == pytest.approx([one[2] for one in wanted])
    touched = [
        (s.user_id, s.number, s.start_ms, s.context.recent_items, s.context.bought_items) for s in run.contents()
    ]
    assert sorted(touched) == sorted(expected.touched)
    assert sorted((e.user_id, e.ts, by) for e, by in run.late) == sorted(expected.late)
    for offset, fate in enumerate(run.fates):
        final = expected.fates[0, offset]
        if fate is None:
            assert final == oracle.FORGET
        elif fate is not Fate.HELD:
            assert fate.name.lower() == final, offset
    assert run.one.clock.fates[Fate.HELD] == (0 if ended else list(expected.fates.values()).count(oracle.HELD))
    assert run.one.open_sessions == expected.still_open
