"""K transformers models of one shape as stacked weights: OPT, Qwen2, Llama and SmolLM2."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # the angles depend on the position alone


@dataclass(frozen=True)
class Linear:
    """K linear maps: weight (K, in, out), bias (K, 1, out)."""

    weight: Tensor
    bias: Tensor | None

    @cached_property
    def only(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight (in, out) and bias (out,) where K is 1: to make these views anew takes as long as a small product."""
        if len(self.weight) > 1:
            return None
        return self.weight[0], None if self.bias is None else self.bias[0, 0]


@dataclass(frozen=True)
class Norm:
    """K LayerNorms, or RMSNorms where `centred` is false: weight and bias (K, 1, D)."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    centred: bool

    @cached_property
    def only(self) -> tuple[Tensor | None, Tensor | None] | None:
        """Weight and bias (D,) where K is 1."""
        if self.weight is None or len(self.weight) > 1:
            return None
        return self.weight[0, 0], None if self.bias is None else self.bias[0, 0]


@dataclass(frozen=True)
class Layer:
    """A decoder layer. `up` is gate and up side by side where the activation is gated."""

    queries_keys_values: Linear
    out: Linear
    norm: Norm
    up: Linear
    down: Linear
    mlp_norm: Norm


@dataclass(frozen=True)
class Weights:
    """K models: embeddings (K, V, E), learned positions (K, P, D) or rotary tables (P, width), layers, head."""

    embeddings: Tensor
    positions: Tensor | None
    rotary: tuple[Tensor, Tensor] | None  # cosine, and sine with the sign of rotate_half
    context: int  # positions there are
    project_in: Linear | None
    layers: tuple[Layer, ...]
    norm: Norm | None
    project_out: Linear | None
    head: Linear
    heads: int
    groups: int
    width: int
    norm_first: bool
    gated: bool
    activation: Callable[[Tensor], Tensor]

    def part(self, first: int, last: int) -> "Weights":
        """The models first..last - 1, as views."""
        return cut(self, slice(first, last))  # type: ignore[no-any-return]


def cut(value: Any, models: slice) -> Any:
    """The same structure of weights with only these models."""
    if isinstance(value, Tensor):
        return value[models]
    if isinstance(value, Linear | Norm | Layer | Weights):
        values = {field.name: getattr(value, field.name) for field in fields(value)}
        return type(value)(**{name: kept if name == "rotary" else cut(kept, models) for name, kept in values.items()})
    if isinstance(value, tuple):
        return tuple(cut(part, models) for part in value)
    return value


def stackable(config: Any) -> bool:
    """Whether the engine knows this architecture. Other models run as transformers has them."""
    if config.model_type == "opt":
        return True
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    full = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    return config.model_type in ("qwen2", "llama") and rope in FIXED_ROPE and full


def stack(models: Sequence[PreTrainedModel], size: int, device: torch.device, dtype: torch.dtype) -> Weights:
    """Weights of models of one config, copied; the head gives the first `size` tokens only."""
    read = _Reader(device, dtype)
    return read.opt(models, size) if models[0].config.model_type == "opt" else read.llama(models, size)


class _Reader:
    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def opt(self, models: Sequence[Any], size: int) -> Weights:
        """OPT (Zhang et al., 2022), OPT-350M's norm after the block and narrow embeddings too."""
        config, decoders = models[0].config, [model.model.decoder for model in models]
        layers = []
        for same in zip(*(decoder.layers for decoder in decoders), strict=True):
            attention = [layer.self_attn for layer in same]
            layers.append(
                Layer(
                    self.linear(*([getattr(a, name) for a in attention] for name in ("q_proj", "k_proj", "v_proj"))),
                    self.linear([a.out_proj for a in attention]),
                    self.norm([layer.self_attn_layer_norm for layer in same]),
                    self.linear([layer.fc1 for layer in same]),
                    self.linear([layer.fc2 for layer in same]),
                    self.norm([layer.final_layer_norm for layer in same]),
                )
            )
        first = decoders[0]
        return Weights(
            embeddings=self.tensor([d.embed_tokens.weight for d in decoders]),
            positions=self.tensor([d.embed_positions.weight[d.embed_positions.offset :] for d in decoders]),
            rotary=None, context=config.max_position_embeddings,
            project_in=self.linear([d.project_in for d in decoders]) if first.project_in is not None else None,
            layers=tuple(layers),
            norm=self.norm([d.final_layer_norm for d in decoders]) if first.final_layer_norm is not None else None,
            project_out=self.linear([d.project_out for d in decoders]) if first.project_out is not None else None,
            head=self.linear([model.lm_head for model in models], size=size),
            heads=config.num_attention_heads, groups=config.num_attention_heads,
            width=config.hidden_size // config.num_attention_heads, norm_first=config.do_layer_norm_before,
            gated=False, activation=first.layers[0].activation_fn,
        )  # fmt: skip

    def llama(self, models: Sequence[Any], size: int) -> Weights:
        """Llama (Touvron et al., 2023), SmolLM2, and Qwen2 with its biases."""
        decoders = [model.model for model in models]
        layers = []
        for same in zip(*(decoder.layers for decoder in decoders), strict=True):
            attention, mlp = [layer.self_attn for layer in same], [layer.mlp for layer in same]
            layers.append(
                Layer(
                    self.linear(*([getattr(a, name) for a in attention] for name in ("q_proj", "k_proj", "v_proj"))),
                    self.linear([a.o_proj for a in attention]),
                    self.norm([layer.input_layernorm for layer in same]),
                    self.linear([m.gate_proj for m in mlp], [m.up_proj for m in mlp]),
                    self.linear([m.down_proj for m in mlp]),
                    self.norm([layer.post_attention_layernorm for layer in same]),
                )
            )
        config, first = models[0].config, decoders[0].layers[0]
        width = first.self_attn.head_dim
        return Weights(
            embeddings=self.tensor([d.embed_tokens.weight for d in decoders]), positions=None,
            rotary=self.rotary(decoders[0].rotary_emb, config.max_position_embeddings),
            context=config.max_position_embeddings, project_in=None,
            layers=tuple(layers), norm=self.norm([d.norm for d in decoders]), project_out=None,
            head=self.linear([model.lm_head for model in models], size=size), heads=config.num_attention_heads,
            groups=config.num_key_value_heads, width=width, norm_first=True, gated=True, activation=first.mlp.act_fn,
        )  # fmt: skip

    def tensor(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.stack([part.detach().to(self.device, self.dtype) for part in parts])

    def linear(self, *sides: Sequence[Any], size: int | None = None) -> Linear:
        """Maps of the same input stand side by side; `size` keeps the first outputs."""
        weight = torch.cat([self.tensor([m.weight[:size] for m in maps]) for maps in sides], dim=1)
        bias = None
        if sides[0][0].bias is not None:
            bias = torch.cat([self.tensor([m.bias[:size] for m in maps]) for maps in sides], dim=1).unsqueeze(1)
        return Linear(weight.transpose(1, 2).contiguous(), bias)

    def norm(self, norms: Sequence[Any]) -> Norm:
        centred = isinstance(norms[0], torch.nn.LayerNorm)
        weight, bias = (
            None if getattr(norms[0], name, None) is None else self.tensor([getattr(n, name) for n in norms])[:, None]
            for name in ("weight", "bias")
        )
        return Norm(weight, bias, norms[0].eps if centred else norms[0].variance_epsilon, centred)

    def rotary(self, module: Any, positions: int) -> tuple[Tensor, Tensor]:
        angles = torch.arange(positions, device=module.inv_freq.device)[None]
        cosine, sine = (table[0] for table in module(torch.zeros(1, device=module.inv_freq.device), angles))
        half = sine.shape[1] // 2
        sine = torch.cat([-sine[:, :half], sine[:, half:]], dim=1)
        return cosine.to(self.device, self.dtype), sine.to(self.device, self.dtype)
