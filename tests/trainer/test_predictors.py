"""What training begins with: models from local directories, and those that are refused before anything is learnt."""

from dataclasses import replace
from pathlib import Path

import pytest

from models.language_model import build
from tests.models.test_pretrained import saved
from trainer.errors import TrainingError
from trainer.options import TrainOptions
from trainer.predictors import new_model


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
