"""The forward pass over stacked weights: K models at once, each row by the weights of its cluster."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from models.attention import KeyValues, RolloutCache, causal
from models.engine_weights import Layer, Linear, Norm, Weights, stack
from models.language_model import LanguageModel

# Layer, queries (B, H, N, D), keys and values (B, G, N, D) -> (B, N, H, D).
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Stacked:
    """See models.language_model: an Ensemble, and a Network of all its clusters.

    Hidden states of B = k * n rows with N tokens each are (k, n * N, D).
    """

    stacked = True

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.clusters = weights.embeddings.shape[0]
        self.size = weights.head.weight.shape[2]
        self.device = weights.embeddings.device
        self.heads, self.context = weights.heads, weights.context
        self.token_bytes = 2 * len(weights.layers) * weights.groups * weights.width * weights.embeddings.itemsize
        self._scale = weights.width**-0.5
        self._part = lru_cache(maxsize=None)(lambda first, last: Stacked(weights.part(first, last)))

    @classmethod
    def of(cls, models: Sequence[LanguageModel], size: int) -> "Stacked":
        """A copy of these models' weights; `size` tokens can come out."""
        return cls(stack([lm.model for lm in models], size, models[0].device, models[0].model.dtype))

    def part(self, first: int, last: int) -> "Stacked":
        """See Ensemble; views of the same weights."""
        return self if (first, last) == (0, self.clusters) else self._part(first, last)

    def prefill(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, KeyValues]:
        """See Network. The last layer is computed at the last token only."""
        final = len(self.weights.layers) - 1
        rows, places = torch.arange(len(lengths), device=self.device), lengths - 1
        outside = (torch.arange(tokens.shape[2], device=self.device) >= lengths[:, None])[:, None, None]
        kept: KeyValues = []

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            kept.append((k, v))
            if index < final:
                return causal(q, k, v, self._scale)
            query = q[rows, :, places].reshape(len(rows), k.shape[1], -1, q.shape[3])
            mask = torch.zeros(outside.shape, dtype=q.dtype, device=self.device).masked_fill_(outside, -torch.inf)
            mask = mask.expand(-1, -1, query.shape[2], -1)
            out = functional.scaled_dot_product_attention(query, k, v, attn_mask=mask, scale=self._scale)
            return out.reshape(len(rows), 1, -1, q.shape[3])

        states = self.states(tokens.flatten(0, 1), self._places(tokens), attend, (rows, places))
        return self.logits(states).flatten(0, 1), kept

    def step(self, tokens: Tensor, positions: Tensor, cache: RolloutCache) -> Tensor:
        """See Network."""

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cache.append(index, k, v)
            return cache.attend(index, q, self._scale)

        return self.logits(self.states(tokens, positions, attend)).view(*tokens.shape, -1)

    def logits_at(self, tokens: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """See Network."""
        states = self.states(tokens, self._places(tokens), lambda _, q, k, v: causal(q, k, v, self._scale))
        return self.logits(states.view(*tokens.shape, -1)[rows, places][None])[0]

    def states(
        self, tokens: Tensor, positions: Tensor, attend: Attend, only: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Hidden states below the head. tokens (B, N), positions (B or 1, N or 1) -> (k, n * N, E).

        With `only` (rows and places, B each) the attention of the last layer gives that place of each row, and so
        does the result: (k, n, E).
        """
        weights, batch = self.weights, tokens.shape[0]
        x = self._embed(tokens, positions)
        turn = None
        if weights.rotary is not None:
            cosine, sine = weights.rotary
            turn = cosine[positions].unsqueeze(1), sine[positions].unsqueeze(1)
        for index, layer in enumerate(weights.layers):
            h = normed(x, layer.norm) if weights.norm_first else x
            q, k, v = self._heads(linear(h, layer.queries_keys_values), batch, turn)
            seen = attend(index, q, k, v)
            if only is not None and layer is weights.layers[-1]:
                x = x.reshape(*tokens.shape, -1)[only].view(self.clusters, -1, x.shape[2])
            x = self._block(x, seen.reshape(self.clusters, x.shape[1], -1), layer)
        if weights.norm is not None:
            x = normed(x, weights.norm)
        return x if weights.project_out is None else linear(x, weights.project_out)

    def logits(self, states: Tensor) -> Tensor:
        """(k, m, E) -> (k, m, V) float32."""
        return linear(states, self.weights.head).float()

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        weights, (batch, length) = self.weights, tokens.shape
        table = weights.embeddings
        if self.clusters > 1:
            first = torch.arange(self.clusters, device=self.device) * table.shape[1]
            tokens = tokens + first.repeat_interleave(batch // self.clusters)[:, None]
        x = functional.embedding(tokens, table.flatten(0, 1)).view(self.clusters, -1, table.shape[2])
        if weights.project_in is not None:
            x = linear(x, weights.project_in)
        if weights.positions is not None:
            learned = weights.positions
            if self.clusters == 1:
                places = functional.embedding(positions, learned[0]).expand(batch, length, -1)
            else:
                spread = positions.expand(batch, -1).view(self.clusters, batch // self.clusters, -1)
                each = torch.arange(self.clusters, device=self.device)[:, None, None]
                places = learned[each, spread].flatten(0, 1).expand(batch, length, -1)
            x = x + places.reshape(x.shape)
        return x

    def _heads(
        self, projected: Tensor, batch: int, turn: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(k, n * N, (H + 2G) * D) -> queries (B, H, N, D), keys and values (B, G, N, D), turned to their places."""
        heads, groups, width = self.weights.heads, self.weights.groups, self.weights.width
        every = projected.view(batch, -1, heads + 2 * groups, width).transpose(1, 2)
        turned = every[:, : heads + groups]
        if turn is not None:  # rotary embedding (Su et al., 2021); the sine carries the sign of the swapped halves
            turned = torch.addcmul(turned * turn[0], turned.roll(width // 2, -1), turn[1])
        return turned[:, :heads], turned[:, heads:], every[:, heads + groups :]

    def _block(self, x: Tensor, seen: Tensor, layer: Layer) -> Tensor:
        """What follows the attention of a layer: output map, residuals, MLP."""
        weights = self.weights
        x = x + linear(seen, layer.out)
        if not weights.norm_first:
            x = normed(x, layer.norm)
        h = linear(normed(x, layer.mlp_norm) if weights.norm_first else x, layer.up)
        if weights.gated:
            gate, up = h.chunk(2, dim=-1)
            h = weights.activation(gate) * up
        else:
            h = weights.activation(h)
        x = x + linear(h, layer.down)
        return x if weights.norm_first else normed(x, layer.mlp_norm)

    def _places(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[-1], device=self.device)[None]
        return places.clamp_(max=self.weights.context - 1)  # padding may lie beyond


def linear(x: Tensor, of: Linear) -> Tensor:
    """(k, m, in) -> (k, m, out), each of the k by its own weights."""
    if of.only is not None:
        weight, bias = of.only
        return (x[0] @ weight if bias is None else torch.addmm(bias, x[0], weight))[None]
    return torch.bmm(x, of.weight) if of.bias is None else torch.baddbmm(of.bias, x, of.weight)


def normed(x: Tensor, norm: Norm) -> Tensor:
    """(k, m, D), each of the k by its own weights."""
    shape = x.shape[-1:]
    if norm.centred:
        if norm.only is not None:
            return torch.layer_norm(x, shape, *norm.only, norm.eps)
        y = functional.layer_norm(x, shape, eps=norm.eps)
    else:
        y = functional.rms_norm(x, shape, eps=norm.eps)
    if norm.weight is None:
        return y
    return y * norm.weight if norm.bias is None else torch.addcmul(norm.bias, y, norm.weight)
