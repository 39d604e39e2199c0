"""Which cluster a visitor belongs to, kept as running sums. numpy only: sessionizing workers import it."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from models.config import SELECTOR, VOCABULARY, decode_config, decode_vocabulary
from models.manifest import BundleRefused, File, open_manifest
from models.vocabulary import SPECIALS, Vocabulary

# Sums are multiples of 2**-32: adding such numbers in float64 is exact, so the order of adding never matters.
UNIT = 2.0**32


class Router:
    """Nearest centroid of a visitor's mean page embedding, without the embeddings.

    With page embeddings z_v and centroids e_k, the nearest centroid of the mean over n pages is
    argmin_k |mean - e_k|^2 = argmin_k n |e_k|^2 - 2 sum_v z_v . e_k = argmin_k sum_v (|e_k|^2 - 2 z_v . e_k):
    a visitor needs one running sum per cluster. Clusters are ordered by size, so a visitor without a known page
    goes to the largest.
    """

    def __init__(self, pages: Sequence[str], costs: np.ndarray, digest: str) -> None:
        """`costs` (pages, K): what a page adds to each cluster's sum; `digest` names this router."""
        self.digest = digest
        self.width = int(costs.shape[1])
        self._costs: dict[str, list[float]] = dict(zip(pages, costs.tolist(), strict=True))

    def add(self, sums: list[float] | None, count: int, pages: Sequence[str]) -> tuple[list[float], int]:
        """Running sums (K floats, None for a new visitor) and number of known pages, a closed session added."""
        total = [0.0] * self.width if sums is None else list(sums)
        if len(total) != self.width:
            raise ValueError(f"{len(total)} routing sums, but this router keeps {self.width}; compute them anew.")
        for page in pages:
            costs = self._costs.get(page)
            if costs is not None:
                total = [a + b for a, b in zip(total, costs, strict=True)]
                count += 1
        return total, count

    def cluster(self, sums: list[float] | None, count: int = 0) -> int:
        """The visitor's cluster. `count` is not needed: the sums already weigh each page once."""
        return min(range(self.width), key=sums.__getitem__) if sums else 0

    def route(self, sessions: Sequence[Sequence[str]]) -> list[float]:
        """The running sums of a whole history."""
        sums: list[float] | None = None
        for session in sessions:
            sums, _ = self.add(sums, 0, session)
        return sums if sums is not None else [0.0] * self.width


def page_costs(embeddings: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """What each page adds to each cluster's sum: |e_k|^2 - 2 z_v . e_k. (V, D), (K, D) -> (V, K) float64."""
    z, e = embeddings.astype(np.float64), centroids.astype(np.float64)
    costs: np.ndarray = np.round(((e**2).sum(1)[None, :] - 2.0 * z @ e.T) * UNIT) / UNIT
    return costs


def load_router(bundle_path: Path) -> Router:
    """The router of a bundle; only the files it reads are verified. Raises BundleRefused."""
    verified = open_manifest(bundle_path)
    decode_config(verified)
    vocabulary = decode_vocabulary(verified)
    try:
        costs = load_tensors(verified.read(SELECTOR))["costs"]
    except (SafetensorError, KeyError) as error:
        raise BundleRefused(bundle_path, SELECTOR, f"holds no `costs` ({error})") from None
    return make_router(bundle_path, vocabulary, costs, router_digest(verified.manifest.files))


def make_router(bundle_path: Path, vocabulary: Vocabulary, costs: np.ndarray, digest: str) -> Router:
    """A router from verified parts. `costs` (V, K) has a row for every token. Raises BundleRefused."""
    if costs.ndim != 2 or costs.shape[0] != len(vocabulary) or costs.shape[1] < 1 or costs.dtype != np.float64:
        what = f"`costs` is {costs.shape} {costs.dtype}, but {VOCABULARY} has {len(vocabulary)} tokens"
        raise BundleRefused(bundle_path, SELECTOR, what)
    if not np.isfinite(costs).all():
        raise BundleRefused(bundle_path, SELECTOR, "`costs` holds NaN or infinite numbers")
    return Router(vocabulary.pages, costs[len(SPECIALS) :], digest)


def router_digest(files: Mapping[str, File]) -> str:
    """Bundles with the same vocabulary and selector share their running sums, whatever else differs."""
    both = files[VOCABULARY].sha256 + files[SELECTOR].sha256
    return f"sha256:{hashlib.sha256(both.encode()).hexdigest()}"
