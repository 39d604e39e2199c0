"""The report of a judgement: its words, its tables, and a page that needs nothing else."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.metrics import Cases
from tests.trainer import plainfigures
from tests.trainer.invented import MARKS, invented, row
from trainer.contenders import LARGE_LM, SMALL_LM, Advance
from trainer.examples import Example
from trainer.figures import Figure, Figures
from trainer.judging import judge
from trainer.measures import MEASURES, PAPER
from trainer.portraits import portraits
from trainer.report import Report, _bin, compose, standing, write
from trainer.reportpage import examples, html
from trainer.rows import Rows, table
from trainer.verdict import composite, verdict


@dataclass
class Known:
    """A contender whose rows are known."""

    name: str
    known: Rows
    parameters: int | None = 7
    thresholds: tuple[float, float] = (0.4, 0.3)

    def rows(self, seen: Sequence[Example], advance: Advance) -> Rows:
        advance(len(self.known))
        return self.known


@pytest.fixture(scope="module")
def rows() -> dict[str, Rows]:
    made = invented(90, seed=2)
    for one in made["bundle"]:
        one["user_id"] += "<b>"
    return made


@pytest.fixture(scope="module")
def report(rows: dict[str, Rows]) -> Report:
    contenders = [Known(name, part) for name, part in rows.items()]
    return compose(judge(contenders, [], MARKS), contenders, MARKS, 3, ("v1", "sha256:0"), 0)


def test_report_json_is_whole_and_follows_from_the_rows(report: Report, rows: dict[str, Rows], tmp_path: Path) -> None:
    told = json.loads(write(report, tmp_path).read_bytes())
    read: dict[str, Rows] = {}
    for one in table(rows).to_pylist():
        read.setdefault(one["predictor"], []).append(one)
    assert told["users"] == 90 and list(told["figures"]) == list(read) == list(told["predictors"])
    for name, found in told["figures"].items():
        thresholds = told["predictors"][name]["cart_threshold"], told["predictors"][name]["purchase_threshold"]
        plain = plainfigures.figures(read[name], thresholds, told["outcome_pages"])
        for key, figure in found.items():
            assert (figure or {"mean": None})["mean"] == pytest.approx(plain.get(key)), key
            assert key in told["definitions"]
    for cluster in told["clusters"]:
        mine = [one for one in read["bundle"] if one["cluster"] == cluster["portrait"]["cluster"]]
        assert cluster["portrait"]["users"] == len(mine)
        plain = plainfigures.figures(mine, (0.4, 0.3), MARKS)
        assert cluster["figures"]["bundle"]["iou"]["mean"] == pytest.approx(plain["iou"])
        assert set(cluster["differences"]) == {told["rival"]} == {LARGE_LM}


def test_reliability_bins_hold_everybody_once(report: Report, rows: dict[str, Rows]) -> None:
    bins = report.reliability["bundle"]["cart"]
    assert len(bins) == 10 and sum(bin.users for bin in bins) == 90
    assert [bin.p for bin in bins] == sorted(bin.p for bin in bins)
    assert sum(bin.users * bin.rate for bin in bins) == pytest.approx(sum(one["cart"] for one in rows["bundle"]))
    assert sum(bin.users * bin.p for bin in bins) == pytest.approx(sum(one["cart_p"] for one in rows["bundle"]))
    assert all(0 <= bin.low <= bin.rate <= bin.high <= 1 for bin in bins)


def test_composites_count_strict_wins(report: Report) -> None:
    found = report.composites[LARGE_LM]["path"]
    assert found.overall is not None and 0 <= found.overall <= 1
    ours, theirs = report.figures["bundle"], report.figures[LARGE_LM]
    wins = 0
    for name in (name for names in PAPER.values() for name in names):
        mine, other = ours["path_" + name], theirs["path_" + name]
        assert mine is not None and other is not None
        wins += mine.mean < other.mean if name.endswith("_var") else mine.mean > other.mean
    assert found.overall == wins / 20
    assert sum(map(len, PAPER.values())) == 20
    assert composite({"bundle": ours, "twin": ours}, "twin", "").overall == 0.0
    assert composite(report.figures, "trees", "").page is None


def _figures(**nats: float) -> Figures:
    return {
        name.replace("_", " "): {**dict.fromkeys(MEASURES), "nll_per_token": Figure(mean, mean, mean)}
        for name, mean in nats.items()
    }


@pytest.mark.parametrize(
    ("low", "high", "answer", "words"),
    [
        (-0.09, -0.01, "help", "clusters help: .* better than by one large LM, by 0.050 nats"),
        (0.01, 0.09, "hurt", "clusters hurt: one large LM foretells next sessions better"),
        (-0.02, 0.08, "no difference shown", "clusters do not help: no difference from one large LM is shown"),
    ],
)
def test_the_verdict_says_plainly_whether_clusters_help(low: float, high: float, answer: str, words: str) -> None:
    alone = _figures(bundle=2.0, one_small_LM=3.0, one_large_LM=2.1)
    away = Figure((low + high) / 2, low, high)
    against: Figures = {
        LARGE_LM: {**dict.fromkeys(MEASURES), "nll_per_token": away},
        SMALL_LM: {**dict.fromkeys(MEASURES), "nll_per_token": Figure(-1.0, -1.1, -0.9)},
    }
    found = verdict(alone, against, 4)
    assert found.answer == answer and re.search(words, found.headline)
    assert any("less those of one small LM: -1.000 [-1.100, -0.900], better" in words for words in found.findings)
    clear = {"help": "better than one large LM in nll per token (-0.050)", "hurt": "worse in nll per token (+0.050)"}
    assert clear.get(answer, "better than one large LM in nothing, and worse in nothing") in found.findings[0]
    one = verdict(alone, against, 1)
    assert one.answer == "one cluster" and "single model serves all" in one.headline


def test_without_a_single_model_it_says_that_clusters_were_not_tested() -> None:
    found = verdict(_figures(bundle=2.0), {}, 4)
    assert found.answer == "not tested" and "--train" in found.headline


def test_the_page_needs_nothing_else_and_trusts_no_name(report: Report, rows: dict[str, Rows]) -> None:
    page = html(report, rows)
    assert not re.search(r"<(script|link|img|iframe)|@import|url\((?!#)|(src|href)=\"(?!#)", page)
    assert report.verdict.headline in page and page.count("<svg") == 2
    assert "var(--good)" in page and not re.search(r"#(0[1-5])\1\1", page)  # pictures take the page's colours
    assert "&lt;b&gt;" in page and "<b>" not in page.replace("<b>%", "").split("Sessions, foretold")[1]
    for name in report.figures:
        assert f"<td>{name}</td>" in page
    assert html(report, rows) == page


def test_standing_is_told_by_the_interval(report: Report) -> None:
    for name, columns in report.differences.items():
        for key, difference in columns.items():
            clear = difference is not None and (difference.low > 0 or difference.high < 0)
            assert bool(standing(report, name, key)) == clear
    assert standing(report, "bundle", "iou") == ""


def test_examples_go_from_well_to_badly_foretold(rows: dict[str, Rows]) -> None:
    shown = examples(rows["bundle"])
    assert len(shown) == 5 and [one.overlap for one in shown] == sorted((one.overlap for one in shown), reverse=True)
    assert len(examples(rows["bundle"][:2])) == 2
    for one in shown:
        assert {page.name for page in one.came if page.hit} == {page.name for page in one.expected if page.hit}


def test_portraits_tell_what_a_cluster_is_fond_of() -> None:
    def visitor(cluster: int, session: Sequence[str], **columns: Any) -> dict[str, Any]:
        posterior = [0.8, 0.2] if cluster == 0 else [0.1, 0.9]
        return row(input=[list(session)] * 2, cluster=cluster, cluster_p=posterior, **columns)

    made = [visitor(0, ["home", "shoes", "boots"], cart=True)] * 3 + [visitor(1, ["home", "guitar"])] * 1
    shoes, music = portraits(made, 3)
    assert (shoes.users, shoes.share, shoes.cart) == (3, 0.75, 1.0) and shoes.certainty == pytest.approx(0.8)
    assert [habit.name for habit in shoes.pages[:2]] == ["boots", "shoes"]
    for habit in shoes.pages[:2]:
        assert (habit.share, habit.lift) == pytest.approx((1.0, 4 / 3))
    assert shoes.steps[0].name in ("home → shoes", "shoes → boots")
    assert "boots" in shoes.words and "100% of their next sessions have a cart (of all 75%)" in shoes.words
    assert music.pages[0].name == "guitar" and music.pages[0].lift == pytest.approx(4.0)
    assert (music.pages_per_session, music.returns, music.repeats) == (2.0, 1.0, 0.0)
    (everybody,) = portraits([one | {"cluster": 0} for one in made], 1)
    assert everybody.words.startswith("All visitors.")


@pytest.mark.parametrize("happened", [0.0, 1.0])
def test_an_outcome_that_all_or_none_have_lies_within_its_interval(happened: float) -> None:
    for users in range(1, 60):
        cases = Cases.of(np.full(users, 0.5), np.full(users, happened), np.ones((1, users)))
        found = _bin(cases, np.ones(len(cases.p), dtype=bool))
        assert found.low <= found.rate <= found.high
