"""What must come out of a log of clicks: slow, obvious, and written from the design alone, not from the program.

`replay_log` follows the small print event by event. `simple_sessions` is the second, simpler form for logs whose
disorder stays within the grace: sort, split at gaps, cut what is too long. `scores_of` pairs predictions with the
sessions that came. `naive_channels` is Algorithm 1 of XPert as it is printed, `seeds_of` applies it to sessions.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from streams.settings import Settings

ACCEPTED, DUPLICATE, LATE, REJECTED, HELD = "accepted", "duplicate", "late", "rejected", "held"
FORGET = "forget"
YEAR_1990_MS = 631_152_000_000
REMEMBERED_IDS = 64
CLIP = 1e-7
MAX_BYTES, MAX_DEPTH = 256 * 1024, 32
WORDS = ("event_id", "type", "item_id", "category", "query", "device")


@dataclass(frozen=True)
class Record:
    """One record of `clicks` as a consumer sees it."""

    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None


@dataclass(frozen=True, order=True)
class Click:
    """A good event; ordered by event time, then by its place in the log."""

    ts: int
    offset: int
    user: str = field(compare=False)
    page: str = field(compare=False)
    type: str = field(compare=False)
    id: str = field(compare=False)
    item: str | None = field(compare=False, default=None)


@dataclass(frozen=True, order=True)
class Cut:
    """A closed session by its content; two runs agree when they have the same of these, equally often."""

    user: str
    number: int
    start_ms: int
    end_ms: int
    pages: tuple[str, ...]
    page_ts_ms: tuple[int, ...]
    cart: bool
    purchase: bool


@dataclass
class Expected:
    """All that must come out: a fate for every record (by partition and offset), closed sessions, late and rejected.

    `touched` are user, number and start of each session with the recent and the bought items that its context has.
    """

    fates: dict[tuple[int, int], str] = field(default_factory=dict)
    sessions: list[Cut] = field(default_factory=list)
    late: list[tuple[str, int, int]] = field(default_factory=list)  # user, ts, late_by_ms
    reasons: dict[tuple[int, int], str] = field(default_factory=dict)
    touched: list[tuple[str, int, int, list[str], list[str]]] = field(default_factory=list)
    still_open: int = 0


class Visitor:
    """What the rules remember of one user."""

    def __init__(self) -> None:
        self.open: list[list[Click]] = []  # sessions, each sorted
        self.closed_end: int | None = None
        self.number = 0
        self.recent: list[str] = []
        self.items: list[tuple[str, bool, int]] = []  # of closed sessions: item, whether it was bought, session
        self.last_ts: int | None = None


def replay_log(log: Iterable[Record], settings: Settings, ended: bool = False) -> Expected:
    """Cut the whole log. `ended` also closes what is open at the end, as a replay into files does."""
    expected = Expected()
    partitions: dict[int, Partition] = {}
    for record in log:
        partition = partitions.setdefault(record.partition, Partition(record.partition, settings, expected))
        partition.receive(record)
    for partition in partitions.values():
        partition.finish(ended)
    return expected


class Partition:
    """One partition's clock, held events and users."""

    def __init__(self, number: int, settings: Settings, expected: Expected) -> None:
        self.number, self.rules, self.expected = number, settings, expected
        self.highest: int | None = None
        self.held: list[Click] = []
        self.ahead_users: set[str] = set()
        self.users: dict[str, Visitor] = defaultdict(Visitor)

    def receive(self, record: Record) -> None:
        """Decide the fate of one record and apply it."""
        place = (self.number, record.offset)
        if record.key is not None and self.highest is not None:
            self.close_due(record.key.decode(errors="replace"), self.highest - self.rules.grace_ms)
        if record.value is None and record.key is not None:
            self.forget(record.key.decode())
            self.expected.fates[place] = FORGET
            return
        click = self.decode(record)
        if isinstance(click, str):
            self.expected.fates[place], self.expected.reasons[place] = REJECTED, click
            return
        if self.is_duplicate(click):
            self.expected.fates[place] = DUPLICATE
        elif self.highest is not None and click.ts > self.highest - self.rules.grace_ms + self.rules.ahead_ms:
            self.hold(click)
        else:
            before = self.highest
            self.apply(click)
            if self.highest != before:
                self.ahead_users.clear()
        self.apply_held_within_reach()

    def decode(self, record: Record) -> Click | str:
        """The click, or the code of what is wrong with it."""
        reason = wrong_key(record.key) or wrong_value(record.value or b"")
        if reason is not None:
            return reason
        event = json.loads(record.value or b"")
        user, ts = event["user_id"], event["ts"]
        if record.key != user.encode():
            return "key_mismatch"
        if ts < YEAR_1990_MS:
            return "before_1990"
        if ts > record.timestamp_ms + self.rules.ahead_ms:
            return "in_the_future"
        place = f"place {record.offset}"
        kind, event_id = event.get("type") or "view", event.get("event_id") or place
        return Click(ts, record.offset, user, event["page"], kind, event_id, event.get("item_id"))

    def is_duplicate(self, click: Click) -> bool:
        """Whether the id is in the user's open sessions, among held events, or among the user's last ones."""
        visitor = self.users[click.user]
        known = {other.id for session in visitor.open for other in session}
        return click.id in known or click.id in visitor.recent or any(other.id == click.id for other in self.held)

    def hold(self, click: Click) -> None:
        """Too far ahead to be believed, until enough different users say the same."""
        self.held.append(click)
        self.expected.fates[self.number, click.offset] = HELD
        self.ahead_users.add(click.user)
        if len(self.ahead_users) >= self.rules.ahead_users:
            self.highest = min(self.held).ts

    def apply_held_within_reach(self) -> None:
        """In order of event time; each may bring the next within reach. Who is still held still counts as ahead."""
        while self.held and self.highest is not None:
            first = min(self.held)
            if first.ts > self.highest - self.rules.grace_ms + self.rules.ahead_ms:
                return
            self.held.remove(first)
            self.apply(first)
            self.ahead_users &= {click.user for click in self.held}

    def apply(self, click: Click) -> None:
        """Move the clock, close what is due, then join, begin a session, or be late."""
        if self.highest is None or click.ts > self.highest:
            self.highest = click.ts
        watermark = self.highest - self.rules.grace_ms
        self.close_due(click.user, watermark)
        visitor = self.users[click.user]
        gap = self.rules.gap_ms
        near = [s for s in visitor.open if s[0].ts - gap <= click.ts <= s[-1].ts + gap]
        if click.ts < watermark and (not near or self.touches_closed(visitor, near, click)):
            self.expected.fates[self.number, click.offset] = LATE
            self.expected.late.append((click.user, click.ts, watermark - click.ts))
            return
        joined = sorted([click, *(other for session in near for other in session)])
        visitor.open = sorted([*(s for s in visitor.open if s not in near), joined])
        visitor.last_ts = max(click.ts, visitor.last_ts or click.ts)
        self.expected.fates[self.number, click.offset] = ACCEPTED

    def touches_closed(self, visitor: Visitor, near: list[list[Click]], click: Click) -> bool:
        """Whether taking the click, which is behind the watermark, would change or touch a closed session."""
        end = visitor.closed_end
        if end is None:
            return False
        before_open = click.ts < min(session[0].ts for session in near)
        return click.ts <= end or (before_open and click.ts <= end + self.rules.gap_ms)

    def close_due(self, user: str, watermark: int | None) -> None:
        """Close the user's sessions that ended more than a gap before the watermark (None: all); forget the silent."""
        visitor = self.users[user]
        due = [s for s in visitor.open if watermark is None or s[-1].ts + self.rules.gap_ms < watermark]
        visitor.open = [s for s in visitor.open if s not in due]
        for session in sorted(due):
            for piece in pieces(session, self.rules):
                visitor.number += 1
                visitor.closed_end = piece[-1].ts
                visitor.recent = [*visitor.recent, *(click.id for click in piece)][-REMEMBERED_IDS:]
                self.expected.sessions.append(as_cut(user, visitor.number, piece))
                visitor.items += [(c.item, c.type == "purchase", visitor.number) for c in piece if c.item is not None]
                touched = touched_of(visitor.items, visitor.number, self.rules.recent_items)
                self.expected.touched.append((user, visitor.number, piece[0].ts, *touched))
        silent_since = visitor.last_ts if not visitor.open else None
        if watermark is not None and silent_since is not None and silent_since + self.rules.forget_after_ms < watermark:
            del self.users[user]

    def forget(self, user: str) -> None:
        """A null value: nothing of the user stays, closed sessions published before excepted."""
        self.users.pop(user, None)
        for click in self.held:
            if click.user == user:
                self.expected.fates[self.number, click.offset] = FORGET
        self.held = [click for click in self.held if click.user != user]
        self.ahead_users.discard(user)

    def finish(self, ended: bool) -> None:
        """Close what the last watermark closes, or everything when the log has ended."""
        while ended and self.held:
            self.highest = max(self.highest or 0, min(self.held).ts)
            self.apply_held_within_reach()
        watermark = None if ended or self.highest is None else self.highest - self.rules.grace_ms
        for user in list(self.users):
            self.close_due(user, watermark)
            self.expected.still_open += len(self.users[user].open)


