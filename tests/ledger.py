"""What really came out, read committed, against what must come out: in both directions, by content, repeats counted.

Nothing here removes a repeat. `verdict` names every difference; an empty verdict is the proof.
"""

import base64
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from confluent_kafka import Consumer, Message, TopicPartition

from streams import wire
from streams.clients import librdkafka
from streams.settings import Settings
from tests.oracle import Cut, Expected, Record, scores_of
from tests.traffic import Sent

OUTPUTS = (wire.SESSIONS, wire.PREDICTIONS, wire.SCORES, wire.LATE, wire.REJECTED)
RELATIVE_TOLERANCE = 1e-9


class Reader:
    """A consumer of whole topics from their beginning, read committed; it belongs to no group that matters."""

    def __init__(self, settings: Settings, topics: Iterable[str]) -> None:
        """Assign all partitions of `topics` (names as in `wire`), at offset 0."""
        options = {
            "group.id": f"{settings.topic_prefix}ledger",
            "isolation.level": "read_committed",
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            "topic.metadata.refresh.interval.ms": 2_000,
            "log_level": 0,
        }
        self._prefix = len(settings.topic_prefix)
        self._consumer = Consumer(librdkafka(settings) | options)
        names = [settings.topic(name) for name in topics]
        self._consumer.assign([TopicPartition(name, n, 0) for name in names for n in range(settings.partitions)])

    def read(self, seconds: float) -> list[tuple[str, Message]]:
        """Records that arrive within `seconds`, with their topic's name as in `wire`."""
        found = [message for message in self._consumer.consume(10_000, seconds) if message.error() is None]
        return [(str(message.topic())[self._prefix :], message) for message in found]

    def close(self) -> None:
        """Leave."""
        self._consumer.close()


@dataclass
class Ledger:
    """All published records of a deployment, as they are."""

    settings: Settings
    sessions: list[dict[str, Any]] = field(default_factory=list)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    late: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    misplaced: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = Reader(self.settings, OUTPUTS)
        self._of = {
            wire.SESSIONS: self.sessions,
            wire.PREDICTIONS: self.predictions,
            wire.SCORES: self.scores,
            wire.LATE: self.late,
            wire.REJECTED: self.rejected,
        }

    def read(self, seconds: float) -> int:
        """Take in what arrives within `seconds`; returns how much that was."""
        found = self._reader.read(seconds)
        for name, message in found:
            value = message.value()
            if value is None:
                continue
            record = json.loads(value)
            self._of[name].append(record)
            if name not in (wire.REJECTED, wire.LATE) and message.key() != record["user_id"].encode():
                self.misplaced.append(f"{name} of {record['user_id']} has key {message.key()!r}")
        return len(found)

    def read_until(
        self, complete: Callable[[], bool], tick: Callable[[], None], patience_s: float = 60, linger_s: float = 2
    ) -> None:
        """Read until `complete`, or until nothing came for `patience_s`; then a little longer, for repeats."""
        last = time.monotonic()
        while not complete() and time.monotonic() - last < patience_s:
            tick()
            if self.read(0.3):
                last = time.monotonic()
        end = time.monotonic() + linger_s
        while time.monotonic() < end:
            self.read(0.3)

    def close(self) -> None:
        """Leave."""
        self._reader.close()


def read_clicks(settings: Settings, count: int, seconds: float = 60) -> list[Record]:
    """The first `count` records of `clicks` over all partitions, in order within each. Raises if they do not come."""
    reader = Reader(settings, [wire.CLICKS])
    log: list[Record] = []
    deadline = time.monotonic() + seconds
    while len(log) < count:
        assert time.monotonic() < deadline, f"only {len(log)} of {count} acknowledged clicks can be read"
        for _, message in reader.read(1.0):
            partition, offset = message.partition(), message.offset()
            assert partition is not None and offset is not None
            log.append(
                Record(partition, offset, message.timestamp()[1], _bytes(message.key()), _bytes(message.value()))
            )
    reader.close()
    return log


def log_faults(log: Sequence[Record], manifest: dict[tuple[int, int], Sent]) -> list[str]:
    """What the broker has against what it acknowledged: a difference makes the test void, not the worker wrong."""
    there = {(record.partition, record.offset): (record.key, record.value) for record in log}
    wanted = {place: (sent.key, sent.value) for place, sent in manifest.items()}
    return [f"clicks {place}: {'lost' if place in wanted else 'not sent'}" for place in there.keys() ^ wanted.keys()]


def verdict(expected: Expected, ledger: Ledger, log: Sequence[Record], predicted: bool = True) -> list[str]:
    """Every difference, in words; empty when every record that must be there is there, right, and once."""
    found = list(ledger.misplaced)
    found += _differences("session", expected.sessions, [cut_of(session) for session in ledger.sessions])
    found += _repeats("session_id", (session["session_id"] for session in ledger.sessions))
    found += _differences("items of session", map(_frozen, expected.touched), map(touched_of, ledger.sessions))
    came_late = [(late["event"]["user_id"], late["event"]["ts"], late["late_by_ms"]) for late in ledger.late]
    found += _differences("late event", expected.late, came_late)
    found += _rejected_faults(expected, ledger, log)
    if predicted:
        found += _prediction_faults(ledger)
        found += _score_faults(ledger)
    return found


