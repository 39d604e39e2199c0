"""The partition's sessionizer against the independent oracle: any log, any cut into batches, any restart."""

import json
import random

import pytest

from streams.sessionizer import Sessionizer
from streams.sessions import CART, PURCHASE, Policy
from streams.settings import Settings
from streams.wire import Event, Session
from tests.oracle import FORGET, HELD, REJECTED, Cut, Record, replay_log

BASE = 1_700_000_000_000
MARKS = {"view": 0, "cart": CART, "purchase": PURCHASE}


def random_log(choose: random.Random, size: int, tame: bool) -> list[Record]:
    """Disorder, duplicates and quiet times in one partition; unless it is tame, wild clocks and forgotten users too."""
    log: list[Record] = []
    now = BASE
    wild = 0.0 if tame else choose.random() * 0.05
    disorder = choose.choice([5_000, 20_000, 199_000])
    for offset in range(size):
        now += choose.choice([0, 100, 3_000, 3_000, 20_000, 70_000]) if choose.random() < 0.98 else 5_000_000
        if log and choose.random() < 0.05:
            again = choose.choice(log[-30:])
            log.append(Record(0, offset, again.timestamp_ms, again.key, again.value))
            continue
        user = f"u{choose.randrange(6)}"
        if choose.random() < 0.01 and not tame:
            log.append(Record(0, offset, now, user.encode(), None))
            continue
        ts = now - (choose.randrange(disorder) if choose.random() < 0.4 else 0)
        ts += choose.choice([600_000, 4_000_000, 10**11]) if choose.random() < wild else 0
        value: dict[str, object] = {"user_id": user, "ts": ts, "page": f"p{choose.randrange(9)}"}
        value["item_id"] = f"i{offset % 7}"
        value["type"] = choose.choice(["view", "view", "cart", "purchase"])
        if tame or choose.random() < 0.9:  # without an id, one sent again is a new event, behind the watermark perhaps
            value["event_id"] = f"e{offset}"
        log.append(Record(0, offset, ts, user.encode(), json.dumps(value).encode()))
    return log


def run(
    log: list[Record], settings: Settings, choose: random.Random, ended: bool
) -> tuple[list[Cut], list[object], list[int]]:
    """Apply the log in batches, with evictions, and at times with a new object from the stored records alone."""
    store: dict[bytes, bytes] = {}
    policy = Policy.of(settings)
    one = Sessionizer(policy, store.get)
    sessions: list[Cut] = []
    late: list[object] = []

    def drain() -> None:
        sessions.extend(cut_of(session) for _, session in one.closed if session is not None)
        late.extend((each.event.user_id, each.event.ts, each.late_by_ms) for _, each in one.late)
        one.closed, one.late = [], []

    for record in log:
        assert record.key is not None
        if record.value is None:
            one.forget(record.key, record.key.decode())
        else:
            event = Event(**json.loads(record.value))
            one.apply(record.key, event, MARKS[event.type], record.offset)
        if choose.random() < 0.1:
            drain()
            for key, changed in one.changes():
                store.pop(key, None) if changed is None else store.__setitem__(key, changed)
            one.evict(2)
            if choose.random() < 0.3:
                one = Sessionizer(policy, store.get, list(store.items()))
    if ended:
        one.end()
    drain()
    return sessions, late, one.clock.fates


def cut_of(session: Session) -> Cut:
    """The oracle's form of a session."""
    pages, times = tuple(session.pages), tuple(session.page_ts_ms)
    assert session.number
    return Cut(
        session.user_id, session.number, session.start_ms, session.end_ms, pages, times, session.cart, session.purchase
    )


@pytest.mark.parametrize("block", range(8))
def test_same_as_the_oracle(block: int) -> None:
    """Sessions, late events and the number of each fate."""
    for seed in range(block * 25, block * 25 + 25):
        choose = random.Random(seed)
        long = choose.random() < 0.3
        settings = Settings(gap_ms=60_000, grace_ms=choose.choice([0, 10_000, 200_000]), ahead_ms=600_000).but(
            max_session_events=4 if long else None, max_session_ms=150_000 if long else None
        )
        if long:  # pieces come out before their session ends, so what is late or forgotten then differs on purpose
            settings = settings.but(grace_ms=200_000)
        log = random_log(choose, 150, tame=long)
        ended = long or choose.random() < 0.5  # the first piece of an over-long open session comes out early
        expected = replay_log(log, settings, ended=ended)
        sessions, late, fates = run(log, settings, choose, ended)
        assert sorted(sessions) == sorted(expected.sessions), f"seed {seed}"
        assert sorted(late, key=repr) == sorted(expected.late, key=repr), f"seed {seed}"
        counted = list(expected.fates.values())
        assert fates[4] == counted.count(HELD) * (not ended), f"seed {seed}"
        assert sum(fates) == len(log) - counted.count(REJECTED), f"seed {seed}"
        assert counted.count(FORGET) + counted.count("accepted") >= fates[0], f"seed {seed}"
