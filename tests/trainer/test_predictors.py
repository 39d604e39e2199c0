"""What training begins with, what it refuses before anything is learnt, and how adapters are judged."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.adapters import Adapters
from models.language_model import build
from models.predictors import one_hot
from tests.models.test_pretrained import saved
from trainer.checkpoints import Run
from trainer.corpus import read_corpus
from trainer.errors import TrainingError
from trainer.material import Material
from trainer.options import TrainOptions
from trainer.predictors import _judge, _predictor, new_model


def test_an_architecture_that_does_not_work_is_refused_with_its_directory(tmp_path: Path) -> None:
    options = TrainOptions(pretrained=saved("bloom", tmp_path / "b"), context_tokens=40, max_pages=8)
    with pytest.raises(TrainingError, match="/b: architecture 'bloom' does not work here"):
        new_model(options, 12)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="holds no model that transformers can open"):
        new_model(TrainOptions(pretrained=tmp_path), 12)


def test_a_model_of_too_few_positions_is_refused(tmp_path: Path) -> None:
    build("opt", 90, 16, 1, 2, 48).save_pretrained(tmp_path)
    with pytest.raises(TrainingError, match="has 48 positions"):
        new_model(TrainOptions(pretrained=tmp_path, context_tokens=40, max_pages=8), 12)


def test_a_model_that_takes_no_adapters_is_refused_with_backend_lora(tmp_path: Path) -> None:
    options = TrainOptions(pretrained=saved("gpt2", tmp_path), context_tokens=40, max_pages=8)
    assert new_model(options, 12).config.model_type == "gpt2"
    with pytest.raises(TrainingError, match=r"no linear layers .* that adapters could change. Take another model"):
        new_model(replace(options, backend="lora"), 12)


def test_adapters_are_judged_as_their_merged_models_without_a_copy_of_the_trunk(
    sessions: Path, options: Callable[..., TrainOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Run(tmp_path / "run", {}, tmp_path / "log")
    material = Material.of(read_corpus(sessions), None, options(), store, None)
    held = material.held(None)
    routed = one_hot([row % 2 for row in range(len(held))], 2)
    adapters = Adapters(new_model(material.options, len(material.vocabulary)), 2)
    with torch.no_grad():
        for name, value in adapters.named_parameters():
            if name.endswith(".B"):
                value.normal_(std=0.3)
    encode, render = material.tokenizer.encode, material.tokenizer.render
    prompts = [render([encode(pages) for pages in example.visit.sessions]) for example in held]
    targets = [encode(example.target) for example in held]
    merged = _predictor("lora", 2, adapters, material.device, torch.float32)
    expected = merged.nll(prompts, routed, targets).sum() / sum(len(target) + 1 for target in targets)
    monkeypatch.setattr(Adapters, "merge", lambda *_: pytest.fail("a copy of the whole model"))
    assert _judge(material, "lora", routed, held)(adapters) == pytest.approx(float(expected), rel=1e-4)
    assert np.isfinite(expected)
    store.close()
