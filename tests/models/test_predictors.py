"""What every predictor keeps: back ends, architectures, hard and soft routing."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPTNeoXConfig

from models.adapters import Adapters
from models.engine import Rollouts
from models.language_model import LanguageModel, from_config
from models.predictors import Predictor, Separate, Token, one_hot, shared_out
from models.sampling import uniforms
from models.vocabulary import BOS, EOS, PAD, SPECIALS, UNK
from tests.models.conftest import SIZE, tiny
from tests.models.naive import generated, naive, nll, plain, until_end

Prompts = Callable[[int, int], list[list[int]]]
CLUSTERS, STEPS, SAMPLES = 3, 10, 7
# gpt2 and gpt_neox, which takes adapters, stand for the architectures that the engine leaves to transformers.
ARCHITECTURES = ("opt", "qwen2", "llama")
CASES = [
    *product(("separate", "token"), (*ARCHITECTURES, "gpt2")),
    *product(("lora",), (*ARCHITECTURES, "gpt_neox")),
]
OTHERS = {
    "gpt2": lambda size: GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=160),
    "gpt_neox": lambda size: GPTNeoXConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=160,
    ),
}  # fmt: skip


def small(architecture: str, seed: int, size: int) -> LanguageModel:
    if architecture in ARCHITECTURES:
        return tiny(architecture, seed, size)
    torch.manual_seed(seed)
    model = from_config(OTHERS[architecture](size))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20.0)
    return LanguageModel(model)


def adapted(lm: LanguageModel) -> Adapters:
    """Adapters that make each cluster another model."""
    made = Adapters(lm.model, CLUSTERS, rank=2)
    with torch.no_grad():
        for name, value in made.named_parameters():
            if name.endswith(".B"):
                value.normal_(std=0.3)
    return made.eval()


class Unmerged:
    """The trunk with one cluster's adapters beside it and transformers' own attention."""

    def __init__(self, adapters: Adapters, cluster: int) -> None:
        self._adapters, self._cluster = adapters, cluster
        self.config = adapters.trunk.config

    def __call__(self, **inputs: Any) -> Any:
        return self._adapters(self._cluster, **inputs)

    def generate(self, *args: Any, **options: Any) -> Any:
        with self._adapters.using(self._cluster) as trunk:
            return trunk.generate(*args, **options)


class Case:
    """A predictor, and the plain model and prompt that stand for it in each cluster."""

    def __init__(self, backend: str, architecture: str, path: Path) -> None:
        self.predictor: Predictor
        if backend == "separate":
            models = [small(architecture, k, SIZE) for k in range(CLUSTERS)]
            self.predictor = Separate(models)
            self._plain = [plain(lm.model, path / str(k)) for k, lm in enumerate(models)]
        elif backend == "lora":
            adapters = adapted(small(architecture, 7, SIZE))
            self.predictor = Separate([LanguageModel(adapters.merge(k)) for k in range(CLUSTERS)])
            adapters.trunk.set_attn_implementation("eager")
            self._plain = [Unmerged(adapters, k) for k in range(CLUSTERS)]
        else:
            lm = small(architecture, 5, SIZE + CLUSTERS)
            self.predictor = Token(lm, CLUSTERS)
            self._plain = [plain(lm.model, path)] * CLUSTERS
        self._prefixed = backend == "token"

    def oracle(self, cluster: int, prompt: list[int]) -> tuple[Any, list[int]]:
        return self._plain[cluster], [SIZE + cluster, *prompt] if self._prefixed else prompt


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    backend, architecture = request.param
    return Case(backend, architecture, tmp_path_factory.mktemp("model"))


def posteriors(soft: bool, count: int) -> np.ndarray:
    """Hard: clusters in turn. Soft: uneven, with a cluster that is out of the question for some."""
    if not soft:
        return one_hot([row % CLUSTERS for row in range(count)], CLUSTERS)
    posterior = np.random.default_rng(1).dirichlet(np.ones(CLUSTERS), size=count)
    posterior[::3, 1] = 0.0
    posterior /= posterior.sum(1, keepdims=True)
    return posterior


def some_groups() -> np.ndarray:
    groups = np.zeros((2, SIZE), dtype=np.float32)
    groups[0, 5], groups[1, 7:10] = 1.0, 1.0
    return groups


def roll(case: Case, asked: list[list[int]], posterior: np.ndarray, rows: list[int]) -> Rollouts:
    """Rollouts of these rows, each with its own draws."""
    draws = uniforms([str(row) for row in rows], SAMPLES + 1, STEPS)
    prompts = [asked[row] for row in rows]
    return case.predictor.rollouts(prompts, posterior[rows], draws[:, :-1], some_groups(), draws[:, -1, 0])


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
class TestContract:
    def test_samples_are_naive_with_the_same_draws(self, case: Case, soft: bool, prompts: Prompts) -> None:
        asked, posterior = prompts(5, 2), posteriors(soft, 5)
        draws = uniforms([str(row) for row in range(5)], SAMPLES + 1, STEPS)
        rolled = roll(case, asked, posterior, list(range(5)))
        shares = shared_out(posterior, SAMPLES, draws[:, -1, 0])
        for row, sample in product(range(5), range(SAMPLES)):
            model, prompt = case.oracle(int(shares[row, sample]), asked[row])
            expected = naive(model, prompt, STEPS, SIZE, draws[row, sample])
            assert until_end(rolled.sequences[row, sample]) == expected

    def test_the_path_is_greedy_in_the_likeliest_cluster(self, case: Case, soft: bool, prompts: Prompts) -> None:
        asked, posterior = prompts(6, 1), posteriors(soft, 6)
        likeliest = posterior.argmax(1).tolist()
        oracles = [case.oracle(cluster, prompt) for cluster, prompt in zip(likeliest, asked, strict=True)]
        expected = [naive(model, prompt, STEPS, SIZE) for model, prompt in oracles]
        assert roll(case, asked, posterior, list(range(6))).paths == expected
        assert case.predictor.greedy(asked, likeliest, STEPS) == expected
        assert [generated(model, prompt, STEPS, SIZE) for model, prompt in oracles[:3]] == expected[:3]

    def test_nll_is_that_of_the_mixture_by_plain_logits(self, case: Case, soft: bool, prompts: Prompts) -> None:
        asked, posterior = prompts(5, 4), posteriors(soft, 5)
        targets = [[4, 5, 6, 5][: 1 + row % 4] for row in range(5)]
        nats = case.predictor.nll(asked, posterior, targets)
        for row in range(5):
            each = [nll(*case.oracle(k, asked[row]), targets[row], SIZE) for k in range(CLUSTERS)]
            assert nats[row] == pytest.approx(-np.log((posterior[row] * np.exp(-np.array(each))).sum()), rel=1e-4)

    def test_a_visit_depends_on_neither_order_nor_batch(self, case: Case, soft: bool, prompts: Prompts) -> None:
        asked, posterior = prompts(7, 3), posteriors(soft, 7)
        together = roll(case, asked, posterior, list(range(7)))
        turned = roll(case, asked, posterior, [4, 2, 6, 0])
        alone = [roll(case, asked, posterior, [row]) for row in (2, 5)]
        for row, part, at in [(4, turned, 0), (6, turned, 2), (0, turned, 3), (2, alone[0], 0), (5, alone[1], 0)]:
            assert (part.sequences[at] == together.sequences[row]).all()
            assert part.paths[at] == together.paths[row]
            np.testing.assert_allclose(part.marginals[at], together.marginals[row], atol=1e-5)
            np.testing.assert_allclose(part.groups[at], together.groups[row], atol=1e-5)

    def test_sessions_hold_pages_only(self, case: Case, soft: bool, prompts: Prompts) -> None:
        rolled = roll(case, prompts(6, 8), posteriors(soft, 6), list(range(6)))
        assert (rolled.sequences[:, :, 0] >= len(SPECIALS)).all()
        assert (rolled.sequences < SIZE).all() and not np.isin(rolled.sequences, [PAD, BOS, UNK]).any()
        assert rolled.marginals.shape == (6, SIZE) and (rolled.marginals[:, : len(SPECIALS)] == 0).all()
        assert ((rolled.marginals >= 0) & (rolled.marginals <= 1)).all()
        after_end = np.cumsum(rolled.sequences == EOS, axis=2) > 0
        assert (rolled.sequences[after_end] == EOS).all()


def test_the_mixture_is_sampled_exactly(prompts: Prompts) -> None:
    """The mean over many picks is the mixture of the clusters' own marginals."""
    predictor, prompt = Separate([tiny(seed=k) for k in range(2)]), prompts(1, 5)[0]
    count, posterior = 150, np.array([0.3, 0.7])

    def marginals(weights: np.ndarray) -> np.ndarray:
        draws = uniforms([f"m{row}" for row in range(count)], 9, STEPS)
        rolled = predictor.rollouts([prompt] * count, weights, draws[:, :-1], some_groups(), draws[:, -1, 0])
        mean: np.ndarray = rolled.marginals.mean(0)
        return mean

    own = [marginals(one_hot([k] * count, 2)) for k in range(2)]
    assert np.abs(own[0] - own[1]).max() > 0.2
    np.testing.assert_allclose(marginals(np.tile(posterior, (count, 1))), posterior @ np.stack(own), atol=0.03)


def test_rollouts_are_shared_out_by_the_posterior() -> None:
    posterior = np.array([[0.5, 0.0, 0.26, 0.24], [0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    picks = (np.arange(1000) + 0.5) / 1000
    counts = []
    for pick in picks:
        shares = shared_out(posterior, 10, np.full(3, pick))
        counts.append([np.bincount(row, minlength=4) for row in shares])
    np.testing.assert_allclose(np.mean(counts, axis=0), 10 * posterior, atol=0.011)
    spread = np.array(counts)
    assert (spread >= np.floor(10 * posterior)).all() and (spread <= np.ceil(10 * posterior)).all()
    assert shared_out(posterior, 0, np.zeros(3)).shape == (3, 0)


def test_extreme_draws_stay_in_range() -> None:
    highest = np.full(2, 1.0 - 2.0**-24, dtype=np.float32)
    posterior = np.array([[0.1] * 10, [0.0, *[0.125] * 8, 0.0]])
    shares = shared_out(posterior, 3, highest)
    assert shares.max() <= 9 and (shares[1] != 9).all() and (shares[1] != 0).all()
