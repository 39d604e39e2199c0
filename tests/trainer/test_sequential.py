"""Sequential tests against their definition, and their errors when somebody looks after every single session."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from trainer.sequential import BETS, PRICES, Detector, Sums, log_e

RUNS, STEPS = 300, 1_500
Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


def told(numbers: np.ndarray) -> Sums:
    sums = Sums()
    for x in numbers.tolist():
        sums.add(x)
    return sums


def some(count: int, mean: float, spread: float, seed: int = 0) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).normal(mean, spread, count), -1, 1)


def looked_at(numbers: np.ndarray, m: float = 0.0) -> np.ndarray:
    """Log e-values against "the mean is at most m" after every number: (runs, steps) -> (runs, steps)."""
    steps = np.arange(1, numbers.shape[1] + 1)
    return log_e(np.cumsum(numbers, axis=1) - steps * m, np.cumsum(numbers**2, axis=1))


def test_the_e_value_is_the_average_wealth_of_fixed_bets() -> None:
    numbers, m = some(300, 0.1, 0.4), 0.05
    wealth = np.ones(len(BETS))
    for x in numbers:
        for i, bet in enumerate(BETS):
            wealth[i] *= math.exp(bet * (x - m) - (-math.log(1 - bet) - bet) * x * x)
    assert told(numbers).log_e_above(m) == pytest.approx(math.log(wealth.mean()))
    assert told(-numbers).log_e_below(-m) == pytest.approx(math.log(wealth.mean()))
    assert told(numbers[:0]).log_e_above(m) == pytest.approx(0.0)


def test_no_bet_wins_more_than_the_fair_game_allows() -> None:
    x = np.linspace(-1, 1, 2001)[:, None]
    assert (np.exp(BETS * x - PRICES * x * x) <= 1 + BETS * x + 1e-12).all()  # Fan's inequality: at m = 0 it is fair


def test_the_interval_holds_what_neither_test_rejects() -> None:
    for numbers in (some(400, 0.1, 0.3), some(30, -0.2, 0.5), some(5_000, 0.001, 0.02)):
        sums, alpha = told(numbers), 0.05
        low, high = sums.interval(alpha)
        means = np.linspace(-1, 1, 4001)
        kept = [m for m in means if max(sums.log_e_above(m), sums.log_e_below(m)) < math.log(2 / alpha)]
        assert low == pytest.approx(kept[0], abs=6e-4)
        assert high == pytest.approx(kept[-1], abs=6e-4)
        assert low < sums.mean < high
    assert Sums().interval(0.05) == (-1.0, 1.0)


def visitors(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Thirty visitors who come again and again, each with a liking of its own that is drawn once; the mean is 0."""
    runs, steps = shape
    likings = rng.normal(0, 0.05, (runs, 30))
    likings -= likings.mean(axis=1, keepdims=True)
    who = rng.integers(0, 30, shape)
    return np.clip(np.take_along_axis(likings, who, axis=1) + rng.normal(0, 0.25, (runs, steps)), -1, 1)


