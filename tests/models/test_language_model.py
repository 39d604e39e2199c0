"""The fast decoder against naive generation, for every architecture."""

from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from models.language_model import LanguageModel, buckets, build, from_config, from_pretrained, restore
from models.sampling import uniforms
from models.vocabulary import BOS, EOS, PAD, SPECIALS, UNK
from tests.models.conftest import ARCHITECTURES, SIZE, tiny

Prompts = Callable[[int, int], list[list[int]]]
NOTHING = np.zeros((0, SIZE), dtype=np.float32)
STEPS = 12


def plain(lm: LanguageModel, path: Path) -> Any:
    """The same weights, opened by transformers with its own attention."""
    lm.model.save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


def naive(model: Any, prompt: list[int], steps: int, draws: np.ndarray | None = None) -> list[int]:
    """One token at a time over the whole sequence, no cache, float32 probabilities."""
    tokens: list[int] = []
    with torch.inference_mode():
        for step in range(steps):
            logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, -1].float()
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


def until_end(sequence: np.ndarray) -> list[int]:
    """Tokens before the first [EOS]."""
    tokens: list[int] = sequence.tolist()
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens


@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestContract:
    """What every architecture must keep."""

    def test_greedy_is_naive(self, architecture: str, prompts: Prompts, tmp_path: Path) -> None:
        lm = tiny(architecture)
        oracle = plain(lm, tmp_path)
        asked = prompts(7, 1)
        assert lm.greedy(asked, STEPS) == [naive(oracle, prompt, STEPS) for prompt in asked]

    def test_greedy_is_transformers_generate(self, architecture: str, prompts: Prompts, tmp_path: Path) -> None:
        lm = tiny(architecture, seed=3)
        oracle = plain(lm, tmp_path)
        for prompt in prompts(3, 5):
            generated = oracle.generate(
                torch.tensor([prompt]), max_new_tokens=STEPS, do_sample=False, suppress_tokens=[PAD, BOS, UNK],
                begin_suppress_tokens=[EOS],
            )  # fmt: skip
            assert lm.greedy([prompt], STEPS)[0] == until_end(generated[0, len(prompt) :].numpy())

    def test_samples_are_naive_with_the_same_draws(self, architecture: str, prompts: Prompts, tmp_path: Path) -> None:
        lm = tiny(architecture)
        oracle = plain(lm, tmp_path)
        asked = prompts(5, 2)
        draws = uniforms([str(i) for i in range(5)], 6, STEPS)
        rolled = lm.rollouts(asked, draws, NOTHING)
        for row, prompt in enumerate(asked):
            for rollout in range(6):
                expected = naive(oracle, prompt, STEPS, draws[row, rollout])
                assert until_end(rolled.sequences[row, rollout]) == expected

    def test_a_visit_does_not_depend_on_its_batch(self, architecture: str, prompts: Prompts) -> None:
        lm = tiny(architecture)
        asked = prompts(9, 3)
        draws = uniforms([str(i) for i in range(9)], 8, STEPS)
        together = lm.rollouts(asked, draws, NOTHING)
        for row in range(9):
            alone = lm.rollouts([asked[row]], draws[[row]], NOTHING)
            assert (alone.sequences[0] == together.sequences[row]).all()
            np.testing.assert_allclose(alone.marginals[0], together.marginals[row], atol=1e-5)

    def test_nll_is_the_sum_of_log_probabilities(self, architecture: str, prompts: Prompts, tmp_path: Path) -> None:
        lm = tiny(architecture)
        oracle = plain(lm, tmp_path)
        asked, targets = prompts(6, 4), [[4, 5, 6][: 1 + i % 3] for i in range(6)]
        for prompt, target, nll in zip(asked, targets, lm.nll(asked, targets), strict=True):
            whole = [*prompt, *target, EOS]
            with torch.inference_mode():
                logp = torch.log_softmax(oracle(input_ids=torch.tensor([whole])).logits[0].double(), -1)
            exact = -sum(float(logp[i - 1, whole[i]]) for i in range(len(prompt), len(whole)))
            assert nll == pytest.approx(exact, rel=1e-4)

    def test_restored_weights_give_the_same_logits(self, architecture: str, prompts: Prompts) -> None:
        lm = tiny(architecture)
        again = LanguageModel(restore(lm.model.config.to_dict(), dict(lm.model.named_parameters())))
        tokens = torch.tensor([prompts(1, 6)[0]])
        assert torch.equal(lm.logits(tokens), again.logits(tokens))

    def test_a_pretrained_directory_gets_page_embeddings(self, architecture: str, tmp_path: Path) -> None:
        build(architecture, 90, 16, 2, 2, 160).save_pretrained(tmp_path)
        lm = LanguageModel(from_pretrained(tmp_path, SIZE))
        assert lm.size == SIZE
        assert lm.logits(torch.tensor([[1, 5, 2, 1]])).shape == (1, 4, SIZE)
        assert lm.model.config.eos_token_id == EOS


