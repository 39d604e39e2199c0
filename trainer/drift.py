"""How far today's visitors are from those that the champion was trained on.

    unknown_pages         share of the pages seen that the champion's vocabulary does not know
    pages                 Jensen-Shannon distance between how often pages are in sessions, now and in training
    clusters              the same between the clusters that visitors are routed to
    cart_calibration      carts less those that were expected, in standard errors, either way
    purchase_calibration  the same for purchases

Distances are square roots of divergences in bits, so they lie between 0 and 1. Two samples differ even if nothing has
changed, the more the fewer they are, so what is to be expected then is taken off first.

How often a kind is beyond its limit, on 100 made sites (tests/trainer/test_drift.py: 1,500 visitors to learn from, then
a day of 250 visitors, or 1,000 scores; visitors are of five kinds and have tastes of their own):

                          without a change   with a change of this size
    unknown_pages               0 of 100    100 of 100: 15 % of the clicks go to new pages; 0 of 100 with 5 %
    pages                       0 of 100     97 of 100: a third of the sessions begins on a page that hardly anybody saw
    clusters                    0 of 100    100 of 100: a kind of visitors, three in ten, is gone
    cart_calibration            0 of 100    100 of 100: carts come half again as often, 30 % instead of 20 %
    purchase_calibration        0 of 100    100 of 100: purchases come twice as often, 20 % instead of 10 %

No change of one kind alarmed another. These sites have no weekends and no seasons.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import coo_array, csr_array
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
    """Drift of the pages. A visitor's sessions are alike, so chance is what another choice of visitors would change."""
    lists = sessions["pages"].combine_chunks()
    tokens = pc.index_in(lists.flatten(), pa.array(reference.pages, pa.string()))  # (clicks,), null: unknown
    clicks = np.stack([lists.value_parent_indices().to_numpy(), tokens.fill_null(-1).to_numpy()])
    known = clicks[1] >= 0
    held = np.unique(clicks[:, known], axis=1)  # (2, pairs of a session and a page)
    visitors = sessions["user_id"].combine_chunks().dictionary_encode().indices.to_numpy()  # (sessions,)
    size = visitors.max() + 1, len(reference.pages)
    counts = coo_array((np.ones(held.shape[1]), (visitors[held[0]], held[1])), size).tocsr()  # (visitors, pages)
    return {"unknown_pages": float(1 - known.mean()), "pages": pages_moved(counts, len(sessions), reference)}


def pages_moved(counts: csr_array, sessions: int, reference: Reference) -> float:
    """Jensen-Shannon distance of the pages held, (visitors, V), from the reference's shares, less chance.

    Chance is the divergence of a sample from what it was drawn from: of visitors drawn anew (a bootstrap with Poisson
    weights), and of the reference's sessions. Whose these were is not known, so a visitor's are taken to be as alike as
    those of the present are, which shows in how much further visitors scatter than single sessions would.
    """
    total = counts.sum(axis=0)
    if not total.any():
        return 1.0
    rng = np.random.default_rng(0)  # the same figures give the same drift
    by_visitors = _by_chance(rng.poisson(1.0, (DRAWS, counts.shape[0])) @ counts, total)
    by_sessions = _by_chance(_draws(rng, sessions, total / sessions), total)
    alike = max(by_visitors / by_sessions, 1.0) if by_sessions else 1.0
    then = _by_chance(_draws(rng, reference.sessions, reference.shares), reference.shares)
    return float(max(_divergence(total, reference.shares) - by_visitors - alike * then, 0.0) ** 0.5)


def _draws(rng: np.random.Generator, sessions: int, shares: np.ndarray) -> np.ndarray:
    """How many of so many sessions hold each page, (draws, V), as `shares` (V,) of them do."""
    drawn: np.ndarray = rng.binomial(sessions, shares, (DRAWS, len(shares)))
    return drawn


def _by_chance(drawn: np.ndarray, around: np.ndarray) -> float:
    """Mean divergence of what was drawn (draws, V) from what it was drawn from (V,)."""
    return float(np.mean([_divergence(one, around) for one in drawn if one.any()] or [0.0]))


def _divergence(left: np.ndarray, right: np.ndarray) -> float:
    """Jensen-Shannon divergence in bits."""
    return float(jensenshannon(left, right, base=2)) ** 2


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
    rng = np.random.default_rng(0)
    by_chance = sum(_by_chance(_draws(rng, cases, shares), shares) for cases in (size, reference_size))
    return float(max(_divergence(counts, shares) - by_chance, 0.0) ** 0.5)
