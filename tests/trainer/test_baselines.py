"""Fitted baselines stand on the bundle's own split, leave the bundle as it is, and know more than nothing."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from models.bundle import load_bundle
from models.forecaster import Forecaster
from tests.trainer.conftest import shop, write
from trainer import fit
from trainer.baselines import ALL, BOOSTING, FAST, GROUPS, GRU, MARKOV, MIXTURE, fit_contenders
from trainer.contenders import KMEANS_LMS, LARGE_LM, SMALL_LM, Contender
from trainer.corpus import read_corpus
from trainer.errors import TrainingError
from trainer.examples import Example, examples
from trainer.options import TrainOptions
from trainer.rows import Rows

PARAMETERS = 7_000  # of the bundle, as far as the baselines are told


@pytest.fixture(scope="module")
def forecaster(
    sessions: Path, options: Callable[..., TrainOptions], tmp_path_factory: pytest.TempPathFactory
) -> Forecaster:
    place = tmp_path_factory.mktemp("baselines") / "bundle"
    return load_bundle(fit.train(sessions, place, options(epochs=1, fine_tune_epochs=0)), "cpu")


@pytest.fixture(scope="module")
def seen(forecaster: Forecaster, tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    """Other visitors of the same shop."""
    corpus = read_corpus(write(shop(150, seed=5), tmp_path_factory.mktemp("others")))
    return examples(corpus, corpus.returning(), forecaster.router)


@pytest.fixture(scope="module")
def fitted(forecaster: Forecaster, sessions: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Contender]:
    before = copy.deepcopy([head.outcome for head in forecaster.heads]), forecaster.config
    nowhere = tmp_path_factory.mktemp("none") / "cache"
    contenders = fit_contenders(sessions, forecaster, PARAMETERS, (*FAST, GRU), nowhere, device="cpu")
    assert ([head.outcome for head in forecaster.heads], forecaster.config) == before
    assert not nowhere.exists()
    return {contender.name: contender for contender in contenders}


def nats(rows: Rows) -> float:
    return float(sum(row["nll"] for row in rows) / sum(row["tokens"] for row in rows))


def test_each_says_all_it_can(fitted: dict[str, Contender], seen: list[Example]) -> None:
    assert tuple(fitted) == (*FAST, GRU)
    for name, contender in fitted.items():
        done: list[int] = []
        rows = contender.rows(seen, done.append)
        assert [row["session_id"] for row in rows] == [example.session_id for example in seen]
        assert sum(done) == len(seen) and {row["predictor"] for row in rows} == {name}
        assert all(0 < row[p] < 1 for row in rows for p in ("cart_p", "purchase_p"))
        assert all(0 < threshold < 1 for threshold in contender.thresholds)
        assert (contender.parameters or 0) > 0
        if not name.startswith(BOOSTING):
            assert all(row["expected"] and row["path"] and np.isfinite(row["nll"]) for row in rows)


def test_who_knows_the_visitor_does_better(fitted: dict[str, Contender], seen: list[Example]) -> None:
    """Visitors like shoes or music: one chain for everybody cannot know which."""
    found = {name: nats(fitted[name].rows(seen, lambda done: None)) for name in (MARKOV, MIXTURE)}
    assert found[MIXTURE] < found[MARKOV] - 0.05


def test_fitting_again_gives_the_same(
    forecaster: Forecaster, fitted: dict[str, Contender], sessions: Path, seen: list[Example], tmp_path: Path
) -> None:
    (again,) = fit_contenders(sessions, forecaster, PARAMETERS, [MIXTURE], tmp_path, device="cpu")
    few = seen[:20]
    assert again.rows(few, lambda done: None) == fitted[MIXTURE].rows(few, lambda done: None)


def test_language_models_are_kept(
    forecaster: Forecaster, sessions: Path, seen: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (small,) = fit_contenders(sessions, forecaster, PARAMETERS, [SMALL_LM], tmp_path, device="cpu")
    monkeypatch.setattr(fit, "train", None)
    (again,) = fit_contenders(sessions, forecaster, PARAMETERS, [SMALL_LM], tmp_path, device="cpu")
    few = seen[:10]
    assert small.rows(few, lambda done: None) == again.rows(few, lambda done: None)
    assert small.parameters == again.parameters and (small.parameters or 0) > 1_000


def test_names_and_groups(forecaster: Forecaster, sessions: Path, tmp_path: Path) -> None:
    assert set(GROUPS["fast"]) < set(GROUPS["all"]) == set(ALL) and {SMALL_LM, LARGE_LM, KMEANS_LMS} < set(ALL)
    with pytest.raises(TrainingError, match="no baseline called oracle"):
        fit_contenders(sessions, forecaster, PARAMETERS, ["oracle"], tmp_path)
