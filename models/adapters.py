"""Low-rank adapters: one trunk, and for each cluster a small change to every linear layer of its decoder blocks.

LoRA (Hu et al. 2021, arXiv:2106.09685): cluster k's layer is W x + alpha / rank * B_k A_k x. B starts at zero, so all
clusters start as the trunk. Rows of one batch may belong to different clusters.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.language_model import restore

RANK = 4
ALPHA = 8.0  # at this the update has twice the size of the bare product, as is usual for small ranks
SCALE = "scale"  # name of alpha / rank in the saved tensors


class Choice:
    """The clusters of the batch at hand, shared by all layers: one for all rows, one a row (B,), or none."""

    clusters: int | Tensor | None = None


class AdaptedLinear(nn.Linear):
    """A linear layer with a low-rank addition for each cluster: `A` (K, rank, in) and `B` (K, out, rank)."""

    def __init__(
        self, layer: nn.Linear, clusters: int, rank: int, scale: float, choice: Choice, dropout: float
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scale, self.choice = (
            layer.in_features, layer.out_features, scale, choice,
        )  # fmt: skip
        self.dropout = dropout
        self.weight, self.bias = layer.weight, layer.bias
        self.A = nn.Parameter(self.weight.new_empty(clusters, rank, layer.in_features))
        self.B = nn.Parameter(self.weight.new_zeros(clusters, layer.out_features, rank))
        bound = 1 / math.sqrt(layer.in_features)
        nn.init.uniform_(self.A, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, in) -> (B, T, out), or (B * T, in) -> (B * T, out) where a block has flattened its rows."""
        out = super().forward(x)
        chosen = self.choice.clusters
        if chosen is None:
            return out
        a, b = self.A[chosen], self.B[chosen]
        x = nn.functional.dropout(x, self.dropout, self.training)  # of the addition alone
        if isinstance(chosen, int):
            return out + self.scale * (x @ a.T) @ b.T
        rows = x.reshape(len(chosen), -1, self.in_features)
        change = torch.bmm(torch.bmm(rows, a.transpose(1, 2)), b.transpose(1, 2))  # (B, T, rank) -> (B, T, out)
        return out + self.scale * change.view_as(out)

    def merged(self, cluster: int) -> Tensor:
        """Cluster's own weight, W + alpha / rank * B A: (out, in)."""
        return self.weight + self.scale * self.B[cluster] @ self.A[cluster]


