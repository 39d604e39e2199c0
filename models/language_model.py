"""A causal language model over pages: build, load, and what any network must do to predict with it."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from models.attention import ATTENTION, KeyValues, RolloutCache, layered
from models.specials import BOS, EOS, PAD

disable_progress_bar()  # of loading and saving; a caller shows its own

ARCHITECTURES = ("opt", "qwen2", "llama")
SMALLEST_BUCKET = 64
ENDLESS = 1 << 30  # positions of a model without a limit


def build(
    architecture: str, vocabulary: int, hidden_size: int, layers: int, heads: int, positions: int, dropout: float = 0.0
) -> PreTrainedModel:
    """A new model of any size. Raises ValueError for an unknown architecture or sizes that do not fit together."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r} is unknown. Take one of {', '.join(ARCHITECTURES)}.")
    if hidden_size % heads or (architecture != "opt" and hidden_size // heads % 2):
        raise ValueError(f"hidden size {hidden_size} is no even multiple of {heads} heads. Change one of them.")
    sizes: dict[str, Any] = {
        "vocab_size": vocabulary, "hidden_size": hidden_size, "num_hidden_layers": layers,
        "num_attention_heads": heads, "max_position_embeddings": positions, "tie_word_embeddings": True,
        "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "attention_dropout": dropout,
    }  # fmt: skip
    if architecture == "opt":
        sizes |= {"ffn_dim": 4 * hidden_size, "word_embed_proj_dim": hidden_size, "dropout": dropout}
    else:
        sizes |= {"intermediate_size": 8 * (hidden_size // 3), "num_key_value_heads": heads}
    return from_config(CONFIG_MAPPING[architecture](**sizes))


def from_config(config: PretrainedConfig) -> PreTrainedModel:
    """A model with new weights, on our attention."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    return model


def restore(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """A saved model from its config and exactly these weights. Raises ValueError when they do not fit or are NaN."""
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"model_type {kind!r} is unknown to the installed transformers")
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise ValueError(f"weight {name} holds NaN or infinite numbers")
    model = from_config(CONFIG_MAPPING[kind].from_dict(dict(config)))
    try:
        absent, extra = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"weights do not fit the config ({error})") from None
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    if extra or set(absent) - tied:
        raise ValueError(f"weights do not fit the config (missing {sorted(set(absent) - tied)}, extra {sorted(extra)})")
    model.tie_weights()
    return model


class Network(Protocol):
    """k causal language models of one shape. Of a batch's k * n rows each has n; rows of one stand together."""

    size: int  # tokens that can come out
    context: int  # tokens that it has positions for
    heads: int
    device: torch.device

    def prefill(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, KeyValues]:
        """Logits of the next token (k * n, V) float32, and keys and values (k * n, G, T, D) of each layer.

        Prompts (k, n, T) are padded on the right; `lengths` (k * n,).
        """
        ...

    def step(self, tokens: Tensor, positions: Tensor, cache: RolloutCache) -> Tensor:
        """One more token of each rollout, (k * n, C), at `positions` (k * n, 1) -> logits (k * n, C, V) float32."""
        ...

    def logits_at(self, tokens: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """Next-token logits after tokens[rows, places]: (k * n, T), (M,), (M,) -> (M, V) float32; k is 1."""
        ...


class Ensemble(Protocol):
    """A language model for each of K clusters."""

    size: int
    device: torch.device
    token_bytes: int  # of the keys and values of a token, all layers
    stacked: bool  # parts may have several clusters, and their steps may be captured as CUDA graphs

    def part(self, first: int, last: int) -> Network:
        """The clusters first..last - 1."""
        ...


class LanguageModel:
    """One transformers model of any architecture, ready to predict: see Network."""

    def __init__(
        self, model: PreTrainedModel, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """bf16 on CUDA and float32 elsewhere, unless `dtype` says otherwise."""
        self.device = device or torch.device("cpu")
        if dtype is None:
            dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = model.to(device=self.device, dtype=dtype).eval()
        self._base, self._head = model.base_model, model.get_output_embeddings()
        self.size = int(model.config.vocab_size)
        self.heads = int(model.config.num_attention_heads)
        self.context = int(getattr(model.config, "max_position_embeddings", None) or ENDLESS)

    def narrowed(self, size: int) -> "LanguageModel":
        """The same model, of whose tokens only the first `size` can come out."""
        narrow = copy.copy(self)
        narrow.size = size
        return narrow

    def prefill(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, KeyValues]:
        """See Network."""
        cache = DynamicCache(config=self.model.config)
        states = self.hidden(tokens.flatten(0, 1), past_key_values=cache, use_cache=True)
        last = states[torch.arange(len(lengths), device=self.device), lengths - 1]
        return self.head(last), [(layer.keys, layer.values) for layer in cache.layers]

    def step(self, tokens: Tensor, positions: Tensor, cache: RolloutCache) -> Tensor:
        """See Network."""
        places = positions.expand(tokens.shape)
        return self.head(self.hidden(tokens, position_ids=places, past_key_values=layered(cache), use_cache=True))

    def logits_at(self, tokens: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """See Network."""
        return self.head(self.hidden(tokens)[rows, places])

    def nll(self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> np.ndarray:
        """Nats that each target session costs after its prompt, its [EOS] included: (B,) float64."""
        return nll(self, prompts, targets)

    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits at every position, (B, T) -> (B, T, V) float32; padding on the right."""
        return self.head(self.hidden(tokens))

    def hidden(self, tokens: Tensor, **context: Any) -> Tensor:
        """Last hidden states, (B, T) -> (B, T, D)."""
        states: Tensor = self._base(input_ids=tokens, **context)[0]
        return states

    def head(self, states: Tensor) -> Tensor:
        """Hidden states to float32 logits."""
        logits: Tensor = self._head(states)
        return logits[..., : self.size].float()


class Several:
    """Models one by one: see Ensemble."""

    stacked = False

    def __init__(self, models: Sequence[LanguageModel], size: int) -> None:
        self._models = [model.narrowed(size) for model in models]
        self.size, self.device = size, models[0].device
        config, bits = models[0].model.config, torch.finfo(models[0].model.dtype).bits
        self.token_bytes = 2 * config.num_hidden_layers * config.hidden_size * bits // 8  # no fewer

    def part(self, first: int, last: int) -> LanguageModel:
        """See Ensemble."""
        return self._models[first]


@torch.inference_mode()
def nll(network: Network, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> np.ndarray:
    """Nats of each target session after its prompt, its [EOS] included, by a network of one model: (B,) float64."""
    total = np.zeros(len(prompts))
    pairs = enumerate(zip(prompts, targets, strict=True))
    parts = [(row, *part) for row, pair in pairs for part in scored_parts(*pair, network.context)]
    owners = np.array([row for row, _, _ in parts], dtype=np.int64)
    for chosen in buckets([len(tokens) for _, tokens, _ in parts]):
        tokens, lengths = pad([parts[place][1] for place in chosen], network.device)
        starts = torch.tensor([parts[place][2] for place in chosen], device=network.device)
        places = torch.arange(tokens.shape[1], device=network.device)
        rows, ahead = ((places >= starts[:, None]) & (places < lengths[:, None])).nonzero(as_tuple=True)
        logits = network.logits_at(tokens[:, :-1], rows, ahead - 1)
        costs = torch.nn.functional.cross_entropy(logits, tokens[rows, ahead], reduction="none").double()
        sums = torch.zeros(len(chosen), dtype=torch.double, device=network.device).index_add_(0, rows, costs)
        np.add.at(total, owners[chosen], sums.cpu().numpy())
    return total


def scored_parts(prompt: Sequence[int], target: Sequence[int], context: int) -> Iterator[tuple[list[int], int]]:
    """What is scored of a session in one go: tokens, and where among them those begin that are to be predicted.

    One that goes beyond the network's positions is scored in parts of half of them, each after as many tokens as fit.
    The first token stays, since it may tell the cluster.
    """
    whole = [*prompt, *target, EOS]
    if len(whole) - 1 <= context:
        yield whole, len(prompt)
        return
    for start in range(len(prompt), len(whole), max(context // 2, 1)):
        end = min(start + max(context // 2, 1), len(whole))
        first = max(end - context, 1)
        yield [whole[0], *whole[first:end]], start - first + 1


def pad(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token lists as one tensor, [PAD] on the right, and their lengths: (B, T), (B,)."""
    lengths = [len(sequence) for sequence in sequences]
    tokens = np.full((len(sequences), max(lengths)), PAD, dtype=np.int64)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
    return torch.as_tensor(tokens, device=device), torch.as_tensor(lengths, device=device)


def buckets(lengths: Sequence[int]) -> list[list[int]]:
    """Rows grouped by length, each group at most a factor of two wide, so that little is padded."""
    grouped: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        grouped.setdefault(bucket(length), []).append(row)
    return [grouped[key] for key in sorted(grouped)]


def bucket(length: int) -> int:
    """The group of sequences so long: the power of two that bounds them, 64 at least."""
    return max(SMALLEST_BUCKET, 1 << max(length - 1, 0).bit_length())
