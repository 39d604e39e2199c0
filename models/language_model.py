"""A causal language model over pages: build, load, prefill once, roll out many times, score a session."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from models.attention import ATTENTION, rollout_cache
from models.vocabulary import BOS, EOS, PAD, UNK

disable_progress_bar()  # of loading and saving; a caller shows its own

ARCHITECTURES = ("opt", "qwen2", "llama")
SMALLEST_BUCKET = 64
COMPACT_BELOW = 0.7  # rows are dropped from the batch when fewer than this share of them goes on


class Rollouts(NamedTuple):
    """What R sampled sessions and the greedy one say of B visits."""

    marginals: np.ndarray  # (B, V) probability that the next session holds the page
    groups: np.ndarray  # (B, G) probability that it holds at least one page of the group
    sequences: np.ndarray  # (B, R, S) sampled tokens, [EOS] after the end
    paths: list[list[int]]  # greedy tokens, without [EOS]


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


def from_pretrained(directory: Path, vocabulary: int) -> PreTrainedModel:
    """A local pretrained model whose word embeddings give way to `vocabulary` page embeddings of the same spread."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation=ATTENTION, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    spread = float(model.get_input_embeddings().weight.detach().std())
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
        torch.nn.init.normal_(layer.weight, std=spread)
    for name, token in (("pad_token_id", PAD), ("bos_token_id", BOS), ("eos_token_id", EOS)):
        setattr(model.config, name, token)
        setattr(model.generation_config, name, token)
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


