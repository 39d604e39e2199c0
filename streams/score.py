"""The role `score`: a visitor's next session meets the prediction made for it, whichever of the two is read first."""

import time
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from aiokafka import ConsumerRecord

from models.metrics import hr, ioa, iop, iou, log_loss
from streams import wire
from streams.metrics import Metrics
from streams.roles import Changes, Output, refused
from streams.settings import DAY_MS, Settings
from streams.store import Store

CLOCK_KEY = b"\x00clock"
# Sessions of a partition come in the order of their ends, but for the pieces of over-long ones.
DISORDER_MS = 2 * DAY_MS
SWEEP_RECORDS = 500
SWEEP_SECONDS = 5.0

_encode = msgspec.json.Encoder().encode
_decode_prediction = msgspec.json.Decoder(wire.Prediction).decode
_decode_session = msgspec.json.Decoder(wire.Session).decode


class Guess(msgspec.Struct, array_like=True, gc=False):
    """What is kept of a prediction until its session comes."""

    session_id: str  # the session that closed when it was made
    prediction_id: str
    pages: list[str]
    cart: float
    purchase: float
    model_version: str
    session_end_ms: int
    era: int


class Outcome(msgspec.Struct, array_like=True, gc=False):
    """What is kept of a session until the prediction made for it comes."""

    previous_session_id: str
    previous_end_ms: int
    session_id: str
    user_id: str
    pages: list[str]
    cart: bool
    purchase: bool
    era: int


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


class Pairing:
    """Pairs predictions with sessions for one partition: pure but for the injected reader of state."""

    def __init__(self, expire_after_ms: int, read: Any, clock: tuple[int, int] = (0, 0)) -> None:
        self.expire_after_ms = expire_after_ms
        self.clock_ms, self.predicted_ms = clock  # how far each topic has been read, by the ends of its sessions
        self.scores: list[tuple[bytes, wire.Score]] = []
        self.expired = self.waiting = 0  # predictions: given up, and kept for their session
        self.users: dict[bytes, Waiting] = {}
        self.dirty: dict[bytes, Waiting] = {}
        self._read = read

    def predicted(self, key: bytes, prediction: wire.Prediction) -> None:
        """A prediction was made: score it if its session is there already, else keep it."""
        self.predicted_ms = max(self.predicted_ms, prediction.session_end_ms)
        waiting = self._load(key)
        pages = [page.page for page in prediction.pages]
        guess = Guess(
            prediction.session_id, prediction.prediction_id, pages, prediction.cart, prediction.purchase,
            prediction.model_version, prediction.session_end_ms, waiting.prediction_era,
        )  # fmt: skip
        for outcome in waiting.outcomes:
            if outcome.previous_session_id == guess.session_id:
                waiting.outcomes.remove(outcome)
                self.scores.append((key, score(guess, outcome)))
                return
        waiting.guesses.append(guess)
        self.waiting += 1

    def came(self, key: bytes, session: wire.Session) -> None:
        """A session closed: score the prediction made for it, or keep the session until that arrives."""
        self.clock_ms = max(self.clock_ms, session.end_ms)
        previous, previous_end_ms = session.context.previous_session_id, session.context.previous_end_ms
        if previous is None or previous_end_ms is None:
            return
        waiting = self._load(key)
        if session.end_ms - previous_end_ms > self.expire_after_ms:
            self._keep(waiting, [guess for guess in waiting.guesses if guess.session_id != previous], expired=True)
            return
        outcome = Outcome(
            previous, previous_end_ms, session.session_id, session.user_id, session.pages, session.cart,
            session.purchase, waiting.session_era,
        )  # fmt: skip
        for guess in waiting.guesses:
            if guess.session_id == previous:
                waiting.guesses.remove(guess)
                self.waiting -= 1
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
        self.waiting -= gone
        self.expired += gone * expired
        waiting.guesses = guesses

    def _drop_old(self, waiting: Waiting, era: int) -> None:
        self._keep(waiting, [guess for guess in waiting.guesses if guess.era >= era], expired=False)
        waiting.outcomes = [outcome for outcome in waiting.outcomes if outcome.era >= era]

    def expire(self, records: Iterable[tuple[bytes, bytes]]) -> None:
        """Drop what waits in vain: predictions whose session did not come in time (counted), sessions unpredicted."""
        oldest, oldest_previous = self.clock_ms - self.expire_after_ms - DISORDER_MS, self.predicted_ms - DISORDER_MS
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
        changes.append((CLOCK_KEY, msgspec.msgpack.encode((self.clock_ms, self.predicted_ms))))
        return changes

    def evict(self) -> None:
        """What is written may leave memory."""
        self.users = dict(self.dirty)


