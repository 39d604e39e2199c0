"""Rollouts in step: what each has drawn, and the first-passage probabilities that all of them add up."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.attention import RolloutCache
from models.specials import BOS, EOS, PAD, UNK


@dataclass
class Lanes:
    """C rollouts for each of B rows; column 0 is the greedy session, the others are samples.

    `sums` and `hits` add up P(v) = E[sum_t p_t(v) 1{v not yet seen}] over the samples: exact in expectation, and they
    vary less than counts of pages.
    """

    tokens: Tensor  # (B, C) drawn last
    ended: Tensor  # (B, C)
    draws: Tensor  # (B, C, S) uniforms
    sequences: Tensor  # (B, C, S) tokens, [EOS] after the end
    unseen: Tensor  # (B, C, V) 1 where a sample that goes on has not been; no element when nothing is sampled
    unmet: Tensor  # (B, C, G) the same for groups of pages
    sums: Tensor  # (B, V)
    hits: Tensor  # (B, G)
    lengths: Tensor  # (B, 1) of the prompts
    never: Tensor  # (V,) -inf for tokens that no session holds
    marks: Tensor  # (V, G) pages of each group
    cache: RolloutCache

    @classmethod
    def start(
        cls, logits: Tensor, draws: Tensor, absent: Tensor, marks: Tensor, lengths: Tensor, cache: RolloutCache
    ) -> "Lanes":
        """The first token of each rollout, from the logits (B, V) behind the prompts; `absent` (B, C) have none."""
        batch, columns, steps = draws.shape
        never = torch.zeros(logits.shape[1], device=logits.device)
        never[[PAD, BOS, UNK]] = -torch.inf
        logits = logits + never
        logits[:, EOS] = -torch.inf  # a session has at least one page
        sampled = columns > 1
        sizes = [size if sampled else 0 for size in (logits.shape[1], marks.shape[1])]
        unseen, unmet = (torch.ones(batch, columns, size, device=logits.device) for size in sizes)
        lanes = cls(
            tokens=logits.argmax(-1, keepdim=True), ended=absent, draws=draws,
            sequences=torch.full((batch, columns, steps), EOS, device=logits.device),
            unseen=unseen, unmet=unmet, sums=unseen.new_zeros(batch, sizes[0]), hits=unmet.new_zeros(batch, sizes[1]),
            lengths=lengths[:, None], never=never, marks=marks, cache=cache,
        )  # fmt: skip
        if sampled:
            p = torch.softmax(logits, dim=-1)
            samples = (~absent[:, 1:]).sum(1, keepdim=True)
            lanes.sums += p * samples
            lanes.hits += (p @ marks) * samples
            lanes.tokens = torch.cat([lanes.tokens, draw(p, draws[:, 1:, 0])], dim=1)
        lanes.mark(lanes.tokens, torch.zeros_like(cache.step))
        return lanes

    def advance(self, logits: Tensor) -> None:
        """Add this step's first passages and draw a token for each rollout; logits (B, C, V)."""
        logits = logits.add_(self.never)
        greedy = logits[:, :1].argmax(-1)
        following = self.cache.step + 1
        if self.draws.shape[1] > 1:
            p = torch.softmax(logits, dim=-1)
            self.hits += ((p @ self.marks) * self.unmet).sum(1)
            tokens = draw(p, self.draws.index_select(2, following))
            tokens = torch.cat([greedy, tokens.squeeze(-1)[:, 1:]], dim=1)
            self.sums += p.mul_(self.unseen).sum(1)
        else:
            tokens = greedy
        self.mark(tokens, following)
        self.cache.step.add_(1)

    def mark(self, tokens: Tensor, step: Tensor) -> None:
        """Write down the tokens (B, C) of a step (1,) and what they leave unseen."""
        self.tokens.copy_(tokens.masked_fill(self.ended, EOS))
        self.ended.copy_(self.tokens == EOS)
        self.sequences.index_copy_(2, step, self.tokens.unsqueeze(-1))
        if self.unseen.shape[2]:
            ended = self.ended.unsqueeze(-1)
            self.unseen.scatter_(2, self.tokens.unsqueeze(-1), 0.0).masked_fill_(ended, 0.0)
            self.unmet.mul_(1.0 - self.marks[self.tokens]).masked_fill_(ended, 0.0)
            self.unseen[:, 0], self.unmet[:, 0] = 0.0, 0.0

    def keep(self, rows: Tensor, columns: Tensor, filled: int) -> "Lanes":
        """Go on with these rows (B',) and of each with these columns (B', C'), the sums anew from zero.

        `filled` tokens of each rollout are in the cache.
        """
        pick = (rows[:, None], columns)
        lane = {name: getattr(self, name)[pick] for name in FIELDS[:6]}
        row = {name: torch.zeros_like(getattr(self, name)[rows]) for name in ("sums", "hits")}
        # Copies throughout: what is here may lie in the very memory that the kept lanes move to.
        same = {name: getattr(self, name).clone() for name in ("never", "marks")}
        return Lanes(**lane, **row, **same, lengths=self.lengths[rows], cache=self.cache.keep(rows, columns, filled))

    def tensors(self) -> list[Tensor]:
        """Everything that a step reads or writes, apart from the model."""
        return [getattr(self, name) for name in FIELDS] + self.cache.tensors()

    def placed(self, tensors: Sequence[Tensor]) -> "Lanes":
        """The same lanes in other memory: `tensors` in the order of `tensors()`."""
        own = dict(zip(FIELDS, tensors, strict=False))
        return Lanes(**own, cache=self.cache.placed(tensors[len(FIELDS) :]))


FIELDS = (
    "tokens", "ended", "draws", "sequences", "unseen", "unmet", "sums", "hits", "lengths", "never", "marks",
)  # fmt: skip


def draw(p: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens by inversion of the cumulative distribution: p (..., V), uniforms (..., N) -> (..., N).

    Takes the first token whose cumulative probability exceeds the draw. Float noise in p can move a draw over such
    an edge: with probability about the noise, 1e-7 in float32 and 1e-3 in bf16.
    """
    cumulative = p.cumsum(-1)
    tokens = torch.searchsorted(cumulative, uniforms * cumulative[..., -1:], right=True)
    return tokens.clamp_(max=p.shape[-1] - 1)
