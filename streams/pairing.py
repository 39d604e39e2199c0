"""Predictions meet sessions: one waits for the other, until it comes, is forgotten or expires."""

from collections.abc import Iterable
from typing import Any

import msgspec

from streams import wire
from streams.guesses import Guess, Outcome, guess_of, outcome_of, score
from streams.roles import Changes
from streams.settings import DAY_MS

CLOCK_KEY = b"\x00clock"
# Sessions of a partition come in the order of their ends, but for the pieces of over-long ones.
DISORDER_MS = 2 * DAY_MS


class Waiting(msgspec.Struct, array_like=True):
    """A visitor's predictions and sessions without their counterparts.

    A forgotten user is announced in both topics, each at its own place. The eras count these announcements, so that one
    read early in one topic does not take what comes after it in the other.
    """

    guesses: list[Guess] = []
    outcomes: list[Outcome] = []
    prediction_era: int = 0
    session_era: int = 0

    def is_empty(self) -> bool:
        """Whether the record can go."""
        return not self.guesses and not self.outcomes and self.prediction_era == self.session_era


class Clock(msgspec.Struct, array_like=True):
    """How far a partition's topics have been read, by the ends of their sessions, and the predictions that wait."""

    ends_ms: int = 0
    predicted_ms: int = 0
    waiting: int = 0


class Pairing:
    """Pairs predictions with sessions for one partition: pure but for the injected reader of state."""

    def __init__(self, expire_after_ms: int, read: Any, clock: Clock | None = None) -> None:
        self.expire_after_ms = expire_after_ms
        self.clock = clock or Clock()
        self.scores: list[tuple[bytes, wire.Score]] = []
        self.expired = 0  # predictions given up
        self.users: dict[bytes, Waiting] = {}
        self.dirty: dict[bytes, Waiting] = {}
        self._read = read

    def predicted(self, key: bytes, prediction: wire.Prediction) -> None:
        """A prediction was made: score it if its session is there already, else keep it."""
        self.clock.predicted_ms = max(self.clock.predicted_ms, prediction.session_end_ms)
        waiting = self._load(key)
        guess = guess_of(prediction, waiting.prediction_era)
        for outcome in waiting.outcomes:
            if outcome.previous_session_id == guess.session_id:
                waiting.outcomes.remove(outcome)
                self.scores.append((key, score(guess, outcome)))
                return
        waiting.guesses.append(guess)
        self.clock.waiting += 1

    def came(self, key: bytes, session: wire.Session) -> None:
        """A session closed: score the prediction made for it, or keep the session until that arrives."""
        self.clock.ends_ms = max(self.clock.ends_ms, session.end_ms)
        previous, previous_end_ms = session.context.previous_session_id, session.context.previous_end_ms
        if previous is None or previous_end_ms is None:
            return
        waiting = self._load(key)
        if session.end_ms - previous_end_ms > self.expire_after_ms:
            self._keep(waiting, [guess for guess in waiting.guesses if guess.session_id != previous], expired=True)
            return
        outcome = outcome_of(session, previous, previous_end_ms, waiting.session_era)
        for guess in waiting.guesses:
            if guess.session_id == previous:
                waiting.guesses.remove(guess)
                self.clock.waiting -= 1
                self.scores.append((key, score(guess, outcome)))
                return
        waiting.outcomes.append(outcome)

    def forget_prediction(self, key: bytes) -> None:
        """The user is forgotten, said the predictions: nothing read from them before counts any more."""
        waiting = self._load(key)
        waiting.prediction_era += 1
        self._drop_old(waiting, waiting.prediction_era)

    def forget_session(self, key: bytes) -> None:
        """The user is forgotten, said the sessions."""
        waiting = self._load(key)
        waiting.session_era += 1
        self._drop_old(waiting, waiting.session_era)

    def _keep(self, waiting: Waiting, guesses: list[Guess], expired: bool) -> None:
        gone = len(waiting.guesses) - len(guesses)
        self.clock.waiting -= gone
        self.expired += gone * expired
        waiting.guesses = guesses

    def _drop_old(self, waiting: Waiting, era: int) -> None:
        self._keep(waiting, [guess for guess in waiting.guesses if guess.era >= era], expired=False)
        waiting.outcomes = [outcome for outcome in waiting.outcomes if outcome.era >= era]

    def expire(self, records: Iterable[tuple[bytes, bytes]]) -> None:
        """Drop what waits in vain: predictions whose session did not come in time (counted), sessions unpredicted."""
        oldest = self.clock.ends_ms - self.expire_after_ms - DISORDER_MS
        oldest_previous = self.clock.predicted_ms - DISORDER_MS
        for key, record in records:
            if key.startswith(b"\0") or key in self.dirty:
                continue
            waiting = self.users[key] if key in self.users else msgspec.msgpack.decode(record, type=Waiting)
            guesses = [guess for guess in waiting.guesses if guess.session_end_ms >= oldest]
            outcomes = [outcome for outcome in waiting.outcomes if outcome.previous_end_ms >= oldest_previous]
            if len(guesses) + len(outcomes) < len(waiting.guesses) + len(waiting.outcomes):
                self._keep(waiting, guesses, expired=True)
                waiting.outcomes = outcomes
                self.users[key] = self.dirty[key] = waiting

    def _load(self, key: bytes) -> Waiting:
        waiting = self.users.get(key)
        if waiting is None:
            record = self._read(key)
            waiting = self.users[key] = Waiting() if record is None else msgspec.msgpack.decode(record, type=Waiting)
        self.dirty[key] = waiting
        return waiting

    def changes(self) -> Changes:
        """Every record that changed since the last call; None: it is gone."""
        dirty, self.dirty = self.dirty, {}
        changes: Changes = [(key, None if w.is_empty() else msgspec.msgpack.encode(w)) for key, w in dirty.items()]
        changes.append((CLOCK_KEY, msgspec.msgpack.encode(self.clock)))
        return changes

    def evict(self) -> None:
        """What is written may leave memory."""
        self.users = dict(self.dirty)
