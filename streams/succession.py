"""Who predicts, from when on, and how well: the topics `models`, `predictions` and `scores` seen together."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from streams.aliases import Story
from streams.wire import CHALLENGER, CHAMPION, ModelDecision, Prediction, Score


@dataclass(slots=True)
class Reign:
    """What one model has predicted; sums over its scored predictions."""

    version: str
    first_ms: int  # end of the first session whose successor it predicted, as far as was seen
    scores: int = 0
    hits: int = 0
    iou: float = 0.0
    compared: int = 0  # of the scores, those that tell what the baseline would have had
    baseline_iou: float = 0.0  # "the pages this visitor sees most"

    def add(self, score: Score) -> None:
        """Take one score in."""
        self.scores += 1
        self.hits += score.hr
        self.iou += score.iou
        if score.baselines is not None:
            self.compared += 1
            self.baseline_iou += score.baselines["own_frequencies"]


@dataclass(slots=True)
class Succession:
    """Feed it the three topics, in any order between them; `tell` gets a line for every decision and every swap."""

    tell: Callable[[str], None]
    story: Story = field(default_factory=Story)
    reigns: dict[str, Reign] = field(default_factory=dict)  # by digest, in the order in which they were seen
    scores: int = 0  # of whichever model
    _untold: list[str] = field(default_factory=list)  # digests that predict, by a decision that was not seen yet

    def record(self, key: bytes, value: bytes | None) -> None:
        """A record of the topic `models` came."""
        before = len(self.story.decisions)
        self.story.take(key, value)
        for decision in self.story.decisions[before:]:
            self.tell(told(decision))
        self._tell_swaps()

    def predicted(self, prediction: Prediction) -> None:
        """A prediction came."""
        digest = prediction.model_digest
        if prediction.fallback is not None:
            return
        if digest not in self.reigns:
            self.reigns[digest] = Reign(prediction.model_version, prediction.session_end_ms)
            if len(self.reigns) > 1:
                self._untold.append(digest)
                self._tell_swaps()
        reign = self.reigns[digest]
        reign.first_ms = min(reign.first_ms, prediction.session_end_ms)

    def scored(self, score: Score) -> None:
        """A score came."""
        self.scores += 1
        reign = self.reigns.get(score.model_digest or "")
        if reign is not None and score.fallback is None:
            reign.add(score)

    @property
    def on_trial(self) -> bool:
        """Whether a challenger stands beside the champion, by the decisions: the alias itself may come later."""
        moves = [one.aliases[CHALLENGER] for one in self.story.decisions if CHALLENGER in one.aliases]
        return bool(moves) and moves[-1] is not None

    @property
    def promoted(self) -> bool:
        """Whether a challenger has become the champion."""
        return any(decision.decision == "promoted" for decision in self.story.decisions)

    def decided_by(self, by: str) -> bool:
        """Whether the trainer, say, has decided anything."""
        return any(decision.by == by for decision in self.story.decisions)

    def _tell_swaps(self) -> None:
        """Of the models whose decision is known: a prediction may be read before what made its model the champion."""
        decided = {decision.aliases.get(CHAMPION) for decision in self.story.decisions}
        for digest in [one for one in self._untold if one in decided]:
            self._untold.remove(digest)
            self.tell(self._swap(digest))

    def _swap(self, digest: str) -> str:
        reign = self.reigns[digest]
        since = (
            f"another champion serves: {reign.version} predicts since the session that ended {moment(reign.first_ms)}"
        )
        changes = [evidence(one.evidence) for one in self.story.decisions if one.digest == digest]
        return "; ".join([since, *changes[-1:]])


def told(decision: ModelDecision) -> str:
    """A decision in one line."""
    named = ", ".join(alias for alias, digest in decision.aliases.items() if digest == decision.digest)
    what = decision.decision.replace("_", " ")
    return f"the {decision.by}: {what} {decision.version}{f' as {named}' if named else ''}: {decision.reason}"


def evidence(found: dict[str, Any]) -> str:
    """What a promotion changes by the judge's evidence, in words."""
    iou = found.get("iou")
    if not isinstance(iou, dict):
        return "nobody has compared it yet"
    sessions = f"the {found['sessions']:,} sessions that both predicted"
    return f"IoU {iou['champion']:.3f} -> {iou['challenger']:.3f} on {sessions}"


def moment(ms: int) -> str:
    """Event time in words, UTC."""
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%d %b, %H:%M")
