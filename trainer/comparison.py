"""Whether a candidate may take a place: not worse than its rivals beyond a margin, and better somewhere."""

from collections.abc import Mapping, Sequence

import msgspec

from trainer.contenders import BUNDLE
from trainer.figures import Figure, Figures, figures
from trainer.judging import Judgement, score
from trainer.measures import MEASURES

CHAMPION = "champion"
GUARDED = ("iou", "cart_log_loss", "purchase_log_loss", "nll_per_token")
FLOOR = 0.005  # a margin is at least so much: a share of a log loss of nearly 0 would be nothing
FEWEST = 30  # visitors whose nats per token are compared


class Comparison(msgspec.Struct, frozen=True):
    """The outcome, the reasons in words, and what they rest on.

    Figures are by predictor and measure, `differences` the candidate's less each rival's, paired, with 95 % bootstrap
    intervals. Nats per token are those of the sessions whose pages both candidate and champion know: a bundle that does
    not know a page pays only for [UNK].
    """

    accepted: bool
    reasons: list[str]
    users: int
    margin: float
    figures: Figures
    differences: Figures


def compare(
    judgement: Judgement, thresholds: Mapping[str, tuple[float, float]], known: Sequence[bool], margin: float, seed: int
) -> Comparison:
    """Compare the candidate (`bundle`) with the champion and the baselines by their rows.

    `known` says of each row whether the champion and the candidate both know all pages of the target. A difference that
    may be worse than the rival's figure by more than the share `margin` of it, by its interval, refuses the candidate.
    It must be better, by its interval, in one guarded measure than the champion, or without one than each baseline. So
    a candidate that is no better passes one measure by chance in 2.5 % of the comparisons; the shadow test comes after.
    """
    alone, against = _guarded(judgement.figures), _guarded(judgement.differences)
    both = [i for i, whole in enumerate(known) if whole]
    if CHAMPION in against:
        names = (BUNDLE, CHAMPION)
        nats: tuple[Figures, Figures] = ({}, {})
        if len(both) >= FEWEST:
            rows = {name: [judgement.rows[name][i] for i in both] for name in names}
            nats = figures(score(rows, thresholds, {"cart": [], "purchase": []}), BUNDLE, seed)
        for told, found in zip((alone, against), nats, strict=True):
            for name in names:
                if name in told:
                    told[name]["nll_per_token"] = found[name]["nll_per_token"] if name in found else None
    reasons, refused = [], False
    for rival in against:
        worse, better = _standing(rival, alone, against, margin)
        must = rival == CHAMPION or CHAMPION not in against
        refused |= bool(worse) or (must and not better)
        reasons += worse + (better if must else [])
        if must and not better and not worse:
            reasons.append(f"no measure is shown to be better than that of {rival}")
    return Comparison(not refused, reasons, len(judgement.rows[BUNDLE]), margin, alone, against)


def _guarded(found: Figures) -> Figures:
    return {name: {key: columns[key] for key in GUARDED} for name, columns in found.items()}


def _standing(rival: str, alone: Figures, against: Figures, margin: float) -> tuple[list[str], list[str]]:
    """In which measures the candidate may be worse beyond the margin, and in which it is better, in words."""
    worse, better = [], []
    for key in GUARDED:
        theirs, difference = alone[rival][key], against[rival][key]
        if theirs is None or difference is None:
            continue
        least, sign = margin_of(theirs, margin), MEASURES[key].better
        edge = difference.low if sign > 0 else -difference.high  # the worst that the interval allows
        told = f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
        words = key.replace("_", " ")
        if edge < -least:
            worse.append(f"{words} may be worse than that of {rival} by more than {least:.4f}: {told}")
        elif edge > 0:
            better.append(f"{words} is better than that of {rival}: {told}")
    return worse, better


def margin_of(figure: Figure, margin: float) -> float:
    """How much worse than this figure is still no reason to refuse."""
    return max(margin * abs(figure.mean), FLOOR)
