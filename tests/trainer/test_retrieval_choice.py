"""Validation chooses, and what is personal only where its gain over one matrix for all is more than luck."""

from dataclasses import dataclass

import numpy as np
import pytest

from tests.trainer.clicked import by_place
from trainer import retrieval_choice
from trainer.figures import RESAMPLES, paired
from trainer.interactions import NONE, Cases, Task
from trainer.items import aligned, click_space
from trainer.retrieval_choice import NAMES, OPERATORS, Choice, choose
from trainer.retrieval_metrics import strength, strengths
from trainer.retrieval_options import XPertOptions
from trainer.retrievers import Ranking
from trainer.slates import World


@dataclass(frozen=True)
class Knows:
    """Ranks a label of the first `right` cases first, and nothing for anybody else."""

    name: str
    right: int

    def rank(self, cases: Cases, k: int) -> Ranking:
        items = np.full((len(cases), k), NONE, dtype=np.int32)
        items[: self.right, 0] = cases.labels[cases.starts[: self.right]]
        scores = np.where(items == NONE, -np.inf, 1.0).astype(np.float32)
        return Ranking(items, scores, np.full(items.shape, NONE, dtype=np.int32))


def chosen(monkeypatch: pytest.MonkeyPatch, **right: int) -> tuple[Task, Choice]:
    """Of retrievers that know the labels of so many of the 30 validation cases."""
    task = by_place()
    spaces, _ = aligned(click_space(task.known(snapshot), width=16) for snapshot in range(2))

    def fitted(ranker: str, *_: object) -> Knows:
        return Knows(NAMES[ranker], right.get(ranker, 0))  # type: ignore[index]

    monkeypatch.setattr(retrieval_choice, "fit_operator", fitted)
    popularity, counts = (Knows(name, right.get(name, 0)) for name in ("popularity", "counts"))
    world = World(task, spaces, XPertOptions())
    return task, choose(world, popularity, counts, lambda what: None)  # type: ignore[arg-type]


def test_one_hit_more_does_not_make_it_personal(monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = chosen(monkeypatch, shared=10, residual=11, personal=12)
    assert found.chosen.ranker == found.operator.ranker == "shared"
    assert [one.ranker for one in found.candidates] == ["popularity", "counts", *OPERATORS, "shared"]
    assert found.candidates[-1].fused, "the best of those that may be chosen is fused"
    assert all("so it may not be chosen" in reason for reason in found.why)


def test_a_gain_beyond_chance_does(monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = chosen(monkeypatch, shared=10, residual=11, personal=25)
    assert found.chosen.ranker == found.operator.ranker == "personal"
    residual, personal = found.why
    assert residual.startswith("residual operator less shared matrix: +0.033 [") and "may not be" in residual
    assert personal.startswith("personal operator less shared matrix: +0.500 [") and "may be chosen" in personal


def test_others_need_no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = chosen(monkeypatch, popularity=3, counts=9, shared=8, personal=7)
    assert (found.chosen.ranker, found.operator.ranker) == ("counts", "shared")
    assert found.candidates[-1].ranker == "shared"


def test_the_interval_is_that_of_the_same_resamples_for_both() -> None:
    task = by_place()
    cases = task.validation
    one, other = (strengths(Knows("", right).rank(cases, 50), cases) for right in (12, 5))
    assert strength(Knows("", 12).rank(cases, 50), cases) == pytest.approx(one.mean())
    picks = np.random.default_rng(7).integers(0, len(cases), size=(RESAMPLES, len(cases)))
    found = paired(one - other, 7)
    low, high = np.quantile(one[picks].mean(axis=1) - other[picks].mean(axis=1), [0.025, 0.975])
    assert (found.mean, found.low, found.high) == pytest.approx((one.mean() - other.mean(), low, high))
