"""`items evaluate` from the log to the report, and every figure of it again from retrieval.parquet in plain code."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from streams.cli import app
from tests.trainer.clicked import ITEMS, clicks, histories, sessions
from trainer.errors import TrainingError
from trainer.protocols import Histories
from trainer.retrieval import evaluate_items, render
from trainer.retrieval_published import NO_CHANNELS, NO_MORPHS, PUBLISHED, PUBLISHED_BEST

SMALL = """
[train]
epochs = 1
seeds = 3
batch = 50
{train}
[paper]
epochs = 1
heads = 2
[baselines]
names = {names}
"""
ALL = (
    '["popularity", "counts", "EASE", "nearest items", "PinnerSage", "one vector", "one vector, ordered", "DPSR", '
    '"XPert as published", "XPert as published, without channels", "XPert as published, without morphs"]'
)


def everybody() -> Histories:
    """Among them some who clicked only what nobody else did: nothing of it has a vector."""
    told = histories()
    alone = [f"v{user}" for user in range(30)]
    return Histories(
        [*told.users, *alone],
        [*told.items, *([f"{user}a", f"{user}b"] for user in alone)],
        [*told.labels, *(ITEMS[:2] for _ in alone)],
    )


def sequences(directory: Path, train: str = "", names: str = ALL) -> tuple[Path, Path]:
    told = everybody()
    rows = zip(told.users, told.items, told.labels, strict=True)
    (directory / "log.txt").write_text(
        "".join(f"{' '.join([user, *items, *labels])}\n" for user, items, labels in rows)
    )
    attributes = {item: [place % 4, 4 + place % 3] for place, item in enumerate(ITEMS)}
    (directory / "attributes.json").write_text(json.dumps(attributes))
    head = '[log]\nformat = "sequences"\nattributes = "attributes.json"\n[last_items]\nvalidation = 30\ntest = 60\n'
    (directory / "recipe.toml").write_text(head + SMALL.format(train=train, names=names))
    return directory / "recipe.toml", directory / "log.txt"


def timed(directory: Path) -> tuple[Path, Path]:
    log = clicks()
    columns = {
        "user_id": log.user,
        "session_id": log.user * 100 + log.session,
        "article_id": log.item,
        "ts_ms": log.ts,
    }
    pq.write_table(pa.table(columns), directory / "log.parquet")
    head = (
        '[log]\nformat = "clicks"\n[later_days]\ntrain_days = [2, 4]\nvalidation_days = [4, 5]\ntest_days = [5, 6]\n'
        "train = 80\nvalidation = 40\ntest = 40\nindex_clicks = 8\n"
    )
    names = '["popularity", "nearest items"]'
    (directory / "recipe.toml").write_text(head + SMALL.format(train='policy = "recency"', names=names))
    return directory / "recipe.toml", directory / "log.parquet"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("items")
    recipe, log = sequences(directory)
    told = CliRunner().invoke(
        app, ["items", "evaluate", "--recipe", str(recipe), "--log", str(log), "--report", str(directory / "report")]
    )
    assert told.exit_code == 0, told.output
    assert "personal operator" in told.output and "retrieval.html" in told.output
    return directory / "report"


def plain_figures(row: dict[str, Any]) -> dict[str, float]:
    """Every measure of one case, from its ranked items and labels (XPert, section 4)."""
    items, scores, labels = row["items"], row["scores"], set(row["target"])
    hits = [item in labels for item in items]
    found = {f"recall_{k}": sum(hits[:k]) / len(labels) for k in (10, 50, 100)}
    for k in (10, 50, 100):
        gain = sum(1 / math.log(place + 2) for place, hit in enumerate(hits[:k]) if hit)
        found[f"ndcg_{k}"] = gain / sum(1 / math.log(place + 2) for place in range(min(k, len(labels))))
    first = next((place for place, hit in enumerate(hits[:100], start=1) if hit), None)
    found["mrr_100"] = 0.0 if first is None else 1 / first
    pairs = [
        1.0 if own > other else 0.5 if own == other else 0.0
        for own, hit in zip(scores, hits, strict=True)
        if hit
        for other, miss in zip(scores, hits, strict=True)
        if not miss
    ]
    found["auc_100"] = (sum(pairs) / len(pairs) if pairs else 1.0) if any(hits) else 0.0
    return found | {f"precision_{k}": sum(hits[:k]) / k for k in (1, 3)}


def test_every_figure_follows_from_the_parquet_file(made: Path) -> None:
    report = json.loads((made / "retrieval.json").read_text())
    rows = pq.read_table(made / "retrieval.parquet").to_pylist()
    values = {name: [plain_figures(row) for row in rows if row["predictor"] == name] for name in report["figures"]}
    assert {len(found) for found in values.values()} == {report["cases"]} == {60}
    picks = np.random.default_rng(report["seed"]).integers(0, 60, size=(report["resamples"], 60))
    ours = report["ours"]
    for name, columns in report["figures"].items():
        for measure, figure in columns.items():
            one = np.array([row[measure] for row in values[name]])
            spread = np.quantile(one[picks].mean(axis=1), [0.025, 0.975])
            assert [figure["mean"], figure["low"], figure["high"]] == pytest.approx([one.mean(), *spread], abs=1e-9)
            if name != ours:
                apart = np.array([row[measure] for row in values[ours]]) - one
                spread = np.quantile(apart[picks].mean(axis=1), [0.025, 0.975])
                told = report["differences"][name][measure]
                assert [told["mean"], told["low"], told["high"]] == pytest.approx([apart.mean(), *spread], abs=1e-9)
    for contrast in report["contrasts"]:
        apart = np.mean([row["recall_50"] for row in values[contrast["with_it"]]]) - np.mean(
            [row["recall_50"] for row in values[contrast["without"]]]
        )
        assert contrast["differences"]["all"]["recall_50"]["mean"] == pytest.approx(apart)


def test_who_has_no_seed_counts_but_is_told_of(made: Path) -> None:
    report = json.loads((made / "retrieval.json").read_text())
    rows = [row for row in pq.read_table(made / "retrieval.parquet").to_pylist() if row["predictor"] == report["ours"]]
    without = [row for row in rows if not row["seeded"]]
    assert 0 < report["seedless"] == len(without) == sum(row["user_id"].startswith("v") for row in rows)
    part = report["parts"]["with a seed"]
    assert part["cases"] == len(rows) - len(without)
    seeded = [plain_figures(row)["recall_10"] for row in rows if row["seeded"]]
    assert part["figures"][report["ours"]]["recall_10"]["mean"] == pytest.approx(np.mean(seeded))
    assert f"Of the visitors, {len(without)} have\nno seed" in (made / "retrieval.html").read_text()


def test_everybody_stands_in_the_report(made: Path) -> None:
    report = json.loads((made / "retrieval.json").read_text())
    assert {
        "popularity", "counts", "nearest + prior", "shared matrix", "residual operator", "personal operator", PUBLISHED,
        PUBLISHED_BEST, NO_CHANNELS, NO_MORPHS, "EASE", "nearest items", "PinnerSage", "one vector",
        "one vector, ordered", "DPSR",
    } <= set(report["figures"])  # fmt: skip
    assert any(name.endswith("recent seeds") for name in report["figures"])
    pairs = {(one["with_it"], one["without"]) for one in report["contrasts"]}
    assert {(PUBLISHED, NO_CHANNELS), (PUBLISHED, NO_MORPHS)} <= pairs
    assert {"vectors from clicks", "vectors from texts"} <= set(report["validation"])
    chosen = {name: value for name, value in report["validation"].items() if not name.startswith("vectors")}
    kept_out = tuple(reason.partition(" less ")[0] for reason in report["choice"] if "may not be chosen" in reason)
    assert chosen[report["ours"]] == max(value for name, value in chosen.items() if name not in kept_out)
    assert any(name.endswith("fused with counts") for name in chosen)
    page = (made / "retrieval.html").read_text()
    assert report["verdict"]["headline"] in page and page.count("<svg") == 3
    assert len(report["choice"]) == 2 and "esidual operator less shared matrix" in page


def test_nobody_is_shown_what_they_have_seen_and_seeds_are_of_the_history(made: Path) -> None:
    told = everybody()
    before = {user: set(items) for user, items in zip(told.users, told.items, strict=True)}
    after = {user: labels for user, labels in zip(told.users, told.labels, strict=True)}
    for row in pq.read_table(made / "retrieval.parquet").to_pylist():
        assert not set(row["items"]) & before[row["user_id"]]
        assert len(set(row["items"])) == len(row["items"])
        assert {seed for seed in row["seeds"] if seed is not None} <= before[row["user_id"]]
        assert row["target"] == after[row["user_id"]]


def test_a_log_with_times_is_judged_by_days_and_by_kind_of_click(tmp_path: Path) -> None:
    found = evaluate_items(*timed(tmp_path), tmp_path / "report")
    assert "within a session" in found.parts
    assert any(name.endswith(", channels") for name in found.figures), "recency is the default here"
    assert found.coverage["test"] < 1
    assert render(found).row_count == len(found.figures)


@pytest.mark.parametrize(
    "division",
    [
        "[later_days]\ntrain_days = [2, 4]\nvalidation_days = [4, 5]\ntest_days = [5, 6]\nindex_clicks = 8\n",
        "[last_items]\nvalidation = 30\n",
    ],
)
def test_a_shop_judges_its_own_sessions(tmp_path: Path, division: str) -> None:
    log = sessions(clicks(), tmp_path / "sessions")
    recipe = '[log]\nformat = "sessions"\n' + division + SMALL.format(train="", names='["popularity", "SASRec"]')
    (tmp_path / "recipe.toml").write_text(recipe)
    found = evaluate_items(tmp_path / "recipe.toml", log, tmp_path / "report")
    assert found.task == "sessions" and found.cases > 20
    assert {"popularity", "SASRec", "shared matrix"} <= set(found.figures)


def test_in_mode_paper_the_published_model_is_ours(tmp_path: Path) -> None:
    found = evaluate_items(*sequences(tmp_path, 'mode = "paper"', '["popularity"]'), tmp_path / "report")
    assert found.ours == PUBLISHED


def test_where_the_report_goes_is_settled_before_anything_is_fitted(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("a file")
    recipe, log = sequences(tmp_path)
    log.unlink()
    with pytest.raises(TrainingError, match="report cannot be a directory for the report"):
        evaluate_items(recipe, log, tmp_path / "report")