class LanguageModel:
    """Prompts in, rollouts and scores out. Prompts are token lists that end with [BOS]."""

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
        never = torch.zeros(self.size, device=self.device)
        never[[PAD, BOS, UNK]] = -torch.inf
        self._never = never
        self._never_first = never.clone()
        self._never_first[EOS] = -torch.inf  # a session has at least one page

    @torch.inference_mode()
    def rollouts(self, prompts: Sequence[Sequence[int]], draws: np.ndarray, groups: np.ndarray) -> Rollouts:
        """Sample R sessions of at most S pages for each prompt, and follow the most likely one.

        `draws` (B, R, S) are uniform; `groups` (G, V) marks pages. Probabilities are first-passage sums along the
        rollouts: P(v) = E[sum_t p_t(v) 1{v not yet seen}], which is exact in expectation and varies less than counts.
        """
        batch, samples, steps = draws.shape
        marginals = np.zeros((batch, self.size), dtype=np.float32)
        hits = np.zeros((batch, len(groups)), dtype=np.float32)
        sequences = np.full((batch, samples + 1, steps), EOS, dtype=np.int64)
        marks = torch.as_tensor(groups, dtype=torch.float32, device=self.device)
        for rows in buckets([len(prompt) for prompt in prompts]):
            decoder = _Decoder(self, [prompts[row] for row in rows], draws[rows], marks)
            decoder.run()
            marginals[rows], hits[rows] = decoder.results()
            sequences[rows] = decoder.sequences.cpu().numpy()
        paths = [path[: list(path).index(EOS)] if EOS in path else path for path in sequences[:, 0].tolist()]
        return Rollouts(marginals, hits, sequences[:, 1:], paths)

    def greedy(self, prompts: Sequence[Sequence[int]], steps: int) -> list[list[int]]:
        """The most likely page at each step, until [EOS] or `steps` pages."""
        nothing = np.zeros((0, self.size), dtype=np.float32)
        return self.rollouts(prompts, np.zeros((len(prompts), 0, steps), dtype=np.float32), nothing).paths

    @torch.inference_mode()
    def nll(self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> np.ndarray:
        """Nats that each target session costs after its prompt, its [EOS] included: (B,) float64."""
        total = np.zeros(len(prompts))
        whole = [[*prompt, *target, EOS] for prompt, target in zip(prompts, targets, strict=True)]
        for rows in buckets([len(sequence) for sequence in whole]):
            tokens, _ = pad([whole[row] for row in rows], self.device)
            logits = self.logits(tokens[:, :-1])
            costs = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
            for row, cost in zip(rows, costs.double().cpu().numpy(), strict=True):
                total[row] = cost[len(prompts[row]) - 1 : len(whole[row]) - 1].sum()
        return total

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
        return logits.float()


class _Decoder:
    """Rollouts of one bucket of prompts. Column 0 is the greedy session, the others are samples."""

    def __init__(self, lm: LanguageModel, prompts: Sequence[Sequence[int]], draws: np.ndarray, marks: Tensor) -> None:
        self.lm, self.marks = lm, marks
        batch, samples, self.steps = draws.shape
        self.samples = samples
        self.columns = samples + 1
        greedy = np.zeros((batch, 1, self.steps), dtype=np.float32)
        self.draws = torch.as_tensor(np.concatenate([greedy, draws], axis=1), device=lm.device)
        tokens, lengths = pad(prompts, lm.device)
        self.lengths = lengths
        prefill = DynamicCache(config=lm.model.config)
        states = lm.hidden(tokens, past_key_values=prefill, use_cache=True)
        self.first = lm.head(states[torch.arange(batch, device=lm.device), lengths - 1])  # (B, V)
        self.cache = rollout_cache(prefill, lengths, self.columns, self.steps)
        self.rows = torch.arange(batch, device=lm.device)
        self.slots = torch.arange(self.columns, device=lm.device).expand(batch, -1)
        self.ended = torch.zeros(batch, self.columns, dtype=torch.bool, device=lm.device)
        self.sequences = torch.full((batch, self.columns, self.steps), EOS, device=lm.device)
        self.sums = torch.zeros(batch, lm.size, device=lm.device)
        self.hits = torch.zeros(batch, len(marks), device=lm.device)
        # 1 where a sample may still meet the page (or group) for the first time; 0 for the greedy column.
        self.unseen = torch.ones(batch, self.columns, lm.size, device=lm.device)
        self.unmet = torch.ones(batch, self.columns, len(marks), device=lm.device)
        self.unseen[:, 0], self.unmet[:, 0] = 0.0, 0.0

    def run(self) -> None:
        """Step until every rollout has ended."""
        logits = (self.first + self.lm._never_first).unsqueeze(1).expand(-1, self.columns, -1)
        for step in range(self.steps):
            tokens = self.advance(logits, step)
            alive = self.ended.numel() - int(self.ended.sum())
            if alive == 0 or step + 1 == self.steps:
                return
            if alive < COMPACT_BELOW * self.ended.numel():
                tokens = self.compact(tokens)
            positions = (self.lengths + step)[:, None].expand(tokens.shape)
            states = self.lm.hidden(tokens, position_ids=positions, past_key_values=self.cache, use_cache=True)
            logits = self.lm.head(states) + self.lm._never  # (B, R+1, V)

    def advance(self, logits: Tensor, step: int) -> Tensor:
        """Add this step's first passages and draw a token for each rollout: (B, R+1, V) -> (B, R+1)."""
        p = torch.softmax(logits, dim=-1)
        self.hits.index_add_(0, self.rows, ((p @ self.marks.T) * self.unmet).sum(1))
        cumulative = p.cumsum(-1)
        threshold = self.draws[:, :, step, None] * cumulative[..., -1:]
        tokens = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=self.lm.size - 1).squeeze(-1)
        self.sums.index_add_(0, self.rows, p.mul_(self.unseen).sum(1))
        tokens[:, 0] = logits[:, 0].argmax(-1)
        tokens.masked_fill_(self.ended, EOS)
        self.ended = tokens == EOS
        self.sequences[self.rows[:, None], self.slots, step] = tokens
        ended = self.ended.unsqueeze(-1)
        self.unseen.scatter_(2, tokens.unsqueeze(-1), 0.0).masked_fill_(ended, 0.0)
        self.unmet.mul_(1.0 - self.marks.T[tokens]).masked_fill_(ended, 0.0)
        return tokens

    def compact(self, tokens: Tensor) -> Tensor:
        """Drop prompts and columns in which nothing goes on; the greedy column stays first."""
        going = ~self.ended
        rows = going.any(1).nonzero().squeeze(1)
        priority = going[rows].to(torch.int8)
        priority[:, 0] = 2
        columns = priority.argsort(dim=1, descending=True, stable=True)[:, : int((priority > 0).sum(1).max())]
        if rows.numel() * columns.shape[1] > COMPACT_BELOW * going.numel():
            return tokens
        pick = (rows[:, None], columns)
        self.lengths, self.rows = self.lengths[rows], self.rows[rows]
        self.draws, self.slots = self.draws[pick], self.slots[pick]
        self.unseen, self.unmet, self.ended = self.unseen[pick], self.unmet[pick], self.ended[pick]
        for layer in self.cache.layers:
            layer.keep(rows, columns)
        kept: Tensor = tokens[pick]
        return kept

    def results(self) -> tuple[np.ndarray, np.ndarray]:
        """Marginals (B, V) and group probabilities (B, G)."""
        count = max(self.samples, 1)
        marginals = self.sums / count
        marginals[:, : UNK + 1] = 0.0
        return marginals.clamp_(0, 1).cpu().numpy(), (self.hits / count).clamp_(0, 1).cpu().numpy()


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
        grouped.setdefault(max(length - 1, SMALLEST_BUCKET - 1).bit_length(), []).append(row)
    return [grouped[key] for key in sorted(grouped)]
