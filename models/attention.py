"""Attention of rollouts that share a prompt: the prompt's keys and values are kept once for all its rollouts.

The rollouts of a prompt stand where a transformer expects the positions of a sequence: the decoder sees (B, C) tokens,
one new token for each of C rollouts, and a mask lets each see the prompt and its own tokens only (as in tree attention;
Miao et al., SpecInfer, 2023). So one fused attention call does a layer, whatever the device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

ATTENTION = "browsecast"

KeyValues = list[tuple[Tensor, Tensor]]
Room = Callable[[int, tuple[int, ...], Tensor], Tensor]  # number, shape and an example -> memory to fill


class RolloutCache:
    """Keys and values of B prompts and of their C rollouts: (B, G, T + S * C, D) for each layer; G key-value heads.

    Place T + s * C + c holds token s of rollout c, so whatever has been filled is a prefix. All is allocated once.
    """

    def __init__(self, layers: KeyValues, mask: Tensor, prompt: int, columns: int, step: Tensor, blank: bool) -> None:
        """`mask` (B, 1, H/G * C, T + S * C) is 0 where a rollout may look and -inf elsewhere; `step` (1,) counts.

        `blank`: what is not filled is zero, since steps of static shape look at it too.
        """
        self.layers, self.mask, self.prompt, self.columns, self.step = layers, mask, prompt, columns, step
        self.blank = blank
        self.slots = (layers[0][0].shape[2] - prompt) // columns
        self._lanes = torch.arange(columns, device=step.device)
        self._slot = torch.arange(-prompt, self.slots * columns, device=step.device).div(columns, rounding_mode="floor")

    @classmethod
    def start(
        cls, prompts: KeyValues, lengths: Tensor, heads: int, columns: int, slots: int, room: "Room", blank: bool
    ) -> "RolloutCache":
        """Room for `slots` tokens of each of `columns` rollouts behind every prefilled prompt, (B, G, T, D) a layer.

        Prompts are padded on the right; `lengths` (B,) says how many of their tokens count. `heads` are the queries'.
        """
        batch, groups, longest, width = prompts[0][0].shape
        shape = (batch, groups, longest + slots * columns, width)
        layers = []
        for layer, pair in enumerate(prompts):
            keys, values = (room(2 * layer + half, shape, part) for half, part in enumerate(pair))
            keys[:, :, :longest], values[:, :, :longest] = pair
            if blank:
                keys[:, :, longest:], values[:, :, longest:] = 0.0, 0.0
            layers.append((keys, values))
        padding = torch.arange(longest, device=lengths.device) >= lengths[:, None]
        mask = _mask(padding, heads // groups, columns, slots, prompts[0][0].dtype)
        step = torch.zeros(1, dtype=torch.long, device=lengths.device)
        return cls(layers, mask, longest, columns, step, blank)

    def begin(self, reach: int, exact: bool) -> None:
        """Open this step: `reach` tokens of each rollout are looked at, which is just what is filled if `exact`."""
        self._end = self.prompt + reach * self.columns
        self._places = self._lanes + (self.prompt + self.step * self.columns)
        self._visible = self.mask[..., : self._end]
        if not exact:
            self._visible = self._visible.masked_fill(self._slot[: self._end] > self.step, -torch.inf)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """A token for each rollout: (B, G, C, D)."""
        for room, part in zip(self.layers[layer], (keys, values), strict=True):
            room.index_copy_(2, self._places, part)

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attention of (B, H, C, D) queries to prompt and own tokens -> (B, C, H, D)."""
        keys, values = (room[:, :, : self._end] for room in self.layers[layer])
        batch, heads, columns, width = query.shape
        q = query.reshape(batch, keys.shape[1], -1, width)  # heads that share keys stand below each other
        out = scaled_dot_product_attention(q, keys, values, attn_mask=self._visible, scale=scale)
        return out.reshape(batch, heads, columns, width).transpose(1, 2)

    def keep(self, rows: Tensor, columns: Tensor, filled: int) -> "RolloutCache":
        """Go on with the prompts `rows` (B',) and of each only the rollouts `columns` (B', C') of `filled` tokens."""
        batch, kept = columns.shape
        start, stop, end = self.prompt, self.prompt + filled * self.columns, self.prompt + filled * kept
        places = self.prompt + self.slots * kept
        layers = []
        for pair in self.layers:
            shape = (batch, pair[0].shape[1], places, pair[0].shape[3])
            keys, values = (part.new_zeros(shape) if self.blank else part.new_empty(shape) for part in pair)
            for room, part in zip((keys, values), pair, strict=True):
                room[:, :, :start] = part[rows, :, :start]
                own = part[:, :, start:stop].unflatten(2, (filled, self.columns))[rows[:, None], :, :, columns]
                room[:, :, start:end] = own.permute(0, 2, 3, 1, 4).flatten(2, 3)  # (B', C', G, s, D) as places
            layers.append((keys, values))
        padding = self.mask[rows, 0, 0, :start] != 0
        mask = _mask(padding, self.mask.shape[2] // self.columns, kept, self.slots, self.mask.dtype)
        return RolloutCache(layers, mask, start, kept, self.step.clone(), self.blank)

    def tensors(self) -> list[Tensor]:
        """Everything that a step reads or writes, keys and values first."""
        return [*(part for pair in self.layers for part in pair), self.mask, self.step]

    def placed(self, tensors: Sequence[Tensor]) -> "RolloutCache":
        """The same cache in other memory: `tensors` in the order of `tensors()`."""
        *parts, mask, step = tensors
        layers = list(zip(parts[::2], parts[1::2], strict=True))
        return RolloutCache(layers, mask, self.prompt, self.columns, step, self.blank)


def _mask(padding: Tensor, share: int, columns: int, slots: int, dtype: torch.dtype) -> Tensor:
    """What the rollouts may see once all is filled; `padding` (B, T) marks places of no token."""
    lane = torch.eye(columns, dtype=torch.bool, device=padding.device).repeat(share, slots)
    hidden = torch.cat([padding[:, None, None].expand(-1, 1, share * columns, -1),
                        ~lane.expand(len(padding), 1, -1, -1)], dim=-1)  # fmt: skip
    return torch.zeros(hidden.shape, dtype=dtype, device=padding.device).masked_fill_(hidden, -torch.inf)


class RolloutLayer(CacheLayerMixin):
    """A layer of a RolloutCache as transformers wants it; the attention below gets it in place of keys."""

    def __init__(self, cache: RolloutCache, layer: int) -> None:
        super().__init__()
        self.cache, self.layer = cache, layer
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Add a token to each rollout, (B, G, C, D)."""
        self.cache.append(self.layer, key_states, value_states)
        return self, self

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the layer is made with its prompts."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys a rollout can see; no mask is made for this attention."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens before the next one, the prompt's padding included."""
        return self.cache.prompt + int(self.cache.step)

    def get_max_length(self) -> int:
        """Most tokens, the prompt's padding included."""
        return self.cache.prompt + self.cache.slots


def layered(cache: RolloutCache) -> Cache:
    """The cache as transformers' models take it."""
    return Cache(layers=[RolloutLayer(cache, layer) for layer in range(len(cache.layers))])


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

    With padding on the right no real token can see padding, so no mask is needed and the fast kernels apply. Windows
    that share a row in training bring their mask, (B, 1, T, T) bool, True where a token may look.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, RolloutLayer):
        return key.cache.attend(key.layer, query, scale), None
    return causal(query, key, value, scale, dropout, attention_mask), None


def causal(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float = 0.0, mask: Tensor | None = None
) -> Tensor:
    """Causal attention, (B, H, T, D) queries and (B, G, T, D) keys -> (B, T, H, D); a `mask` says all itself."""
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and query.shape[2] > 1,
        scale=scale, enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2).contiguous()


AttentionInterface.register(ATTENTION, attend)