class Markov(LanguageModel):
    """Stands in for a network: three pages, the next depends on the last token only, so all is known exactly."""

    TABLE = np.array([[0.2, 0.5, 0.2, 0.1], [0.3, 0.1, 0.4, 0.2], [0.5, 0.2, 0.2, 0.1]])  # after page: EOS, pages

    def __init__(self) -> None:
        super().__init__(build("opt", len(SPECIALS) + 3, 8, 1, 1, 64))
        logits = torch.full((len(SPECIALS) + 3, len(SPECIALS) + 3), -torch.inf)
        logits[[BOS, EOS], 4:] = torch.tensor([0.5, 0.3, 0.2]).log()
        for page in range(3):
            logits[4 + page, [EOS, 4, 5, 6]] = torch.tensor(self.TABLE[page]).float().log()
        self.table = logits

    def hidden(self, tokens: torch.Tensor, **context: object) -> torch.Tensor:
        """Fills the cache as a model would, but returns the last token."""
        super().hidden(tokens, **context)
        return tokens.unsqueeze(-1)

    def head(self, states: torch.Tensor) -> torch.Tensor:
        """The row of the last token."""
        return self.table[states.squeeze(-1)]


def exact(steps: int) -> tuple[np.ndarray, float]:
    """By enumeration: P(page in session) for each page, and P(page 0 or page 2 in session)."""
    held, either = np.zeros(3), 0.0
    start = [0.5, 0.3, 0.2]
    for length in range(1, steps + 1):
        for path in product(range(3), repeat=length):
            p = start[path[0]]
            for a, b in pairwise(path):
                p *= Markov.TABLE[a, 1 + b]
            if length < steps:
                p *= Markov.TABLE[path[-1], 0]
            for page in range(3):
                held[page] += p * (page in path)
            either += p * (0 in path or 2 in path)
    return held, either


class TestDistribution:
    """Rollouts follow the model's distribution, and the marginals are its first-passage probabilities."""

    STEPS = 6

    def test_marginals_and_groups_are_first_passage_probabilities(self) -> None:
        groups = np.zeros((1, 7), dtype=np.float32)
        groups[0, [4, 6]] = 1.0
        seeds = [str(i) for i in range(40)]
        rolled = Markov().rollouts([[BOS]] * 40, uniforms(seeds, 100, self.STEPS), groups)
        held, either = exact(self.STEPS)
        np.testing.assert_allclose(rolled.marginals.mean(0)[4:], held, atol=0.01)
        assert rolled.groups.mean() == pytest.approx(either, abs=0.01)
        counted = (rolled.sequences[..., None] == np.arange(4, 7)).any(2)
        np.testing.assert_allclose(counted.mean((0, 1)), held, atol=0.025)
        # The same 100 rollouts tell more through first passages than through counts.
        assert (rolled.marginals[:, 4:].var(0) < counted.mean(1).var(0)).all()

    def test_transitions_pass_a_chi_square_test(self) -> None:
        draws = uniforms([f"s{i}" for i in range(20)], 100, self.STEPS)
        rolled = Markov().rollouts([[BOS]] * 20, draws, np.zeros((0, 7)))
        observed = np.zeros((3, 4))
        for session in rolled.sequences.reshape(-1, self.STEPS):
            for a, b in pairwise(session):
                if a == EOS:
                    break
                observed[a - 4, 0 if b == EOS else b - 3] += 1
        expected = observed.sum(1, keepdims=True) * Markov.TABLE
        statistic = ((observed - expected) ** 2 / expected).sum()
        assert statistic < 27.9  # 99.9 % quantile at 9 degrees of freedom


