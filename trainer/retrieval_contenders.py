"""The baselines of a retrieval report by name; where there are settings, validation chooses among them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import TypeVar

from trainer.covisits import CoVisits
from trainer.interactions import Task
from trainer.protocols import HOUR_MS
from trainer.retrieval_baselines import EASE, Counts, Nearest, Popularity, recent_seeds, ward_medoids
from trainer.retrieval_metrics import strength
from trainer.retrieval_networks import Query, network
from trainer.retrievers import Retriever
from trainer.sasrec import SASRecOptions, fit_sasrec
from trainer.slates import Examples, World
from trainer.xpert import XPertRetriever, fit, tune_prior

WINDOWS_H = (1, 2, 3, 6, 12, 24)  # of what is counted, where the log has times
SEEDS = (1, 3, 5, 10)
FADES = ((1, 1.0), (5, 0.5), (5, 0.8))  # seeds of the counts, and what each weighs of the one after it
POWERS = (0.5, 1.0)
NETWORKS: dict[str, Query] = {"one vector": "user", "DPSR": "pair", "one vector, ordered": "order"}
R = TypeVar("R", bound=Retriever)
POPULARITY, COUNTS = "popularity", "counts"
Note = Callable[[str], None]


def best_on_validation(settings: Sequence[R], task: Task) -> R:
    """The one with the highest Recall@10 + Recall@50 on the validation cases, the first of equals."""
    if len(settings) == 1:
        return settings[0]
    return max(settings, key=lambda one: strength(one.rank(task.validation, 50), task.validation))


def best_popularity(task: Task, spans: Sequence[int | None]) -> Popularity:
    """With the window that validation chooses of `spans` (ms; None: all)."""
    return best_on_validation([Popularity(task, span) for span in spans], task)


def best_counts(task: Task, spans: Sequence[int | None]) -> Counts:
    """What is counted and when first, then how the seeds weigh."""
    kinds = [Counts(task, count, span) for count, span in product((CoVisits.follow, CoVisits.beside), spans)]
    first = best_on_validation(kinds, task)
    weighed = [replace(first, seeds=seeds, fade=fade, power=power) for (seeds, fade), power in product(FADES, POWERS)]
    return best_on_validation([first, *(one for one in weighed if one != first)], task)


def windows(task: Task) -> list[int | None]:
    """The windows (ms) that validation chooses from; None, all, where the log has no times."""
    return [hours * HOUR_MS for hours in WINDOWS_H] if task.log.timed else [None]


def _ease(world: World, note: Note) -> Retriever:
    return best_on_validation([EASE(world.task, span=span) for span in windows(world.task)], world.task)


def _nearest(world: World, note: Note) -> Retriever:
    settings = [Nearest(world.task, world.spaces, recent_seeds(count)) for count in SEEDS]
    return best_on_validation(settings, world.task)


def _sasrec(world: World, note: Note) -> Retriever:
    options = SASRecOptions(seed=world.options.seed)
    return fit_sasrec(world.task, options, lambda epoch, _: note(f"SASRec, epoch {epoch + 1}"))


def _trained(name: str, world: World, note: Note) -> Retriever:
    query = NETWORKS[name]
    if query != "pair":  # one query a visitor needs no more than one seed, to know that there is a history
        world = world.but(replace(world.options, seeds=1))
    model = network(query, world.spaces[0].vectors.shape[1], world.options.seeds)
    train = Examples(world.task.train, world)
    fit(model, train, world.task.validation, world.options, note=lambda epoch, _: note(f"{name}, epoch {epoch + 1}"))
    tune_prior(model, world, world.task.validation)
    return XPertRetriever(name, model, world)


# By name, what makes a baseline.
WAYS: dict[str, Callable[[World, Note], Retriever]] = {
    POPULARITY: lambda world, note: best_popularity(world.task, windows(world.task)),
    COUNTS: lambda world, note: best_counts(world.task, windows(world.task)),
    "EASE": _ease,
    "nearest items": _nearest,
    "PinnerSage": lambda world, note: Nearest(world.task, world.spaces, ward_medoids, "PinnerSage"),
    "SASRec": _sasrec,
    **{name: partial(_trained, name) for name in NETWORKS},
}


def contenders(names: Sequence[str], world: World, note: Note) -> Iterator[tuple[str, Retriever]]:
    """The baselines of these names in `WAYS`, fitted; `note` hears which one is next.

    The world's options say how the networks are trained.
    """
    for name in names:
        note(name)
        yield name, WAYS[name](world, note)
