"""The decoder: variants of the architectures, waves, static shapes, and the distribution of what it samples."""

from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, OPTConfig, Qwen2Config

from models.attention import KeyValues, RolloutCache
from models.engine import Engine, Rollouts
from models.engine_graphs import Graphs
from models.engine_network import Stacked
from models.engine_waves import CPU, GPU, Branch, Pace, length_rung, row_rung, waves
from models.engine_weights import stackable
from models.language_model import LanguageModel, Several, from_config
from models.sampling import uniforms
from models.vocabulary import BOS, EOS, PAD, SPECIALS
from tests.models.conftest import SIZE, tiny
from tests.models.naive import naive, plain

Prompts = Callable[[int, int], list[list[int]]]
STEPS = 12
TOKENS = {"vocab_size": SIZE, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
ROTARY = {"intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 96} | TOKENS
LEARNED = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2} | TOKENS
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 24}  # fmt: skip
VARIANTS = {
    "opt-350m": OPTConfig(**LEARNED, word_embed_proj_dim=8, do_layer_norm_before=False, max_position_embeddings=96),
    "opt-plain": OPTConfig(**LEARNED, word_embed_proj_dim=16, enable_bias=False, layer_norm_elementwise_affine=False,
                           max_position_embeddings=96, activation_function="gelu", tie_word_embeddings=False),
    "qwen2-grouped": Qwen2Config(**ROTARY, hidden_size=32, num_attention_heads=4, num_key_value_heads=2),
    "llama-grouped": LlamaConfig(**ROTARY, hidden_size=48, num_attention_heads=6, num_key_value_heads=2,
                                 attention_bias=True, tie_word_embeddings=False),
    "llama3-rope": LlamaConfig(**ROTARY, hidden_size=32, num_attention_heads=2, rope_parameters=LLAMA3),
}  # fmt: skip


def variant(name: str, seed: int = 0) -> LanguageModel:
    """A model of a variant; every weight counts, norms and biases too."""
    torch.manual_seed(seed)
    model = from_config(VARIANTS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0) if parameter.dim() > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
    return LanguageModel(model)


def branches(asked: list[list[int]], samples: int, clusters: int = 1) -> list[Branch]:
    return [Branch(row, row % clusters, prompt, np.arange(samples), True) for row, prompt in enumerate(asked)]


def roll(engine: Engine, asked: list[list[int]], samples: int, clusters: int = 1) -> Rollouts:
    draws = uniforms([str(row) for row in range(len(asked))], samples, STEPS)
    groups = np.zeros((1, SIZE), dtype=np.float32)
    groups[0, [5, 8]] = 1.0
    return engine.rollouts(branches(asked, samples, clusters), draws, groups)


def same(one: Rollouts, other: Rollouts) -> None:
    assert (one.sequences == other.sequences).all() and one.paths == other.paths
    np.testing.assert_allclose(one.marginals, other.marginals, atol=1e-5)
    np.testing.assert_allclose(one.groups, other.groups, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
class TestVariants:
    def test_greedy_is_naive(self, name: str, prompts: Prompts, tmp_path: Path) -> None:
        lm = variant(name)
        assert stackable(lm.model.config)
        oracle, asked = plain(lm.model, tmp_path), prompts(5, 11)
        paths = roll(Engine(Stacked.of([lm], SIZE)), asked, 0).paths
        assert paths == [naive(oracle, prompt, STEPS, SIZE) for prompt in asked]

    def test_logits_are_those_of_transformers(self, name: str) -> None:
        models = [variant(name, seed) for seed in range(2)]
        tokens = torch.randint(4, SIZE, (3, 20), generator=torch.Generator().manual_seed(0))
        rows, places = torch.tensor([0, 2, 2, 1]), torch.tensor([19, 0, 11, 5])
        stacked = Stacked.of(models, SIZE)
        with torch.inference_mode():
            for k, lm in enumerate(models):
                logits = stacked.part(k, k + 1).logits_at(tokens, rows, places)
                torch.testing.assert_close(logits, lm.logits(tokens)[rows, places], atol=2e-5, rtol=1e-4)

    def test_stacked_models_say_what_each_says_alone(self, name: str, prompts: Prompts) -> None:
        models, asked = [variant(name, seed) for seed in range(3)], prompts(7, 3)
        together = roll(Engine(Stacked.of(models, SIZE), pace(small=10_000)), asked, 5, 3)
        apart = roll(Engine(Several(models, SIZE)), asked, 5, 3)
        same(together, apart)


ALIKE = {"few": 0, "short": 0}  # waves of like branches, however few they are


def pace(**changes: Any) -> Pace:
    return Pace(**{**CPU.__dict__, **changes})


def test_other_models_are_left_to_transformers() -> None:
    assert not stackable(LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}))
    assert not stackable(Qwen2Config(use_sliding_window=True, max_window_layers=0))
    assert not stackable(GPT2Config())


