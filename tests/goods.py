"""Made-up items for the tests of retrieval: each ranker with random weights, co-visits and a map of texts."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import random_array

from models.encoder import WIDTH as TEXT_WIDTH
from models.items import WEIGHTS, ItemsFile, RetrieverConfig, nearest_clusters, unit, write_items
from models.manifest import MANIFEST, write_bundle
from models.xpert import XPert

WIDTH = 16
SEEDS = 5


def goods(
    count: int = 40, clusters: int = 4, seed: int = 0, width: int = WIDTH, **chosen: Any
) -> tuple[ItemsFile, dict[str, np.ndarray]]:
    """Items `i0`, `i1`, ... with vectors, clicks, clusters, co-visits, a text map, and what the ranker needs."""
    rng = np.random.default_rng(seed)
    retriever = RetrieverConfig(**({"prior": (0.1, 0.2), "seed_bias": (0.2, 0.1, 0.0)} | chosen))
    vectors, centroids = unit(rng.normal(size=(count, width))), unit(rng.normal(size=(clusters, width)))
    covisits = random_array((count, count), density=0.2, rng=rng, dtype=np.float32).tocsr()
    tensors = {
        "vectors": vectors,
        "centroids": centroids,
        "clusters": nearest_clusters(vectors, centroids),
        "clicks": rng.integers(0, 50, count).astype(np.float32),
        "text_map": rng.normal(size=(TEXT_WIDTH, width)).astype(np.float32),
        "covisits_indptr": covisits.indptr.astype(np.int64),
        "covisits_indices": covisits.indices.astype(np.int32),
        "covisits_values": covisits.data,
    }
    return ItemsFile([f"i{number}" for number in range(count)], retriever), tensors | weights(retriever, width, seed)


def with_items(bundle: Path, directory: Path, made: tuple[ItemsFile, dict[str, np.ndarray]]) -> Path:
    """A copy of a bundle that knows these items."""

    def fill(work: Path) -> None:
        shutil.copytree(bundle, work, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)
        write_items(work, *made)

    write_bundle(directory, fill)
    return directory


def weights(retriever: RetrieverConfig, width: int = WIDTH, seed: int = 0) -> dict[str, np.ndarray]:
    """The state of the ranker's operator, by the names of the bundle; nothing for a ranker without one."""
    if retriever.ranker not in ("shared", "residual", "personal"):
        return {}
    torch.manual_seed(seed)
    model = XPert(retriever.ranker, width, SEEDS, retriever.heads, retriever.activation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.prior.copy_(torch.tensor([0.1, 0.2]))
    return {WEIGHTS + name: tensor.numpy() for name, tensor in model.state_dict().items()}
