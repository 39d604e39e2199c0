"""A recurrent baseline: the next page from a GRU over the visitor's history (GRU4Rec, Hidasi et al. 2016)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.attention import KeyValues, RolloutCache
from models.engine import Engine, Rollouts
from models.engine_waves import Branch
from models.language_model import ENDLESS, nll, pad
from models.vocabulary import BOS, PAD
from trainer.descent import BETAS, CLIP, schedule
from trainer.windows import batch_count, batches

DROPOUT = 0.1


class GRU4Rec(nn.Module):
    """Next-page logits from a single GRU layer; input and output embeddings are tied, the softmax is full."""

    def __init__(self, size: int, width: int) -> None:
        """`size` tokens, embeddings of `width`, a state of twice that."""
        super().__init__()
        self.embedding = nn.Embedding(size, width)
        self.gru = nn.GRU(width, 2 * width, batch_first=True)
        self.output = nn.Linear(2 * width, width)
        self.bias = nn.Parameter(torch.zeros(size))
        self.dropout = nn.Dropout(DROPOUT)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def states(self, tokens: Tensor, state: Tensor | None = None) -> Tensor:
        """State after every token, (B, T) -> (B, T, 2 width); `state` (1, B, 2 width) goes before."""
        states: Tensor = self.gru(self.dropout(self.embedding(tokens)), state)[0]
        return states

    def logits(self, states: Tensor) -> Tensor:
        """Next-token logits, (..., 2 width) -> (..., V)."""
        logits: Tensor = self.output(self.dropout(states)) @ self.embedding.weight.T + self.bias
        return logits


@dataclass(frozen=True)
class Schedule:
    """How a GRU is trained: AdamW, warm-up and cosine, the best epoch kept; as the language models are."""

    epochs: int
    batch: int
    lr: float
    weight_decay: float
    patience: int
    seed: int


def fit_gru(
    rows: Sequence[np.ndarray],
    size: int,
    width: int,
    plan: Schedule,
    judge: Callable[["GRUPredictor"], float],
    device: torch.device,
    advance: Callable[[int], None] = lambda done: None,
) -> "GRUPredictor":
    """Fit on token windows; `judge` gives the validation loss in nats, `advance` hears of each step."""
    torch.manual_seed(plan.seed)
    model = GRU4Rec(size, width).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.lr, betas=BETAS, weight_decay=plan.weight_decay, fused=True
    )
    lengths = [len(row) for row in rows]
    total, step = plan.epochs * batch_count(len(rows), plan.batch), 0
    best, best_loss, worse = model.state_dict(), math.inf, 0
    for epoch in range(plan.epochs):
        model.train()
        for chosen in batches(lengths, plan.batch, (plan.seed, epoch), by_length=False):
            for group in optimizer.param_groups:
                group["lr"] = plan.lr * schedule(step, total)
            tokens, _ = pad([rows[row] for row in chosen.tolist()], device)
            optimizer.zero_grad()
            next_page_loss(model, tokens).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            step += 1
            advance(1)
        loss = judge(GRUPredictor(model, device))
        if loss < best_loss:
            best, best_loss, worse = {k: v.clone() for k, v in model.state_dict().items()}, loss, 0
        else:
            worse += 1
        if worse == plan.patience:
            break
    model.load_state_dict(best)
    return GRUPredictor(model, device)


def next_page_loss(model: GRU4Rec, tokens: Tensor) -> Tensor:
    """Mean nats per predicted token of right-padded windows (B, T); the sure [BOS] after [EOS] does not count."""
    labels = tokens[:, 1:]
    scored = (labels != PAD) & (labels != BOS)
    logits = model.logits(model.states(tokens[:, :-1])[scored])
    return nn.functional.cross_entropy(logits, labels[scored])


class GRUNetwork:
    """The network as the decoder wants it (models.language_model.Network), and the only one of its ensemble.

    A transformer keeps keys and values of every token. Here the two halves of the state after it lie in their place,
    so the decoder's cache serves both.
    """

    stacked, heads, context = False, 1, ENDLESS

    def __init__(self, model: GRU4Rec, device: torch.device) -> None:
        self.size, self.device, self._model = model.bias.numel(), device, model.eval()
        self.token_bytes = model.gru.hidden_size * model.bias.itemsize

    def part(self, first: int, last: int) -> "GRUNetwork":
        """See Ensemble."""
        return self

    def prefill(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, KeyValues]:
        """See Network. Of a prompt only the last state is kept."""
        states = self._model.states(tokens.flatten(0, 1))
        last = states[torch.arange(len(lengths), device=self.device), lengths - 1]
        return self._model.logits(last), [_halves(last[:, None, None])]

    def step(self, tokens: Tensor, positions: Tensor, cache: RolloutCache) -> Tensor:
        """See Network."""
        batch, columns = tokens.shape
        done = int(cache.step)  # tokens of each rollout before this one; none: all go on from the prompt's state
        start, width = (cache.prompt + (done - 1) * columns, columns) if done else (0, 1)
        before = torch.cat([room[:, 0, start : start + width] for room in cache.layers[0]], dim=-1)
        before = before.expand(batch, columns, -1).reshape(1, batch * columns, -1)
        states = self._model.states(tokens.reshape(-1, 1), before).view(batch, 1, columns, -1)
        cache.append(0, *_halves(states))
        return self._model.logits(states[:, 0])

    def logits_at(self, tokens: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """See Network."""
        return self._model.logits(self._model.states(tokens)[rows, places])


def _halves(states: Tensor) -> tuple[Tensor, Tensor]:
    first, second = states.chunk(2, dim=-1)
    return first, second


class GRUPredictor:
    """The network as a predictor with a single cluster (models.predictors.Predictor)."""

    clusters = 1

    def __init__(self, model: GRU4Rec, device: torch.device) -> None:
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self._network = GRUNetwork(model, device)
        self._engine = Engine(self._network)

    def rollouts(
        self, prompts: Sequence[Sequence[int]], posterior: Any, draws: np.ndarray, groups: np.ndarray, picks: Any = None
    ) -> Rollouts:
        """See Predictor."""
        every = np.arange(draws.shape[1])
        branches = [Branch(visit, 0, prompt, every, True) for visit, prompt in enumerate(prompts)]
        return self._engine.rollouts(branches, draws, groups)

    def greedy(self, prompts: Sequence[Sequence[int]], clusters: Any, steps: int) -> list[list[int]]:
        """See Predictor."""
        no_draws = np.zeros((len(prompts), 0, steps), dtype=np.float32)
        return self.rollouts(prompts, None, no_draws, np.zeros((0, self._network.size))).paths

    def nll(self, prompts: Sequence[Sequence[int]], posterior: Any, targets: Sequence[Sequence[int]]) -> np.ndarray:
        """See Predictor."""
        return nll(self._network, prompts, targets)
