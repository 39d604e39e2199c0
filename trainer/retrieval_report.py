"""retrieval.json: every figure of every retriever with its interval, and what it says in words."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from trainer.figures import RESAMPLES, Figure, Figures, resampled
from trainer.interactions import Task
from trainer.rankings import Judged
from trainer.retrieval_metrics import MEASURES, hits, measure, positives
from trainer.retrievers import Ranking

REPORT = "retrieval.json"
DEPTH = 100  # items of each list
LONG = 12  # clicks of a long history
FEWEST = 20  # cases of a part that has figures of its own
SEEDED = "with a seed"  # XPert's own figures leave out who has none
BINS = 5  # of labels by their clicks
HEADLINE = ("recall_10", "recall_50", "recall_100", "ndcg_10", "ndcg_100", "mrr_100", "auc_100", "precision_1")


class Part(msgspec.Struct, frozen=True):
    """Some of the cases, with figures of their own."""

    cases: int
    figures: Figures
    differences: Figures


class Bin(msgspec.Struct, frozen=True):
    """Labels of about the same number of clicks in the log, and the share of them that was among the first 100."""

    labels: int
    fewest: int
    most: int
    recall: float


class Contrast(msgspec.Struct, frozen=True):
    """What one thing is worth: a retriever with it less one without, paired, over all cases and over parts of them."""

    question: str
    with_it: str
    without: str
    differences: Figures  # by part; "all" among them


class Verdict(msgspec.Struct, frozen=True):
    """What the figures say: `answer` is help, hurt or unclear, beside the best of the others."""

    answer: str
    headline: str
    findings: list[str]


class RetrievalReport(msgspec.Struct, frozen=True):
    """retrieval.json. All but `coverage` follows from retrieval.parquet; intervals from `seed` and `resamples`.

    `coverage`: by set of cases, the share of labels that the index held. Labels outside it count as missed, unless the
    protocol asks only for labels inside it.
    """

    task: str
    cases: int
    seedless: int  # of them: nothing in the history has a vector, so no seed can ask; they count in every mean
    ours: str
    rival: str  # the best of the others by Recall@10 and @50
    seed: int
    resamples: int
    coverage: dict[str, float]
    verdict: Verdict
    figures: Figures
    differences: Figures  # ours less each other's, paired
    parts: dict[str, Part]
    contrasts: list[Contrast]
    validation: dict[str, float]  # Recall@10 + Recall@50 of what validation chose among
    choice: list[str]  # why personal ones were among them or not
    depths: dict[str, list[float]]  # Recall@1 to @100
    by_clicks: dict[str, list[Bin]]
    definitions: dict[str, str]


class _Found(NamedTuple):
    """What one retriever hit, and every measure of every case."""

    hit: np.ndarray  # (C, 100) bool
    values: np.ndarray  # (C, measures)


def compose(
    task: Task,
    judged: Judged,
    rankings: Mapping[str, Ranking],
    ours: str,
    seed: int = 0,
    contrasts: Mapping[str, tuple[str, str]] | None = None,
    validation: Mapping[str, float] | None = None,
    choice: Sequence[str] = (),
) -> RetrievalReport:
    """The report of what each retriever ranked for the judged cases; `ours` is the one that validation chose.

    `contrasts`: by question, a retriever with something and one without. `validation`, `choice`: as in the report.
    """
    cases = judged.cases
    labels = positives(cases)
    found = {}
    for name, ranking in rankings.items():
        hit = hits(ranking.items[:, :DEPTH], cases)
        values = measure(hit, ranking.scores[:, :DEPTH], labels)
        found[name] = _Found(hit, np.stack([values[one] for one in MEASURES], axis=1))
    alone, against = bootstrap({name: one.values for name, one in found.items()}, ours, seed)
    parts, masks = {}, _parts(judged)
    for what, rows in masks.items():
        part = bootstrap({name: one.values[rows] for name, one in found.items()}, ours, seed)
        parts[what] = Part(int(rows.sum()), *part)
    everybody = {"all": np.ones(len(cases), dtype=bool)} | {one: rows for one, rows in masks.items() if one != SEEDED}
    answers = [
        Contrast(question, *pair, _contrast({name: found[name].values for name in pair}, *pair, everybody, seed))
        for question, pair in (contrasts or {}).items()
    ]
    rival = max((name for name in alone if name != ours), key=lambda name: _strength(alone[name]), default=ours)
    return RetrievalReport(
        task=task.name,
        cases=len(cases),
        seedless=int((~judged.seeded).sum()),
        ours=ours,
        rival=rival,
        seed=seed,
        resamples=RESAMPLES,
        coverage=task.coverage,
        verdict=_verdict(ours, rival, alone, against, parts),
        figures=alone,
        differences=against,
        parts=parts,
        contrasts=answers,
        validation=dict(validation or {}),
        choice=list(choice),
        depths={name: (one.hit.cumsum(axis=1) / labels[:, None]).mean(axis=0).tolist() for name, one in found.items()},
        by_clicks={name: _by_clicks(judged, ranking) for name, ranking in rankings.items()},
        definitions=MEASURES,
    )


def bootstrap(values: Mapping[str, np.ndarray], ours: str, seed: int) -> tuple[Figures, Figures]:
    """Figures from (C, measures) of each retriever, and those of `ours` less each other's on the same resamples."""
    names, size = list(values), len(values[ours])
    both = np.concatenate([values[name] for name in names], axis=1)
    shape = (-1, len(names), len(MEASURES))
    drawn = np.concatenate([weights @ both for weights in resampled(size, RESAMPLES, seed)]).reshape(shape) / size
    means = both.mean(axis=0).reshape(shape)[0]
    mine = names.index(ours)

    def told(mean: np.ndarray, spread: np.ndarray) -> dict[str, Figure | None]:
        low, high = np.quantile(spread, [0.025, 0.975], axis=0)
        return {one: Figure(*map(float, three)) for one, *three in zip(MEASURES, mean, low, high, strict=True)}

    alone: Figures = {name: told(means[i], drawn[:, i]) for i, name in enumerate(names)}
    against: Figures = {
        name: told(means[mine] - means[i], drawn[:, mine] - drawn[:, i]) for i, name in enumerate(names) if i != mine
    }
    return alone, against


