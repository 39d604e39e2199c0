"""The model card says what the bundle is and repeats the judgement's figures."""

import pytest

from models.config import BundleConfig, Decoding, Outcome
from tests.trainer.invented import MARKS, invented
from tests.trainer.test_report import Known
from trainer.card import card, day
from trainer.contenders import BUNDLE
from trainer.judging import Judgement, judge
from trainer.measures import HEADLINE


@pytest.fixture(scope="module")
def judgement() -> Judgement:
    return judge([Known(name, part) for name, part in invented(60).items()], [], MARKS)


def _config(clusters: int) -> BundleConfig:
    return BundleConfig(
        kind="", format=2, created="", mode="behaviour", selector="mixture", backend="token", architecture="opt",
        clusters=clusters, cluster_users=[40, 30, 20, 10][:clusters], context_tokens=512, decoding=Decoding(),
        cart=Outcome(["basket"], 0.25, 0.31, "combined"), purchase=Outcome([], 0.05, 0.11),
    )  # fmt: skip


def test_the_card_repeats_the_figures(judgement: Judgement) -> None:
    text = card(_config(4), 300, 12_345, judgement, {"window": "May"})
    for name, columns in judgement.figures.items():
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        for key, cell in zip(HEADLINE, cells, strict=True):
            figure = columns[key]
            assert cell == ("-" if figure is None else f"{figure.mean:.3f} [{figure.low:.3f}, {figure.high:.3f}]")
    assert "| cart | 0.250 | combined | 0.310 | basket |" in text
    assert "| purchase | 0.050 | rollouts | 0.110 | learned from all pages |" in text
    assert "- window: May" in text and "12,345 parameters in all" in text and "60 validation users" in text


def test_the_card_says_how_visitors_are_grouped(judgement: Judgement) -> None:
    text = card(_config(4), 300, 1, judgement, {})
    assert "mixture of Markov chains" in text and "told by a token which of 4 clusters" in text
    in_cluster = sum(row["cluster"] == 0 for row in judgement.rows[BUNDLE])
    assert in_cluster and "| 0 | 40 | They " in text
    assert "| 3 | 10 | no validation user is in it |" in text
    alone = card(_config(1), 300, 1, judgement, {})
    assert "One model serves all visitors.\n1 parameters in all" in alone and "of 1 clusters" not in alone


def test_a_day_is_told_in_utc() -> None:
    assert day(1_700_000_000_000) == "2023-11-14 22:13 UTC"
