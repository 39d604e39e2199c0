"""What a report says in words: whether the clusters help, and what else the figures show."""

from collections.abc import Mapping
from typing import Literal

import msgspec

from trainer.contenders import BUNDLE, KMEANS_LMS, LARGE_LM, SMALL_LM
from trainer.figures import Figure, Figures
from trainer.measures import DECODINGS, HEADLINE, MEASURES, PAPER

Answer = Literal["help", "hurt", "no difference shown", "one cluster", "not tested"]
LMS = (BUNDLE, SMALL_LM, LARGE_LM, KMEANS_LMS)  # the others are baselines of another kind
RULE = (
    "Clusters help when the 95 % paired bootstrap interval of the bundle's nats per token, less those of the best "
    "single language model, lies below 0; they hurt when it lies above; otherwise no difference is shown."
)


class Verdict(msgspec.Struct, frozen=True):
    """Whether clusters help, by the rule, and further findings; all in plain words."""

    answer: Answer
    headline: str
    findings: list[str]
    rule: str = RULE


class Composite(msgspec.Struct, frozen=True):
    """The paper's composite: share of its metrics on which the bundle beats a rival; strict, on unrounded values.

    For the record only: it counts a difference of .001 like one of .1, rewards low variance, which weak models have,
    and HR's variance is HR (1 - HR) again. None where a metric is missing.
    """

    outcome: float | None
    page: float | None
    variance: float | None
    overall: float | None


def composite(figures: Figures, rival: str, prefix: str) -> Composite:
    """Wins of the bundle over `rival` among the paper's 20 metrics, read with the decoding of `prefix`."""
    wins = {part: [_beats(figures, rival, prefix + name) for name in names] for part, names in PAPER.items()}
    every = [win for part in wins.values() for win in part]
    shares = {part: _share(won) for part, won in {**wins, "overall": every}.items()}
    return Composite(**shares)


def composites(figures: Figures) -> dict[str, dict[str, Composite]]:
    """By rival and decoding (expected, path)."""
    rivals = [name for name in figures if name != BUNDLE]
    return {
        rival: {column: composite(figures, rival, prefix) for prefix, column in DECODINGS.items()} for rival in rivals
    }


def verdict(figures: Figures, differences: Figures, clusters: int) -> Verdict:
    """Judge by the intervals of the differences, never by means alone."""
    answer, headline = _clusters_help(figures, differences, clusters)
    told = [_beside(figures, differences), *_likelihoods(figures, differences)]
    told += [_sets(figures, differences), _decoding(figures)]
    told += [_outcome(figures, differences, name) for name in ("cart", "purchase")]
    return Verdict(answer, headline, [words for words in told if words])


def best(figures: Figures, measure: str, among: Mapping[str, object] | tuple[str, ...]) -> str | None:
    """The one with the best value of a measure, of those that have it."""
    sign = MEASURES[measure].better
    found = {name: figure.mean for name in among if name in figures and (figure := figures[name][measure]) is not None}
    return max(found, key=lambda name: sign * found[name]) if found else None


def _clusters_help(figures: Figures, differences: Figures, clusters: int) -> tuple[Answer, str]:
    if clusters == 1:
        return "one cluster", "This bundle has one cluster: a single model serves all visitors."
    rival = best(figures, "nll_per_token", (SMALL_LM, LARGE_LM))
    found = None if rival is None else differences[rival]["nll_per_token"]
    if rival is None or found is None:
        return "not tested", (
            "Whether clusters help is not tested here: no single language model was trained beside the bundle. "
            "`evaluate --contenders all` with the training sessions (--train) trains some."
        )
    by = f"{abs(found.mean):.3f} nats per token {_interval(found)}"
    if found.high < 0:
        return "help", f"The {clusters} clusters help: next sessions are foretold better than by {rival}, by {by}."
    if found.low > 0:
        return "hurt", f"The {clusters} clusters hurt: {rival} foretells next sessions better, by {by}."
    return "no difference shown", (
        f"The {clusters} clusters do not help: no difference from {rival} is shown, {found.mean:+.3f} nats per token "
        f"{_interval(found)}. The single model is simpler."
    )


