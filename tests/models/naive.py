"""Generation the slow and obvious way: the oracle of the engine."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from models.vocabulary import BOS, EOS, PAD, UNK


def plain(model: Any, path: Path) -> Any:
    """The same weights, opened by transformers with its own attention."""
    model.save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


def naive(model: Any, prompt: list[int], steps: int, size: int, draws: np.ndarray | None = None) -> list[int]:
    """One token at a time over the whole sequence, no cache: greedy, or by these draws. Tokens below `size` only."""
    tokens: list[int] = []
    with torch.inference_mode():
        for step in range(steps):
            logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, -1, :size].float()
            logits[[PAD, BOS, UNK]] = -torch.inf
            if step == 0:
                logits[EOS] = -torch.inf
            if draws is None:
                token = int(logits.argmax())
            else:
                cumulative = torch.softmax(logits, -1).cumsum(-1)
                token = int((cumulative <= float(draws[step]) * cumulative[-1]).sum())
            if token == EOS:
                break
            tokens.append(token)
    return tokens


def generated(model: Any, prompt: list[int], steps: int, size: int) -> list[int]:
    """What transformers' own greedy search says."""
    tokens = model.generate(
        torch.tensor([prompt]), max_new_tokens=steps, do_sample=False, begin_suppress_tokens=[EOS],
        suppress_tokens=[PAD, BOS, UNK, *range(size, model.config.vocab_size)],
    )  # fmt: skip
    return until_end(tokens[0, len(prompt) :].numpy())


def nll(model: Any, prompt: list[int], target: list[int], size: int) -> float:
    """Nats of the target and its [EOS], from plain logits over the first `size` tokens."""
    whole = [*prompt, *target, EOS]
    with torch.inference_mode():
        logp = torch.log_softmax(model(input_ids=torch.tensor([whole])).logits[0, :, :size].double(), -1)
    return -sum(float(logp[i - 1, whole[i]]) for i in range(len(prompt), len(whole)))


def until_end(sequence: np.ndarray) -> list[int]:
    """Tokens before the first [EOS]."""
    tokens: list[int] = sequence.tolist()
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens
