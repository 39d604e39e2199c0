"""Tests and intervals that may be looked at after every session, and stopped whenever one likes.

What is tested are bounded numbers x_1, x_2, ... in [-1, 1], such as differences of two predictors' scores. The value of
an *e-process* is the wealth of one who bets against a hypothesis: while the hypothesis holds, it is expected to stay at
or below the 1 that it starts from, whenever one stops, so it ever reaches 1 / alpha with a probability of at most alpha
(Ville's inequality; Shafer and Vovk, "Game-Theoretic Foundations for Probability and Finance", 2019). A *confidence
sequence* is an interval that holds the mean at all times together with a probability of at least 1 - alpha.

For a bet b of [0, 1) and psi(b) = -log(1 - b) - b, the factor exp(b (x - m) - psi(b) x^2) is expected to be at most 1
where x is expected to be at most m: Fan's inequality, as in Theorem 4 of Howard, Ramdas, McAuliffe and Sekhon,
"Time-uniform, nonparametric, nonasymptotic confidence sequences" (Annals of Statistics, 2021), with 0 as the predicted
x, which is good for differences near 0. The products of these factors are averaged over fixed bets, so the data choose
none. Bets that learn (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", JRSS B, 2024)
win a little sooner, but every single x must be expected to be at most m. With fixed bets this is needed of the average
of the expectations so far: the weak null hypothesis of Choe and Ramdas, "Comparing sequential forecasters" (Operations
Research, 2024). Nothing is assumed of how sessions hang together, or whether they change with time.
"""

import math
from collections.abc import Callable

import msgspec
import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq

BETS = np.geomspace(0.01, 0.9, 12)
PRICES = -np.log1p(-BETS) - BETS  # psi


class Sums(msgspec.Struct):
    """All that tests and intervals need of the numbers so far."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, x: float) -> None:
        """Take in one number of [-1, 1]."""
        self.count += 1
        self.total += x
        self.squares += x * x

    @property
    def mean(self) -> float:
        """0 before the first number."""
        return self.total / max(self.count, 1)

    def log_e_above(self, least: float) -> float:
        """Log e-value against "the mean is at most `least`"."""
        return float(log_e(self.total - self.count * least, self.squares))

    def log_e_below(self, most: float) -> float:
        """Log e-value against "the mean is at least `most`"."""
        return float(log_e(self.count * most - self.total, self.squares))

    def interval(self, alpha: float) -> tuple[float, float]:
        """The confidence sequence at level 1 - alpha: what neither test rejects at alpha / 2."""
        needed = math.log(2 / alpha)
        low = _root(lambda mean: self.log_e_above(mean) - needed, -1.0, self.mean)
        high = _root(lambda mean: self.log_e_below(mean) - needed, 1.0, self.mean)
        return low, high


def log_e(excess: ArrayLike, squares: ArrayLike) -> np.ndarray:
    """Log of the average over all bets; `excess` is the sum of x - m, `squares` that of x^2, of any shape (...)."""
    exponents = np.multiply.outer(excess, BETS) - np.multiply.outer(squares, PRICES)  # (..., bets)
    wealth: np.ndarray = np.logaddexp.reduce(exponents, axis=-1)
    return wealth - math.log(len(BETS))


class Detector(msgspec.Struct):
    """An e-process against "the mean is at most 0, now and always", that notices a rise whenever it begins.

    It averages over the number at which the rise may begin: the t-th weighs 1 / (1 + log2 t) less the same of t + 1,
    and all weights sum to 1: an e-detector after Shiryaev and Roberts (Shin, Ramdas and Rinaldo, "E-detectors",
    NEJSDS, 2023) that pays for every begin: alpha is not a rate of false alarms, but the chance of one in all eternity.
    The price is some log t nats of evidence after t numbers.
    """

    count: int = 0
    log_wealth: list[float] = []  # of each bet, over the begins so far; empty before the first number

    def add(self, x: float) -> None:
        """Take in one number of [-1, 1]."""
        self.count += 1
        begun = math.log(_unbegun(self.count) - _unbegun(self.count + 1))
        before = np.logaddexp(self.log_wealth, begun) if self.log_wealth else np.full(len(BETS), begun)
        self.log_wealth = (before + BETS * x - PRICES * (x * x)).tolist()

    @property
    def log_e(self) -> float:
        """Log of the e-value."""
        wealth = np.logaddexp.reduce(self.log_wealth) - math.log(len(BETS)) if self.log_wealth else -math.inf
        return float(np.logaddexp(wealth, math.log(_unbegun(self.count + 1))))


def _unbegun(begin: int) -> float:
    """Weight of the begins from this session on."""
    return 1 / (1 + math.log2(begin))


def _root(surplus: Callable[[float], float], bound: float, mean: float) -> float:
    """Where rejection ends between the bound, which is rejected first, and the mean seen, which never is."""
    return bound if surplus(bound) <= 0 else float(brentq(surplus, bound, mean, xtol=1e-6))