def _likelihoods(figures: Figures, differences: Figures) -> list[str]:
    """Against the controls, and against whoever else has the fewest nats."""
    first = best(figures, "nll_per_token", tuple(differences))
    told = []
    for name in dict.fromkeys((SMALL_LM, LARGE_LM, KMEANS_LMS, first)):
        found = None if name is None else differences.get(name, {}).get("nll_per_token")
        if found is not None:
            told.append(f"Nats per token less those of {name}: {_difference(found, -1)}.")
    return told


def _beside(figures: Figures, differences: Figures) -> str:
    """Where the bundle and the best single language model differ beyond chance."""
    rival = best(figures, "nll_per_token", (SMALL_LM, LARGE_LM))
    if rival is None:
        return ""
    better: list[str] = []
    worse: list[str] = []
    for name in HEADLINE:
        found = differences[rival][name]
        if found is not None and (found.low > 0 or found.high < 0):
            kind = better if MEASURES[name].better * found.mean > 0 else worse
            kind.append(f"{name.replace('_', ' ')} ({found.mean:+.3f})")
    return (
        f"Beyond chance the bundle is better than {rival} in {', '.join(better) or 'nothing'}, and worse in "
        f"{', '.join(worse) or 'nothing'}."
    )


def _sets(figures: Figures, differences: Figures) -> str:
    rival = best(figures, "iou", tuple(name for name in figures if name not in LMS))
    found = None if rival is None else differences[rival]["iou"]
    own = figures[BUNDLE]["iou"]
    if found is None or own is None:
        return ""
    return (
        f"The expected set overlaps the next session by {own.mean:.3f} (IoU). The best besides language "
        f"models is {rival}: the difference is {_difference(found, 1)}."
    )


def _decoding(figures: Figures) -> str:
    expected, path = figures[BUNDLE]["iou"], figures[BUNDLE]["path_iou"]
    if expected is None or path is None:
        return ""
    better, worse = ("expected set", "greedy path") if expected.mean >= path.mean else ("greedy path", "expected set")
    return (
        f"Of the two decodings the {better} overlaps more: {max(expected.mean, path.mean):.3f} against "
        f"{min(expected.mean, path.mean):.3f} for the {worse}."
    )


def _outcome(figures: Figures, differences: Figures, name: str) -> str:
    own, error = figures[BUNDLE][f"{name}_auc"], figures[BUNDLE][f"{name}_calibration_error"]
    if own is None or error is None:
        return f"No AUC of a {name}: all or none of these sessions have one."
    rival = best(figures, f"{name}_auc", tuple(other for other in figures if other != BUNDLE))
    found = None if rival is None else differences[rival][f"{name}_auc"]
    words = f"P({name}) has an AUC of {own.mean:.3f} {_interval(own)} and a calibration error of {error.mean:.3f}"
    if found is None:
        return words + "."
    return f"{words}; less the AUC of the best other, {rival}: {_difference(found, 1)}."


def _difference(found: Figure, sign: int) -> str:
    said = "no difference shown"
    if found.low > 0 or found.high < 0:
        said = "better" if sign * found.mean > 0 else "worse"
    return f"{found.mean:+.3f} {_interval(found)}, {said}"


def _interval(found: Figure) -> str:
    return f"[{found.low:.3f}, {found.high:.3f}]"


def _beats(figures: Figures, rival: str, measure: str) -> bool | None:
    ours, theirs = figures[BUNDLE][measure], figures[rival][measure]
    if ours is None or theirs is None:
        return None
    return MEASURES[measure].better * (ours.mean - theirs.mean) > 0


def _share(wins: list[bool | None]) -> float | None:
    return None if None in wins else sum(map(bool, wins)) / len(wins)