def cut_of(session: dict[str, Any]) -> Cut:
    """A published session in the oracle's form."""
    return Cut(
        session["user_id"],
        session["number"],
        session["start_ms"],
        session["end_ms"],
        tuple(session["pages"]),
        tuple(session["page_ts_ms"]),
        session["cart"],
        session["purchase"],
    )


def touched_of(session: dict[str, Any]) -> tuple[Any, ...]:
    """The items that a published session carries in its context, in the oracle's form."""
    context = session["context"]
    told = (session["user_id"], session["number"], session["start_ms"])
    return _frozen((*told, context["recent_items"], context["bought_items"]))


def _frozen(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(tuple(value) if isinstance(value, list) else value for value in values)


def _differences(what: str, wanted: Iterable[Any], came: Iterable[Any]) -> list[str]:
    """Missing, and extra or repeated, by content and number."""
    want, have = Counter(list(wanted)), Counter(list(came))  # of lists: a Counter takes the values of a dict for counts
    missing = [f"{what} missing {times}x: {one}" for one, times in (want - have).items()]
    return missing + [f"{what} extra {times}x: {one}" for one, times in (have - want).items()]


def _repeats(what: str, ids: Iterable[str]) -> list[str]:
    return [f"{what} {one} is there {times} times" for one, times in Counter(ids).items() if times > 1]


def _rejected_faults(expected: Expected, ledger: Ledger, log: Sequence[Record]) -> list[str]:
    wanted = [(*place, reason) for place, reason in expected.reasons.items()]
    came = [(one["partition"], one["offset"], one["reason"]) for one in ledger.rejected]
    found = _differences("rejected event", wanted, came)
    values = {(record.partition, record.offset): record for record in log}
    for one in ledger.rejected:
        record = values.get((one["partition"], one["offset"]))
        if record is not None and (_decoded(one["original"]), _decoded(one["original_key"])) != (
            record.value,
            record.key,
        ):
            found.append(f"rejected event {one['partition']}/{one['offset']} does not carry its original")
        if not one["message"] or not one["stage"]:
            found.append(f"rejected event {one['partition']}/{one['offset']} does not say what is wrong")
    return found


def _prediction_faults(ledger: Ledger) -> list[str]:
    sessions = {session["session_id"]: session for session in ledger.sessions}
    users = {session_id: session["user_id"] for session_id, session in sessions.items()}
    made = [prediction["session_id"] for prediction in ledger.predictions]
    found = _differences("prediction for session", users, made)
    found += _repeats("prediction_id", (prediction["prediction_id"] for prediction in ledger.predictions))
    for one in ledger.predictions:
        if not _is_sound(one) or users.get(one["session_id"]) != one["user_id"]:
            found.append(f"prediction {one['prediction_id']} is wrong: {one}")
        if not _has_sound_items(one, sessions.get(one["session_id"])):
            found.append(f"the items of prediction {one['prediction_id']} are wrong: {one['items']}")
        shadow = one["shadow"]
        if shadow is not None and (not _is_sound(shadow) or shadow["model_digest"] == one["model_digest"]):
            found.append(f"the shadow of prediction {one['prediction_id']} is wrong: {shadow}")
    shadows = [one["shadow"]["prediction_id"] for one in ledger.predictions if one["shadow"] is not None]
    return found + _repeats("prediction_id of a shadow", shadows)


def _is_sound(prediction: dict[str, Any]) -> bool:
    chances = [page["p"] for page in prediction["pages"]] + [prediction["cart"], prediction["purchase"]]
    return all(0 <= p <= 1 for p in chances)


def _has_sound_items(prediction: dict[str, Any], session: dict[str, Any] | None) -> bool:
    """Each once, the best first, none that was touched or bought, and each by a seed or by none."""
    items = prediction["items"]
    if items is None or session is None:
        return True
    context, ids = session["context"], [item["item_id"] for item in items]
    touched = {*(session["items"] or ()), *context["recent_items"], *context["bought_items"]}
    scores = [item["score"] for item in items]
    seeds = {None, *context["recent_items"], *(seed["item_id"] for seed in context["seeds"] or ())}
    return (
        len(set(ids)) == len(ids)
        and not touched & set(ids)
        and scores == sorted(scores, reverse=True)
        and {item["seed"] for item in items} <= seeds
    )


def _score_faults(ledger: Ledger) -> list[str]:
    wanted = {(one["prediction_id"], one["session_id"]): one for one in scores_of(ledger.sessions, ledger.predictions)}
    came = [(one["prediction_id"], one["session_id"]) for one in ledger.scores]
    found = _differences("score", wanted, came)
    for one in ledger.scores:
        want = wanted.get((one["prediction_id"], one["session_id"]), one)
        found += [
            f"score {one['prediction_id']}: {name} {one[name]} not {want[name]}"
            for name in want
            if not _same(one[name], want[name])
        ]
    return found


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    if isinstance(one, float) or isinstance(other, float):
        return math.isclose(one, other, rel_tol=RELATIVE_TOLERANCE, abs_tol=RELATIVE_TOLERANCE)
    return bool(one == other)


def _decoded(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)


def _bytes(value: str | bytes | None) -> bytes | None:
    return value.encode() if isinstance(value, str) else value
