"""A visitor's next session meets the prediction made for it, in whatever order the two topics are read."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import pytest
from aiokafka import ConsumerRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from streams import wire
from streams.metrics import Metrics
from streams.pairing import CLOCK_KEY, DISORDER_MS, Clock, Pairing
from streams.score import Scoring
from streams.settings import DAY_MS, HOUR_MS, Settings
from tests import oracle
from tests.streams.fakebroker import put

BASE = 1_700_000_000_000
EXPIRE = 30 * DAY_MS
PAGES = ("home", "shoes", "hats", "cart", "paid")
bounded = settings(max_examples=100, deadline=None)


def session(user: str, number: int, end_ms: int, previous: wire.Session | None, pages: list[str]) -> wire.Session:
    context = wire.Context([], None, None, None)
    if previous is not None:
        context.previous_session_id, context.previous_end_ms = previous.session_id, previous.end_ms
    return wire.Session(
        f"{user}-{end_ms}", user, number, end_ms, end_ms, pages, [], None, "cart" in pages, "paid" in pages, context
    )


def prediction(of: wire.Session, pages: list[str], cart: float = 0.25, purchase: float = 0.0) -> wire.Prediction:
    expected = [wire.PageProbability(page, 0.5) for page in pages]
    return wire.Prediction(
        f"p-{of.session_id}", of.session_id, of.user_id, None, expected, pages, cart, purchase, "v1", "sha256:0", None,
        1.0, of.end_ms,
    )  # fmt: skip


# ---------------------------------------------------------------- any interleaving


@dataclass
class Log:
    """The two topics of one partition; None forgets the user. `lives` tells the lives of a user apart."""

    sessions: list[tuple[str, wire.Session | None]] = field(default_factory=list)
    predictions: list[tuple[str, wire.Prediction | None]] = field(default_factory=list)


@st.composite
def logs(draw: st.DrawFn) -> Log:
    log, last, now = Log(), dict[str, wire.Session](), BASE
    pages = st.lists(st.sampled_from(PAGES), max_size=4)
    steps = st.sampled_from([0, HOUR_MS, EXPIRE // 4, EXPIRE + 1])
    for user, forget, step, came, expected in draw(
        st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 7), steps, pages, pages), max_size=20)
    ):
        now += step + 1
        if not forget:
            last.pop(user, None)
            log.sessions.append((user, None))
            log.predictions.append((user, None))
            continue
        known = last.get(user)
        last[user] = one = session(user, 1 if known is None else known.number + 1, now, known, came or ["home"])
        log.sessions.append((user, one))
        log.predictions.append((user, prediction(one, expected)))
    return log


def interleaved(log: Log, draw: st.DataObject, in_order: bool) -> Iterator[tuple[bool, int]]:
    """(is a session, index) in some order that keeps each topic's own."""
    read = [0, 0]
    total = len(log.sessions)
    while sum(read) < 2 * total:
        session_next = read[0] < total and (
            read[1] == total or (read[0] == read[1] if in_order else draw.draw(st.booleans(), label="a session next"))
        )
        yield session_next, read[not session_next]
        read[not session_next] += 1


class Reader:
    """A pairing with its store, restarted at will; all that came out of it."""

    def __init__(self) -> None:
        self.store: dict[bytes, bytes] = {}
        self.pairing = Pairing(EXPIRE, self.store.get)
        self.scores: list[wire.Score] = []
        self.expired = 0

    def feed(self, log: Log, is_session: bool, index: int) -> None:
        user, one = (log.sessions if is_session else log.predictions)[index]
        if isinstance(one, wire.Session):
            self.pairing.came(user.encode(), one)
        elif one is not None:
            self.pairing.predicted(user.encode(), one)
        elif is_session:
            self.pairing.forget_session(user.encode())
        else:
            self.pairing.forget_prediction(user.encode())
        self.drain()

    def drain(self) -> None:
        self.scores += [score for _, score in self.pairing.scores]
        self.pairing.scores.clear()
        self.expired, self.pairing.expired = self.expired + self.pairing.expired, 0

    def write(self) -> None:
        put(self.store, self.pairing.changes())

    def disturb(self, how: str) -> None:
        if how == "sweep":
            self.pairing.expire(list(self.store.items()))
        elif how != "go on":
            self.write()
        if how == "evict":
            self.pairing.evict()
        elif how == "restart":
            clock = msgspec.msgpack.decode(self.store[CLOCK_KEY], type=Clock)
            self.pairing = Pairing(EXPIRE, self.store.get, clock)
        self.drain()

    def result(self) -> list[wire.Score]:
        return sorted(self.scores, key=lambda score: score.session_id)


