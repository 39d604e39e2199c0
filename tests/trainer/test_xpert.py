"""Training of operators: the loss against plain numpy, what is learned where there is something to learn, fusion."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.xpert import Operator, XPert
from tests.trainer.clicked import by_days, by_place, turned
from trainer.fusion import fuse
from trainer.interactions import NONE, Task
from trainer.items import Space, aligned, click_space
from trainer.retrieval_baselines import Nearest
from trainer.retrieval_baselines import recent_seeds as recent
from trainer.retrieval_metrics import recall, strength
from trainer.retrieval_options import XPertOptions
from trainer.retrievers import Ranking
from trainer.slates import Examples, World
from trainer.xpert import PRIORS, XPertRetriever, fit, softmax_loss, tune_prior

WIDTH = 16
OPTIONS = XPertOptions(seeds=3, batch=50, epochs=3, policy="recency")


def world(task: Task, **changes: object) -> World:
    spaces, _ = aligned(
        click_space(task.known(snapshot), width=WIDTH, least_clicks=1) for snapshot in range(len(task.snapshots))
    )
    return World(task, spaces, replace(OPTIONS, **changes))  # type: ignore[arg-type]


def model(operator: Operator, width: int = WIDTH) -> XPert:
    torch.manual_seed(0)
    made = XPert(operator, width, OPTIONS.seeds)
    with torch.no_grad():
        made.prior.copy_(torch.tensor([0.1, 0.3]))
        made.seed_bias.copy_(torch.tensor([0.1, 0.0, -0.2]))
    return made.eval()


@pytest.mark.parametrize("operator", ["identity", "shared", "residual", "personal"])
def test_the_loss_is_the_softmax_over_all_unseen_items_with_the_best_seed_inside(operator: Operator) -> None:
    here, made = world(by_days()), model(operator)
    train, slate = Examples(here.task.train, here), here.slate(int(here.task.train.snapshot[0]))
    rows = np.flatnonzero(here.task.train.snapshot == here.task.train.snapshot[0])
    found = softmax_loss(here.options)(made, slate, train.batch(rows), np.random.default_rng(0))
    scores = torch.from_numpy(
        XPertRetriever("", made, here).prepare(int(here.task.train.snapshot[0]), 9)(here.task.train.take(rows))[0]
    ).double()
    seen = here.task.train.take(rows).seen().toarray()[:, slate.items]
    total = 0.0
    for row in range(len(rows)):
        open_to = np.flatnonzero(~seen[row])
        logits = scores[row, open_to] * float(made.log_temperature.detach().exp())
        place = list(slate.items[open_to]).index(here.task.train.labels[rows[row]])
        total += float(logits.logsumexp(0) - logits[place])
    assert float(found.detach()) == pytest.approx(total / len(rows), rel=1e-4)


def test_a_sample_of_candidates_stands_for_all() -> None:
    here, made = world(by_place()), model("identity")
    train = Examples(here.task.train, here)
    batch, slate = train.batch(np.arange(60)), here.slate(0)
    whole = float(softmax_loss(here.options)(made, slate, batch, np.random.default_rng(0)).detach())
    few = softmax_loss(replace(here.options, candidates=24))
    sampled = [float(few(made, slate, batch, np.random.default_rng(seed)).detach()) for seed in range(30)]
    assert np.mean(sampled) == pytest.approx(whole, rel=0.1) and np.std(sampled) > 0


def test_without_prior_and_bias_the_identity_is_the_nearest_items() -> None:
    here = world(by_place())
    plain = XPertRetriever("", XPert("identity", WIDTH, 3), here).rank(here.task.test, 10)
    wanted = Nearest(here.task, here.spaces, recent(3)).rank(here.task.test, 10)
    np.testing.assert_array_equal(plain.items, wanted.items)
    np.testing.assert_allclose(plain.scores, wanted.scores, atol=1e-5)
    np.testing.assert_array_equal(plain.seeds, wanted.seeds)


# ---------------------------------------------------------------- learning


def learned(task: Task, space: Space, operator: Operator) -> float:
    """Recall@10 on the test cases."""
    options = replace(OPTIONS, seeds=1, epochs=20, patience=20, lr=1e-2)
    here = World(task, [space], options)
    torch.manual_seed(0)
    made = XPert(operator, WIDTH, 1)
    fit(made, Examples(task.train, here), task.validation, options)
    return recall(XPertRetriever("", made, here).rank(task.test, 10).items, task.test, 10)


def test_one_matrix_learns_what_all_have_in_common() -> None:
    task, space = turned(1, WIDTH)
    assert learned(task, space, "shared") > learned(task, space, "identity") + 0.3


@pytest.mark.parametrize("operator", ["residual", "personal"])
def test_a_personal_operator_learns_what_each_has_of_its_own(operator: Operator) -> None:
    task, space = turned(3, WIDTH)
    assert learned(task, space, operator) > learned(task, space, "shared") + 0.1


def test_the_best_epoch_is_kept() -> None:
    here = world(by_place(), epochs=4, patience=4, lr=0.05)
    made, heard = XPert("shared", WIDTH, 3), list[float]()
    found = fit(
        made, Examples(here.task.train, here), here.task.validation, here.options, note=lambda _, one: heard.append(one)
    )
    assert found[1:] == heard and len(found) == 5
    ranked = XPertRetriever("", made, here).rank(here.task.validation, 50)
    assert strength(ranked, here.task.validation) == pytest.approx(max(found))


def test_the_prior_is_the_largest_of_those_about_as_good_as_the_best() -> None:
    here, made = world(by_days()), model("identity")
    learned_ones = made.prior.tolist()
    tune_prior(made, here, here.task.validation)
    for place, rows in enumerate((~here.task.validation.opens, here.task.validation.opens)):
        cases, each = here.task.validation.take(rows), {}
        for weight in {learned_ones[place], *PRIORS}:
            other = copy.deepcopy(made)
            with torch.no_grad():
                other.prior[place] = weight
            items = XPertRetriever("", other, here).rank(cases, 50).items
            hit = np.array([
                [label in row[:k] for k in (10, 50)] for row, label in zip(items.tolist(), cases.labels, strict=True)
            ])  # fmt: skip
            each[weight] = hit.sum(axis=1)
        top = max(each.values(), key=lambda values: values.mean())
        behind = {weight: top - values for weight, values in each.items()}
        near = [w for w, one in behind.items() if one.mean() <= one.std() / np.sqrt(len(one)) + 1e-12]
        assert float(made.prior[place].detach()) == pytest.approx(max(near))


# ---------------------------------------------------------------- fusion


def test_fusion_is_by_reciprocal_ranks() -> None:
    first = Ranking(np.array([[4, 2, 9]]), np.array([[3.0, 2.0, 1.0]]), np.array([[NONE, 7, 7]]))
    second = Ranking(np.array([[9, 4, NONE]]), np.array([[0.2, 0.1, -np.inf]]), np.array([[5, 6, NONE]]))
    found = fuse(first, second, 4, 60)
    assert found.items[0].tolist() == [4, 9, 2, NONE]
    assert found.scores[0, :3] == pytest.approx([1 / 61 + 1 / 62, 1 / 63 + 1 / 61, 1 / 62])
    assert found.seeds[0].tolist() == [6, 7, 7, NONE], "of the first list that names one"
