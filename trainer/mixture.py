"""EM for a mixture of Markov chains over users' sessions, with K and the smoothing chosen on validation users.

The unit is the user: one hidden type for all sessions of a user (hetlm_findings, sections 1 and 7). Every number the
fit needs is in one sparse matrix, users by pairs of tokens: the E-step is its product with the chains' log
probabilities, the M-step the product of its transpose with the responsibilities.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np

from models.chains import Chains
from models.vocabulary import EOS
from trainer.corpus import Corpus
from trainer.steps import Steps

HOTTEST = 8.0  # temperature that EM starts at: nearly all users in all clusters
WARM = 2.0  # temperature after a cluster was split
ANNEALED = 16  # iterations until the temperature is 1
LONGEST = 200  # iterations at temperature 1
STILL = 1e-5  # nats a step: a smaller gain ends EM
CANDIDATES = 3  # large clusters to split, and small ones to merge
MOST_MOVES = 12  # splits and merges
FLAT = 50.0  # steps' worth of the pooled marginal in each cluster's marginal
MOST_PAIRS = 500_000  # rarer pairs are left to the smoothing: routing workers hold K floats for each
MOST_USERS = 20_000  # that restarts and choices look at; the chosen fit goes on with all
FIRST_SMOOTHING = 50.0  # with which K is chosen


@dataclass(frozen=True)
class MixtureOptions:
    """What is tried. One value in `clusters` or `smoothings` leaves nothing to choose."""

    clusters: Sequence[int] = range(1, 9)
    smoothings: Sequence[float] = (8.0, 20.0, 50.0, 120.0)
    restarts: int = 12
    trial_restarts: int = 2  # while K is being chosen
    worse: int = 2  # larger K that may do worse before no larger one is tried
    seed: int = 0


@dataclass(frozen=True)
class Choices:
    """What validation said, in nats a token of the validation users' last sessions; the fit's own at the end."""

    by_clusters: dict[int, float] = field(default_factory=dict)
    by_smoothing: dict[float, float] = field(default_factory=dict)
    nll: float = float("nan")


def fit_chains(
    corpus: Corpus, users: np.ndarray, held: np.ndarray, tokens: np.ndarray, size: int,
    options: MixtureOptions | None = None,
) -> tuple[Chains, Choices]:  # fmt: skip
    """Chains of the training `users` from all their sessions, the cluster with most users first.

    K and the smoothing have the least nats on the last sessions of the `held` users, whose earlier sessions tell the
    cluster; of the K that are as good within one standard error, the smallest. K is chosen first, at one smoothing and
    with few restarts, then the smoothing; then all restarts are run.
    """
    options = options or MixtureOptions()
    every = Steps.of(corpus, [corpus.sessions(user) for user in users.tolist()], tokens, size).frequent(MOST_PAIRS)
    some = every.sample(MOST_USERS, options.seed)
    held_out = HeldOut.of(corpus, held, tokens, size)
    nats: dict[int, np.ndarray] = {}
    fits: dict[int, Chains] = {}
    smoothing = FIRST_SMOOTHING if FIRST_SMOOTHING in options.smoothings else options.smoothings[0]
    for k in sorted(set(options.clusters)):
        fits[k] = _fit(some, k, smoothing, options.trial_restarts, options.seed)
        nats[k] = held_out.nats(fits[k])
        best = min(nats, key=lambda other: nats[other].sum())
        if sum(other > best for other in nats) >= options.worse:
            break
    clusters = fewest(nats)
    start = fits[clusters]
    by_smoothing = {lam: held_out.nll(_polish(some, replace(start, smoothing=lam))[0]) for lam in options.smoothings}
    smoothing = min(by_smoothing, key=by_smoothing.__getitem__)
    chains = _fit(some, clusters, smoothing, options.restarts, options.seed, start)
    if some is not every:
        chains = _by_size(_polish(every, chains)[0])
    by_clusters = {k: float(values.sum()) / held_out.tokens for k, values in nats.items()}
    return chains, Choices(by_clusters, by_smoothing, held_out.nll(chains))


def refit_chains(
    corpus: Corpus, users: np.ndarray, held: np.ndarray, tokens: np.ndarray, start: Chains,
    options: MixtureOptions | None = None,
) -> tuple[Chains, Choices]:  # fmt: skip
    """EM from the chains of an earlier fit: each cluster goes on from what it was, so K and their order stay.

    The smoothing is chosen anew, on the last sessions of the `held` users.
    """
    options = options or MixtureOptions()
    rows = [corpus.sessions(user) for user in users.tolist()]
    steps = Steps.of(corpus, rows, tokens, start.size).frequent(MOST_PAIRS)
    held_out = HeldOut.of(corpus, held, tokens, start.size)
    fits = {lam: _polish(steps, replace(start, smoothing=lam))[0] for lam in options.smoothings}
    by_smoothing = {lam: held_out.nll(fitted) for lam, fitted in fits.items()}
    smoothing = min(by_smoothing, key=by_smoothing.__getitem__)
    nll = by_smoothing[smoothing]
    return fits[smoothing], Choices({start.clusters: nll}, by_smoothing, nll)


def responsibilities(
    chains: Chains, corpus: Corpus, users: Sequence[int], tokens: np.ndarray, history: bool = False
) -> np.ndarray:
    """P(cluster | sessions) of each user: (users, K). `history` leaves out the last session, the target."""
    rows = [corpus.sessions(user)[: -1 if history else None] for user in users]
    return posterior(chains, Steps.of(corpus, rows, tokens, chains.size).log_likelihood(chains))


def posterior(chains: Chains, logs: np.ndarray) -> np.ndarray:
    """Log likelihoods (N, K) and the prior to probabilities."""
    joint = logs + np.log(chains.prior)
    return _softmax(joint)


@dataclass(frozen=True)
class HeldOut:
    """Validation users: the sessions before the last one, and the last one, which nothing but the score sees."""

    history: Steps
    target: Steps

    @classmethod
    def of(cls, corpus: Corpus, users: np.ndarray, tokens: np.ndarray, size: int) -> "HeldOut":
        """Users with two sessions or more."""
        sessions = [corpus.sessions(user) for user in users.tolist()]
        return cls(
            Steps.of(corpus, [row[:-1] for row in sessions], tokens, size),
            Steps.of(corpus, [row[-1:] for row in sessions], tokens, size),
        )

    @property
    def tokens(self) -> float:
        """Tokens of the last sessions, [EOS] included."""
        return float(self.target.counts.sum())

    def nats(self, chains: Chains) -> np.ndarray:
        """-log sum_k P(k | history) P_k(last session) of each user: (users,)."""
        weights = posterior(chains, self.history.log_likelihood(chains))
        return next_session_nll(weights, self.target.log_likelihood(chains))

    def nll(self, chains: Chains) -> float:
        """Nats a token of the last sessions."""
        return float(self.nats(chains).sum()) / self.tokens


def next_session_nll(weights: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """Nats of sessions under mixtures with these weights: (N, K), (N, K) log likelihoods -> (N,)."""
    with np.errstate(divide="ignore"):
        joint = np.log(weights) + logs
    nats: np.ndarray = -np.logaddexp.reduce(joint, axis=1)
    return nats


def fewest(nats: Mapping[int, np.ndarray]) -> int:
    """The smallest K whose users' nats are, on average, within one standard error of the best K's (Breiman, 1984)."""
    best = min(nats, key=lambda k: nats[k].sum())
    for k in sorted(nats):
        more = nats[k] - nats[best]
        if more.mean() <= more.std() / math.sqrt(len(more)):
            return k
    return best


def _fit(
    steps: Steps, clusters: int, smoothing: float, restarts: int, seed: int, start: Chains | None = None
) -> Chains:
    """The best of several restarts, and of `start`, by the users' likelihood; then clusters are split and merged."""
    rng = np.random.default_rng([seed, clusters])
    runs = [] if start is None else [_polish(steps, replace(start, smoothing=smoothing))]
    for _ in range(restarts if clusters > 1 else 1):
        shares = rng.dirichlet(np.ones(clusters), size=steps.counts.shape[0])
        runs.append(_polish(steps, _anneal(steps, shares, smoothing, HOTTEST)))
    chains, likelihood = max(runs, key=lambda run: run[1])
    for _ in range(MOST_MOVES if clusters > 1 else 0):
        moved = _moved(steps, chains, likelihood, rng)
        if moved is None:
            break
        chains, likelihood = moved
    return _by_size(chains)


