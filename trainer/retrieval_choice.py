"""Validation chooses a retriever: popularity, counts, nearest items, one matrix, or the visitor's own operator."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from models.items import Ranker
from models.xpert import Operator, XPert
from trainer.fusion import Fused
from trainer.interactions import Task
from trainer.retrieval_baselines import Counts, Popularity
from trainer.retrieval_metrics import strength
from trainer.retrievers import Retriever
from trainer.slates import Examples, World
from trainer.xpert import XPertRetriever, fit, tune_prior

# From the simplest to the most personal: of equals the first is chosen.
OPERATORS: dict[Ranker, Operator] = {
    "nearest": "identity", "shared": "shared", "residual": "residual", "personal": "personal"
}  # fmt: skip
NAMES: dict[Ranker, str] = {
    "popularity": "popularity", "counts": "counts", "nearest": "nearest + prior", "shared": "shared matrix",
    "residual": "residual operator", "personal": "personal operator",
}  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A fitted retriever and its Recall@10 + Recall@50 on the validation cases."""

    ranker: Ranker
    retriever: Retriever
    found: float
    fused: bool = False


@dataclass(frozen=True)
class Choice:
    """All candidates, the one that was chosen, and the best of the operators, fused or not chosen at all."""

    candidates: list[Candidate]
    chosen: Candidate
    operator: Candidate


def choose(world: World, popularity: Popularity, counts: Counts, note: Callable[[str], None]) -> Choice:
    """Fit every operator, and choose; among the candidates is the best of all but the counts, fused with these."""
    task = world.task
    found = [_candidate("popularity", popularity, task), _candidate("counts", counts, task)]
    found += [_candidate(ranker, fit_operator(ranker, world, note), task) for ranker in OPERATORS]
    operator = max(found[2:], key=lambda one: one.found)
    alone = max(found[:1] + found[2:], key=lambda one: one.found)
    fused = Fused(f"{alone.retriever.name}, fused with counts", alone.retriever, counts)
    found.append(_candidate(alone.ranker, fused, task, fused=True))
    best = max(found, key=lambda one: one.found)
    return Choice(found, best, operator)


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


def _candidate(ranker: Ranker, retriever: Retriever, task: Task, fused: bool = False) -> Candidate:
    return Candidate(ranker, retriever, strength(retriever.rank(task.validation, 50), task.validation), fused)
