"""XPert's own training and its way to make one list of many, against plain numpy."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.xpert import XPert
from tests.trainer.clicked import by_place, turned
from trainer.hinge import (
    batch_negatives,
    fit_published,
    global_negatives,
    hinge,
    hinge_loss,
    published,
    without_morphs,
)
from trainer.interactions import NONE
from trainer.items import aligned, click_space
from trainer.retrieval_metrics import recall
from trainer.retrieval_options import PaperOptions, XPertOptions
from trainer.retrievers import best
from trainer.slates import Examples, World
from trainer.slots import Slots, quotas
from trainer.xpert import XPertRetriever

MARGINS = (1.0, 0.3)


def made(rows: int = 12, seeds: int = 3, negatives: int = 5, width: int = 6) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(1)

    def unit(*shape: int) -> np.ndarray:
        found = rng.normal(size=shape)
        one: np.ndarray = found / np.linalg.norm(found, axis=-1, keepdims=True)
        return one

    known, there = rng.random((rows, seeds)) < 0.7, rng.random((rows, negatives)) < 0.6
    known[:, 0], there[0] = True, False
    return unit(rows, seeds, width), known, unit(rows, width), unit(rows, negatives, width), there


def plain(
    seeds: np.ndarray, known: np.ndarray, positive: np.ndarray, negatives: np.ndarray, there: np.ndarray
) -> float:
    """The printed loss, user by user."""
    total = 0.0
    for user in range(len(seeds)):
        event = max((e for e in range(seeds.shape[1]) if known[user, e]), key=lambda e: seeds[user, e] @ positive[user])
        psi = seeds[user, event]
        total += max(MARGINS[0] - psi @ positive[user], 0)
        hard = [psi @ negatives[user, b] for b in range(negatives.shape[1]) if there[user, b]]
        total += max(max(hard) - MARGINS[1], 0) if hard else 0
    return total / len(seeds)


def tensors(arrays: tuple[np.ndarray, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(map(torch.from_numpy, arrays))


def test_the_hinge_loss_is_the_printed_one() -> None:
    arrays = made()
    seeds, known, positive, negatives, there = tensors(arrays)
    found = hinge(seeds, known, positive, negatives, there, MARGINS)
    assert float(found) == pytest.approx(plain(*arrays))


def test_its_gradients_are_those_of_finite_differences() -> None:
    arrays = made(rows=4)
    seeds, known, positive, negatives, there = tensors(arrays)
    hinge(seeds.requires_grad_(), known, positive, negatives, there, MARGINS).backward()
    assert seeds.grad is not None
    chosen = 0
    for place in np.ndindex(arrays[0].shape):
        ends = []
        for step in (1e-6, -1e-6):
            moved = arrays[0].copy()
            moved[place] += step
            ends.append(plain(moved, *arrays[1:]))
        assert float(seeds.grad[place]) == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-6)
        chosen += bool(seeds.grad[place] != 0)
    assert 0 < chosen <= 4 * 6, "only the most promising seed of each learns"


def test_global_negatives_are_the_most_similar_that_are_not_too_similar() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(60, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    targets = np.array([5, 5, 40])
    cosines = torch.from_numpy(vectors[targets] @ vectors.T)
    places, there = global_negatives(cosines, torch.from_numpy(targets), 4, 0.5)
    for row, target in enumerate(targets.tolist()):
        allowed = [item for item in range(60) if vectors[item] @ vectors[target] <= 0.5 and item != target]
        wanted = sorted(allowed, key=lambda item: -vectors[item] @ vectors[target])[:4]
        assert places[row].tolist() == wanted and there[row].all()
    _, none = global_negatives(torch.full((1, 6), 0.9), torch.tensor([2]), 4, 0.5)
    assert not none.any(), "all are too similar: the term is 0"


def test_negatives_of_the_batch_are_other_targets_that_are_not_too_similar() -> None:
    rng = np.random.default_rng(0)
    vectors = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(30, 3))), dim=1)
    targets = torch.tensor([3, 3, 9, 11, 17, 20])
    chosen = vectors[targets]
    for _ in range(10):
        places, there = batch_negatives(chosen @ chosen.T, targets, 4, 0.5, rng)
        for row in range(len(targets)):
            found = places[row][there[row]].tolist()
            allowed = [one for one in targets.tolist() if one != targets[row] and vectors[one] @ chosen[row] <= 0.5]
            assert set(found) <= set(allowed) and len(found) == min(4, len(allowed))


def world(**changes: object) -> World:
    task = by_place()
    spaces, _ = aligned(click_space(task.known(snapshot), width=16) for snapshot in range(2))
    return World(task, spaces, replace(XPertOptions(seeds=3, batch=40, epochs=2), **changes))  # type: ignore[arg-type]


def test_item_wise_batches_hold_each_target_once() -> None:
    here = world(batch=10)
    examples = Examples(here.task.train, here)
    rng = np.random.default_rng(0)
    drawn = [rows for _, rows in examples.batches_of_items(rng)]
    assert len(drawn) == -(-len(here.task.train) // 10)
    for rows in drawn:
        targets = examples.targets[rows].tolist()
        assert len(set(targets)) == len(targets) == 10
    assert len({int(row) for rows in drawn for row in rows}) > 60, "another case of a target each time"
    once = np.concatenate([rows for _, rows in examples.batches(rng)])
    assert sorted(once.tolist()) == list(range(len(here.task.train))), "user-wise: every case once"


@pytest.mark.parametrize("source", ["all", "batch"])
def test_the_published_model_learns_and_its_scalars_stay(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What visitors click next lies near their last click, turned: the seeds as they are find little of it."""
    task, space = turned(1)
    paper = PaperOptions(
        negatives_from=source,  # type: ignore[arg-type]
        heads=2, seeds=1, history=3, epochs=4, lr=1e-2, quotas=False, merge="max",
    )  # fmt: skip
    here = published(World(task, [space], XPertOptions(batch=50, patience=9)), paper)

    def fitted() -> tuple[XPert, float, float]:
        """The model, its loss on the training cases, and its Recall@10 on others."""
        made = fit_published("paper", here, task.validation, paper, lambda epoch, value: None)
        train = Examples(task.train, here)
        batch = train.batch(np.arange(len(task.train)))
        with torch.no_grad():
            loss = hinge_loss(paper)(made.model.eval(), here.slate(0), batch, np.random.default_rng(0))
        return made.model, float(loss), recall(made.rank(task.test, 10).items, task.test, 10)

    with monkeypatch.context() as patch:
        patch.setattr("trainer.hinge.fit", lambda *given: None)
        _, loss, found = fitted()
    learned, less, more = fitted()
    assert less < 0.9 * loss and more > found + 0.2
    assert not learned.prior.any() and not learned.seed_bias.any(), "no prior, and no bias of seeds"


