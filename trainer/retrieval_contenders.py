"""The baselines of a retrieval report by name; where there are settings, validation chooses among them."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

from trainer.covisits import CoVisits
from trainer.errors import TrainingError
from trainer.interactions import Task
from trainer.items import Space
from trainer.protocols import HOUR_MS
from trainer.retrieval_baselines import EASE, Counts, Nearest, Popularity, recent_seeds, ward_medoids
from trainer.retrieval_metrics import recall
from trainer.retrieval_networks import Query, network
from trainer.retrievers import Retriever
from trainer.sasrec import SASRecOptions, fit_sasrec
from trainer.xpert import Examples, World, XPertOptions, XPertRetriever, fit

WINDOWS_H = (6, 12, 24)  # of what is counted, where the log has times
SEEDS = (1, 3, 5, 10)
FADES = ((1, 1.0), (5, 0.5), (5, 0.8))  # seeds of the counts, and what each weighs of the one after it
POWERS = (0.5, 1.0)
NETWORKS: dict[str, Query] = {"one vector": "user", "DPSR": "pair", "one vector, ordered": "order"}


def best_on_validation(settings: Sequence[Retriever], task: Task) -> Retriever:
    """The one with the highest Recall@10 + Recall@50 on the validation cases, the first of equals."""
    if len(settings) == 1:
        return settings[0]

    def strength(retriever: Retriever) -> float:
        items = retriever.rank(task.validation, 50).items
        return recall(items, task.validation, 10) + recall(items, task.validation, 50)

    return max(settings, key=strength)


def contenders(
    names: Sequence[str], task: Task, spaces: Sequence[Space], options: XPertOptions, note: Callable[[str], None]
) -> Iterator[Retriever]:
    """The baselines of these names, fitted; `note` hears which one is next. Raises TrainingError for another name.

    `spaces`: where the items lie, one a snapshot. `options`: how the networks are trained.
    """
    ways = _ways(task, spaces, options)
    for name in names:
        if name not in ways:
            raise TrainingError(f"there is no baseline {name!r}. There are {', '.join(ways)}.")
    for name in names:
        note(name)
        yield best_on_validation(ways[name](), task)


def _ways(task: Task, spaces: Sequence[Space], options: XPertOptions) -> dict[str, Callable[[], Sequence[Retriever]]]:
    """By name, what makes all settings of a baseline."""
    spans: list[int | None] = [hours * HOUR_MS for hours in WINDOWS_H] if task.log.timed else [None]
    ways: dict[str, Callable[[], Sequence[Retriever]]] = {
        "popularity": lambda: [Popularity(task, span) for span in spans],
        "counts": lambda: [
            Counts(task, count, span, seeds, fade, power)
            for count, span in product((CoVisits.follow, CoVisits.beside), spans)
            for (seeds, fade), power in product(FADES, POWERS)
        ],
        "EASE": lambda: [EASE(task, span=span) for span in spans],
        "nearest items": lambda: [Nearest(task, spaces, recent_seeds(count)) for count in SEEDS],
        "PinnerSage": lambda: [Nearest(task, spaces, ward_medoids, "PinnerSage")],
        "SASRec": lambda: [fit_sasrec(task, SASRecOptions(seed=options.seed))],
    }
    return ways | {name: partial(_trained, name, task, spaces, options) for name in NETWORKS}


def _trained(name: str, task: Task, spaces: Sequence[Space], options: XPertOptions) -> list[Retriever]:
    world = World(task, spaces, options)
    model = network(NETWORKS[name], spaces[0].vectors.shape[1], options.seeds)
    fit(model, Examples(task.train, world), task.validation, options)
    return [XPertRetriever(name, model, world)]
