"""Attention for rollouts that share a prompt: the prompt's keys and values are kept once for all its rollouts.

The rollouts of a prompt stand where transformers expects the positions of a sequence: the decoder sees (B, R) tokens,
one new token for each of R rollouts, and each attends to the prompt (shared) and to its own tokens only.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, softmax
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

ATTENTION = "browsecast"


class RolloutLayer(CacheLayerMixin):
    """Keys and values of one decoder layer: (B, G, T, D) of the prompts, (B, G, S, D, R) of the rollouts' own tokens.

    G counts key-value heads, S the most tokens a rollout can have. Rollouts lie last, so that sums over D and S run
    over whole vectors of rollouts.
    """

    def __init__(self, keys: Tensor, values: Tensor, bias: Tensor | None, rollouts: int, steps: int) -> None:
        super().__init__()
        batch, groups, _, width = keys.shape
        self.prompt_keys, self.prompt_values, self.bias = keys, values, bias
        self.own_keys = keys.new_empty(batch, groups, steps, width, rollouts)
        self.own_values = torch.empty_like(self.own_keys)
        self.length = 0
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Add a token to each rollout, (B, G, R, D); the attention then gets this layer in place of its keys."""
        self.own_keys[:, :, self.length] = key_states.transpose(-1, -2)
        self.own_values[:, :, self.length] = value_states.transpose(-1, -2)
        self.length += 1
        return self, self

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """Attention of (B, H, R, D) queries to prompt and own tokens -> (B, R, H, D)."""
        batch, heads, rollouts, width = query.shape
        groups, length = self.prompt_keys.shape[1], self.prompt_keys.shape[2]
        share = heads // groups  # query heads of a key-value head
        query = query * scaling
        q = query.reshape(batch, groups, share * rollouts, width)
        prompt = q @ self.prompt_keys.transpose(-1, -2)  # (B, G, H/G * R, T)
        if self.bias is not None:
            prompt += self.bias
        own_q = query.view(batch, groups, share, rollouts, width).permute(0, 1, 4, 2, 3).contiguous()
        own = (self.own_keys[:, :, : self.length].unsqueeze(-2) * own_q.unsqueeze(2)).sum(3)  # (B, G, S, H/G, R)
        scores = torch.cat([prompt, own.flatten(3).transpose(-1, -2)], dim=-1)
        weights = softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)  # (B, G, H/G * R, T + S)
        seen = weights[..., :length] @ self.prompt_values  # (B, G, H/G * R, D)
        own_weights = weights[..., length:].transpose(-1, -2).contiguous()
        own_weights = own_weights.view(batch, groups, self.length, 1, share, rollouts)
        own_seen = (self.own_values[:, :, : self.length].unsqueeze(-2) * own_weights).sum(2)  # (B, G, D, H/G, R)
        seen += own_seen.flatten(3).transpose(-1, -2)
        return seen.view(batch, heads, rollouts, width).transpose(1, 2).contiguous()

    def keep(self, rows: Tensor, columns: Tensor) -> None:
        """Go on with the prompts `rows` (B',) and of each only the rollouts `columns` (B', R')."""
        if self.bias is not None:
            self.bias = self.bias[rows]
        self.prompt_keys, self.prompt_values = self.prompt_keys[rows], self.prompt_values[rows]
        self.own_keys = self._kept(self.own_keys, rows, columns)
        self.own_values = self._kept(self.own_values, rows, columns)

    def _kept(self, own: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        _, groups, steps, width, _ = own.shape
        kept = own.new_empty(len(rows), groups, steps, width, columns.shape[1])
        index = columns[:, None, None, None, :].expand(-1, groups, self.length, width, -1)
        kept[:, :, : self.length] = own[rows, :, : self.length].gather(4, index)
        return kept

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the layer is made with its prompts."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys a rollout can see; no mask is made for this attention."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens before the next one, the prompt's padding included."""
        return int(self.prompt_keys.shape[2]) + self.length

    def get_max_length(self) -> int:
        """Most tokens, the prompt's padding included."""
        return int(self.prompt_keys.shape[2] + self.own_keys.shape[2])


def rollout_cache(prefill: DynamicCache, lengths: Tensor, rollouts: int, steps: int) -> Cache:
    """A cache for `rollouts` continuations of each prefilled prompt, `steps` tokens each at most.

    Prompts are padded on the right; `lengths` (B,) says how many of their tokens count.
    """
    longest = prefill.get_seq_length()
    bias = None
    if int(lengths.min()) < longest:
        keys = prefill.layers[0].keys
        padded = torch.arange(longest, device=keys.device) >= lengths[:, None]
        bias = torch.zeros(padded.shape, dtype=keys.dtype, device=keys.device).masked_fill_(padded, -torch.inf)
        bias = bias[:, None, None, :]  # (B, 1, 1, T)
    layers = [RolloutLayer(layer.keys, layer.values, bias, rollouts, steps) for layer in prefill.layers]
    return Cache(layers=layers)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention seam: rollouts on a shared prompt, else causal attention, padding on the right.

    With padding on the right no real token can see padding, so no mask is needed and the fast kernels apply.
    """
    if isinstance(key, RolloutLayer):
        return key.attend(query, query.shape[-1] ** -0.5 if scaling is None else scaling), None
    out = scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=query.shape[2] > 1, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attend)
