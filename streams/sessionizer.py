"""The sessions of one partition: its watermark, its held events, its visitors. Pure but for the reader of state.

The stream engine and the offline replay run the same object, so both give the same sessions.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import msgspec

from streams.channels import Channels
from streams.sessions import (
    Fate,
    Policy,
    User,
    close_due,
    decode_user,
    encode_user,
    event_id_hash,
    finish,
    is_duplicate,
    is_over_long,
    is_too_fast,
    next_due_ms,
    next_due_of_record,
    step,
)
from streams.wire import Event, Late, Session

RESERVED = b"\x00"  # no user id starts with it: such keys belong to the partition itself
CLOCK_KEY = RESERVED + b"clock"
HELD_KEY = RESERVED + b"held"


class Clock(msgspec.Struct, array_like=True):
    """The partition's event time. `ahead` holds the users seen far ahead since an ordinary event moved the time."""

    high_ms: int | None = None
    ahead: list[str] = []
    fates: list[int] = msgspec.field(default_factory=lambda: [0] * len(Fate))  # events so far; HELD: held now
    received: int = 0  # counted where records come in, so that the fates can be checked against it

    def watermark(self, grace_ms: int) -> int | None:
        """The highest event time less the grace; None before the first event."""
        return None if self.high_ms is None else self.high_ms - grace_ms


class Held(msgspec.Struct, array_like=True):
    """An event too far ahead of the watermark to be believed yet."""

    ts: int
    offset: int
    key: bytes
    mark: int
    id_hash: bytes
    event: Event

    def __lt__(self, other: "Held") -> bool:
        return (self.ts, self.offset) < (other.ts, other.offset)


class Capped(msgspec.Struct):
    """An event that was not taken although nothing is wrong with it: `offset` says which."""

    offset: int
    event: Event
    reason: str
    message: str


