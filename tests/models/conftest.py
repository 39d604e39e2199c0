"""Tiny models and bundles for the tests of this room."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from models.bundle import save_bundle
from models.config import FORMAT, BundleConfig, Decoding, Outcome
from models.items import ItemsFile
from models.language_model import LanguageModel, build
from models.routing import page_costs
from models.vocabulary import SPECIALS, Vocabulary

torch.set_num_threads(1)  # the machine is shared

PAGES = ["home", "shoes", "shirts", "search", "cart", "paid", "sale", "help"]
SIZE = len(SPECIALS) + len(PAGES)
Goods = tuple[ItemsFile, dict[str, np.ndarray]]
ARCHITECTURES = ("opt", "qwen2", "llama")


def vocabulary() -> Vocabulary:
    """Eight pages with falling popularity."""
    return Vocabulary(PAGES, [0.9 - 0.1 * i for i in range(len(PAGES))], 100)


def tiny(architecture: str = "opt", seed: int = 0, size: int = SIZE) -> LanguageModel:
    """A model with random weights that are large enough to prefer some pages."""
    torch.manual_seed(seed)
    model = build(architecture, size, 16, 2, 2, 160)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return LanguageModel(model)


def write_tiny(path: Path, architecture: str = "opt", clusters: int = 2, items: Goods | None = None) -> Path:
    """A whole bundle with random models and embeddings."""
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(SIZE, 12)).astype(np.float32)
    embeddings[: len(SPECIALS)] = 0.0
    centers = rng.normal(size=(clusters, 12)).astype(np.float32)
    costs = page_costs(embeddings, centers)
    costs[: len(SPECIALS)] = 0.0
    config = BundleConfig(
        kind="browsecast-bundle", format=FORMAT, created="2026-01-02T03:04:05+00:00", mode="kmeans",
        selector="kmeans", backend="separate", architecture=architecture, clusters=clusters,
        cluster_users=[3] * clusters, context_tokens=64, decoding=Decoding(rollouts=8, max_pages=10),
        cart=Outcome(pages=["cart"], base_rate=0.3, threshold=0.2, own_weight=0.5),
        purchase=Outcome(pages=[], base_rate=0.1),
    )  # fmt: skip
    weights = {"cart": np.zeros(SIZE), "purchase": np.linspace(-2.0, 1.0, SIZE)}
    models = [tiny(architecture, seed=k).model for k in range(clusters)]
    selector = {"costs": costs, "centroids": centers}
    save_bundle(path, config, vocabulary(), embeddings, selector, weights, models, "# A tiny bundle\n", items=items)
    return path


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One bundle for all tests that only read it."""
    return write_tiny(tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture
def prompts() -> Callable[[int, int], list[list[int]]]:
    """Makes prompts of different lengths: `prompts(count, seed)`."""

    def make(count: int, seed: int) -> list[list[int]]:
        rng = np.random.default_rng(seed)
        return [
            [1, *rng.integers(len(SPECIALS), SIZE, size=int(rng.integers(1, 30))).tolist(), 2, 1] for _ in range(count)
        ]

    return make