def _moved(steps: Steps, chains: Chains, likelihood: float, rng: np.random.Generator) -> tuple[Chains, float] | None:
    """A better fit with a large cluster split and the users of a small one given to the others, or None.

    EM alone cannot leave an optimum where two types share a cluster and another type has two (Ueda et al., 2000, SMEM
    algorithm for mixture models).
    """
    shares, _ = _expect(steps, chains, 1.0)
    order = np.argsort(-chains.prior, kind="stable").tolist()
    for large, small in product(order[:CANDIDATES], order[: -CANDIDATES - 1 : -1]):
        if large == small:
            continue
        parted = shares.copy()
        parted[:, small] = 0.0
        parted /= np.maximum(parted.sum(axis=1, keepdims=True), np.finfo(float).tiny)
        parted[:, small] = parted[:, large] * rng.random(len(parted))
        parted[:, large] -= parted[:, small]
        moved, reached = _polish(steps, _anneal(steps, parted, chains.smoothing, WARM))
        if reached > likelihood + _least(steps):
            return moved, reached
    return None


def _anneal(steps: Steps, shares: np.ndarray, smoothing: float, hottest: float) -> Chains:
    """EM from responsibilities, the temperature falling from `hottest` to 1."""
    chains = maximise(steps, shares, smoothing)
    for i in range(ANNEALED):
        shares, _ = _expect(steps, chains, hottest ** (1.0 - i / ANNEALED))
        chains = maximise(steps, shares, smoothing)
    return chains


