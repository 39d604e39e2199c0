"""What a session is: the pure rules, one visitor at a time. No I/O, no clock, no globals.

Neighbouring events of a session are at most `gap_ms` apart; a session ends at its last event and closes when the
watermark has passed end + gap. An over-long one is cut by the order of event times. `Sessionizer` applies these rules
to a partition; the slow, obvious form of the same rules is the oracle in the tests.
"""

from bisect import bisect_right
from enum import IntEnum
from hashlib import blake2b
from typing import Any, Protocol

import msgspec

from models.visit import recent
from streams.channels import NO_CHANNELS, Channels
from streams.settings import Settings
from streams.touched import NOTHING_TOUCHED, touch
from streams.wire import Context, Event, Routing, Seed, Session

CART, PURCHASE = 1, 2  # the bits of an event's mark
ID_BYTES = 8
RECENT_IDS = 64
WINDOW_MS = 60_000


class Fate(IntEnum):
    """What became of an event. Every event received has exactly one, and `HELD` turns into another later."""

    ACCEPTED = 0
    DUPLICATE = 1
    LATE = 2
    REJECTED = 3
    HELD = 4


class Policy(msgspec.Struct, frozen=True):
    """The rules' numbers; see `Settings` for what each means."""

    gap_ms: int
    grace_ms: int
    ahead_ms: int
    ahead_users: int
    held_events: int
    max_events: int
    max_span_ms: int
    events_per_minute: int
    forget_after_ms: int
    history_tokens: int
    recent_items: int

    @classmethod
    def of(cls, settings: Settings) -> "Policy":
        """The policy that the settings describe."""
        return cls(
            gap_ms=settings.gap_ms,
            grace_ms=settings.grace_ms,
            # With a grace as long as that, every ordinary event would be so far ahead of the watermark.
            ahead_ms=settings.ahead_ms + (settings.grace_ms if settings.grace_ms >= settings.ahead_ms else 0),
            ahead_users=settings.ahead_users,
            held_events=settings.held_events,
            max_events=settings.max_session_events,
            max_span_ms=settings.max_session_ms,
            events_per_minute=settings.max_events_per_minute,
            forget_after_ms=settings.forget_after_ms,
            history_tokens=settings.history_tokens,
            recent_items=settings.recent_items,
        )


class Visit(msgspec.Struct, array_like=True, gc=False):
    """An open session as columns, in order of (event time, place in the log)."""

    ts: list[int]
    pages: list[str]
    items: list[str | None]
    marks: bytes  # one a event: CART | PURCHASE
    ids: bytes  # ID_BYTES a event


class Timed(Protocol):
    """Anything with the event times of a session."""

    ts: list[int]


class User(msgspec.Struct, array_like=True, gc=False):
    """All that is kept of a visitor: one record, bounded."""

    open: list[Visit] = []  # first, so that `next_due_of_record` need not read on
    last_ms: int = 0  # highest event time: silence is counted from here
    number: int = 0  # sessions closed so far
    closed_end_ms: int | None = None
    closed_id: str | None = None
    window_ms: int = 0  # the rate limit's window: its first event
    window_events: int = 0
    recent: bytes = b""  # ids of the last RECENT_IDS events of closed sessions
    history: msgspec.Raw = msgspec.Raw(b"\x90")  # list[list[str]], decoded only when a session closes
    routing: Routing | None = None
    seeds: msgspec.Raw = NO_CHANNELS  # list[channels.Kept] | None, decoded only when a session closes
    items: msgspec.Raw = NOTHING_TOUCHED  # touched.Kept | None, the same


_encode = msgspec.msgpack.Encoder().encode
_decode_user = msgspec.msgpack.Decoder(User).decode
_decode_history = msgspec.msgpack.Decoder(list[list[str]]).decode


def encode_user(user: User) -> bytes:
    """The user's record as it stands in the changelog and in RocksDB."""
    return _encode(user)


def decode_user(record: bytes) -> User:
    """Undo `encode_user`."""
    return _decode_user(record)


class _Times(msgspec.Struct, array_like=True, gc=False):
    """The beginning of a `Visit`."""

    ts: list[int]


class _OpenTimes(msgspec.Struct, array_like=True, gc=False):
    """The beginning of a `User`."""

    open: list[_Times]


_decode_open = msgspec.msgpack.Decoder(_OpenTimes).decode
NOTHING_OPEN = 0x90  # an empty array: the first field, behind the one byte that heads a record of up to 15 fields


def has_open(record: bytes) -> bool:
    """Whether a user's record holds an open session."""
    return record[1] != NOTHING_OPEN


