"""Validation chooses a retriever: popularity, counts, nearest items, one matrix, or the visitor's own operator.

What is personal costs more to serve, and its lead may be luck: it is only chosen where the paired interval of its gain
over one matrix for all, on the validation cases, lies above 0.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from models.items import Ranker
from models.xpert import Operator, XPert
from trainer.figures import Figure, paired
from trainer.fusion import Fused
from trainer.interactions import Task
from trainer.retrieval_baselines import Counts, Popularity
from trainer.retrieval_metrics import strengths
from trainer.retrievers import Retriever
from trainer.slates import Examples, World
from trainer.xpert import XPertRetriever, fit, tune_prior

# From the simplest to the most personal: of equals the first is chosen. `OWN` are the visitor's own.
OPERATORS: dict[Ranker, Operator] = {
    "nearest": "identity", "shared": "shared", "residual": "residual", "personal": "personal"
}  # fmt: skip
NAMES: dict[Ranker, str] = {
    "popularity": "popularity", "counts": "counts", "nearest": "nearest + prior", "shared": "shared matrix",
    "residual": "residual operator", "personal": "personal operator",
}  # fmt: skip
OWN: tuple[Ranker, ...] = ("residual", "personal")


@dataclass(frozen=True)
class Candidate:
    """A fitted retriever and its Recall@10 + Recall@50 on the validation cases."""

    ranker: Ranker
    retriever: Retriever
    found: float
    fused: bool = False


@dataclass(frozen=True)
class Choice:
    """All candidates, the one that was chosen, and the best operator that may be chosen, fused or not chosen at all.

    `why`: what kept personal ones out, or let them in, in words.
    """

    candidates: list[Candidate]
    chosen: Candidate
    operator: Candidate
    why: list[str] = field(default_factory=list)


class _Measured(NamedTuple):
    """A candidate and its Recall@10 + Recall@50 on each validation case, (C,)."""

    candidate: Candidate
    values: np.ndarray


def choose(world: World, popularity: Popularity, counts: Counts, note: Callable[[str], None]) -> Choice:
    """Fit every operator, and choose; among the candidates is the best of all but the counts, fused with these."""
    task = world.task
    plain = [_measured("popularity", popularity, task), _measured("counts", counts, task)]
    operators = {ranker: _measured(ranker, fit_operator(ranker, world, note), task) for ranker in OPERATORS}
    shared, seed = operators["shared"].values, world.options.seed
    gains = {ranker: paired(operators[ranker].values - shared, seed) for ranker in OWN}
    found = [one.candidate for one in (*plain, *operators.values())]
    allowed = [one for one in found if one.ranker not in gains or gains[one.ranker].low > 0]
    operator = max(allowed[2:], key=lambda one: one.found)
    alone = max((one for one in allowed if one.ranker != "counts"), key=lambda one: one.found)
    name = f"{alone.retriever.name}, fused with counts"
    fused = _measured(alone.ranker, Fused(name, alone.retriever, counts), task, fused=True).candidate
    best = max((*allowed, fused), key=lambda one: one.found)
    return Choice([*found, fused], best, operator, [_told(ranker, one) for ranker, one in gains.items()])


def fit_operator(ranker: Ranker, world: World, note: Callable[[str], None], name: str | None = None) -> XPertRetriever:
    """Train an operator, and set its prior by validation."""
    name = name or NAMES[ranker]
    torch.manual_seed(world.options.seed)
    model = XPert(OPERATORS[ranker], world.spaces[0].vectors.shape[1], world.options.seeds)
    note(name)
    train = Examples(world.task.train, world)
    fit(model, train, world.task.validation, world.options, note=lambda epoch, _: note(f"{name}, epoch {epoch + 1}"))
    tune_prior(model, world, world.task.validation)
    return XPertRetriever(name, model, world)


def other_policy(world: World) -> World:
    """The same world with recent seeds instead of channels, or the other way round."""
    options = world.options
    return world.but(replace(options, policy="recency" if options.policy == "channels" else "channels"))


def _measured(ranker: Ranker, retriever: Retriever, task: Task, fused: bool = False) -> _Measured:
    values = strengths(retriever.rank(task.validation, 50), task.validation)
    return _Measured(Candidate(ranker, retriever, float(values.mean()), fused), values)


def _told(ranker: Ranker, gain: Figure) -> str:
    told = f"{NAMES[ranker]} less {NAMES['shared']}: {gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
    return f"{told}, so it {'may' if gain.low > 0 else 'may not'} be chosen: personal only where it wins."