def test_draws_are_uniform_and_depend_on_seed_rollout_and_step_only() -> None:
    many = uniforms([f"v{i}" for i in range(50)], 24, 32)
    assert many.min() >= 0.0 and many.max() < 1.0
    counts = np.histogram(many, bins=20, range=(0, 1))[0]
    expected = many.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # 99.9 % quantile at 19 degrees of freedom
    assert (uniforms(["v7"], 24, 32)[0] == many[7]).all()
    assert (uniforms(["v7"], 8, 16)[0] == many[7, :8, :16]).all()
    assert len(np.unique(many)) > 0.99 * many.size


def test_a_session_has_a_page_and_no_special_token(prompts: Prompts) -> None:
    rolled = tiny().rollouts(prompts(4, 8), uniforms(list("abcd"), 16, STEPS), NOTHING)
    assert (rolled.sequences[:, :, 0] >= len(SPECIALS)).all()
    assert not np.isin(rolled.sequences, [PAD, BOS, UNK]).any()
    assert (rolled.marginals[:, : len(SPECIALS)] == 0).all()
    assert ((rolled.marginals >= 0) & (rolled.marginals <= 1)).all()
    after_end = np.cumsum(rolled.sequences == EOS, axis=2) > 0
    assert (rolled.sequences[after_end] == EOS).all()


def test_buckets_keep_every_row_once_and_are_narrow() -> None:
    lengths = [3, 70, 64, 65, 128, 129, 500, 1]
    found = buckets(lengths)
    assert sorted(row for rows in found for row in rows) == list(range(8))
    for rows in found:
        longest, shortest = max(lengths[r] for r in rows), min(lengths[r] for r in rows)
        assert longest <= 64 or longest < 2 * shortest


def test_restore_refuses_nan_and_foreign_weights() -> None:
    model = tiny().model
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    name = next(iter(weights))
    with pytest.raises(ValueError, match="do not fit"):
        restore(model.config.to_dict(), {k: v for k, v in weights.items() if k != name})
    with pytest.raises(ValueError, match="do not fit"):
        restore(model.config.to_dict(), {**weights, "other": torch.zeros(1)})
    weights[name][0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        restore(model.config.to_dict(), weights)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bf16_says_nearly_the_same(architecture: str, prompts: Prompts) -> None:
    exact, rounded = tiny(architecture), tiny(architecture)
    rounded = LanguageModel(rounded.model, dtype=torch.bfloat16)
    draws = uniforms(list("abc"), 24, STEPS)
    a, b = (lm.rollouts(prompts(3, 9), draws, NOTHING).marginals for lm in (exact, rounded))
    assert np.abs(a - b).max() < 0.25 and np.abs(a - b).mean() < 0.03


def test_grouped_key_value_heads_decode_like_generate(prompts: Prompts, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SIZE, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    lm = LanguageModel(from_config(config))
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.mul_(8.0 if parameter.dim() > 1 else 1.0)
    oracle = plain(lm, tmp_path)
    asked = prompts(4, 11)
    assert lm.greedy(asked, STEPS) == [naive(oracle, prompt, STEPS) for prompt in asked]
