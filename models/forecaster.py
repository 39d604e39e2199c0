"""From visits to forecasts: route, roll out, shrink to the visitor's own habits, choose the expected set."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from models.baselines import last_session
from models.config import BundleConfig
from models.outcomes import OutcomeHead
from models.predictors import Predictor
from models.routing import Router
from models.sampling import uniforms
from models.selector import Selector
from models.sets import own_frequencies, rank, set_size, shrink
from models.visit import CONTEXT_TOKENS, Forecast, Visit, recent
from models.vocabulary import SPECIALS, Tokenizer, Vocabulary, presence

MAX_SET = 64  # pages looked at for an expected set


class Evidence(NamedTuple):
    """What is known of B visits before any decoding setting is applied; the trainer calibrates on it."""

    clusters: list[int]
    posterior: np.ndarray  # (B, K) P(cluster | visit)
    counts: np.ndarray  # (B, V) sessions of the visitor with the page
    sessions: np.ndarray  # (B,) sessions of the visitor
    own: np.ndarray  # (B, 2) the visitor's own smoothed rate of cart and purchase
    marginals: np.ndarray  # (B, V) from rollouts
    rolled: np.ndarray  # (B, 2) P(cart), P(purchase) from rollouts
    paths: list[list[int]]


class Forecaster:
    """The parts of a bundle at work; needs no files."""

    def __init__(
        self,
        config: BundleConfig,
        vocabulary: Vocabulary,
        router: Router,
        selector: Selector,
        predictor: Predictor,
        heads: Sequence[OutcomeHead],
    ) -> None:
        """`heads`: cart, then purchase."""
        self.config, self.vocabulary, self.router = config, vocabulary, router
        self.selector, self.predictor = selector, predictor
        self.heads = list(heads)
        self.tokenizer = Tokenizer(vocabulary)
        self.shares = np.array([0.0] * len(SPECIALS) + vocabulary.shares)
        self._groups = np.stack([head.marks for head in self.heads])
        self._outcome_tokens = [np.flatnonzero(head.marks) for head in self.heads]

    @property
    def router_digest(self) -> str:
        """Whose running routing sums this can use."""
        return self.router.digest

    def forecast(self, visits: Sequence[Visit]) -> list[Forecast]:
        """What the next session of each visit should look like. Deterministic: the seed fixes the rollouts."""
        if not visits:
            return []
        evidence = self.evidence(visits)
        q = self.probabilities(evidence)
        outcomes = [
            head.combine(evidence.rolled[:, i], evidence.own[:, i], head.passage(evidence.posterior)).tolist()
            for i, head in enumerate(self.heads)
        ]
        sets = self.expected_sets(q, outcomes)
        return [
            Forecast(cluster, pages, self.tokenizer.decode(path), cart, purchase)
            for cluster, pages, path, cart, purchase in zip(
                evidence.clusters, sets, evidence.paths, *outcomes, strict=True
            )
        ]

    def evidence(self, visits: Sequence[Visit]) -> Evidence:
        """Everything the models and the visitor's own history say."""
        decoding = self.config.decoding
        tokens = self._tokens(visits)
        posterior = self.posterior(visits)
        # One row of draws more than there are rollouts: its first number deals the rollouts to the clusters.
        draws = uniforms([visit.seed for visit in visits], decoding.rollouts + 1, decoding.max_pages)
        prompts = [self.tokenizer.render(sessions) for sessions in tokens]
        routed = self.routed(posterior)
        rolled = self.predictor.rollouts(prompts, routed, draws[:, :-1], self._groups, draws[:, -1, 0])
        outcomes = [
            rolled.groups[:, i] if head.certain else head.rollouts(rolled.sequences)
            for i, head in enumerate(self.heads)
        ]
        counts, sessions, own = self._habits(tokens)
        rates = np.stack(outcomes, axis=1)
        clusters = posterior.argmax(axis=1).tolist()
        return Evidence(clusters, posterior, counts, sessions, own, rolled.marginals, rates, rolled.paths)

    def probabilities(self, evidence: Evidence) -> np.ndarray:
        """Probability of each page in the next session, (B, V): rollouts shrunk to the visitor's own frequencies."""
        decoding = self.config.decoding
        prior = own_frequencies(evidence.counts, evidence.sessions, self.shares, decoding.own_weight)
        return shrink(evidence.marginals, decoding.rollouts, prior, decoding.shrink)

    def expected_sets(self, q: np.ndarray, outcomes: Sequence[Sequence[float]]) -> list[list[tuple[str, float]]]:
        """The expected set of each row of q (B, V); outcome pages join by their own threshold, not by rank."""
        ranked = q.copy()
        for tokens in self._outcome_tokens:
            ranked[:, tokens] = 0.0
        order = rank(ranked, MAX_SET)
        best = np.take_along_axis(ranked, order, axis=1)
        sizes = set_size(best, q.sum(axis=1)) if best.size else np.zeros(len(q), dtype=np.int64)
        names, sets = self.tokenizer.names, []
        for row, size in enumerate(sizes.tolist()):
            found = dict(zip((names[t] for t in order[row, :size]), best[row, :size].tolist(), strict=True))
            for head, tokens, p in zip(self.heads, self._outcome_tokens, outcomes, strict=True):
                if len(tokens) and p[row] >= head.outcome.threshold:
                    likeliest = tokens[int(np.argmax(q[row, tokens]))]
                    found[names[likeliest]] = max(p[row], found.get(names[likeliest], 0.0))  # one page may mark both
            sets.append(sorted(found.items(), key=lambda page: -page[1]))
        return sets

    def fallback(self, visits: Sequence[Visit]) -> list[Forecast]:
        """The frequency baseline: the visitor's own pages shrunk to popularity, and own rates. Needs no model."""
        if not visits:
            return []
        decoding = self.config.decoding
        counts, sessions, own = self._habits(self._tokens(visits))
        q = own_frequencies(counts, sessions, self.shares, decoding.own_weight)
        order = rank(q, decoding.fallback_pages)
        cart, purchase = (head.fallback(own[:, i]).tolist() for i, head in enumerate(self.heads))
        names = self.tokenizer.names
        return [
            Forecast(
                None,
                [(names[token], float(q[row, token])) for token in order[row]],
                last_session(visit).path,
                cart[row],
                purchase[row],
            )
            for row, visit in enumerate(visits)
        ]

    def nll(self, visits: Sequence[Visit], targets: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        """Nats of each target session and its number of tokens, [EOS] included: (B,), (B,)."""
        prompts = [self.tokenizer.render(sessions) for sessions in self._tokens(visits)]
        encoded = [self.tokenizer.encode(target) for target in targets]
        nats = self.predictor.nll(prompts, self.routed(self.posterior(visits)), encoded)
        return nats, np.array([len(target) + 1 for target in encoded])

    def posterior(self, visits: Sequence[Visit]) -> np.ndarray:
        """P(cluster | visit): (B, K)."""
        return self.selector.posterior(visits)

    def routed(self, posterior: np.ndarray) -> np.ndarray:
        """How much each cluster has to say, (B, K): the posterior itself, or all for the likeliest."""
        return posterior if self.config.soft else np.eye(posterior.shape[1])[posterior.argmax(axis=1)]

    def _tokens(self, visits: Sequence[Visit]) -> list[list[list[int]]]:
        # A live visit may bring more than an archived one; and the session to come needs trained positions, too.
        budget = min(self.config.context_tokens, CONTEXT_TOKENS) - self.config.decoding.max_pages - 1
        return [[self.tokenizer.encode(pages) for pages in recent(visit.sessions, budget)] for visit in visits]

    def _habits(self, tokens: Sequence[Sequence[Sequence[int]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        counts = np.stack([presence(sessions, len(self.shares)) for sessions in tokens])
        own = np.array([[head.rate(sessions) for head in self.heads] for sessions in tokens])
        return counts, np.array([float(len(sessions)) for sessions in tokens]), own
