"""Local pretrained models of any architecture, each tried on our attention before anything is learnt with it."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from models.attention import ATTENTION, RolloutCache
from models.language_model import LanguageModel
from models.specials import BOS, EOS, PAD, UNK

TRIED = (
    "gemma", "gemma3_text", "gpt2", "gpt_bigcode", "gpt_neox", "llama", "mistral", "olmo2", "opt", "phi", "phi3",
    "qwen2", "qwen3", "stablelm",
)  # fmt: skip
FIRST, SECOND = [BOS, UNK, UNK, EOS, BOS, UNK], [BOS, UNK, EOS]  # tokens that every vocabulary has
NOISE = 1e-3  # share of the largest logit by which two ways to the same logits may differ in float32


class Unsuitable(ValueError):
    """A model that transformers can open, but whose architecture does not work here."""


def from_pretrained(directory: Path, vocabulary: int) -> PreTrainedModel:
    """A local pretrained model whose word embeddings give way to `vocabulary` page embeddings of the same spread.

    Raises Unsuitable, and OSError or ValueError where transformers cannot open it.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation=ATTENTION, dtype=torch.float32, local_files_only=True,
            trust_remote_code=False,
        )  # fmt: skip
    except KeyError:  # it looks its attention up in a table of its own
        raise _unsuitable(directory, "it takes no attention but its own") from None
    try:
        _give_pages(model, vocabulary)
        flaw = _flaw(model)
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        flaw = f"a trial fails with {type(error).__name__}: {error}"
    if flaw is not None:
        raise _unsuitable(directory, flaw)
    return model


def _unsuitable(directory: Path, flaw: str) -> Unsuitable:
    kind = AutoConfig.from_pretrained(directory, local_files_only=True).model_type
    return Unsuitable(f"architecture {kind!r} does not work here: {flaw}. Take one of {', '.join(TRIED)}.")


def _give_pages(model: PreTrainedModel, vocabulary: int) -> None:
    spread = float(model.get_input_embeddings().weight.detach().std())
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
        torch.nn.init.normal_(layer.weight, std=spread)
    for name, token in (("pad_token_id", PAD), ("bos_token_id", BOS), ("eos_token_id", EOS)):
        setattr(model.config, name, token)
        setattr(model.generation_config, name, token)


@torch.inference_mode()
def _flaw(model: PreTrainedModel) -> str | None:
    """What the model computes otherwise here than by itself, from a few tokens; None where all is well.

    Attention that ignores ours, or does more than ours does, is nowhere told: the figures would just be worse.
    """
    lm = LanguageModel(model, dtype=torch.float32)
    first, second = (lm.logits(torch.tensor([tokens])) for tokens in (FIRST, SECOND))
    if _differ(_packed(lm), torch.cat([first, second], dim=1)):
        return "windows that share a row do not stay apart"
    if _differ(_stepped(lm), first[:, -1]):
        return "a rollout does not go on from its prompt"
    model.set_attn_implementation("eager")
    own = lm.logits(torch.tensor([FIRST]))
    model.set_attn_implementation(ATTENTION)
    return "its own attention gives other logits than ours" if _differ(own, first) else None


def _differ(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) > NOISE * float(other.abs().max())


def _packed(lm: LanguageModel) -> Tensor:
    """Logits of both windows in one row, as in training: (1, T, V)."""
    mask = torch.block_diag(*(torch.ones(len(tokens), len(tokens)) for tokens in (FIRST, SECOND))).tril().bool()
    places = torch.tensor([[*range(len(FIRST)), *range(len(SECOND))]])
    states = lm.hidden(
        torch.tensor([FIRST + SECOND]), position_ids=places, attention_mask=mask[None, None], use_cache=False
    )
    return lm.head(states)


def _stepped(lm: LanguageModel) -> Tensor:
    """Logits after the first window, its last token a rollout's first one, as in prediction: (1, V)."""
    prompt = FIRST[:-1]
    length = torch.tensor([len(prompt)])
    _, pairs = lm.prefill(torch.tensor([[prompt]]), length)
    cache = RolloutCache.start(pairs, length, lm.heads, 1, 1, lambda _, shape, like: like.new_empty(shape), False)
    cache.begin(1, True)
    return lm.step(torch.tensor([FIRST[-1:]]), length[:, None], cache)[:, 0]
