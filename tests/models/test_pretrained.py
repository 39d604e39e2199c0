"""Pretrained models of many architectures: those that work get page embeddings, the others are named."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from models.language_model import LanguageModel
from models.pretrained import TRIED, Unsuitable, from_pretrained
from models.vocabulary import EOS
from tests.models.conftest import SIZE

SIZES: dict[str, Any] = {
    "vocab_size": 90, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
# Beside SIZES.
OWN: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16}, "gpt2": GPT2, "gpt_bigcode": GPT2, "gemma": GROUPED,
    "gemma3_text": GROUPED, "qwen2": {"num_key_value_heads": 1}, "qwen3": GROUPED, "mistral": GROUPED,
    "stablelm": {"num_key_value_heads": 2}, "olmo2": {"num_key_value_heads": 1}, "gptj": {**GPT2, "rotary_dim": 8},
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]},
    "bloom": {"n_layer": 2, "n_head": 2}, "mpt": {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64},
    "mamba": {"state_size": 4}, "xglm": {"d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 32},
}  # fmt: skip


def saved(kind: str, place: Path, **changes: Any) -> Path:
    """A model of that architecture with weights large enough to prefer some tokens, as transformers saves it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SIZES, **OWN.get(kind, {}), **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    model.save_pretrained(place)
    return place


@pytest.mark.parametrize("kind", TRIED)
def test_a_pretrained_directory_gets_page_embeddings(kind: str, tmp_path: Path) -> None:
    lm = LanguageModel(from_pretrained(saved(kind, tmp_path), SIZE))
    assert lm.size == SIZE
    assert lm.logits(torch.tensor([[1, 5, 2, 1]])).shape == (1, 4, SIZE)
    assert lm.model.config.eos_token_id == EOS


@pytest.mark.parametrize("kind", ["gpt_neo", "gptj", "falcon", "bloom", "mpt", "mamba", "xglm"])
def test_an_architecture_that_does_not_work_is_named_with_those_that_do(kind: str, tmp_path: Path) -> None:
    with pytest.raises(Unsuitable, match=f"architecture '{kind}' does not work here: .* Take one of gemma, .*opt"):
        from_pretrained(saved(kind, tmp_path), SIZE)


def test_attention_that_does_more_than_ours_is_noticed(tmp_path: Path) -> None:
    """gemma2 caps what attention sees before the softmax; ours would silently leave that out."""
    place = saved("gemma2", tmp_path, **GROUPED, attn_logit_softcapping=0.01, query_pre_attn_scalar=8)
    with pytest.raises(Unsuitable, match="its own attention gives other logits than ours"):
        from_pretrained(place, SIZE)