class Sessionizer:
    """Applies events in the order of the log; collects what closes, what is late, and what changed."""

    def __init__(
        self,
        policy: Policy,
        read: Callable[[bytes], bytes | None],
        records: Iterable[tuple[bytes, bytes]] = (),
        router: Any = None,
        channels: Channels | None = None,
    ) -> None:
        """Take up the state in `records` (all of the partition's); `read` finds one user's record again later."""
        self.policy, self.router, self.channels = policy, router, channels
        self.clock = Clock()
        self.users: dict[bytes, User] = {}
        self.dirty: dict[bytes, User | None] = {}
        self.closed: list[tuple[bytes, Session | None]] = []  # None: the user is forgotten
        self.late: list[tuple[bytes, Late]] = []
        self.capped: list[Capped] = []
        self.open_sessions = 0
        self._read = read
        self._watermark: int | None = None
        self._due: list[tuple[int, bytes]] = []
        self._scheduled: dict[bytes, int] = {}
        self._held: list[Held] = []
        self._side: dict[bytes, bytes | None] = {}  # changed records of the partition itself
        for key, record in records:
            self._take_up(key, record)
        heapq.heapify(self._held)
        self._set_watermark()

    def _take_up(self, key: bytes, record: bytes) -> None:
        if key == CLOCK_KEY:
            self.clock = msgspec.msgpack.decode(record, type=Clock)
        elif key.startswith(HELD_KEY):
            self._held.append(msgspec.msgpack.decode(record, type=Held))
        elif not key.startswith(RESERVED):
            count, due = next_due_of_record(record, self.policy)
            self.open_sessions += count
            if due is not None:
                self._schedule(key, due)

    # ---------------------------------------------------------------- events

    def apply(self, key: bytes, event: Event, mark: int, offset: int) -> Fate:
        """Decide one event's fate. `mark`: its outcome bits; `offset`: its place in the partition."""
        user = self._load(key)
        id_hash = event_id_hash(event, offset)
        watermark = self._watermark
        if event.event_id is not None and (is_duplicate(user, id_hash) or (self._held and self._holds(key, id_hash))):
            fate = Fate.DUPLICATE
        elif watermark is not None and event.ts > watermark + self.policy.ahead_ms:
            fate = self._hold(key, event, mark, offset, id_hash)
        else:
            high = self.clock.high_ms
            fate = self._take(key, user, event, mark, offset, id_hash)
            if self.clock.ahead and self.clock.high_ms != high:
                self.clock.ahead.clear()
        self.clock.fates[fate] += 1
        if self._held:
            self._release()
        return fate

    def _take(self, key: bytes, user: User, event: Event, mark: int, offset: int, id_hash: bytes) -> Fate:
        policy = self.policy
        self.dirty[key] = user
        if is_too_fast(user, event, policy):
            message = f"user {event.user_id!r} is over {policy.events_per_minute} events a minute"
            self.capped.append(Capped(offset, event, "rate_limited", message))
            return Fate.REJECTED
        clock = self.clock
        if clock.high_ms is None or event.ts > clock.high_ms:
            clock.high_ms = event.ts
            self._watermark = event.ts - policy.grace_ms
            if self._due and self._due[0][0] < self._watermark:
                self.advance()
            if not user.open:
                user = self._load(key)  # silent for too long by now, perhaps
        watermark = self._watermark
        assert watermark is not None
        before = len(user.open)
        fate = step(user, event, id_hash, mark, watermark, policy)
        if fate is Fate.LATE:
            self.late.append((key, Late(event, watermark - event.ts)))
            return fate
        self.open_sessions += len(user.open) - before
        if key not in self._scheduled or len(user.open) > 1 or is_over_long(user.open[0], policy):
            self._schedule(key, next_due_ms(user, self.policy))
        self.dirty[key] = user
        return fate

    def forget(self, key: bytes, user_id: str) -> None:
        """Drop all that is known of the user, at once; whoever reads our sessions is told."""
        user = self._load(key)
        self.open_sessions -= len(user.open)
        self.users[key] = User()  # stays in memory until the record's end is written, else the old one is read again
        self._scheduled.pop(key, None)
        self.dirty[key] = None
        self.closed.append((key, None))
        self.clock.fates[Fate.ACCEPTED] += 1
        for held in [h for h in self._held if h.event.user_id == user_id]:
            self._drop_held(held)
            self.clock.fates[Fate.ACCEPTED] += 1
        if user_id in self.clock.ahead:
            self.clock.ahead.remove(user_id)

    # ---------------------------------------------------------------- event time

    @property
    def watermark_ms(self) -> int | None:
        """The highest event time less the grace."""
        return self._watermark

    def run_on(self, high_ms: int) -> None:
        """Event time goes on without events (a quiet partition at wall speed); it never goes back."""
        while self._held and self._held[0].ts < high_ms:  # one after the other, else they would be late
            self._move_to(self._held[0].ts)
        self._move_to(high_ms)

    def _move_to(self, high_ms: int) -> None:
        if self.clock.high_ms is not None and high_ms > self.clock.high_ms:
            self.clock.high_ms = high_ms
            self._set_watermark()
            self.advance()
            self._release()

    def end(self) -> None:
        """The log has ended: apply what is held, close what is open."""
        while self._held:
            self._move_to(self._held[0].ts)
        while self._due:
            self._close(*heapq.heappop(self._due), watermark=None)

    def advance(self) -> None:
        """Close every session that the watermark has passed, in the order of their ends."""
        watermark, due = self._watermark, self._due
        while due and watermark is not None and due[0][0] < watermark:
            self._close(*heapq.heappop(due), watermark=watermark)

    def _set_watermark(self) -> None:
        self._watermark = self.clock.watermark(self.policy.grace_ms)

    def _close(self, due: int, key: bytes, watermark: int | None) -> None:
        if self._scheduled.get(key) != due:
            return  # a newer entry stands for this user
        del self._scheduled[key]
        user = self._load(key)
        before = len(user.open)
        user_id = key.decode()
        for visit in close_due(user, watermark, self.policy):
            self.closed.append((key, finish(user, user_id, visit, self.router, self.policy, self.channels)))
            self.dirty[key] = user
        self.open_sessions += len(user.open) - before
        self._schedule(key, next_due_ms(user, self.policy))

    def _schedule(self, key: bytes, due: int | None) -> None:
        if due is not None and self._scheduled.get(key, due + 1) > due:
            self._scheduled[key] = due
            heapq.heappush(self._due, (due, key))

    # ---------------------------------------------------------------- held events

    def _holds(self, key: bytes, id_hash: bytes) -> bool:
        return any(held.id_hash == id_hash and held.key == key for held in self._held)

    def _hold(self, key: bytes, event: Event, mark: int, offset: int, id_hash: bytes) -> Fate:
        policy, clock = self.policy, self.clock
        if event.user_id not in clock.ahead:
            clock.ahead.append(event.user_id)
        believed = len(clock.ahead) >= policy.ahead_users
        if len(self._held) >= policy.held_events and not believed:
            message = f"{policy.held_events} events are held already, this one is too far ahead of the others as well"
            self.capped.append(Capped(offset, event, "too_far_ahead", message))
            return Fate.REJECTED
        held = Held(event.ts, offset, key, mark, id_hash, event)
        heapq.heappush(self._held, held)
        self._side[_held_key(held)] = msgspec.msgpack.encode(held)
        if believed:
            clock.high_ms = self._held[0].ts
            self._set_watermark()
            self.advance()
        return Fate.HELD

    def _release(self) -> None:
        """Apply the held events that the watermark has come near to; who is still held counts as ahead."""
        released = False
        while self._held and self._watermark is not None and self._held[0].ts <= self._watermark + self.policy.ahead_ms:
            held = self._held[0]
            self._drop_held(held)
            user = self._load(held.key)
            self.clock.fates[self._take(held.key, user, held.event, held.mark, held.offset, held.id_hash)] += 1
            released = True
        if released and self.clock.ahead:
            held_users = {held.event.user_id for held in self._held}
            self.clock.ahead = [user_id for user_id in self.clock.ahead if user_id in held_users]

    def _drop_held(self, held: Held) -> None:
        self._held.remove(held)
        heapq.heapify(self._held)
        self._side[_held_key(held)] = None
        self.clock.fates[Fate.HELD] -= 1

    # ---------------------------------------------------------------- state

    def _load(self, key: bytes) -> User:
        user = self.users.get(key)
        if user is None:
            record = None if self.dirty.get(key, key) is None else self._read(key)
            user = self.users[key] = User() if record is None else decode_user(record)
        if not user.open and self._is_silent(user):
            user = self.users[key] = User()
        return user

    def _is_silent(self, user: User) -> bool:
        heard_ms = user.last_ms or user.window_ms  # nothing but late events: only the rate limit knows of them
        return self._watermark is not None and 0 < heard_ms < self._watermark - self.policy.forget_after_ms

    def forget_silent(self, records: Iterable[tuple[bytes, bytes]]) -> int:
        """Drop those of the records whose users have been silent for too long; how many they are."""
        forgotten = 0
        for key, record in records:
            if key.startswith(RESERVED) or key in self.dirty:
                continue
            user = self.users[key] if key in self.users else decode_user(record)
            if not user.open and self._is_silent(user):
                self.users.pop(key, None)
                self.dirty[key] = None
                forgotten += 1
        return forgotten

    def changes(self) -> Iterator[tuple[bytes, bytes | None]]:
        """Every record that changed since the last call; None: it is gone."""
        dirty, self.dirty = self.dirty, {}
        side, self._side = self._side, {}
        for key, user in dirty.items():
            yield key, None if user is None else encode_user(user)
        yield from side.items()
        yield CLOCK_KEY, msgspec.msgpack.encode(self.clock)

    def evict(self, keep: int) -> None:
        """Forget decoded users beyond `keep`, oldest first; only what is written may go."""
        surplus = len(self.users) - keep
        if surplus <= 0:
            return
        for key in [k for k, _ in zip(self.users, range(surplus * 2), strict=False) if k not in self.dirty][:surplus]:
            del self.users[key]


def _held_key(held: Held) -> bytes:
    return HELD_KEY + held.offset.to_bytes(8, "big")