def pieces(session: Sequence[Click], settings: Settings) -> list[list[Click]]:
    """An over-long session in pieces: each takes as many events, in order of time, as number and span allow."""
    cut: list[list[Click]] = [[]]
    for click in session:
        piece = cut[-1]
        if piece and (len(piece) == settings.max_session_events or click.ts - piece[0].ts > settings.max_session_ms):
            cut.append([click])
        else:
            piece.append(click)
    return cut


def as_cut(user: str, number: int, clicks: Sequence[Click]) -> Cut:
    """A session's content."""
    return Cut(
        user,
        number,
        clicks[0].ts,
        clicks[-1].ts,
        tuple(click.page for click in clicks),
        tuple(click.ts for click in clicks),
        any(click.type == "cart" for click in clicks),
        any(click.type == "purchase" for click in clicks),
    )


def touched_of(items: Sequence[tuple[str, bool, int]], number: int, most: int) -> tuple[list[str], list[str]]:
    """The newest items, and the newest of those bought in session `number` and the two before, each once."""
    newest = [item for item, _, _ in reversed(items)]
    bought = [item for item, was_bought, when in reversed(items) if was_bought and when >= number - 2]
    return sorted(set(newest), key=newest.index)[:most], sorted(set(bought), key=bought.index)[:most]


