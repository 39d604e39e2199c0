"""report.json: every figure with its interval, what it is read with, and what it says in words."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from models.metrics import Cases, calibration_bins
from trainer.contenders import BUNDLE, LARGE_LM, SMALL_LM, Contender
from trainer.figures import RESAMPLES, Figures, figures
from trainer.judging import Judgement, score
from trainer.measures import MEASURES, OUTCOMES
from trainer.portraits import Portrait, portraits
from trainer.scores import Scores
from trainer.verdict import Composite, Verdict, best, composites, verdict

REPORT = "report.json"
BINS = 10  # of a reliability diagram
FEWEST = 20  # users of a cluster that has figures of its own
Z = 1.96


class Predictor(msgspec.Struct, frozen=True):
    """Who stood in the report, with its fitted parameters, and the outcome thresholds of its expected set."""

    parameters: int | None
    cart_threshold: float
    purchase_threshold: float


class Bin(msgspec.Struct, frozen=True):
    """Users of about the same P(outcome): its mean, how often it happened, with a 95 % Wilson interval."""

    users: int
    p: float
    rate: float
    low: float
    high: float


class Cluster(msgspec.Struct, frozen=True):
    """A cluster's figures beside its rival's, and the bundle's less the rival's; none with fewer than 20 users."""

    portrait: Portrait
    figures: Figures
    differences: Figures


class Report(msgspec.Struct, frozen=True):
    """report.json: figures by predictor, and the bundle's less each other predictor's, each with a 95 % interval.

    Names without a prefix are read from the expected set and the probabilities, those with `path_` from the greedy
    path; `definitions` says what each means. All follow from predictions.parquet with the thresholds of `predictors`
    and `outcome_pages`; intervals from `seed` and `resamples` (see trainer.figures).
    """

    bundle_version: str
    bundle_digest: str
    users: int
    seed: int
    resamples: int
    predictors: dict[str, Predictor]
    outcome_pages: dict[str, list[str]]
    remarks: list[str]  # on what was judged, and on whom beside
    verdict: Verdict
    figures: Figures
    differences: Figures
    composites: dict[str, dict[str, Composite]]  # by rival and decoding
    reliability: dict[str, dict[str, list[Bin]]]  # by predictor and outcome
    rival: str  # whom the clusters' tables show beside the bundle
    clusters: list[Cluster]
    definitions: dict[str, str]


def compose(
    judgement: Judgement,
    contenders: Sequence[Contender],
    pages: dict[str, list[str]],
    clusters: int,
    version: tuple[str, str],
    seed: int,
    remarks: Sequence[str] = (),
) -> Report:
    """The report of a judgement. `pages` mark the outcomes in paths; `version`: the bundle's version and digest."""
    alone, against = judgement.figures, judgement.differences
    predictors = {
        contender.name: Predictor(contender.parameters, *map(float, contender.thresholds)) for contender in contenders
    }
    rival = _rival(alone)
    return Report(
        bundle_version=version[0],
        bundle_digest=version[1],
        users=len(judgement.rows[BUNDLE]),
        seed=seed,
        resamples=RESAMPLES,
        predictors=predictors,
        outcome_pages=pages,
        remarks=list(remarks),
        verdict=verdict(alone, against, clusters),
        figures=alone,
        differences=against,
        composites=composites(alone),
        reliability={name: reliability(scores) for name, scores in judgement.scores.items()},
        rival=rival,
        clusters=_clusters(judgement, predictors, pages, clusters, rival, seed),
        definitions={name: measure.words for name, measure in MEASURES.items()},
    )


def write(report: Report, directory: Path) -> Path:
    """Write report.json; returns its path."""
    path = directory / REPORT
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
    return path


def standing(report: Report, rival: str, measure: str) -> str:
    """How the rival stands to the bundle: "worse" or "better" where the interval of the difference excludes 0."""
    difference = report.differences[rival][measure] if rival in report.differences else None
    if difference is None or difference.low <= 0 <= difference.high:
        return ""
    return "worse" if MEASURES[measure].better * difference.mean > 0 else "better"


def reliability(scores: Scores) -> dict[str, list[Bin]]:
    """By outcome, users in bins of equal mass by probability; bins without users are left out."""
    found = {}
    for name in OUTCOMES:
        if name in scores.values:
            cases = Cases.of(scores.values[name], scores.happened[name], np.ones((1, scores.users)))
            at = calibration_bins(cases, BINS)[0]
            found[name] = [_bin(cases, at == k) for k in np.unique(at).tolist()]
    return found


def _bin(cases: Cases, inside: np.ndarray) -> Bin:
    users = cases.cases[0, inside]
    n, happened = float(users.sum()), float(cases.positives[0, inside].sum())
    rate = happened / n
    middle = (rate + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * (rate * (1 - rate) / n + Z**2 / (4 * n**2)) ** 0.5
    low, high = min(middle - half, rate), max(middle + half, rate)  # at 0 and 1 they are equal but for rounding
    return Bin(int(n), float((users * cases.p[inside]).sum() / n), rate, low, high)


def _rival(alone: Figures) -> str:
    """The best single language model, else the best other by overlap."""
    lm = best(alone, "nll_per_token", (SMALL_LM, LARGE_LM))
    other = lm or best(alone, "iou", tuple(name for name in alone if name != BUNDLE))
    assert other is not None  # the unfitted baselines all have an overlap
    return other


def _clusters(
    judgement: Judgement,
    predictors: dict[str, Predictor],
    pages: dict[str, list[str]],
    clusters: int,
    rival: str,
    seed: int,
) -> list[Cluster]:
    ours = judgement.rows[BUNDLE]
    thresholds = {name: (one.cart_threshold, one.purchase_threshold) for name, one in predictors.items()}
    found = []
    for portrait in portraits(ours, clusters):
        inside = [i for i, row in enumerate(ours) if row["cluster"] == portrait.cluster]
        alone: Figures = {}
        against: Figures = {}
        if len(inside) >= FEWEST:
            rows = {name: [judgement.rows[name][i] for i in inside] for name in (BUNDLE, rival)}
            alone, against = figures(score(rows, thresholds, pages), BUNDLE, seed)
        found.append(Cluster(portrait, alone, against))
    return found
