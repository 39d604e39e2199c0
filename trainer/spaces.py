"""Where the items of a task lie: by clicks, by texts or attributes, or by both; validation chooses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.sparse import csr_array

from trainer.interactions import Task
from trainer.items import Space, align, aligned, click_space, join, text_space
from trainer.retrieval_baselines import Nearest, recent_seeds
from trainer.retrieval_metrics import strength
from trainer.retrieval_options import XPertOptions

TEXT_WEIGHTS = (0.5, 1.0)  # of texts beside clicks


@dataclass(frozen=True)
class Spaces:
    """A space for each snapshot, aligned to the one before it, and the mean cosine of each to that one.

    Snapshots that learn from the same events have the same space. `make` gives another such space from one of clicks.
    """

    name: str
    make: Callable[[Space], Space]
    of: list[Space]
    cosines: list[float]

    def newest(self, clicks: Space) -> Space:
        """A later one, aligned to the last."""
        return align(self.make(clicks), self.of[-1])[0]


def choose_spaces(task: Task, options: XPertOptions, note: Callable[[str], None]) -> tuple[Spaces, dict[str, float]]:
    """The spaces whose nearest items are best on validation, and what each reached there. Raises TrainingError."""
    ways = make_spaces(task, options, note)
    found = {}
    for name, spaces in ways.items():
        note(f"nearest by {name}")
        nearest = Nearest(task, spaces.of, recent_seeds(options.seeds))
        found[name] = strength(nearest.rank(task.validation, 50), task.validation) if len(ways) > 1 else 0.0
    best = max(found, key=lambda name: found[name])
    return ways[best], found if len(ways) > 1 else {}


def make_spaces(task: Task, options: XPertOptions, note: Callable[[str], None]) -> Mapping[str, Spaces]:
    """By clicks; and where items have texts or attributes, by these, and by both with each of `TEXT_WEIGHTS`."""
    clicks = []
    moments, firsts, which = np.unique(
        [task.learned_at(snapshot) for snapshot in range(len(task.snapshots))], return_index=True, return_inverse=True
    )
    for number, snapshot in enumerate(firsts.tolist(), start=1):
        note(f"vectors from clicks {number}/{len(moments)}")
        clicks.append(click_space(task.learned(snapshot, options.space_ms), options.seed))
    ways: dict[str, Callable[[Space], Space]] = {"clicks": lambda space: space}
    if task.content is not None:
        note("vectors from texts")
        texts = content_space(task.content)
        ways["texts"] = lambda space: texts
        for weight in TEXT_WEIGHTS:
            ways[f"clicks and texts x {weight:g}"] = partial(join, texts=texts, text_weight=weight)
    found = {}
    for name, make in ways.items():
        spaces, cosines = aligned(map(make, clicks))
        found[name] = Spaces(name, make, [spaces[place] for place in which.tolist()], cosines)
    return found


def content_space(content: csr_array | np.ndarray) -> Space:
    """From texts' vectors (N, D), or indicators of attributes, which weigh more the rarer they are."""
    if isinstance(content, np.ndarray):
        told = np.flatnonzero(np.abs(content).sum(axis=1) > 0)
        return text_space(told, content[told])
    told = np.flatnonzero(np.diff(content.indptr))
    held = np.bincount(content.indices, minlength=content.shape[1])
    rarity = np.log((1 + len(told)) / (1 + held))
    return text_space(told, csr_array(content[told].multiply(rarity[None, :])))
