"""The role `judge`: reads the scores, and promotes, retires and rolls back by what they show.

Evidence and the positions it was read up to are one file that is replaced in one step, so a judge that is killed at any
time goes on as if nothing had happened: each score counts once, and verdicts are reached score by score, wherever a
batch ends. A verdict moves the aliases only if they still name the pair that was judged; one that was carried out
before the judge died is seen in the story of the aliases. A new pair begins without evidence, whoever set it up.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event

import msgspec
import structlog

from models.manifest import BundleRefused
from streams.wire import CHALLENGER, CHAMPION, ModelDecision, Record, Score
from trainer import decisions
from trainer.decisions import Grounds, InService
from trainer.drift import Window
from trainer.errors import TrainingError
from trainer.feeds import Feed
from trainer.judgestate import load_state, save_state
from trainer.registry import Aliases, Registry
from trainer.reign import Reign
from trainer.trainermetrics import TrainerMetrics
from trainer.trial import Rules, Trial, Verdict

JUDGE = "judge"
POLL_RECORDS = 5_000
POLL_S = 0.5
LOOK_S = 5.0  # between two looks at the aliases
RETRY_S = 600.0  # a decision that could not be carried out is tried again after this

log = structlog.get_logger(__name__)
_decode_score = msgspec.json.Decoder(Score).decode


class Judge:
    """Judges the pair that the aliases name. `path`: the file of its evidence, which no other process writes."""

    def __init__(
        self, path: Path, feed: Feed, aliases: Aliases, registry: Registry, metrics: TrainerMetrics, rules: Rules
    ) -> None:
        self._path, self._feed, self._aliases, self._registry = path, feed, aliases, registry
        self._metrics, self._rules = metrics, rules
        self._state = load_state(path, feed.topic)
        self._seen = InService(None, None)
        self._failed: tuple[InService, str] | None = None  # what could not be carried out, and of whom
        self._next_try = 0.0  # of that

    def run(self, stop: Event) -> None:
        """Until `stop`."""
        self._feed.assign(self._state.positions)
        next_look = 0.0
        while not stop.is_set():
            self._read()
            if time.monotonic() >= next_look:
                self.settle()
                next_look = time.monotonic() + LOOK_S

    def catch_up(self) -> None:
        """Up to where the topic ends now, and do what that shows."""
        self._feed.assign(self._state.positions)
        ends = self._feed.ends()
        while any(self._feed.reached()[partition] < end for partition, end in ends.items()):
            self._read()
        self.settle()

    def settle(self) -> None:
        """Look at what the aliases name, drop the evidence of all others, and carry out what is due."""
        self._seen = decisions.in_service(self._aliases.story())
        if self._state.keep(self._seen):  # and so it stays, whatever ends us
            save_state(self._path, self._state)
        due = self._due()
        if due is not None and (self._failed != (self._seen, due) or time.monotonic() >= self._next_try):
            try:
                for decision in self._carry_out():
                    self._metrics.decisions.labels(decision.decision).inc()
                    log.info("decided", decision=decision.decision, version=decision.version, reason=decision.reason)
            except TrainingError as error:
                self._failed, self._next_try = (self._seen, due), time.monotonic() + RETRY_S
                log.error("a decision cannot be carried out: the models stay as they are", error=str(error))
        self._show()

    def window(self) -> Window | None:
        """The champion's last full window of scores, for the drift; None before there is one."""
        windows = self._state.windows.get(self._seen.champion or "")
        return None if windows is None else windows.full

    def _read(self) -> None:
        records = self._feed.poll(POLL_RECORDS, POLL_S)
        if not records:
            return
        for record in records:
            self._take(record)
            self._state.positions[record.partition] = record.offset + 1
        save_state(self._path, self._state)
        self._feed.commit(self._state.positions)
        self._show()

    def _take(self, record: Record) -> None:
        if record.value is None:
            self._state.forget((record.key or b"").decode(errors="replace"))
            return
        try:
            score = _decode_score(record.value)
        except msgspec.MsgspecError as error:
            place = {"partition": record.partition, "offset": record.offset}
            log.warning("a score cannot be read and is left out", error=str(error), **place)
            return
        self._metrics.judged_scores.inc()
        self._state.add(score, self._rules)

    def _due(self) -> str | None:
        """Whose evidence asks for a decision: the challenger first, who may succeed a champion that has fallen."""
        trial, reign = self._state.trial(self._seen), self._state.reigns.get(self._seen.champion or "")
        if trial is not None and trial.verdict is not None:
            return CHALLENGER
        return CHAMPION if reign is not None and reign.fallen else None

    def _carry_out(self) -> Sequence[ModelDecision]:
        """What the evidence asks for."""
        trial, seen = self._state.trial(self._seen), self._seen
        if trial is not None and trial.verdict is not None:
            return self._conclude(trial, trial.verdict)
        evidence = self._state.reigns[seen.champion or ""].evidence(self._rules)
        grounds = Grounds(JUDGE, "its IoU is below that of the best baseline", evidence)
        return decisions.roll_back(self._registry, self._aliases, seen, grounds)

    def _conclude(self, trial: Trial, verdict: Verdict) -> Sequence[ModelDecision]:
        seen, grounds = self._seen, Grounds(JUDGE, verdict.reason, trial.evidence(self._rules))
        if verdict.decision == "promoted" and seen.challenger is not None:
            try:
                return decisions.promote(self._registry, self._aliases, seen.challenger, seen, grounds)
            except BundleRefused as error:
                grounds = grounds._replace(reason=f"it has won, but cannot serve any more ({error})")
        return decisions.retire(self._aliases, seen, grounds)

    def _show(self) -> None:
        metrics, trial = self._metrics, self._state.trial(self._seen) or Trial()
        reign = self._state.reigns.get(self._seen.champion or "") or Reign()
        metrics.challenger_sessions.set(trial.iou.sums.count)
        for measure, difference in (("iou", trial.iou), ("cart_brier", trial.cart), ("purchase_brier", trial.purchase)):
            metrics.challenger_difference.labels(measure).set(difference.sums.mean)
        for claim, log_e in trial.log_e(self._rules).items():
            metrics.challenger_evidence.labels(claim).set(log_e)
        metrics.fall_evidence.set(reign.log_e)
        metrics.below_baseline.set(reign.fallen)
