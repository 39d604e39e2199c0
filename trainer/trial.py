"""A challenger's trial: against the champion on the same sessions, each predicted before it came."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from streams.wire import Score, ShadowScore
from trainer.errors import TrainingError
from trainer.sequential import Sums, log_e
from trainer.visitors import pseudonym

CLAIMS = ("iou higher", "cart worse", "purchase worse", "iou lower", "cart harmless", "purchase harmless")


@dataclass(frozen=True)
class Rules:
    """When a challenger wins or goes, and when a champion falls.

    A challenger is promoted when its IoU is shown to be higher and both Brier scores to be worse by less than
    `brier_margin`. All three must be shown, each at `alpha`, so one that is not better or does harm is promoted with a
    probability of at most `alpha`, however often one looks. It is retired when its IoU is shown to be lower or a Brier
    score to be worse by more than the margin: three tests at `alpha` / 3, so a better and harmless one goes for that
    with a probability of at most `alpha`; and when `most_sessions` have not shown enough. A champion falls when a
    baseline's IoU is shown to be higher; one that is never below a baseline falls, as long as it reigns, with a
    probability of at most `fall_alpha`.
    """

    alpha: float = 0.05
    brier_margin: float = 0.01
    most_sessions: int = 20_000
    visitor_sessions: int = 20  # later ones of a visitor do not count, so that nobody decides alone
    fall_alpha: float = 0.01

    def __post_init__(self) -> None:
        """Raises TrainingError for a value that cannot work."""
        for name in ("alpha", "brier_margin", "fall_alpha"):
            if not 0 < getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}, but must lie between 0 and 1.")
        for name in ("most_sessions", "visitor_sessions"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}, but must be at least 1.")


class Verdict(msgspec.Struct, frozen=True):
    """What is to happen to the challenger, and why."""

    decision: Literal["promoted", "retired"]
    reason: str


class Difference(msgspec.Struct):
    """A measure of both, over the same sessions; differences are the challenger's less the champion's."""

    champion: float = 0.0  # total
    sums: Sums = msgspec.field(default_factory=Sums)

    def add(self, champion: float, challenger: float) -> None:
        """Take in one session; the measure lies in [0, 1]."""
        self.champion += champion
        self.sums.add(challenger - champion)

    def figures(self, alpha: float) -> dict[str, float]:
        """Means, and the confidence sequence of the difference at level 1 - alpha."""
        champion, (low, high) = self.champion / max(self.sums.count, 1), self.sums.interval(alpha)
        difference = self.sums.mean
        return {"champion": champion, "challenger": champion + difference, "difference": difference, "low": low,
                "high": high}  # fmt: skip


class Trial(msgspec.Struct):
    """The evidence for and against one challenger of one champion. It ends with the first verdict."""

    iou: Difference = msgspec.field(default_factory=Difference)
    cart: Difference = msgspec.field(default_factory=Difference)  # Brier scores (p - y)^2
    purchase: Difference = msgspec.field(default_factory=Difference)
    visitors: dict[str, int] = {}  # by pseudonym: sessions that counted
    left_out: dict[str, int] = {}  # by reason: sessions
    verdict: Verdict | None = None

    def add(self, score: Score, shadow: ShadowScore, rules: Rules) -> None:
        """Take in one session, and come to a verdict if it is time. After that nothing is taken in any more."""
        if self.verdict is not None:
            return
        visitor = pseudonym(score.user_id)
        counted = self.visitors.get(visitor, 0)
        if score.fallback is not None:
            self._leave_out("a fallback predicted it, not the champion")
        elif counted >= rules.visitor_sessions:
            self._leave_out("the visitor had as many before as count")
        else:
            self.visitors[visitor] = counted + 1
            self.iou.add(score.iou, shadow.iou)
            self.cart.add((score.cart_p - score.cart) ** 2, (shadow.cart_p - score.cart) ** 2)
            self.purchase.add((score.purchase_p - score.purchase) ** 2, (shadow.purchase_p - score.purchase) ** 2)
            self.verdict = self._judge(rules)

    def evidence(self, rules: Rules) -> dict[str, Any]:
        """All that a verdict rests on, as JSON values; log e-values in nats."""
        figures: dict[str, Any] = {
            "iou": self.iou.figures(rules.alpha),
            "cart_brier": self.cart.figures(rules.alpha),
            "purchase_brier": self.purchase.figures(rules.alpha),
        }
        return figures | {
            "sessions": self.iou.sums.count,
            "visitors": len(self.visitors),
            "left_out": dict(self.left_out),
            "alpha": rules.alpha,
            "brier_margin": rules.brier_margin,
            "log_e": self.log_e(rules),
        }

    def log_e(self, rules: Rules) -> dict[str, float]:
        """Log e-value for each claim."""
        above, below = [], []
        for difference, m in ((self.iou, 0.0), (self.cart, rules.brier_margin), (self.purchase, rules.brier_margin)):
            above.append(difference.sums.total - difference.sums.count * m)
            below.append(-above[-1])
        squares = [difference.sums.squares for difference in (self.iou, self.cart, self.purchase)]
        found = log_e([*above, *below], [*squares, *squares]).tolist()
        return dict(zip(CLAIMS, found, strict=True))

    def _leave_out(self, why: str) -> None:
        self.left_out[why] = self.left_out.get(why, 0) + 1

    def _judge(self, rules: Rules) -> Verdict | None:
        shown = self.log_e(rules)
        promote, retire = math.log(1 / rules.alpha), math.log(3 / rules.alpha)
        if shown["iou lower"] >= retire:
            return Verdict("retired", "its IoU is lower than the champion's")
        for outcome in ("cart", "purchase"):
            if shown[f"{outcome} worse"] >= retire:
                return Verdict("retired", f"its Brier score of the {outcome} is worse by over {rules.brier_margin:g}")
        if all(shown[claim] >= promote for claim in ("iou higher", "cart harmless", "purchase harmless")):
            return Verdict("promoted", "its IoU is higher than the champion's, and no outcome suffers")
        if self.iou.sums.count >= rules.most_sessions:
            return Verdict("retired", f"{self.iou.sums.count} sessions have not shown that it is better and harmless")
        return None