def next_due_of_record(record: bytes, policy: Policy) -> tuple[int, int | None]:
    """(open sessions, when the next is due) of a user's record: all that a partition needs to take it up."""
    if not has_open(record):
        return 0, None
    visits = _decode_open(record).open
    return len(visits), min(due_ms(visit, policy) for visit in visits)


def history_of(user: User) -> list[list[str]]:
    """Pages of the user's last closed sessions, oldest first."""
    return _decode_history(user.history)


def event_id_hash(event: Event, offset: int) -> bytes:
    """The event's id in ID_BYTES bytes; without an event_id its place in the log (the key fixes the partition)."""
    if event.event_id is None:
        return offset.to_bytes(ID_BYTES, "big")
    return blake2b(event.event_id.encode(), digest_size=ID_BYTES).digest()


def is_duplicate(user: User, id_hash: bytes) -> bool:
    """Whether the event is in an open session, or among the last events of the closed ones."""
    if id_hash in user.recent:
        return True
    for visit in user.open:  # noqa: SIM110 - a generator costs three times as much, and this runs for every event
        if id_hash in visit.ids:
            return True
    return False


def is_too_fast(user: User, event: Event, policy: Policy) -> bool:
    """Count the event in the user's window of a minute; true when the window is full."""
    if event.ts - user.window_ms >= WINDOW_MS or not user.window_events:
        user.window_ms, user.window_events = event.ts, 0
    user.window_events += 1
    return user.window_events > policy.events_per_minute


def step(user: User, event: Event, id_hash: bytes, mark: int, watermark: int, policy: Policy) -> Fate:
    """Put one event into the user's open sessions, or say that it is late. Changes `user` in place.

    Sessions that are due at `watermark` must have been taken out before (`close_due`).
    """
    ts, gap = event.ts, policy.gap_ms
    opened = user.open
    if len(opened) == 1 and opened[0].ts[-1] <= ts <= opened[0].ts[-1] + gap and ts >= watermark:  # the usual case
        _append(opened[0], event, id_hash, mark)
        if ts > user.last_ms:
            user.last_ms = ts
        return Fate.ACCEPTED
    near = [v for v in opened if v.ts[0] - gap <= ts <= v.ts[-1] + gap]
    if ts < watermark and not _may_join_behind(user, near, ts, gap):
        return Fate.LATE
    if ts > user.last_ms:
        user.last_ms = ts
    if not near:
        user.open = sorted(
            [*user.open, Visit([ts], [event.page], [event.item_id], bytes((mark,)), id_hash)], key=_start
        )
        return Fate.ACCEPTED
    if len(near) > 1:
        near = [_bridge(user, near)]
    _insert(near[0], event, id_hash, mark)
    return Fate.ACCEPTED


def _may_join_behind(user: User, near: list[Visit], ts: int, gap: int) -> bool:
    """An event behind the watermark may only join an open session, and never one that closed (or touch it)."""
    if not near:
        return False
    closed = user.closed_end_ms
    if closed is None:
        return True
    return ts > closed + gap or (ts > closed and ts >= near[0].ts[0])


def _start(visit: Visit) -> int:
    return visit.ts[0]


def _append(visit: Visit, event: Event, id_hash: bytes, mark: int) -> None:
    visit.ts.append(event.ts)
    visit.pages.append(event.page)
    visit.items.append(event.item_id)
    visit.marks += b"\0" if not mark else bytes((mark,))
    visit.ids += id_hash


def _insert(visit: Visit, event: Event, id_hash: bytes, mark: int) -> None:
    ts = event.ts
    at = bisect_right(visit.ts, ts)
    visit.ts.insert(at, ts)
    visit.pages.insert(at, event.page)
    visit.items.insert(at, event.item_id)
    visit.marks = visit.marks[:at] + bytes((mark,)) + visit.marks[at:]
    visit.ids = visit.ids[: at * ID_BYTES] + id_hash + visit.ids[at * ID_BYTES :]


def _bridge(user: User, near: list[Visit]) -> Visit:
    """Join the sessions that an event connects; they are disjoint and in order of time."""
    first, *rest = near
    for other in rest:
        first.ts += other.ts
        first.pages += other.pages
        first.items += other.items
        first.marks += other.marks
        first.ids += other.ids
        user.open.remove(other)
    return first


def is_over_long(visit: Timed, policy: Policy) -> bool:
    """Whether the session has too many events or lasts too long, so that it is cut."""
    return len(visit.ts) > policy.max_events or visit.ts[-1] - visit.ts[0] > policy.max_span_ms