def worse_then_better(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Below 0 first, above 0 later, never so long that the average of the expectations so far is above 0."""
    half = shape[1] // 2
    means = np.where(np.arange(shape[1]) < half, -0.1, 0.1)
    return np.clip(rng.normal(means, 0.3, shape), -1, 1)


NULLS: dict[str, Draw] = {
    "normal": lambda rng, shape: np.clip(rng.normal(0, 0.3, shape), -1, 1),
    "coins": lambda rng, shape: rng.choice([-1.0, 1.0], shape),
    "seldom and high": lambda rng, shape: np.where(rng.random(shape) < 0.02, 0.98, -0.02),
    "seldom and low": lambda rng, shape: np.where(rng.random(shape) < 0.02, -0.98, 0.02),
    "mostly nothing": lambda rng, shape: rng.choice([-0.5, 0.0, 0.5], shape, p=[0.01, 0.98, 0.01]),
    "returning visitors": visitors,
    "worse, then better": worse_then_better,
}


@pytest.mark.parametrize("name", NULLS)
def test_looking_after_every_session_errs_no_more_than_alpha(name: str) -> None:
    highest = looked_at(NULLS[name](np.random.default_rng(1), (RUNS, STEPS))).max(axis=1)
    for alpha in (0.2, 0.1, 0.05):
        chance = 2 * math.sqrt(alpha * (1 - alpha) / RUNS)
        assert np.mean(highest >= math.log(1 / alpha)) <= alpha + chance


def test_a_t_test_that_is_looked_at_errs_much_more() -> None:
    """Why it is done this way: the usual 5 % test rejects a true hypothesis in every third run."""
    numbers = NULLS["normal"](np.random.default_rng(1), (RUNS, STEPS))
    steps = np.arange(1, STEPS + 1)
    z = np.cumsum(numbers, axis=1) / np.sqrt(np.cumsum(numbers**2, axis=1))
    assert np.mean((z[:, 30:] > 1.645).any(axis=1)) > 0.3
    assert steps[-1] == STEPS


@pytest.mark.parametrize("mean", [-0.05, 0.0, 0.3])
def test_the_confidence_sequence_holds_the_mean_at_all_times(mean: float) -> None:
    numbers = np.clip(np.random.default_rng(2).normal(mean, 0.3, (RUNS, STEPS)), -1, 1)
    needed = math.log(2 / 0.05)
    mean = float(np.clip(np.random.default_rng(3).normal(mean, 0.3, 10**6), -1, 1).mean())
    missed = (looked_at(numbers, mean) >= needed) | (looked_at(-numbers, -mean) >= needed)
    assert np.mean(missed.any(axis=1)) <= 0.05


@pytest.mark.parametrize(
    ("mean", "spread", "m", "sessions"),
    [
        (0.1, 0.3, 0.0, 180),
        (0.05, 0.3, 0.0, 550),
        (0.02, 0.15, 0.0, 1_000),
        (0.01, 0.1, 0.0, 1_800),
        (0, 0.05, -0.01, 1_000),
    ],
)
def test_half_of_the_runs_have_shown_a_difference_after(mean: float, spread: float, m: float, sessions: int) -> None:
    numbers = np.clip(np.random.default_rng(4).normal(mean, spread, (100, sessions)), -1, 1)
    assert np.mean((looked_at(numbers, m) >= math.log(1 / 0.05)).any(axis=1)) > 0.5


def slow_detector(numbers: np.ndarray) -> float:
    """Every begin has an e-process of its own, and the weight 1 / (1 + log2 t) less that of t + 1."""
    unbegun = [1 / (1 + math.log2(t)) for t in range(1, len(numbers) + 2)]
    value = unbegun[-1]
    for begin in range(len(numbers)):
        rest = numbers[begin:]
        value += (unbegun[begin] - unbegun[begin + 1]) * math.exp(told(rest).log_e_above(0.0))
    return value


def detected(numbers: np.ndarray, alpha: float) -> int | None:
    detector = Detector()
    for t, x in enumerate(numbers.tolist()):
        detector.add(x)
        if detector.log_e >= math.log(1 / alpha):
            return t
    return None


def test_the_detector_averages_over_every_begin() -> None:
    numbers = np.concatenate([some(40, -0.2, 0.3), some(40, 0.4, 0.3, seed=1)])
    detector = Detector()
    assert math.exp(detector.log_e) == pytest.approx(1.0)
    for t, x in enumerate(numbers.tolist(), 1):
        detector.add(x)
        assert math.exp(detector.log_e) == pytest.approx(slow_detector(numbers[:t]))


def test_the_detector_is_quiet_for_ever_and_soon_sees_a_fall() -> None:
    """No more false alarms than alpha; after 1,000 good sessions a fall by 0.2 is seen within 1,000."""
    alpha = 0.05
    false = [detected(some(1_500, 0.0, 0.35, seed), alpha) for seed in range(60)]
    assert sum(found is not None for found in false) <= 3
    falls = [np.concatenate([some(1_000, -0.1, 0.35, s), some(1_000, 0.1, 0.35, s + 1)]) for s in range(0, 40, 2)]
    delays = [detected(numbers, alpha) for numbers in falls]
    assert all(delay is not None and 1_000 <= delay < 2_000 for delay in delays)
