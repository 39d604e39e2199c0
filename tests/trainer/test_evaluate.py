"""A bundle judged on session files: what is written, recomputed from what is written."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from models.bundle import load_bundle
from tests.trainer import plainfigures
from tests.trainer.conftest import shop, write
from trainer.contenders import BUNDLE, LAST_SESSION, OWN_FREQUENCIES, POPULARITY, SHRUNK_FREQUENCIES
from trainer.corpus import read_corpus
from trainer.errors import TrainingError
from trainer.evaluate import evaluate, render
from trainer.fit import TrainOptions, train
from trainer.report import Report

UNFITTED = [LAST_SESSION, OWN_FREQUENCIES, SHRUNK_FREQUENCIES, POPULARITY]


@pytest.fixture(scope="module")
def bundle(sessions: Path, options: Callable[..., TrainOptions], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(sessions, tmp_path_factory.mktemp("judged") / "bundle", options())


@pytest.fixture(scope="module")
def judged(bundle: Path, sessions: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    place = tmp_path_factory.mktemp("report")
    return evaluate(bundle, sessions, place, "cpu", bertscore=True), place


def test_every_figure_follows_from_the_files_alone(judged: tuple[Report, Path]) -> None:
    _, place = judged
    told = json.loads((place / "report.json").read_bytes())
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in pq.read_table(place / "predictions.parquet").to_pylist():
        rows.setdefault(row["predictor"], []).append(row)
    assert list(told["figures"]) == list(rows) == [BUNDLE, *UNFITTED]
    for name, found in told["figures"].items():
        stood = told["predictors"][name]
        thresholds = stood["cart_threshold"], stood["purchase_threshold"]
        plain = plainfigures.figures(rows[name], thresholds, told["outcome_pages"])
        for key, figure in found.items():
            if "_bert_" in key:
                assert 0 < figure["low"] <= figure["mean"] <= figure["high"] <= 1
                continue
            assert (figure or {"mean": None})["mean"] == pytest.approx(plain.get(key)), (name, key)
            if figure is not None and name != BUNDLE and told["figures"][BUNDLE][key] is not None:
                expected = told["figures"][BUNDLE][key]["mean"] - figure["mean"]
                assert told["differences"][name][key]["mean"] == pytest.approx(expected)
    assert told["predictors"][BUNDLE]["parameters"] > 1000 and told["predictors"][POPULARITY]["parameters"] is None


def test_rows_hold_what_was_known_and_what_came(judged: tuple[Report, Path], bundle: Path, sessions: Path) -> None:
    report, place = judged
    corpus, loaded = read_corpus(sessions), load_bundle(bundle, "cpu")
    assert (report.users, report.bundle_digest) == (len(corpus.returning()), loaded.digest)
    assert report.predictors[BUNDLE].cart_threshold == loaded.config.cart.threshold
    users = {corpus.users[user]: corpus.sessions(user) for user in corpus.returning()}
    for row in pq.read_table(place / "predictions.parquet").to_pylist():
        *before, last = users[row["user_id"]]
        assert row["input"] == [corpus.page_names(session) for session in before]
        assert (row["session_id"], row["target"]) == (corpus.session_ids[last], corpus.page_names(last))
        assert (row["cart"], row["purchase"]) == (corpus.cart[last], corpus.purchase[last])
        if row["predictor"] == BUNDLE:
            assert row["tokens"] == len(row["target"]) + 1 and sum(row["cluster_p"]) == pytest.approx(1.0)
        elif row["predictor"] == LAST_SESSION:
            assert row["path"] == row["input"][-1] and set(row["expected"]) == set(row["input"][-1])
        elif row["predictor"] == POPULARITY:
            assert row["expected"][0] == "home" and row["cart_p"] == loaded.config.cart.base_rate
        elif row["predictor"] == SHRUNK_FREQUENCIES:
            assert row["path"] == row["expected"] and len(row["expected"]) == loaded.config.decoding.fallback_pages


def test_the_page_and_the_terminal_say_the_same(judged: tuple[Report, Path]) -> None:
    report, place = judged
    assert report.verdict.headline in (place / "report.html").read_text()
    console = Console(width=100, record=True, file=StringIO())
    console.print(render(report))
    shown = console.export_text()
    iou = report.figures[BUNDLE]["iou"]
    assert iou is not None and f"{iou.mean:.3f}" in shown and render(report).row_count == 5


def test_fitted_baselines_stand_beside_it(bundle: Path, sessions: Path, tmp_path: Path) -> None:
    later = write(shop(30, seed=9), tmp_path / "later")
    report = evaluate(bundle, later, tmp_path / "r", "cpu", train=sessions, contenders=["first-order Markov"])
    assert list(report.figures) == [BUNDLE, *UNFITTED, "first-order Markov"]
    assert report.differences["first-order Markov"]["nll_per_token"] is not None


def test_sessions_of_the_training_are_told(bundle: Path, sessions: Path, tmp_path: Path) -> None:
    again = evaluate(bundle, sessions, tmp_path / "again", "cpu")
    count = len(read_corpus(sessions).session_ids)
    assert again.remarks[0].startswith(f"{count:,} of the {count:,} sessions here are among those of the training")
    assert again.remarks[0] in (tmp_path / "again" / "report.html").read_text()
    console = Console(width=300, record=True, file=StringIO())
    console.print(render(again))
    assert "figures flatter" in console.export_text()
    later = [{**row, "session_id": f"later-{row['session_id']}"} for row in shop(30, seed=9)]
    place = write(later, tmp_path / "later")
    assert evaluate(bundle, place, tmp_path / "r", "cpu").remarks == []
    assert evaluate(bundle, place, tmp_path / "r", "cpu", train=sessions, contenders=[]).remarks == []
    mixed = write([*later, *shop(1)], tmp_path / "mixed")
    told = evaluate(bundle, mixed, tmp_path / "r", "cpu", train=sessions, contenders=[]).remarks
    assert len(told) == 1 and told[0].startswith(f"{len(shop(1))} of the")


def test_baselines_of_other_sessions_are_told_and_language_models_refused(
    bundle: Path, sessions: Path, tmp_path: Path
) -> None:
    later = write([{**row, "session_id": f"l{row['session_id']}"} for row in shop(30, seed=9)], tmp_path / "later")
    other = [{**row, "pages": [f"{page}?" for page in row["pages"]]} for row in shop(90, seed=3)]
    elsewhere = write(other, tmp_path / "elsewhere")
    found = evaluate(bundle, later, tmp_path / "r", "cpu", train=elsewhere, contenders=["first-order Markov"])
    assert found.remarks == [
        f"The bundle was trained on other sessions than {elsewhere}, which the fitted baselines learned from."
    ]
    with pytest.raises(TrainingError, match="elsewhere holds other pages than the bundle knows"):
        evaluate(bundle, later, tmp_path / "r", "cpu", train=elsewhere, contenders=["one small LM"])


def test_beside_a_bundle_that_went_on_there_are_no_language_models(
    bundle: Path, sessions: Path, options: Callable[..., TrainOptions], tmp_path: Path
) -> None:
    train(sessions, tmp_path / "next", options(warm_start=bundle, epochs=1, fine_tune_epochs=0))
    later = write([{**row, "session_id": f"l{row['session_id']}"} for row in shop(30, seed=9)], tmp_path / "later")
    chosen = ["first-order Markov", "one small LM"]
    found = evaluate(tmp_path / "next", later, tmp_path / "r", "cpu", train=sessions, contenders=chosen)
    assert list(found.figures) == [BUNDLE, *UNFITTED, "first-order Markov"]
    assert len(found.remarks) == 1 and "it went on from another" in found.remarks[0]


def test_nobody_to_judge_is_said(bundle: Path, tmp_path: Path) -> None:
    once = [row for row in shop(30) if row["number"] == 1]
    with pytest.raises(TrainingError, match="has two sessions: there is nothing to predict"):
        evaluate(bundle, write(once, tmp_path / "once"), tmp_path / "r", "cpu")


def test_what_would_be_judged_in_vain_is_refused(bundle: Path, sessions: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="these contenders must be fitted"):
        evaluate(bundle, sessions, tmp_path / "r", "cpu", contenders=["all"])
    write(shop(10), tmp_path / "divided" / "train")
    with pytest.raises(TrainingError, match="has a part for train, but none for test"):
        evaluate(bundle, tmp_path / "divided", tmp_path / "r", "cpu")