def _polish(steps: Steps, chains: Chains) -> tuple[Chains, float]:
    """EM until it gains no more; the chains, and the log likelihood that the last step started from."""
    before, reached = -np.inf, -np.inf
    for _ in range(LONGEST):
        shares, reached = _expect(steps, chains, 1.0)
        chains = maximise(steps, shares, chains.smoothing)
        if reached - before < _least(steps):
            break
        before = reached
    return chains, reached


def _least(steps: Steps) -> float:
    return STILL * float(steps.counts.sum())


def _expect(steps: Steps, chains: Chains, temperature: float) -> tuple[np.ndarray, float]:
    """Responsibilities (users, K) at a temperature, and the log likelihood of all users."""
    logs = (steps.log_likelihood(chains) + np.log(chains.prior)) / temperature
    return _softmax(logs), float(np.logaddexp.reduce(logs, axis=1).sum())


def maximise(steps: Steps, shares: np.ndarray, smoothing: float) -> Chains:
    """Chains from responsibilities. A cluster's marginal is itself smoothed towards that of all users."""
    counts = steps.counts.T @ shares  # (M, K)
    arrived = np.stack([np.bincount(steps.tails, column, minlength=steps.size) for column in counts.T])  # (K, V)
    pooled = arrived.sum(axis=0) + 1.0
    pooled[:EOS] = 0.0
    arrived += FLAT * pooled / pooled.sum()
    prior = shares.sum(axis=0) + 1.0
    marginals = arrived / arrived.sum(axis=1, keepdims=True)
    return Chains(prior / prior.sum(), smoothing, marginals, steps.heads, steps.tails, counts)


def _by_size(chains: Chains) -> Chains:
    order = np.argsort(-chains.prior, kind="stable")
    return Chains(
        chains.prior[order], chains.smoothing, chains.marginals[order],
        chains.heads, chains.tails, np.ascontiguousarray(chains.counts[:, order]),
    )  # fmt: skip


def _softmax(logs: np.ndarray) -> np.ndarray:
    shares: np.ndarray = np.exp(logs - logs.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return shares
