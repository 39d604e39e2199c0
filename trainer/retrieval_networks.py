"""Networks that a personal operator is compared with: the same vectors, examples and loss, but another query."""

from typing import Literal

import torch
from torch import Tensor, nn

from models.xpert import USER, UserAggregation, XPert

Query = Literal["user", "order", "pair"]
PLACES = 64  # of a history whose order counts; older clicks share the last


class Alone(nn.Module):
    """The visitor's vector, whatever the seed is: one query a visitor (SUR)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = _layers(USER, width)

    def forward(self, seeds: Tensor, z: Tensor) -> Tensor:
        """(B, S, D), (B, user) -> (B, S, D)."""
        query: Tensor = self.layers(z)
        return query[:, None].expand(-1, seeds.shape[1], -1)


class Pair(nn.Module):
    """MLP([z, e]) without what e is itself, as DPSR joins a visitor and a query (Zhang et al., SIGIR 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = _layers(USER + width, width)

    def forward(self, seeds: Tensor, z: Tensor) -> Tensor:
        """(B, S, D), (B, user) -> (B, S, D)."""
        query: Tensor = self.layers(torch.cat([z[:, None].expand(-1, seeds.shape[1], -1), seeds], dim=2))
        return query


class OrderedAggregation(UserAggregation):
    """What stands at the last click of a transformer over the clicks in order (Kang and McAuley 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.places = nn.Embedding(PLACES, width)
        nn.init.normal_(self.places.weight, std=0.02)

    def forward(self, history: Tensor, known: Tensor) -> Tensor:
        """(B, H, D) newest first, (B, H) bool -> (B, user)."""
        places = self.places(torch.arange(history.shape[1], device=history.device).clamp(max=PLACES - 1))
        masked = ~known
        masked[:, 0] = False  # somebody must be looked at; a visitor without a known event has no seed either
        last: Tensor = self.encoder(history + places, src_key_padding_mask=masked)[:, 0]
        z: Tensor = self.output(last)
        return z


def network(query: Query, width: int, seeds: int) -> XPert:
    """An untrained one: `user` asks once a visitor, `order` too but minds the order of clicks, `pair` once a seed."""
    model = XPert("residual", width, seeds if query == "pair" else 1)
    model.change = Pair(width) if query == "pair" else Alone(width)
    if query == "order":
        model.aggregation = OrderedAggregation(width)
    return model


def _layers(taken: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(taken, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