class Recorder:
    """Stands in for CUDA's capture: runs the work once, as the warm-up does, and replays by calling it."""

    def __init__(self) -> None:
        self.captured = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        work()
        return work


class TestStaticShapes:
    """The GPU's way, on a CPU: graphs of static shape on static memory, a ladder of rows and columns."""

    @pytest.mark.parametrize("samples", [0, 9])
    @pytest.mark.parametrize("architecture", ["opt", "llama"])
    def test_graphs_give_what_direct_steps_give(self, architecture: str, samples: int, prompts: Prompts) -> None:
        models, asked = [tiny(architecture, seed) for seed in range(3)], prompts(13, 7)
        stacked = Stacked.of(models, SIZE)
        record = Recorder()
        graphs = Engine(stacked, pace(check=4, compact=0.5, filled=0.6), Graphs(record))
        direct = roll(Engine(stacked), asked, samples, 3)
        same(roll(graphs, asked, samples, 3), direct)
        before = record.captured
        same(roll(graphs, asked, samples, 3), direct)
        assert before and record.captured == before, "a known shape is captured once"

    @pytest.mark.parametrize("name", ["opt-350m", "llama3-rope"])
    def test_padding_may_lie_beyond_the_last_position(self, name: str) -> None:
        stacked, asked = Stacked.of([variant(name)], SIZE), [[BOS, *[5, 6, 7] * 27, EOS, BOS]]
        same(roll(Engine(stacked, GPU, Graphs(Recorder())), asked, 4), roll(Engine(stacked), asked, 4))

    def test_growing_memory_voids_graphs(self, prompts: Prompts) -> None:
        stacked = Stacked.of([tiny()], SIZE)
        graphs, direct = Engine(stacked, GPU, Graphs(Recorder())), Engine(stacked)
        for count in (2, 9, 2):
            asked = prompts(count, 3)
            same(roll(graphs, asked, 3), roll(direct, asked, 3))

    def test_a_step_reads_and_writes_the_static_memory_only(self, prompts: Prompts) -> None:
        """Replayed at other contents of the same memory, a step gives what those contents ask for."""
        graphs = Engine(Stacked.of([tiny()], SIZE), GPU, Graphs(Recorder()))
        first, second = prompts(4, 3), prompts(4, 4)
        once = roll(graphs, second, 3)
        roll(graphs, first, 3)
        same(roll(graphs, second, 3), once)

    def test_static_shapes_pad_little(self) -> None:
        for count in range(65, 2000):
            assert count <= row_rung(count) <= 1.125 * count
        for length in range(1, 1025):
            padded = length_rung(length)
            assert padded % 16 == 0 and length <= padded <= max(length + 15, 1.25 * length + 1)


class TestWaves:
    def engine(self, clusters: int, **changes: Any) -> Engine:
        return Engine(Stacked.of([tiny(seed=k) for k in range(clusters)], SIZE), pace(**changes))

    @pytest.mark.parametrize("changes", [{}, {"small": 10_000}, {"filled": 0.5}, {"lanes": 16}, {"narrow": 2}, ALIKE])
    def test_every_branch_is_in_one_wave(self, changes: dict[str, Any], prompts: Prompts) -> None:
        made = [
            Branch(row, [0, 0, 0, 2, 1][row % 5], [5] * (30 + 50 * (row % 3)), np.arange(row % 4 * 3), True)
            for row in range(40)
        ]
        engine = self.engine(3, **changes)
        found: list[int] = []
        for first, last, rows in waves(made, STEPS, engine.models, engine.pace):
            assert len(rows) == last - first
            for cluster, part in enumerate(rows, first):
                assert all(branch.cluster == cluster for branch in part)
                found += [branch.visit for branch in part]
            branches = [branch for part in rows for branch in part]
            columns = 1 + max(len(branch.rollouts) for branch in branches)
            assert len(branches) == 1 or len(branches) * columns <= engine.pace.lanes
            lengths = [len(branch.prompt) for branch in branches]
            few = len(branches) * columns <= engine.pace.few and len(branches) * max(lengths) <= engine.pace.short
            assert few or max(lengths) <= max(64, 2 * min(lengths))
        assert sorted(found) == list(range(40))

    def test_few_branches_share_a_wave_whatever_their_clusters_and_lengths(self, prompts: Prompts) -> None:
        engine, asked = self.engine(3), branches(prompts(5, 1), 8, 3)
        assert len(waves(asked, STEPS, engine.models, engine.pace)) == 1
        asked[0] = asked[0]._replace(prompt=[5] * 200, rollouts=np.arange(2))
        assert len(waves(asked, STEPS, engine.models, engine.pace)) == 1
        for changes in (ALIKE, {"short": 500}, {"few": 40}):
            assert len(waves(asked, STEPS, engine.models, pace(**changes))) > 1

    def test_waves_do_not_change_what_comes_out(self, prompts: Prompts) -> None:
        asked = prompts(20, 6)
        results = [
            roll(self.engine(3, **c), asked, 6, 3)
            for c in ({}, ALIKE, {**ALIKE, "small": 0, "narrow": 2}, {"lanes": 30, "compact": 1.0})
        ]
        for other in results[1:]:
            same(results[0], other)


