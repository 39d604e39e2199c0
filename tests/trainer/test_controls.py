"""Language models beside a bundle: their sizes and schedules, and that none is trained twice."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from trainer.contenders import KMEANS_LMS, LARGE_LM, SMALL_LM
from trainer.controls import bundle_options, control, control_options
from trainer.corpus import read_corpus
from trainer.errors import TrainingError
from trainer.options import TrainOptions
from trainer.paper import PaperOptions
from trainer.predictors import new_model

SIZE, CLUSTERS = 40, 3


def parameters(options: TrainOptions) -> int:
    return sum(parameter.numel() for parameter in new_model(options, SIZE).parameters())


@pytest.mark.parametrize("architecture", ["opt", "qwen2", "llama"])
def test_the_large_model_is_the_least_with_all_the_parameters(architecture: str) -> None:
    options = TrainOptions(architecture=architecture, hidden_size=16, heads=4, layers=2)
    total = CLUSTERS * parameters(options)
    large = control_options(options, CLUSTERS, total, SIZE)[LARGE_LM]
    unit = 4 if architecture == "opt" else 8
    assert parameters(large) >= total > parameters(replace(large, hidden_size=large.hidden_size - unit))
    assert large.clusters == 1 and large.lr < options.lr


def test_single_models_last_as_long_as_all_phases_of_the_bundle() -> None:
    options = TrainOptions(hidden_size=16, epochs=5, fine_tune_epochs=3, soft=True, dropout=0.05)
    told = control_options(options, CLUSTERS, CLUSTERS * parameters(options), SIZE)
    small, large, kmeans = told[SMALL_LM], told[LARGE_LM], told[KMEANS_LMS]
    # Training gives one cluster a single phase of epochs + fine_tune_epochs.
    assert all(one.epochs + one.fine_tune_epochs == 8 and one.clusters == 1 for one in (small, large))
    assert replace(small, clusters=CLUSTERS) == kmeans
    assert (kmeans.mode, kmeans.predictors, kmeans.soft) == ("kmeans", "separate", False)
    assert replace(kmeans, mode="behaviour", backend=None, soft=True, clusters=None) == options


def test_beside_one_cluster_stands_a_larger_model_alone() -> None:
    options = TrainOptions(hidden_size=16)
    total = parameters(options)
    told = control_options(options, 1, total, SIZE)
    assert set(told) == {LARGE_LM}, "one small LM and K-means would be the bundle again"
    assert 4 * total <= parameters(told[LARGE_LM]) < 5 * total


@pytest.mark.parametrize(("critic", "epochs"), [("hard", 4), ("soft", 4 * CLUSTERS)])
def test_beside_the_published_algorithm(critic: Any, epochs: int) -> None:
    paper = PaperOptions(epochs=4, predictor_lr=1e-4, critic=critic)
    options = TrainOptions(mode="paper", hidden_size=16, epochs=6, paper=paper)
    kmeans = control_options(options, CLUSTERS, 1, SIZE)[KMEANS_LMS]
    assert (kmeans.epochs, kmeans.fine_tune_epochs, kmeans.fine_tune_lr) == (6, epochs, 1e-4)


@pytest.mark.parametrize("embedding", ["text", "pages"])
@pytest.mark.parametrize(("asked", "clusters"), [(None, 6), (4, 4)])
def test_beside_it_k_means_clusters_what_it_began_with(embedding: Any, asked: int | None, clusters: int) -> None:
    options = TrainOptions(mode="paper", hidden_size=16, clusters=asked, paper=PaperOptions(embedding=embedding))
    told = control_options(options, CLUSTERS, 1, SIZE)  # CLUSTERS are left of them
    assert (told[KMEANS_LMS].clusters, told[KMEANS_LMS].embedding) == (clusters, embedding)
    assert (told[SMALL_LM].clusters, told[SMALL_LM].embedding) == (1, None)
    assert control_options(TrainOptions(), CLUSTERS, 1, SIZE)[KMEANS_LMS].embedding is None


def test_what_would_say_nothing_is_left_out(tmp_path: Path) -> None:
    assert set(control_options(TrainOptions(mode="kmeans"), 4, 1, SIZE)) == {SMALL_LM, LARGE_LM}
    assert set(control_options(TrainOptions(pretrained=tmp_path), 4, 1, SIZE)) == {SMALL_LM, KMEANS_LMS}


def test_a_large_model_beside_pretrained_ones_is_tuned_by_table_16(tmp_path: Path) -> None:
    options = TrainOptions(mode="paper", pretrained=tmp_path / "small", large=tmp_path / "large")
    with pytest.raises(TrainingError, match=r"large is .*/large, but there is no config.json"):
        control_options(options, 4, 1, SIZE)
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text("{}")
    large = control_options(options, 4, 1, SIZE)[LARGE_LM]
    assert (large.pretrained, large.predictors, large.clusters) == (tmp_path / "large", "lora", 1)
    assert (large.adapter_rank, large.adapter_alpha, large.adapter_dropout) == (32, 16.0, 0.05)
    assert (large.lr, large.weight_decay, large.warm_up_steps) == (2e-4, 0.0, 10)
    assert (large.epochs, large.patience, large.packing) == (10, 10, True)
    assert (large.batch, large.accumulate, large.fill_rows) == (2, 4, True), "eight rows a step"
    assert (large.context_tokens, large.validation_share) == (512, 0.05) and large.tunes_pretrained


def test_options_are_read_back_from_a_bundle(tmp_path: Path) -> None:
    options = TrainOptions(mode="paper", pretrained=tmp_path, epochs=7, paper=PaperOptions(alpha=1.0))
    told = msgspec.json.decode(msgspec.json.encode({**options.plain(), "chosen": {"nll": 1.0}}))
    assert bundle_options(told) == options
    with pytest.raises(TrainingError, match="Train the bundle again"):
        bundle_options({"epochs": "many"})


def test_nothing_is_trained_twice(
    sessions: Path, options: Callable[..., TrainOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Path] = []

    def train(place: Path, bundle: Path, options: TrainOptions, progress: Any) -> Path:
        trained.append(bundle)
        bundle.mkdir()
        return bundle

    monkeypatch.setattr("trainer.controls.fit.train", train)
    corpus = read_corpus(sessions)
    other = read_corpus(sessions / "part=0")
    first = control(options(), sessions, corpus, tmp_path, "cpu", None)
    again = control(options(minutes=1.0), sessions, corpus, tmp_path, "auto", None)  # where and how long is no matter
    assert again == first and trained == [first]
    wider, elsewhere = options(hidden_size=32), options()
    assert len({first, control(wider, sessions, corpus, tmp_path, "cpu", None)}) == 2
    control(elsewhere, sessions / "part=0", other, tmp_path, "cpu", None)
    assert len(set(trained)) == 3