def pairs(log: Log, order: list[tuple[bool, int]]) -> list[str]:
    """Sessions that must be scored: both halves were read before either topic said that the user is forgotten."""
    read_at = {place: time for time, place in enumerate(order)}
    scored = []
    for index, (user, one) in enumerate(log.sessions):
        if one is None or one.context.previous_session_id is None or one.context.previous_end_ms is None:
            continue
        if one.end_ms - one.context.previous_end_ms > EXPIRE:
            continue
        made = next(
            i for i, (_, p) in enumerate(log.predictions) if p and p.session_id == one.context.previous_session_id
        )
        forgets = [i for i, (other, gone) in enumerate(log.sessions) if i > index and other == user and gone is None]
        forgotten = min((read_at[half, i] for i in forgets for half in (True, False)), default=len(order))
        if max(read_at[True, index], read_at[False, made]) < forgotten:
            scored.append(one.session_id)
    return sorted(scored)


ways = st.sampled_from(["go on", "go on", "write", "evict", "restart", "sweep"])


@bounded
@given(logs(), st.data())
def test_any_interleaving_and_any_restart_give_the_same_scores(log: Log, data: st.DataObject) -> None:
    straight, broken = Reader(), Reader()
    for place in interleaved(log, data, in_order=True):
        straight.feed(log, *place)
    order = []
    for place in interleaved(log, data, in_order=False):
        order.append(place)
        broken.feed(log, *place)
        broken.disturb(data.draw(ways, label="disturbance"))
    assert [score.session_id for score in broken.result()] == pairs(log, order)
    by_id = {score.session_id: score for score in straight.result()}
    assert all(score == by_id[score.session_id] for score in broken.result())


@bounded
@given(logs(), st.data())
def test_in_order_is_the_oracle(log: Log, data: st.DataObject) -> None:
    one = Reader()
    for place in interleaved(log, data, in_order=True):
        one.feed(log, *place)
    sessions = [one for _, one in log.sessions if one is not None]
    made = {p.session_id: p for _, p in log.predictions if p is not None}
    expected = []
    for came in sessions:
        previous, previous_end_ms = came.context.previous_session_id, came.context.previous_end_ms
        if previous is not None and previous_end_ms is not None and came.end_ms - previous_end_ms <= EXPIRE:
            pair = msgspec.to_builtins(made[previous]), msgspec.to_builtins(came)
            expected.append(oracle.score_of(*pair))
    assert [msgspec.to_builtins(score) for score in one.scores] == expected


@bounded
@given(logs(), st.data())
def test_nothing_is_left_of_what_cannot_be_paired(log: Log, data: st.DataObject) -> None:
    """Each prediction is scored, forgotten or expired, and counted once; in the end no record of a user is left."""
    one = Reader()
    for place in interleaved(log, data, in_order=False):
        one.feed(log, *place)
        one.disturb(data.draw(ways, label="disturbance"))
    end = BASE + 1_000 * EXPIRE
    stranger = session("z", 1, end, None, ["home"])
    one.pairing.came(b"z", stranger)
    one.pairing.predicted(b"z", prediction(stranger, []))
    one.write()
    one.disturb("sweep")
    one.write()
    assert set(one.store) <= {CLOCK_KEY, b"z"}
    forgets = any(gone is None for _, gone in log.sessions)
    made = sum(p is not None for _, p in log.predictions)
    assert len(one.scores) + one.expired <= made
    assert forgets or len(one.scores) + one.expired == made


# ---------------------------------------------------------------- expiry


@pytest.mark.parametrize(("wait", "expired"), [(EXPIRE, 0), (EXPIRE + 1, 1)])
@pytest.mark.parametrize("session_first", [False, True])
def test_expiry_by_time(wait: int, expired: int, session_first: bool) -> None:
    first = session("u", 1, BASE, None, ["home"])
    second = session("u", 2, BASE + wait, first, ["home"])
    log = Log([("u", first), ("u", second)], [("u", prediction(first, ["home"]))])
    one = Reader()
    order = [(True, 0), (True, 1), (False, 0)] if session_first else [(True, 0), (False, 0), (True, 1)]
    for place in order:
        one.feed(log, *place)
    later = session("v", 1, BASE + wait + EXPIRE + DISORDER_MS + 1, None, ["home"])
    one.pairing.came(b"v", later)
    for _ in range(2):
        one.write()
        one.disturb("sweep")
    assert (len(one.scores), one.expired) == (1 - expired, expired)
    one.write()
    assert set(one.store) == {CLOCK_KEY}


