"""Building, loading and scoring with one transformers model; draws. tests/models/test_predictors.py has generation."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from models.engine_network import Stacked
from models.language_model import LanguageModel, buckets, build, restore
from models.language_model import nll as score
from models.sampling import uniforms
from models.vocabulary import EOS
from tests.models.conftest import ARCHITECTURES, SIZE, tiny
from tests.models.naive import nll, plain

Prompts = Callable[[int, int], list[list[int]]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
class TestArchitectures:
    def test_nll_is_the_sum_of_log_probabilities(self, architecture: str, prompts: Prompts, tmp_path: Path) -> None:
        lm = tiny(architecture)
        oracle = plain(lm.model, tmp_path)
        asked, targets = [*prompts(6, 4), [1] * 90], [[4, 5, 6][: 1 + i % 3] for i in range(7)]
        for prompt, target, nats in zip(asked, targets, lm.nll(asked, targets), strict=True):
            assert nats == pytest.approx(nll(oracle, prompt, target, SIZE), rel=1e-4)

    def test_a_session_beyond_the_positions_is_scored_in_parts(self, architecture: str, tmp_path: Path) -> None:
        lm = tiny(architecture)
        oracle = plain(lm.model, tmp_path)
        rng = np.random.default_rng(0)
        for before, after in ((100, 58), (100, 59), (100, 70), (120, 400)):  # with [EOS] 159 inputs, 160, 171, 521
            prompt, target = (rng.integers(4, SIZE, size=count).tolist() for count in (before, after))
            whole, nats = [*prompt, *target, EOS], 0.0
            if len(whole) - 1 <= 160:
                nats = nll(oracle, prompt, target, SIZE)
            else:  # 80 tokens at a time, each after the first token of all and those that came last
                for start in range(before, len(whole), 80):
                    part = whole[start : start + 80]
                    context = [prompt[0], *whole[start + len(part) - 160 : start]]
                    with torch.inference_mode():
                        logits = oracle(input_ids=torch.tensor([[*context, *part[:-1]]])).logits[0, :, :SIZE]
                    assert len(context) + len(part) - 1 == 160
                    costs = -torch.log_softmax(logits.double(), -1)[len(context) - 1 :]
                    nats += sum(float(costs[i, token]) for i, token in enumerate(part))
            assert lm.nll([prompt], [target])[0] == pytest.approx(nats, rel=1e-4)
            stacked = Stacked.of([lm], SIZE)
            assert score(stacked, [prompt, prompt], [target, [4]])[0] == pytest.approx(nats, rel=1e-4)

    def test_a_narrowed_model_knows_fewer_tokens(self, architecture: str, prompts: Prompts, tmp_path: Path) -> None:
        lm = tiny(architecture)
        oracle, prompt = plain(lm.model, tmp_path), prompts(1, 4)[0]
        assert lm.narrowed(8).nll([prompt], [[4]])[0] == pytest.approx(nll(oracle, prompt, [4], 8), rel=1e-4)
        assert lm.size == SIZE

    def test_restored_weights_give_the_same_logits(self, architecture: str, prompts: Prompts) -> None:
        lm = tiny(architecture)
        again = LanguageModel(restore(lm.model.config.to_dict(), dict(lm.model.named_parameters())))
        tokens = torch.tensor([prompts(1, 6)[0]])
        assert torch.equal(lm.logits(tokens), again.logits(tokens))


def test_sizes_must_fit_together() -> None:
    with pytest.raises(ValueError, match="architecture 'bert' is unknown"):
        build("bert", 10, 16, 1, 2, 32)
    with pytest.raises(ValueError, match="no even multiple of 3 heads"):
        build("opt", 10, 16, 1, 3, 32)


def test_draws_are_uniform_and_depend_on_seed_rollout_and_step_only() -> None:
    many = uniforms([f"v{i}" for i in range(50)], 24, 32)
    assert many.min() >= 0.0 and many.max() < 1.0
    counts = np.histogram(many, bins=20, range=(0, 1))[0]
    expected = many.size / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # 99.9 % quantile at 19 degrees of freedom
    assert (uniforms(["v7"], 24, 32)[0] == many[7]).all()
    assert (uniforms(["v7"], 8, 16)[0] == many[7, :8, :16]).all()
    assert len(np.unique(many)) > 0.99 * many.size


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
