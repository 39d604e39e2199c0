"""Seeds of a visitor made into queries: XPert's operators (Mittal et al., SIGIR 2023), and what is added to cosines."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from models.items import Activation

USER = 64  # numbers that a visitor's z has
LAYERS, HEADS = 2, 8
FEEDFORWARD = 256
FEEDFORWARD_WEIGHTS = "aggregation.encoder.layers.0.linear1.weight"  # (feedforward, D), in the state of an XPert
DROPOUT = 0.1
SMALL = (
    0.1  # of the default initialisation: a morph starts near no morph, and not at zero, where ReLU would never learn
)

NEVER = -1e4  # the bias of a seed that is none; -inf would have no gradient

Operator = Literal["identity", "shared", "residual", "personal"]


class UserAggregation(nn.Module):
    """A visitor's events as one vector z (XPert, segment S1). The order of events does not matter."""

    def __init__(self, width: int, feedforward: int = FEEDFORWARD, user: int = USER) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, HEADS, feedforward, DROPOUT, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.output = nn.Linear(width, user)

    def forward(self, history: Tensor, known: Tensor) -> Tensor:
        """(B, H, D), (B, H) bool -> z (B, user), of length 1; zeros for a visitor without a known event."""
        some = known.any(dim=1)
        z = history.new_zeros(len(history), self.output.out_features)
        if some.any():
            events = self.output(self.encoder(history[some], src_key_padding_mask=~known[some]))
            z[some] = normalize((events * known[some, :, None]).sum(dim=1), dim=1)
        return z


class Morph(nn.Module):
    """R_u = mean over heads of act(W_h z + b_h) (XPert, segment S2), and e + R_u^T e (S3). Without z, R_u = 0."""

    def __init__(self, width: int, heads: int, activation: Activation, user: int = USER) -> None:
        super().__init__()
        self.width, self.heads, self.activation = width, heads, activation
        self.create = nn.Linear(user, heads * width * width)
        with torch.no_grad():
            self.create.weight.mul_(SMALL)
            self.create.bias.mul_(SMALL)

    def morphs(self, z: Tensor) -> Tensor:
        """z (B, user) -> R_u (B, D, D)."""
        heads = self.create(z).view(-1, self.heads, self.width * self.width)
        if self.activation == "relu":
            heads = torch.relu(heads)
        morphs: Tensor = heads.mean(dim=1).view(-1, self.width, self.width)
        return morphs * (z != 0).any(dim=1)[:, None, None]

    def forward(self, seeds: Tensor, z: Tensor) -> Tensor:
        """(B, S, D), (B, user) -> (B, S, D)."""
        return seeds + seeds @ self.morphs(z)  # a row e^T R is (R^T e)^T


class Shared(nn.Module):
    """e + R^T e with one R for all visitors: the control of what being personal is worth."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(width, width))

    def forward(self, seeds: Tensor, z: Tensor | None) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return seeds + seeds @ self.matrix


class Residual(nn.Module):
    """e + MLP([z, e]); the last layer starts at zero, so training starts from the seeds themselves."""

    def __init__(self, width: int, user: int = USER) -> None:
        super().__init__()
        self.hidden = nn.Linear(user + width, 4 * width)
        self.output = nn.Linear(4 * width, width)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, seeds: Tensor, z: Tensor) -> Tensor:
        """(B, S, D), (B, user) -> (B, S, D)."""
        both = torch.cat([z[:, None, :].expand(-1, seeds.shape[1], -1), seeds], dim=2)
        change: Tensor = self.output(torch.relu(self.hidden(both)))
        return seeds + change


class XPert(nn.Module):
    """Scores of items for a visitor's seeds: cosine + bias of the seed's rank + prior * log(1 + clicks).

    The prior has a weight within a session and another for a session's first click. The highest over the seeds counts.
    All of it is one inner product, so any index for inner products can search it.
    """

    def __init__(
        self,
        operator: Operator,
        width: int,
        seeds: int,
        heads: int = 1,
        activation: Activation = "identity",
        feedforward: int = FEEDFORWARD,
    ) -> None:
        super().__init__()
        self.operator = operator
        self.aggregation = UserAggregation(width, feedforward) if operator in ("residual", "personal") else None
        self.change: nn.Module | None = None
        if operator == "shared":
            self.change = Shared(width)
        elif operator == "residual":
            self.change = Residual(width)
        elif operator == "personal":
            self.change = Morph(width, heads, activation)
        self.seed_bias = nn.Parameter(torch.zeros(seeds))
        self.prior = nn.Parameter(torch.zeros(2))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(10.0)))

    def user(self, history: Tensor, known: Tensor) -> Tensor | None:
        """z of each visitor, (B, H, D), (B, H) -> (B, user); None where the operator needs none."""
        return None if self.aggregation is None else self.aggregation(history, known)

    def forward(self, seeds: Tensor, known: Tensor, z: Tensor | None, opens: Tensor) -> Tensor:
        """A query for each seed, multiplied with `indexed` items: (B, S, D), (B, S), (B, user), (B,) -> (B, S, D + 2).

        It is [psi, prior, bias]. A seed that is not known can win nothing; with none known, the first stands for the
        prior alone.
        """
        psi = normalize(seeds if self.change is None else self.change(seeds, z), dim=2) * known[:, :, None]
        cold = ~known.any(dim=1)
        bias = self.bias(seeds.shape[1]).masked_fill(~known, NEVER).masked_fill(cold[:, None], 0.0)
        prior = self.prior[opens.long()][:, None].expand_as(bias)
        return torch.cat([psi, prior[:, :, None], bias[:, :, None]], dim=2)

    def bias(self, seeds: int) -> Tensor:
        """(S,): the last one learned holds for all seeds beyond."""
        return self.seed_bias[torch.arange(seeds).clamp(max=len(self.seed_bias) - 1)]
