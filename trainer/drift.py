"""How far today's visitors are from those that the champion was trained on.

    unknown_pages         share of the pages seen that the champion's vocabulary does not know
    pages                 Jensen-Shannon distance between how often pages are in sessions, now and in training
    clusters              the same between the clusters that visitors are routed to
    cart_calibration      carts less those that were expected, in standard errors, either way
    purchase_calibration  the same for purchases

Distances are square roots of divergences in bits, so they lie between 0 and 1. Two samples differ even if nothing has
changed, the more the fewer they are, so what is to be expected then is taken off first.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.spatial.distance import jensenshannon

from models.config import decode_config, decode_vocabulary
from models.manifest import open_manifest
from streams.wire import Score
from trainer.visitors import pseudonym

# What is worth an alert and a refresh. Alerts compare the metric browsecast_drift with browsecast_drift_limit.
LIMITS = {
    "unknown_pages": 0.1,
    "pages": 0.2,
    "clusters": 0.2,
    "cart_calibration": 5.0,
    "purchase_calibration": 5.0,
}
WINDOW_SCORES = 1_000
LEAST_SESSIONS = 500  # fewer say nothing about pages
DRAWS = 16


@dataclass(frozen=True)
class Reference:
    """What the champion's bundle tells of its training window."""

    pages: list[str]
    shares: np.ndarray  # (V,) of the sessions that hold each page
    sessions: int
    cluster_users: np.ndarray  # (K,)

    @classmethod
    def of(cls, bundle: Path) -> "Reference":
        """Read from a bundle's directory. Raises BundleRefused."""
        verified = open_manifest(bundle)
        vocabulary, config = decode_vocabulary(verified), decode_config(verified)
        users = np.asarray(config.cluster_users, dtype=float)
        return cls(vocabulary.pages, np.asarray(vocabulary.shares), vocabulary.sessions, users)


class Outcomes(msgspec.Struct):
    """An outcome over some sessions: how often it was expected and came, and the variance of a calibrated forecast."""

    expected: float = 0.0
    happened: int = 0
    variance: float = 0.0

    def add(self, p: float, happened: bool) -> None:
        """Take in one session."""
        self.expected += p
        self.happened += happened
        self.variance += p * (1 - p)

    @property
    def error(self) -> float:
        """Distance from what was expected, in standard errors; one case more or less is no error at all."""
        return abs(self.happened - self.expected) / math.sqrt(max(self.variance, 1.0))


class Window(msgspec.Struct):
    """The champion's predictions that were scored in a row."""

    scores: int = 0
    clusters: dict[str, int] = {}  # pseudonym of the visitor -> the last cluster
    cart: Outcomes = msgspec.field(default_factory=Outcomes)
    purchase: Outcomes = msgspec.field(default_factory=Outcomes)

    def add(self, score: Score) -> None:
        """Take in one score."""
        self.scores += 1
        if score.cluster is not None:
            self.clusters[pseudonym(score.user_id)] = score.cluster
        self.cart.add(score.cart_p, score.cart)
        self.purchase.add(score.purchase_p, score.purchase)


class Windows(msgspec.Struct):
    """One window after another: the one that fills, and the last full one."""

    filling: Window = msgspec.field(default_factory=Window)
    full: Window | None = None

    def add(self, score: Score) -> None:
        """Take in one score; one that a fallback predicted tells nothing of the champion."""
        if score.fallback is None:
            self.filling.add(score)
            if self.filling.scores == WINDOW_SCORES:
                self.full, self.filling = self.filling, Window()

    def forget(self, visitor: str) -> None:
        """Nothing stays of a visitor, named by the pseudonym, but a share in sums."""
        for window in (self.filling, self.full):
            if window is not None:  # it may be read by another thread
                window.clusters = {other: cluster for other, cluster in window.clusters.items() if other != visitor}


def figures(reference: Reference, sessions: pa.Table, window: Window | None) -> dict[str, float]:
    """Drift by kind, without the kinds that there is too little for. `sessions`: the latest, as session files."""
    found: dict[str, float] = {}
    if len(sessions) >= LEAST_SESSIONS:
        found |= page_drift(reference, sessions)
    if window is not None:
        found |= score_drift(reference, window)
    return found


def alarms(found: Mapping[str, float]) -> list[str]:
    """The kinds that are beyond their limits."""
    return [kind for kind, figure in found.items() if figure > LIMITS[kind]]


def page_drift(reference: Reference, sessions: pa.Table) -> dict[str, float]:
    """Drift of the pages; a visitor's sessions are alike, so they weigh as few where many are of one visitor."""
    lists = sessions["pages"].combine_chunks()
    tokens = pc.index_in(lists.flatten(), pa.array(reference.pages, pa.string()))  # (clicks,), null: unknown
    clicks = np.stack([lists.value_parent_indices().to_numpy(), tokens.fill_null(-1).to_numpy()])
    known = clicks[1] >= 0
    held = np.unique(clicks[:, known], axis=1)[1]
    counts = np.bincount(held, minlength=len(reference.pages))
    visits = pc.value_counts(sessions["user_id"]).field("counts").to_numpy().astype(float)
    independent = visits.sum() ** 2 / (visits**2).sum()
    return {
        "unknown_pages": float(1 - known.mean()),
        "pages": moved(counts, reference.shares, int(independent), reference.sessions),
    }


def score_drift(reference: Reference, window: Window) -> dict[str, float]:
    """Drift of the clusters and outcomes."""
    found = {"cart_calibration": window.cart.error, "purchase_calibration": window.purchase.error}
    users = reference.cluster_users
    clusters = np.fromiter(window.clusters.values(), dtype=int)
    if len(clusters) and clusters.max() < len(users):
        counts = np.bincount(clusters, minlength=len(users))
        found["clusters"] = moved(counts, users / users.sum(), len(clusters), int(users.sum()))
    return found


def moved(counts: np.ndarray, shares: np.ndarray, size: int, reference_size: int) -> float:
    """Jensen-Shannon distance of `counts` (V,) from `shares` (V,), less what chance alone would make of it.

    Chance: both were drawn from the same shares, from so many independent cases, each cell as a binomial. Divergences
    (squared distances) are subtracted, as what chance adds is a divergence, and their difference is cut off at 0.
    """
    if not counts.any():
        return 1.0
    rng = np.random.default_rng(0)  # the same figures give the same drift
    now, then = (rng.binomial(n, shares, (DRAWS, len(shares))) for n in (size, reference_size))
    drawn = (now.sum(axis=1) > 0) & (then.sum(axis=1) > 0)
    by_chance = jensenshannon(now[drawn], then[drawn], base=2, axis=1) ** 2
    divergence = jensenshannon(counts, shares, base=2) ** 2
    return float(max(divergence - by_chance.mean(), 0.0) ** 0.5) if drawn.any() else 0.0