def test_a_prediction_that_may_still_be_scored_is_not_swept() -> None:
    one, first = Reader(), session("u", 1, BASE, None, ["home"])
    one.pairing.predicted(b"u", prediction(first, ["home"]))
    for late, expired in [(0, 0), (1, 1)]:
        one.pairing.came(b"v", session("v", 1, BASE + EXPIRE + DISORDER_MS + late, None, ["home"]))
        one.write()
        one.disturb("sweep")
        assert one.expired == expired


def test_a_session_that_was_never_predicted_does_not_wait_for_ever() -> None:
    one, first = Reader(), session("u", 1, BASE, None, ["home"])
    one.pairing.came(b"u", session("u", 2, BASE + HOUR_MS, first, ["home"]))
    for late, left in [(0, True), (1, False)]:
        one.pairing.predicted(b"v", prediction(session("v", 1, BASE + DISORDER_MS + late, None, ["home"]), []))
        one.write()
        one.disturb("sweep")
        one.write()
        assert (b"u" in one.store) is left


# ---------------------------------------------------------------- values


def scored(pages: list[str], expected: list[str], cart: float = 0.25, purchase: float = 0.5) -> wire.Score:
    one, first = Reader(), session("u", 1, BASE, None, ["home"])
    one.pairing.predicted(b"u", prediction(first, expected, cart, purchase))
    one.pairing.came(b"u", session("u", 2, BASE + 9, first, pages))
    one.drain()
    return one.scores[0]


def test_values() -> None:
    score = scored(["home", "home", "cart", "hats"], ["home", "shoes", "cart", "paid", "sale"])
    assert (score.hr, score.ioa, score.iop, score.iou) == (1, 2 / 3, 2 / 5, 2 / 6)
    assert (score.cart, score.cart_p, score.purchase, score.purchase_p) == (True, 0.25, False, 0.5)
    assert score.cart_log_loss == pytest.approx(-math.log(0.25), rel=1e-12)
    assert score.purchase_log_loss == pytest.approx(-math.log(1 - 0.5), rel=1e-12)
    assert (score.prediction_id, score.session_id, score.user_id) == (f"p-u-{BASE}", f"u-{BASE + 9}", "u")
    assert score.model_version == "v1"


def test_nothing_predicted_and_nothing_in_common() -> None:
    for expected, iop in [([], 0.0), (["sale"], 0.0)]:
        score = scored(["home"], expected)
        assert (score.hr, score.ioa, score.iop, score.iou) == (0, 0.0, iop, 0.0)


@pytest.mark.parametrize(
    ("p", "cart", "loss"), [(0.0, True, 1e-7), (1.0, False, 1e-7), (0.0, False, 1 - 1e-7), (1.0, True, 1 - 1e-7)]
)
def test_log_losses_are_clipped(p: float, cart: bool, loss: float) -> None:
    score = scored(["cart"] if cart else ["home"], [], cart=p)
    assert score.cart_log_loss == pytest.approx(-math.log(loss), rel=1e-6)
    assert score.cart_p == p  # as it was published


# ---------------------------------------------------------------- the role


class NoStore:
    def get(self, key: bytes) -> bytes | None:
        return None

    def items_after(self, key: bytes | None, limit: int) -> list[tuple[bytes, bytes]]:
        return []


def test_a_clock_of_an_older_version_is_read() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode((5, 7)), type=Clock) == Clock(5, 7, 0)


async def test_wrong_records_are_refused_and_the_rest_goes_on() -> None:
    def record(offset: int, value: bytes | None) -> ConsumerRecord:
        return ConsumerRecord("t", 0, offset, BASE, 0, b"u", value, None, 0, 0, ())

    role = Scoring(Settings(), Metrics())
    shard = role.open(0, NoStore(), [])  # type: ignore[arg-type]
    first = session("u", 1, BASE, None, ["home"])
    second = session("u", 2, BASE + 9, first, ["home"])
    made, came = msgspec.json.encode(prediction(first, ["home"])), msgspec.json.encode(second)
    await role.work([(shard, wire.PREDICTIONS, [record(0, b"{"), record(1, made), record(2, b"[]")])])
    await role.work([(shard, wire.SESSIONS, [record(0, made), record(1, came)])])
    outputs, changes = shard.take()
    assert [(o.topic, o.key) for o in outputs] == [(wire.REJECTED, b"u")] * 3 + [(wire.SCORES, b"u")]
    assert msgspec.json.decode(outputs[-1].value or b"", type=wire.Score).session_id == second.session_id
    assert dict(changes)[b"u"] is None
    await role.work([(shard, wire.SESSIONS, [record(2, None)]), (shard, wire.PREDICTIONS, [record(3, None)])])
    assert dict(shard.take()[1])[b"u"] is None