def score(guess: Guess, outcome: Outcome) -> wire.Score:
    """How right the prediction was, by sets of pages and log losses clipped at 1e-7 (HeTLM, section 1.7)."""
    actual, predicted = outcome.pages, guess.pages
    return wire.Score(
        prediction_id=guess.prediction_id,
        session_id=outcome.session_id,
        user_id=outcome.user_id,
        hr=hr(actual, predicted),
        ioa=ioa(actual, predicted),
        iop=iop(actual, predicted),
        iou=iou(actual, predicted),
        cart=outcome.cart,
        cart_p=guess.cart,
        cart_log_loss=log_loss(guess.cart, outcome.cart),
        purchase=outcome.purchase,
        purchase_p=guess.purchase,
        purchase_log_loss=log_loss(guess.purchase, outcome.purchase),
        model_version=guess.model_version,
    )


class ScoreShard:
    """One partition of predictions and sessions."""

    def __init__(self, role: "Scoring", store: Store, records: Iterable[tuple[bytes, bytes]]) -> None:
        clock = store.get(CLOCK_KEY)
        known = msgspec.msgpack.decode(clock, type=tuple[int, int]) if clock else (0, 0)
        self.pairing = Pairing(role.settings.expire_after_ms, store.get, known)
        for key, record in records:
            if not key.startswith(b"\0"):
                self.pairing.waiting += len(msgspec.msgpack.decode(record, type=Waiting).guesses)
        self._role, self._store = role, store
        self._outputs: list[Output] = []
        self._sweep_key: bytes | None = None
        self._swept = time.monotonic()

    def apply(self, topic: str, records: Iterable[ConsumerRecord]) -> None:
        """Pair what came."""
        pairing = self.pairing
        for record in records:
            try:
                self._take_in(topic == wire.SESSIONS, record.key or b"", record.value)
            except msgspec.MsgspecError as error:
                self._outputs.append(refused(record, "score", str(error)))
        now = int(time.time() * 1000)
        for key, scored in pairing.scores:
            self._outputs.append(Output(wire.SCORES, key, _encode(scored), now))
            self._role.count(scored)
        pairing.scores.clear()

    def _take_in(self, is_session: bool, key: bytes, value: bytes | None) -> None:
        pairing = self.pairing
        if is_session:
            pairing.forget_session(key) if value is None else pairing.came(key, _decode_session(value))
        else:
            pairing.forget_prediction(key) if value is None else pairing.predicted(key, _decode_prediction(value))

    def take(self) -> tuple[list[Output], Changes]:
        """The scores since the last call, and who waits for what."""
        outputs, self._outputs = self._outputs, []
        return outputs, self.pairing.changes()

    def urgent(self) -> bool:
        """A score should not wait."""
        return bool(self._outputs)

    def written(self) -> None:
        """Memory may let go."""
        self.pairing.evict()

    def tick(self, quiet_ms: int | None) -> None:
        """Now and then look for predictions that wait in vain."""
        if time.monotonic() - self._swept < SWEEP_SECONDS:
            return
        self._swept = time.monotonic()
        records = self._store.items_after(self._sweep_key, SWEEP_RECORDS)
        self._sweep_key = records[-1][0] if records else None
        self.pairing.expire(records)


class Scoring:
    """Scores predictions when the visitor's next session closes."""

    name = "score"
    is_slow = False
    inputs = (wire.SESSIONS, wire.PREDICTIONS)
    batch_records = 2_000
    batch_ms = 0

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self._metrics = settings, metrics

    def open(self, partition: int, store: Store, records: Iterable[tuple[bytes, bytes]]) -> ScoreShard:
        """Take up a partition from its restored state; its records are read again when they are needed."""
        return ScoreShard(self, store, records)

    async def work(self, batch: Sequence[tuple[ScoreShard, str, list[ConsumerRecord]]]) -> None:
        """Pair what came, per partition."""
        for shard, topic, records in batch:
            shard.apply(topic, records)

    def count(self, scored: wire.Score) -> None:
        """Show a score as metrics."""
        self._metrics.scored(scored.model_version, scored.hr, scored.cart_log_loss, scored.purchase_log_loss)

    def report(self, partition: int, shard: ScoreShard) -> None:
        """Show the shard's figures as metrics."""
        self._metrics.predictions_expired.inc(shard.pairing.expired)
        shard.pairing.expired = 0
        self._metrics.waiting_predictions.labels(partition).set(shard.pairing.waiting)