def write(report: RetrievalReport, directory: Path) -> Path:
    """Write retrieval.json; returns its path."""
    path = directory / REPORT
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
    return path


def standing(differences: Figures, rival: str, name: str) -> str:
    """How the rival stands to ours: "worse" or "better" where the interval of the difference excludes 0."""
    difference = differences[rival][name] if rival in differences else None
    if difference is None or difference.low <= 0 <= difference.high:
        return ""
    return "worse" if difference.mean > 0 else "better"


def _contrast(
    values: Mapping[str, np.ndarray], with_it: str, without: str, masks: Mapping[str, np.ndarray], seed: int
) -> Figures:
    return {
        what: bootstrap({name: one[rows] for name, one in values.items()}, with_it, seed)[1][without]
        for what, rows in masks.items()
    }


def _parts(judged: Judged) -> dict[str, np.ndarray]:
    """Masks of the cases, those that are neither all nor too few."""
    opens, longs = judged.cases.opens, judged.history >= LONG
    found = {"within a session": ~opens, "first of a session": opens} if opens.any() else {}
    found |= {f"fewer than {LONG} clicks known": ~longs, f"{LONG} clicks or more known": longs}
    found[SEEDED] = judged.seeded
    return {what: rows for what, rows in found.items() if FEWEST <= rows.sum() < len(rows)}


def _strength(columns: Mapping[str, Figure | None]) -> float:
    return sum(figure.mean for one in ("recall_10", "recall_50") if (figure := columns[one]) is not None)


def _by_clicks(judged: Judged, ranking: Ranking) -> list[Bin]:
    """Labels in bins of equal size, from those that are rarely clicked to those that often are."""
    cases = judged.cases
    owner = np.repeat(np.arange(len(cases)), np.diff(cases.starts))
    there = (ranking.items[owner, :DEPTH] == cases.labels[:, None]).any(axis=1)
    order = np.argsort(judged.clicks, kind="stable")
    return [
        Bin(len(part), int(judged.clicks[part[0]]), int(judged.clicks[part[-1]]), float(there[part].mean()))
        for part in np.array_split(order, min(BINS, len(order)))
    ]


def _verdict(ours: str, rival: str, alone: Figures, against: Figures, parts: Mapping[str, Part]) -> Verdict:
    if rival == ours:
        return Verdict("unclear", f"{ours} stands alone: there is nothing to compare it with.", [])
    marks = {standing(against, rival, name) for name in ("recall_10", "recall_50", "recall_100")} - {""}
    answer = {frozenset(["worse"]): "help", frozenset(["better"]): "hurt"}.get(frozenset(marks), "unclear")
    words = {"help": "finds more than", "hurt": "finds less than", "unclear": "is not clearly apart from"}[answer]
    findings = [
        f"Recall@{k}: {_share(alone[ours][f'recall_{k}'])}; {rival} has {_share(alone[rival][f'recall_{k}'])}, "
        f"the difference is {_points(against[rival][f'recall_{k}'])}."
        for k in (10, 50, 100)
    ]
    findings += [
        f"{what[0].upper()}{what[1:]}, {part.cases:,} cases: Recall@50 {_share(part.figures[ours]['recall_50'])}; "
        f"the difference from {rival} is {_points(part.differences[rival]['recall_50'])}."
        for what, part in parts.items()
    ]
    return Verdict(answer, f"{ours} {words} the best of the others, {rival}.", findings)


def _share(figure: Figure | None) -> str:
    return "-" if figure is None else f"{100 * figure.mean:.1f} %"


def _points(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    return f"{100 * figure.mean:+.1f} points [{100 * figure.low:+.1f}, {100 * figure.high:+.1f}]"
