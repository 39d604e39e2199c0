"""The figures of a report, each with a bootstrap interval, and the differences between predictors."""

from collections.abc import Iterator, Mapping

import msgspec
import numpy as np

from trainer.measures import MEASURES
from trainer.scores import Scores

RESAMPLES = 1_000
BLOCK = 2_000_000  # users times resamples that are weighed at a time


class Figure(msgspec.Struct, frozen=True):
    """A figure over all users with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


Figures = dict[str, dict[str, Figure | None]]  # by predictor and measure; None where a predictor has no such figure
_Drawn = dict[str, np.ndarray]  # the figure itself, then one of each resample


def figures(
    scores: Mapping[str, Scores], ours: str, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[Figures, Figures]:
    """Every predictor's figures, and those of `ours` less each other's, paired: on the same users and resamples.

    Resample r takes the users `numpy.random.default_rng(seed).integers(0, N, size=(resamples, N))[r]`.
    """
    drawn = _draw(scores, scores[ours].users, seed, resamples)
    alone: Figures = {
        name: {key: _figure(found[key]) if key in found else None for key in MEASURES} for name, found in drawn.items()
    }
    mine = drawn[ours]
    against: Figures = {
        name: {key: _figure(mine[key] - found[key]) if key in found and key in mine else None for key in MEASURES}
        for name, found in drawn.items()
        if name != ours
    }
    return alone, against


def resampled(users: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each user is in each bootstrap resample, some resamples at a time: (R, N) float64."""
    rng = np.random.default_rng(seed)
    block = max(1, BLOCK // users)
    for start in range(0, resamples, block):
        picks = rng.integers(0, users, size=(min(block, resamples - start), users))
        yield np.stack([np.bincount(row, minlength=users) for row in picks]).astype(float)


def paired(differences: np.ndarray, seed: int = 0) -> Figure:
    """The mean of paired differences (N,), with its interval."""
    weighed = [weights @ differences for weights in resampled(len(differences), RESAMPLES, seed)]
    low, high = np.quantile(np.concatenate(weighed) / len(differences), [0.025, 0.975])
    return Figure(float(differences.mean()), float(low), float(high))


def _draw(scores: Mapping[str, Scores], users: int, seed: int, resamples: int) -> dict[str, _Drawn]:
    parts: dict[str, dict[str, list[np.ndarray]]] = {
        name: {key: [value] for key, value in one.measure(np.ones((1, users))).items()} for name, one in scores.items()
    }
    for weights in resampled(users, resamples, seed):
        for name, one in scores.items():
            for key, values in one.measure(weights).items():
                parts[name][key].append(values)
    return {name: {key: np.concatenate(part) for key, part in found.items()} for name, found in parts.items()}


def _figure(drawn: np.ndarray) -> Figure | None:
    """None where the figure is undefined, as the AUC of an outcome that never happened; such resamples are left out."""
    if np.isnan(drawn[0]):
        return None
    low, high = np.nanquantile(drawn[1:], [0.025, 0.975])
    return Figure(float(drawn[0]), float(low), float(high))
