"""The champion against the baselines, for as long as it is the champion."""

import math
from typing import Any

import msgspec
import numpy as np

from streams.wire import Score
from trainer.sequential import Detector
from trainer.trial import Rules

BASELINES = ("last_session", "own_frequencies")  # names in Score.baselines


class Reign(msgspec.Struct):
    """Whether a champion has fallen below the best baseline, by IoU.

    Each baseline has an e-process on its IoU less the champion's. Which baseline is best is not known before, and must
    not be chosen afterwards: the evidence is the average of both, itself an e-process, which costs log 2.
    """

    left_out: int = 0  # predicted by a fallback, not by the champion
    champion_total: float = 0.0  # IoU
    baseline_totals: dict[str, float] = msgspec.field(default_factory=lambda: dict.fromkeys(BASELINES, 0.0))
    detectors: dict[str, Detector] = msgspec.field(default_factory=lambda: {name: Detector() for name in BASELINES})
    fallen: bool = False

    def add(self, score: Score, rules: Rules) -> None:
        """Take in one session, one of an older worker without baselines aside. Who has fallen does not rise again."""
        if score.fallback is not None:
            self.left_out += 1
        elif score.baselines is not None:
            self.champion_total += score.iou
            for name, detector in self.detectors.items():
                self.baseline_totals[name] += score.baselines[name]
                detector.add(score.baselines[name] - score.iou)
            self.fallen = self.fallen or self.log_e >= math.log(1 / rules.fall_alpha)

    @property
    def sessions(self) -> int:
        """Sessions taken in."""
        return self.detectors[BASELINES[0]].count

    @property
    def log_e(self) -> float:
        """Log e-value against "the champion is never below a baseline"."""
        each = [detector.log_e for detector in self.detectors.values()]
        return float(np.logaddexp.reduce(each)) - math.log(len(each))

    def evidence(self, rules: Rules) -> dict[str, Any]:
        """What it rests on, as JSON values."""
        sessions = max(self.sessions, 1)
        return {
            "sessions": self.sessions,
            "left_out": {"fallback": self.left_out},
            "alpha": rules.fall_alpha,
            "log_e": self.log_e,
            "iou": self.champion_total / sessions,
            "baselines": {
                name: {"iou": total / sessions, "log_e_higher": self.detectors[name].log_e}
                for name, total in self.baseline_totals.items()
            },
        }