class Markov:
    """An ensemble without a network: three pages, the next depends on the last only, so all is known exactly."""

    TABLE = np.array([[0.2, 0.5, 0.2, 0.1], [0.3, 0.1, 0.4, 0.2], [0.5, 0.2, 0.2, 0.1]])  # after page: EOS, pages
    size, heads, token_bytes, device, stacked = len(SPECIALS) + 3, 1, 8, torch.device("cpu"), False
    context = 1 << 30

    def __init__(self) -> None:
        logits = torch.full((self.size, self.size), -torch.inf)
        logits[[BOS, EOS], 4:] = torch.tensor([0.5, 0.3, 0.2]).log()
        for page in range(3):
            logits[4 + page, [EOS, 4, 5, 6]] = torch.tensor(self.TABLE[page]).float().log()
        self.table = logits

    def part(self, first: int, last: int) -> "Markov":
        return self

    def prefill(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, KeyValues]:
        nothing = torch.zeros(len(lengths), 1, tokens.shape[2], 1)
        return self.table[tokens[0, torch.arange(len(lengths)), lengths - 1]], [(nothing, nothing)]

    def step(self, tokens: Tensor, positions: Tensor, cache: RolloutCache) -> Tensor:
        return self.table[tokens]

    def logits_at(self, tokens: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        return self.table[tokens[rows, places]]


def enumerated(steps: int) -> tuple[np.ndarray, float]:
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

    def sample(self, visits: int, groups: np.ndarray) -> Rollouts:
        draws = uniforms([f"s{i}" for i in range(visits)], 100, self.STEPS)
        return Engine(Markov()).rollouts(branches([[BOS]] * visits, 100), draws, groups)

    def test_marginals_and_groups_are_first_passage_probabilities(self) -> None:
        groups = np.zeros((1, 7), dtype=np.float32)
        groups[0, [4, 6]] = 1.0
        rolled = self.sample(40, groups)
        held, either = enumerated(self.STEPS)
        np.testing.assert_allclose(rolled.marginals.mean(0)[4:], held, atol=0.01)
        assert rolled.groups.mean() == pytest.approx(either, abs=0.01)
        counted = (rolled.sequences[..., None] == np.arange(4, 7)).any(2)
        np.testing.assert_allclose(counted.mean((0, 1)), held, atol=0.025)
        # The same 100 rollouts tell more through first passages than through counts.
        assert (rolled.marginals[:, 4:].var(0) < counted.mean(1).var(0)).all()

    def test_transitions_pass_a_chi_square_test(self) -> None:
        rolled = self.sample(20, np.zeros((0, 7)))
        observed = np.zeros((3, 4))
        for session in rolled.sequences.reshape(-1, self.STEPS):
            for a, b in pairwise(session):
                if a == EOS:
                    break
                observed[a - 4, 0 if b == EOS else b - 3] += 1
        expected = observed.sum(1, keepdims=True) * Markov.TABLE
        statistic = ((observed - expected) ** 2 / expected).sum()
        assert statistic < 27.9  # 99.9 % quantile at 9 degrees of freedom


@pytest.mark.parametrize("architecture", ["opt", "qwen2", "llama"])
def test_bf16_says_nearly_the_same(architecture: str, prompts: Prompts) -> None:
    asked = prompts(3, 9)
    exact = roll(Engine(Stacked.of([tiny(architecture)], SIZE)), asked, 24).marginals
    rounded = LanguageModel(tiny(architecture).model, dtype=torch.bfloat16)
    close = roll(Engine(Stacked.of([rounded], SIZE)), asked, 24).marginals
    assert np.abs(exact - close).max() < 0.25 and np.abs(exact - close).mean() < 0.03
