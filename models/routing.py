"""Which cluster a visitor belongs to, kept as running sums. numpy only: sessionizing workers import it."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from models.chains import Chains
from models.config import SELECTOR, VOCABULARY, Selector, decode_config, decode_vocabulary
from models.manifest import BundleRefused, File, open_manifest
from models.vocabulary import BOS, EOS, SPECIALS, UNK, Vocabulary

# Sums are multiples of 2**-32: adding such numbers in float64 is exact, so the order of adding never matters.
UNIT = 2.0**32
CHAINED = "chains.prior"  # a selector with this tensor routes by chains


class Router(ABC):
    """What a closed session adds to a visitor's running sums, and what the sums say about the cluster."""

    def __init__(self, clusters: int, digest: str) -> None:
        """`digest` names this router: only sums of the same digest go together."""
        self.clusters = self.width = clusters  # one sum for each cluster
        self.digest = digest

    def add(self, sums: list[float] | None, count: int, pages: Sequence[str]) -> tuple[list[float], int]:
        """Running sums (`width` floats, None for a new visitor) and number of known pages, a closed session added.

        The order of sessions never matters. A session without pages changes nothing.
        """
        total = [0.0] * self.width if sums is None else list(sums)
        if len(total) != self.width:
            raise ValueError(f"{len(total)} routing sums, but this router keeps {self.width}; compute them anew.")
        costs, known = self._session(pages)
        if costs:
            total = [sum(column) for column in zip(total, *costs, strict=True)]
        return total, count + known

    def route(self, sessions: Sequence[Sequence[str]]) -> list[float]:
        """The running sums of a whole history."""
        sums = [0.0] * self.width
        for session in sessions:
            sums, _ = self.add(sums, 0, session)
        return sums

    def cluster(self, sums: Sequence[float] | None) -> int:
        """The most likely cluster; without sums the one with most users."""
        posterior = self.log_posterior(sums)
        return max(range(self.clusters), key=posterior.__getitem__)

    @abstractmethod
    def log_posterior(self, sums: Sequence[float] | None) -> list[float]:
        """log P(cluster | sessions) of a visitor with these sums, or of a new one."""

    @abstractmethod
    def _session(self, pages: Sequence[str]) -> tuple[list[Sequence[float]], int]:
        """What a session adds, in rows of K floats, and how many of its pages are known."""


class CentroidRouter(Router):
    """Nearest centroid of a visitor's mean page embedding, without the embeddings.

    With page embeddings z_v and centroids e_k, the nearest centroid of the mean over n pages is
    argmin_k |mean - e_k|^2 = argmin_k n |e_k|^2 - 2 sum_v z_v . e_k = argmin_k sum_v (|e_k|^2 - 2 z_v . e_k):
    a visitor needs one running sum per cluster. Clusters are ordered by size, so a visitor without a known page
    goes to the largest.
    """

    def __init__(self, pages: Sequence[str], costs: np.ndarray, digest: str) -> None:
        """`costs` (pages, K): what a page adds to each cluster's sum."""
        super().__init__(int(costs.shape[1]), digest)
        self._costs: dict[str, list[float]] = dict(zip(pages, costs.tolist(), strict=True))

    def log_posterior(self, sums: Sequence[float] | None) -> list[float]:
        """All on the nearest centroid: 0 there, -inf elsewhere."""
        nearest = min(range(self.clusters), key=sums.__getitem__) if sums else 0
        return [0.0 if k == nearest else -math.inf for k in range(self.clusters)]

    def _session(self, pages: Sequence[str]) -> tuple[list[Sequence[float]], int]:
        known = [self._costs[page] for page in pages if page in self._costs]
        return list(known), len(known)


