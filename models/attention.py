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


class RolloutLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one decoder layer: (B, G, T, D) of the prompts, (B, G, R, S, D) of the rollouts' own tokens.

    G counts key-value heads, S the most tokens a rollout can have.
    """

    def __init__(self, keys: Tensor, values: Tensor, bias: Tensor | None, rollouts: int, steps: int) -> None:
        super().__init__()
        batch, groups, _, width = keys.shape
        self.prompt_keys, self.prompt_values, self.bias = keys, values, bias
        self.own_keys = keys.new_empty(batch, groups, rollouts, steps, width)
        self.own_values = torch.empty_like(self.own_keys)
        self.length = 0
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Add a token to each rollout, (B, G, R, D); the attention then gets this layer in place of its keys."""
        self.own_keys[:, :, :, self.length] = key_states
        self.own_values[:, :, :, self.length] = value_states
        self.length += 1
        return self, self

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """Attention of (B, H, R, D) queries to prompt and own tokens -> (B, R, H, D)."""
        batch, heads, rollouts, width = query.shape
        groups = self.own_keys.shape[1]
        q = query.view(batch, groups, heads // groups, rollouts, width).transpose(2, 3) * scaling  # (B, G, R, H/G, D)
        flat = q.reshape(batch, groups, -1, width)  # (B, G, R * H/G, D)
        own_keys, own_values = self.own_keys[..., : self.length, :], self.own_values[..., : self.length, :]
        prompt = flat @ self.prompt_keys.transpose(-1, -2)  # (B, G, R * H/G, T)
        if self.bias is not None:
            prompt = prompt + self.bias
        prompt = prompt.view(*q.shape[:-1], -1)
        own = (q.unsqueeze(-2) * own_keys.unsqueeze(-3)).sum(-1)  # (B, G, R, H/G, S)
        weights = softmax(torch.cat([prompt, own], dim=-1), dim=-1, dtype=torch.float32).to(q.dtype)
        length = prompt.shape[-1]
        seen = weights[..., :length].reshape(batch, groups, -1, length) @ self.prompt_values
        seen = seen.view(q.shape) + (weights[..., length:].unsqueeze(-1) * own_values.unsqueeze(-3)).sum(-2)
        return seen.permute(0, 2, 1, 3, 4).reshape(batch, rollouts, heads, width)

    def keep(self, rows: Tensor, columns: Tensor) -> None:
        """Go on with the prompts `rows` (B',) and of each only the rollouts `columns` (B', R')."""
        if self.bias is not None:
            self.bias = self.bias[rows]
        self.prompt_keys, self.prompt_values = self.prompt_keys[rows], self.prompt_values[rows]
        self.own_keys = self.own_keys.transpose(1, 2)[rows[:, None], columns].transpose(1, 2)
        self.own_values = self.own_values.transpose(1, 2)[rows[:, None], columns].transpose(1, 2)

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
        return int(self.prompt_keys.shape[2] + self.own_keys.shape[3])


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
