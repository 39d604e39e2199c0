"""Random chains for the tests of this room."""

import numpy as np

from models.chains import Chains
from models.vocabulary import BOS, EOS


def random_chains(size: int, clusters: int, seed: int = 0, share: float = 0.3, smoothing: float = 3.0) -> Chains:
    """Chains over `size` tokens in which about `share` of all pairs were seen; sessions have a few pages."""
    rng = np.random.default_rng(seed)
    seen = rng.random((size, size)) < share
    seen[[0, EOS]] = False  # nothing follows [PAD] or [EOS]
    seen[:, [0, BOS]] = False  # nothing is followed by [PAD] or [BOS]
    seen[BOS, EOS] = False
    seen[BOS, EOS + 2] = seen[EOS + 1 :, EOS] = True
    heads, tails = np.nonzero(seen)
    counts = rng.gamma(1.0, 4.0, size=(len(heads), clusters))
    counts[tails == EOS] += share * size
    marginals = rng.dirichlet(np.ones(size), size=clusters)
    marginals[:, :EOS] = 0.0
    return Chains(
        prior=rng.dirichlet(np.full(clusters, 5.0)),
        smoothing=smoothing,
        marginals=marginals / marginals.sum(axis=1, keepdims=True),
        heads=heads.astype(np.int64),
        tails=tails.astype(np.int64),
        counts=counts,
    )