class Adapters(nn.Module):
    """A trunk with adapters for K clusters. The trunk is changed in place; outside `using` it computes as before."""

    def __init__(
        self, trunk: PreTrainedModel, clusters: int, rank: int = RANK, alpha: float = ALPHA, dropout: float = 0.0
    ) -> None:
        """`dropout`: of what goes into the adapters, in training."""
        super().__init__()
        self.trunk, self.clusters, self.scale = trunk, clusters, alpha / rank
        self.choice = Choice()
        for name in linear_names(trunk):
            layer = trunk.get_submodule(name)
            trunk.set_submodule(name, AdaptedLinear(layer, clusters, rank, self.scale, self.choice, dropout))

    @contextmanager
    def using(self, clusters: int | Tensor) -> Iterator[PreTrainedModel]:
        """The trunk with the adapter of one cluster for all rows, or of a cluster a row (B,)."""
        self.choice.clusters = clusters
        try:
            yield self.trunk
        finally:
            self.choice.clusters = None

    def forward(self, clusters: int | Tensor, **inputs: Any) -> Any:
        """What the trunk computes from `inputs`, with the adapters of `using`."""
        with self.using(clusters) as trunk:
            return trunk(**inputs)

    def freeze(self, embeddings: bool = True) -> None:
        """Only the adapters learn from here on; without `embeddings`, which are then new, those of pages, too."""
        for name, parameter in self.trunk.named_parameters():
            parameter.requires_grad_(is_adapter(name))
        if not embeddings:
            for layer in (self.trunk.get_input_embeddings(), self.trunk.get_output_embeddings()):
                layer.weight.requires_grad_(True)

    def merge(self, cluster: int) -> PreTrainedModel:
        """Cluster's own model, in the trunk's form: what it computes costs nothing more than the trunk."""
        return self._rebuilt(cluster)

    def plain(self) -> PreTrainedModel:
        """The trunk alone, as it was given or as it has been trained since."""
        return self._rebuilt(None)

    @torch.no_grad()
    def _rebuilt(self, cluster: int | None) -> PreTrainedModel:
        weights = {name: value for name, value in self.trunk.named_parameters() if not is_adapter(name)}
        for name, layer in self._layers():
            if cluster is not None:
                weights[f"{name}.weight"] = layer.merged(cluster)
        return restore(self.trunk.config.to_dict(), weights)

    def tensors(self) -> dict[str, Tensor]:
        """What `adapters.safetensors` holds: `<layer>.A` (K, rank, in), `<layer>.B` (K, out, rank) and `scale` ()."""
        found = {name: value.detach() for name, value in self.trunk.named_parameters() if is_adapter(name)}
        return {**found, SCALE: torch.tensor(self.scale)}

    @classmethod
    def from_tensors(cls, trunk: PreTrainedModel, tensors: Mapping[str, Tensor]) -> "Adapters":
        """The adapters of a saved trunk. Raises ValueError where names, shapes or numbers do not fit it."""
        first = next((value for name, value in tensors.items() if name.endswith(".A")), None)
        if first is None or first.dim() != 3 or SCALE not in tensors or tensors[SCALE].numel() != 1:
            raise ValueError(f"adapters need tensors <layer>.A (K, rank, in), <layer>.B (K, out, rank) and {SCALE}")
        clusters, rank = first.shape[:2]
        made = cls(trunk, clusters, rank, float(tensors[SCALE]) * rank)
        wanted = dict(made._adapters())
        if names := wanted.keys() ^ (tensors.keys() - {SCALE}):
            raise ValueError(f"adapters do not fit the model: {sorted(names)[0]} is in only one of them")
        for name, parameter in wanted.items():
            if parameter.shape != tensors[name].shape:
                shapes = f"{tuple(tensors[name].shape)}, but the model needs {tuple(parameter.shape)}"
                raise ValueError(f"adapter {name} is {shapes}")
            if not torch.isfinite(tensors[name]).all():
                raise ValueError(f"adapter {name} holds NaN or infinite numbers")
            with torch.no_grad():
                parameter.copy_(tensors[name])
        return made

    def _layers(self) -> Iterator[tuple[str, AdaptedLinear]]:
        for name, layer in self.trunk.named_modules():
            if isinstance(layer, AdaptedLinear):
                yield name, layer

    def _adapters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, value) for name, value in self.trunk.named_parameters() if is_adapter(name))


def is_adapter(name: str) -> bool:
    """Whether a parameter of an adapted trunk belongs to the adapters."""
    return name.endswith((".A", ".B"))


def linear_names(trunk: PreTrainedModel) -> list[str]:
    """Paths of the linear layers in the decoder blocks: OPT, Qwen2, Llama and any that keep their blocks in a list.

    Raises ValueError when the model has no such list, or no linear layers there (GPT-2's are convolutions).
    """
    blocks = [
        name
        for name, module in trunk.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == trunk.config.num_hidden_layers
    ]
    if not blocks:
        raise ValueError(f"{type(trunk).__name__} has no list of decoder blocks that adapters could be put into")
    names = [
        name
        for name, module in trunk.named_modules()
        if isinstance(module, nn.Linear) and any(name.startswith(block + ".") for block in blocks)
    ]
    if not names:
        raise ValueError(
            f"{type(trunk).__name__} has no linear layers in its decoder blocks that adapters could change"
        )
    return names