def simple_sessions(clicks: Iterable[Click], settings: Settings) -> list[Cut]:
    """Sessions of a log whose disorder stays within the grace: sort, split at gaps, cut what is too long."""
    by_user: dict[str, list[Click]] = defaultdict(list)
    for click in clicks:
        by_user[click.user].append(click)
    found = []
    for user, own in by_user.items():
        own.sort()
        sessions: list[list[Click]] = []
        for click in own:
            if sessions and click.ts - sessions[-1][-1].ts <= settings.gap_ms:
                sessions[-1].append(click)
            else:
                sessions.append([click])
        numbered = enumerate((piece for session in sessions for piece in pieces(session, settings)), start=1)
        found += [as_cut(user, number, piece) for number, piece in numbered]
    return found


def score_of(prediction: dict[str, Any], session: dict[str, Any]) -> dict[str, Any]:
    """The score of a published prediction against the published session that came."""
    shadow = prediction["shadow"]
    return {
        **_accuracy_of(prediction, session),
        "session_id": session["session_id"],
        "user_id": session["user_id"],
        "cart": session["cart"],
        "purchase": session["purchase"],
        "cluster": prediction["cluster"],
        "fallback": prediction["fallback"],
        "session_end_ms": session["end_ms"],
        "baselines": baselines_of(session),
        "shadow": None if shadow is None else _accuracy_of(shadow, session),
    }


def _accuracy_of(prediction: dict[str, Any], session: dict[str, Any]) -> dict[str, Any]:
    """What the champion's score and the challenger's have in common."""
    expected = {page["page"] for page in prediction["pages"]}
    came = set(session["pages"])
    both = len(expected & came)
    return {
        "prediction_id": prediction["prediction_id"],
        "hr": int(both > 0),
        "ioa": both / len(came),
        "iop": both / len(expected) if expected else 0.0,
        "iou": both / len(expected | came),
        "cart_p": prediction["cart"],
        "cart_log_loss": log_loss(prediction["cart"], session["cart"]),
        "purchase_p": prediction["purchase"],
        "purchase_log_loss": log_loss(prediction["purchase"], session["purchase"]),
        "model_version": prediction["model_version"],
        "model_digest": prediction["model_digest"],
    }


def baselines_of(session: dict[str, Any]) -> dict[str, float] | None:
    """IoU of the last session again, and of the seven pages in most of the visitor's sessions (the newest if equal)."""
    history, came = session["context"]["history"], set(session["pages"])
    if not history:
        return None
    counts = Counter(page for pages in history for page in set(pages))
    seen = [page for pages in reversed(history) for page in pages]
    most = set(sorted(counts, key=lambda page: (-counts[page], seen.index(page)))[:7])
    last = set(history[-1])
    return {
        "last_session": len(last & came) / len(last | came),
        "own_frequencies": len(most & came) / len(most | came),
    }


