"""What HeTLM trains on: users with a target session, what the selector sees of them, and their tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.language_model import pad
from models.visit import recent
from models.vocabulary import BOS, EOS, PAD, Tokenizer
from trainer.examples import Example

LossOn = Literal["target", "all"]


@dataclass(frozen=True)
class Samples:
    """N users with a target session.

    `z` (N, D) float32 embeds the sessions before the target. `prompts` are those sessions' tokens and the target's
    [BOS]; `targets` are its pages. Prompt, pages and [EOS] fit the context together.
    """

    z: Tensor
    prompts: list[list[int]]
    targets: list[list[int]]

    @classmethod
    def of(cls, examples: Sequence[Example], z: Tensor, tokenizer: Tokenizer, context: int) -> "Samples":
        """The newest pages of each input that leave room for the target in `context` tokens."""
        targets = [tokenizer.encode(example.target)[: context - 2] for example in examples]
        inputs = [recent(e.visit.sessions, context - len(t) - 2) for e, t in zip(examples, targets, strict=True)]
        prompts = [tokenizer.render([tokenizer.encode(pages) for pages in sessions]) for sessions in inputs]
        return cls(z, prompts, targets)

    def batch(self, rows: Sequence[int], loss_on: LossOn, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens (B, T + 1), [PAD] on the right, and which of the last T are scored (B, T)."""
        tokens, _ = pad([[*self.prompts[row], *self.targets[row], EOS] for row in rows], device)
        scored = (tokens[:, 1:] != PAD) & (tokens[:, 1:] != BOS)  # after [EOS] comes [BOS], surely
        if loss_on == "target":
            known = torch.tensor([len(self.prompts[row]) for row in rows], device=device)
            scored &= torch.arange(1, tokens.shape[1], device=device) >= known[:, None]
        return tokens, scored
