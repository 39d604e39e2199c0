"""A warm start: what a training goes on from, and how a vocabulary grows while every old row keeps its meaning."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.bundle import ADAPTERS, PREDICTORS, read_model, read_tensors
from models.chains import Chains
from models.config import SELECTOR, BundleConfig, decode_config, decode_vocabulary
from models.manifest import verify
from models.specials import EOS, SPECIALS
from models.vocabulary import Vocabulary
from trainer.options import TrainOptions

# A bundle that was trained with another value of one of these cannot go on: its parts would not fit.
SHAPE = (
    "mode", "backend", "clusters", "architecture", "hidden_size", "layers", "heads", "pretrained", "encoder",
    "adapter_rank", "context_tokens", "max_pages",
)  # fmt: skip
MOST_GONE = 0.5  # share of the vocabulary; with more pages gone a new vocabulary is the better start


@dataclass(frozen=True)
class Start:
    """The parts of a bundle that a training goes on from."""

    config: BundleConfig
    vocabulary: Vocabulary
    digest: str
    selector: dict[str, np.ndarray]  # tensors of its router and selector
    models: list[PreTrainedModel]  # as saved: one a cluster, or one for all
    adapters: dict[str, Tensor] | None  # backend "lora"

    @classmethod
    def of(cls, bundle: Path) -> "Start":
        """Verify and read a bundle. Raises BundleRefused."""
        verified = verify(bundle)
        config, vocabulary = decode_config(verified), decode_vocabulary(verified)
        told = config.clusters if config.backend == "token" else 0
        count = config.clusters if config.backend == "separate" else 1
        models = [read_model(verified, k, len(vocabulary) + told) for k in range(count)]
        lora = config.backend == "lora"
        adapters = read_tensors(verified, f"{PREDICTORS}/{ADAPTERS}") if lora else None
        selector = {name: tensor.numpy() for name, tensor in read_tensors(verified, SELECTOR).items()}
        return cls(config, vocabulary, verified.digest, selector, models, adapters)

    def model(self, number: int, vocabulary: Vocabulary, seed: int) -> PreTrainedModel:
        """Model `number` over a vocabulary that begins with this one's pages; see `grow`."""
        told = self.config.clusters if self.config.backend == "token" else 0
        return grow(self.models[number], len(self.vocabulary), len(vocabulary), told, seed)

    def chains(self, vocabulary: Vocabulary) -> Chains:
        """The mixture's chains over a vocabulary that begins with this one's pages.

        A new page is as improbable in every cluster as the rarest one there, so it tells nothing of the cluster yet.
        """
        old = Chains.from_tensors(self.selector, len(self.vocabulary))
        new = np.tile(old.marginals[:, EOS:].min(axis=1)[:, None], len(vocabulary) - len(self.vocabulary))
        marginals = np.concatenate([old.marginals, new], axis=1)
        marginals /= marginals.sum(axis=1, keepdims=True)
        return Chains(old.prior, old.smoothing, marginals, old.heads, old.tails, old.counts)


def obstacle(bundle: Path, options: TrainOptions, pages: Collection[str]) -> str | None:
    """Why a training with these options on these pages cannot go on from the bundle; None where it can.

    Raises BundleRefused.
    """
    verified = verify(bundle)
    trained, wanted = decode_config(verified).training, options.plain()
    for name in SHAPE:
        if name not in trained or trained[name] != wanted[name]:
            return f"{name} is {wanted[name]}, but {trained.get(name)} in the champion"
    known = decode_vocabulary(verified).pages
    gone = len(set(known).difference(pages)) / len(known)
    if gone > MOST_GONE:
        return f"{gone:.0%} of the champion's pages are seen no more"
    return None


def grow(model: PreTrainedModel, before: int, after: int, clusters: int, seed: int) -> PreTrainedModel:
    """Give a model of `before` tokens and `clusters` cluster tokens, in place, rows for `after` tokens.

    Old rows stay as they are, cluster tokens move to the new end with their rows, and new pages get rows drawn around
    the mean of the old pages' with their spread (Hewitt, 2021, Initializing new word embeddings for pretrained
    language models).
    """
    if after == before:
        return model
    layers = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    old = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    model.resize_token_embeddings(after + clusters, mean_resizing=False)
    draw = torch.Generator().manual_seed(seed)
    fresh = torch.randn(after - before, old["input"].shape[1], generator=draw)
    layers = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    for name, layer in layers.items():
        _fill(layer, old[name], fresh, before, after)
    return model


@torch.no_grad()
def _fill(layer: Any, old: Tensor, fresh: Tensor, before: int, after: int) -> None:
    pages = old[len(SPECIALS) : before]
    spread = pages.std(dim=0, correction=0)
    layer.weight[:before] = old[:before]
    layer.weight[before:after] = pages.mean(dim=0) + spread * fresh
    layer.weight[after:] = old[before:]