class ChainRouter(Router):
    """The mixture of Markov chains: the sums are log P_k of the sessions so far (hetlm_findings, section 7)."""

    def __init__(self, vocabulary: Vocabulary, chains: Chains, digest: str) -> None:
        super().__init__(chains.clusters, digest)
        self.chains = chains
        self._tokens = vocabulary.tokens()
        self._size = chains.size
        self._log_prior = np.log(chains.prior).tolist()
        # A step that was never seen has log p_k(v | u) = log lam / (n_k(u) + lam) + log p_k(v).
        with np.errstate(divide="ignore"):
            arrive = np.log(chains.marginals.T)
        arrive[:EOS] = 0.0  # nothing steps to [PAD] or [BOS]
        leave = math.log(chains.smoothing) - np.log(chains.totals + chains.smoothing)
        self._leave, self._arrive = _rows(leave), _rows(arrive)
        keys = (chains.heads * chains.size + chains.tails).tolist()
        self._steps = dict(zip(keys, _rows(chains.log_probabilities(chains.heads, chains.tails)), strict=True))

    def log_posterior(self, sums: Sequence[float] | None) -> list[float]:
        """By Bayes: prior times likelihood, normalised."""
        joint = [a + b for a, b in zip(self._log_prior, sums or [0.0] * self.clusters, strict=True)]
        top = max(joint)
        norm = top + math.log(sum(math.exp(value - top) for value in joint))
        return [value - norm for value in joint]

    def _session(self, pages: Sequence[str]) -> tuple[list[Sequence[float]], int]:
        if not pages:
            return [], 0
        tokens = [self._tokens.get(page, UNK) for page in pages]
        rows: list[Sequence[float]] = []
        head = BOS
        for tail in (*tokens, EOS):
            step = self._steps.get(head * self._size + tail)
            if step is not None:
                rows.append(step)
            else:
                rows += (self._leave[head], self._arrive[tail])
            head = tail
        return rows, len(tokens) - tokens.count(UNK)


def page_costs(embeddings: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """What each page adds to each cluster's sum: |e_k|^2 - 2 z_v . e_k. (V, D), (K, D) -> (V, K) float64."""
    z, e = embeddings.astype(np.float64), centroids.astype(np.float64)
    return _exact((e**2).sum(1)[None, :] - 2.0 * z @ e.T)


def load_router(bundle_path: Path) -> Router:
    """The router of a bundle; only the files it reads are verified. Raises BundleRefused."""
    verified = open_manifest(bundle_path)
    config = decode_config(verified)
    vocabulary = decode_vocabulary(verified)
    try:
        tensors = load_tensors(verified.read(SELECTOR))
    except SafetensorError as error:
        raise BundleRefused(bundle_path, SELECTOR, f"not a safetensors file ({error})") from None
    return make_router(bundle_path, vocabulary, config.selector, tensors, router_digest(verified.manifest.files))


def make_router(
    bundle_path: Path, vocabulary: Vocabulary, selector: Selector, tensors: Mapping[str, np.ndarray], digest: str
) -> Router:
    """The router that `selector` names, from the tensors of its file: chains, or `costs`. Raises BundleRefused.

    An MLP's router has chains if it sees their posterior, else costs.
    """
    if selector == "mixture" or (selector == "mlp" and CHAINED in tensors):
        try:
            return ChainRouter(vocabulary, Chains.from_tensors(tensors, len(vocabulary)), digest)
        except ValueError as error:
            raise BundleRefused(bundle_path, SELECTOR, str(error)) from None
    costs = tensors.get("costs")
    if costs is None:
        raise BundleRefused(bundle_path, SELECTOR, "holds no `costs`")
    if costs.ndim != 2 or costs.shape[0] != len(vocabulary) or costs.shape[1] < 1 or costs.dtype != np.float64:
        what = f"`costs` is {costs.shape} {costs.dtype}, but {VOCABULARY} has {len(vocabulary)} tokens"
        raise BundleRefused(bundle_path, SELECTOR, what)
    if not np.isfinite(costs).all():
        raise BundleRefused(bundle_path, SELECTOR, "`costs` holds NaN or infinite numbers")
    return CentroidRouter(vocabulary.pages, costs[len(SPECIALS) :], digest)


def router_digest(files: Mapping[str, File]) -> str:
    """Bundles with the same vocabulary and selector share their running sums, whatever else differs."""
    both = files[VOCABULARY].sha256 + files[SELECTOR].sha256
    return f"sha256:{hashlib.sha256(both.encode()).hexdigest()}"


def _rows(logs: np.ndarray) -> list[tuple[float, ...]]:
    return [tuple(row) for row in _exact(logs).tolist()]


def _exact(values: np.ndarray) -> np.ndarray:
    exact: np.ndarray = np.round(values * UNIT) / UNIT
    return exact