def test_the_published_model_has_channels_whatever_our_own_have() -> None:
    ours = world(policy="recency")
    here = published(ours, PaperOptions())
    assert (here.options.policy, here.options.seeds, here.options.history) == ("channels", 10, 30)
    channels, recent = here.seeds(ours.task.test), published(ours, PaperOptions(policy="recency")).seeds(ours.task.test)
    assert (channels.weights > 1).any(), "an item adds to its channel's weight"
    assert recent.weights.max() == 1.0


def test_without_morphs_the_seeds_ask_as_they_are_under_the_same_quotas() -> None:
    paper = PaperOptions(seeds=3)
    here = published(world(policy="recency"), paper)
    found = without_morphs("", here, paper).rank(here.task.test, 9)
    for row, (seeds, weights) in enumerate(zip(*here.seeds(here.task.test), strict=True)):
        slate = here.slate(int(here.task.test.snapshot[row]))
        seen = here.task.test.take(np.array([row])).seen().toarray()[0][slate.items]
        vectors = slate.vectors.numpy()
        each = np.full((1, 3, len(slate.items)), -np.inf)
        for place, seed in enumerate(seeds.tolist()):
            if seed != NONE:
                each[0, place] = vectors @ slate.space.vectors[slate.space.rows(np.array([seed]))[0]]
        each[0, :, seen] = -np.inf
        wanted = best(Slots("sum", quotas=True).deal(each, weights[None], 9), slate.items, 9)
        np.testing.assert_array_equal(found.items[row], wanted.items[0])


# ---------------------------------------------------------------- slots


def test_quotas_go_by_the_largest_remainders() -> None:
    weights = np.array([[4.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    shares = 10 * weights[0] ** 0.6 / (weights[0] ** 0.6).sum()
    assert shares[:3] == pytest.approx([5.346, 2.327, 2.327], abs=1e-3)
    assert quotas(weights, 10, 0.6).tolist() == [[6, 2, 2, 0], [10, 0, 0, 0], [0, 0, 0, 0]]


def test_quotas_without_refill_lose_places_and_refill_takes_them() -> None:
    """Both seeds find the same items: of ten places five are left."""
    each = np.tile(np.linspace(1, 0, 20), (1, 2, 1))
    each[0, 1] -= 0.01
    weights = np.array([[1.0, 1.0]])
    short = best(Slots(quotas=True).deal(each, weights, 10), np.arange(20), 10).items[0]
    assert short.tolist() == [0, 1, 2, 3, 4] + [NONE] * 5
    assert best(Slots(quotas=True, refill=True).deal(each, weights, 10), np.arange(20), 10).items[0].tolist() == [
        *range(10)
    ]
    assert best(Slots().deal(each, weights, 10), np.arange(20), 10).items[0].tolist() == [*range(10)]


def test_duplicates_are_summed_or_the_highest_counts() -> None:
    each, weights = np.array([[[0.9, 0.5, 0.1], [0.1, 0.6, -np.inf]]]), np.array([[1.0, 1.0]])
    assert Slots().deal(each, weights, 3)[0].tolist() == [0.9, 0.6, 0.1]
    assert Slots("sum").deal(each, weights, 3)[0].tolist() == pytest.approx([1.0, 1.1, 0.1])
    assert Slots().deal(each, np.array([[1.0, 0.0]]), 3)[0].tolist() == [0.9, 0.5, 0.1], "a seed that is none"


def test_what_was_seen_takes_no_place() -> None:
    """The nearest of every seed is itself: dealt before the mask it would waste a place of each quota."""
    here = world()
    torch.manual_seed(0)
    model = XPert("identity", 16, 3)
    full = XPertRetriever("quotas", model, here, Slots(quotas=True)).rank(here.task.test, 9)
    assert (full.items[:, :3] != NONE).all()
    seen = here.task.test.seen().toarray()
    for row, items in enumerate(full.items):
        assert not seen[row, items[items != NONE]].any()
        per_seed = quotas(here.seeds(here.task.test).weights[row : row + 1], 9, 0.6)[0]
        assert (items != NONE).sum() >= per_seed.max(), "the largest quota is filled whole"


def test_highest_of_all_is_what_no_slots_give() -> None:
    here = world()
    model = XPert("identity", 16, 3)
    plain_ranking = XPertRetriever("", model, here).rank(here.task.test, 20)
    dealt = XPertRetriever("", model, here, Slots()).rank(here.task.test, 20)
    np.testing.assert_array_equal(plain_ranking.items, dealt.items)