def _cut_at(visit: Timed, policy: Policy) -> int | None:
    """How many events the first piece of an over-long session has; None when it is not over-long."""
    ts = visit.ts
    if not is_over_long(visit, policy):
        return None
    return min(policy.max_events, bisect_right(ts, ts[0] + policy.max_span_ms))


def due_ms(visit: Timed, policy: Policy) -> int:
    """The session (or its first piece) is final once the watermark is beyond this event time."""
    cut = _cut_at(visit, policy)
    if cut is None:
        return visit.ts[-1] + policy.gap_ms
    return visit.ts[cut - 1] if cut == policy.max_events else visit.ts[0] + policy.max_span_ms


def next_due_ms(user: User, policy: Policy) -> int | None:
    """When the user's next session is due, or None without an open session."""
    return min((due_ms(v, policy) for v in user.open), default=None)


def close_due(user: User, watermark: int | None, policy: Policy) -> list[Visit]:
    """Take the sessions out that are final at `watermark` (None: the log has ended), in order of time."""
    closed = []
    for visit in user.open:
        rest: Visit | None = visit
        while rest is not None and (watermark is None or due_ms(rest, policy) < watermark):
            piece, rest = _split(rest, _cut_at(rest, policy))
            closed.append(piece)
        if rest is not None:
            visit.ts, visit.pages, visit.items, visit.marks, visit.ids = (
                rest.ts,
                rest.pages,
                rest.items,
                rest.marks,
                rest.ids,
            )
        else:
            visit.ts = []
    if closed:
        user.open = [v for v in user.open if v.ts]
    return closed


def _split(visit: Visit, cut: int | None) -> tuple[Visit, Visit | None]:
    if cut is None:
        return Visit(visit.ts, visit.pages, visit.items, visit.marks, visit.ids), None
    ids = cut * ID_BYTES
    head = Visit(visit.ts[:cut], visit.pages[:cut], visit.items[:cut], visit.marks[:cut], visit.ids[:ids])
    tail = Visit(visit.ts[cut:], visit.pages[cut:], visit.items[cut:], visit.marks[cut:], visit.ids[ids:])
    return head, tail


def finish(
    user: User, user_id: str, visit: Visit, router: Any, policy: Policy, channels: Channels | None = None
) -> Session:
    """The record of a closed session; the user remembers it from here on."""
    history = history_of(user)
    user.routing = _route(user, visit, history, router)
    seeds: list[Seed] | None = None
    if channels is not None:
        user.seeds, seeds = channels.update(user.seeds, zip(visit.items, visit.ts, strict=True))
    user.number += 1
    purchase = any(mark & PURCHASE for mark in visit.marks)
    bought = _bought(visit) if purchase else []
    user.items, touched = touch(user.items, visit.items, bought, user.number, policy.recent_items)
    session = Session(
        session_id=_session_id(user_id, visit),
        user_id=user_id,
        number=user.number,
        start_ms=visit.ts[0],
        end_ms=visit.ts[-1],
        pages=visit.pages,
        page_ts_ms=visit.ts,
        items=visit.items if any(item is not None for item in visit.items) else None,
        cart=any(mark & CART for mark in visit.marks),
        purchase=purchase,
        context=Context(history, user.closed_id, user.closed_end_ms, user.routing, seeds, *touched),
    )
    user.closed_id, user.closed_end_ms = session.session_id, session.end_ms
    user.recent = (user.recent + visit.ids)[-RECENT_IDS * ID_BYTES :]
    user.history = msgspec.Raw(_encode(recent([*history, visit.pages], policy.history_tokens)))
    return session


def _bought(visit: Visit) -> list[str]:
    marked = zip(visit.items, visit.marks, strict=True)
    return [item for item, mark in marked if item is not None and mark & PURCHASE]


def _session_id(user_id: str, visit: Visit) -> str:
    """Stable under replay: the user and the first event, by its time and id."""
    place = f"{user_id}\0{visit.ts[0]}\0".encode() + visit.ids[:ID_BYTES]
    return blake2b(place, digest_size=16).hexdigest()


def _route(user: User, visit: Visit, history: list[list[str]], router: Any) -> Routing | None:
    """The running routing sums with this session; rebuilt from the history when they belong to another router."""
    if router is None:
        return None
    known = user.routing
    if known is not None and known.digest == router.digest:
        sums, count = router.add(known.sums, known.count, visit.pages)
    else:
        sums, count = None, 0
        for pages in (*history, visit.pages):
            sums, count = router.add(sums, count, pages)
    return Routing(router.digest, sums, count)