def scores_of(sessions: Iterable[dict[str, Any]], predictions: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The score of every pair of neighbouring sessions of a user, from the published records."""
    made = {prediction["session_id"]: prediction for prediction in predictions}
    by_place = {(session["user_id"], session["number"]): session for session in sessions}
    return [
        score_of(made[before["session_id"]], session)
        for (user, number), session in sorted(by_place.items())
        if (before := by_place.get((user, number - 1))) is not None and before["session_id"] in made
    ]


def log_loss(p: float, outcome: bool) -> float:
    """Negative log likelihood in nats, with p clipped at 1e-7 from both ends."""
    p = min(max(p, CLIP), 1 - CLIP)
    return -math.log(p if outcome else 1 - p)


def naive_channels(
    items: Iterable[str | None], clusters: Mapping[str, int], gamma: float, most: int, protect: bool = True
) -> list[tuple[str, int, float]]:
    """(item, cluster, weight) of the seed events after these items, heaviest first: one weight for every cluster.

    With more digits and a longer exponent than float64, so that nothing underflows within 100,000 events at e^-0.08.
    """
    weights = np.zeros(1 + max(clusters.values(), default=0), dtype=np.longdouble)
    newest: dict[int, tuple[int, str]] = {}
    for number, item in enumerate(items):
        if item is None or item not in clusters:
            continue
        weights *= np.longdouble(gamma)
        touched = clusters[item]
        weights[touched] += 1
        newest[touched] = number, item
        alive = [int(cluster) for cluster in np.flatnonzero(weights)]
        if len(alive) > most:
            others = [cluster for cluster in alive if not protect or cluster != touched]
            weights[min(others, key=lambda cluster: (weights[cluster], newest[cluster]))] = 0
    alive = sorted(np.flatnonzero(weights), key=lambda cluster: (weights[cluster], newest[cluster]), reverse=True)
    return [(newest[cluster][1], int(cluster), float(weights[cluster])) for cluster in alive]


def last_items(
    items: Sequence[str | None], clusters: Mapping[str, int], gamma: float, most: int
) -> list[tuple[str, int, float]]:
    """(item, cluster, weight) of the last known items, each once, the newest first; the weight says how old it is."""
    known = [item for item in items if item is not None and item in clusters][::-1]
    first = sorted((known.index(item), item) for item in set(known))[:most]
    return [(item, clusters[item], gamma**age) for age, item in first]


def seeds_of(
    sessions: Iterable[dict[str, Any]], clusters: Mapping[str, int], settings: Settings
) -> list[list[tuple[str, int, float]]]:
    """The seeds that each published session must carry; a user's sessions come in the order of their numbers."""
    seen: dict[str, list[str | None]] = defaultdict(list)
    found = []
    for session in sessions:
        if session["number"] == 1:  # a new visitor, or one who was forgotten
            seen[session["user_id"]] = []
        items = seen[session["user_id"]]
        items += session["items"] or []
        gamma, most = settings.seed_gamma, settings.seed_events
        if settings.seeds == "recency":
            found.append(last_items(items, clusters, gamma, most))
        else:
            found.append(naive_channels(items, clusters, gamma, most, settings.seed_protect))
    return found


def wrong_key(key: bytes | None) -> str | None:
    """The code of what is wrong with a key."""
    if key is None:
        return "null_key"
    return None if key and is_utf8(key) else "invalid_key"


def wrong_value(value: bytes) -> str | None:
    """The code of what is wrong with a value by itself."""
    if len(value) > MAX_BYTES:
        return "too_large"
    if not is_utf8(value):
        return "invalid_utf8"
    try:
        event = json.loads(value, parse_constant=_no_constants)
    except _NotANumber:
        return "not_a_number"
    except ValueError:
        return "invalid_json"
    if depth_of(event) > MAX_DEPTH:
        return "too_deep"
    if not isinstance(event, dict):
        return "wrong_type"
    if not {"user_id", "ts", "page"} <= event.keys():
        return "missing_field"
    if not isinstance(event["ts"], int):  # these tests write no ISO times
        return "invalid_timestamp" if isinstance(event["ts"], str) else "wrong_type"
    words = [event["user_id"], event["page"], *(event[name] for name in WORDS if event.get(name) is not None)]
    price = event.get("price")
    good = all(isinstance(word, str) for word in words) and (price is None or isinstance(price, int | float))
    return None if good else "wrong_type"


def depth_of(value: Any) -> int:
    """How deep a JSON value is nested."""
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max((depth_of(one) for one in value), default=0) if isinstance(value, list) else 0


def is_utf8(value: bytes) -> bool:
    """Whether the bytes are UTF-8."""
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


class _NotANumber(Exception):
    pass


def _no_constants(name: str) -> None:
    raise _NotANumber(name)
