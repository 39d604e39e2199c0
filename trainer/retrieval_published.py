"""XPert as published in a retrieval report: as it is, and without each of the things that it consists of."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from trainer.hinge import fit_published, published, without_morphs
from trainer.retrieval_options import PaperOptions
from trainer.slates import World
from trainer.slots import Slots
from trainer.xpert import XPertRetriever

PUBLISHED, PUBLISHED_BEST = "XPert as published", "XPert as published, best scores"
NO_CHANNELS, NO_MORPHS = f"{PUBLISHED}, without channels", f"{PUBLISHED}, without morphs"
NAMES = (PUBLISHED, NO_CHANNELS, NO_MORPHS)

Note = Callable[[str], None]


def as_published(
    wanted: Collection[str], world: World, paper: PaperOptions, note: Note
) -> Iterator[tuple[str, XPertRetriever]]:
    """Those of `NAMES` that are wanted.

    The published model stands there twice: with its own way to make one list of many, and with the highest scores.
    """
    if PUBLISHED in wanted:
        fitted = _fitted(PUBLISHED, world, paper, note)
        yield PUBLISHED, fitted
        if fitted.slots != Slots():
            yield PUBLISHED_BEST, replace(fitted, name=PUBLISHED_BEST, slots=None)
    if NO_CHANNELS in wanted:
        yield NO_CHANNELS, _fitted(NO_CHANNELS, world, replace(paper, policy="recency"), note)
    if NO_MORPHS in wanted:
        note(NO_MORPHS)
        yield NO_MORPHS, without_morphs(NO_MORPHS, published(world, paper), paper)


def contrasts(found: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """What channels and morphs are worth to the published model, as far as both stand in the report."""
    pairs = {
        "as published: channels, and not the last items": (PUBLISHED, NO_CHANNELS),
        "as published: morphs, and not the seeds as they are": (PUBLISHED, NO_MORPHS),
    }
    return {question: pair for question, pair in pairs.items() if set(pair) <= set(found)}


def _fitted(name: str, world: World, paper: PaperOptions, note: Note) -> XPertRetriever:
    note(name)
    own = published(world, paper)
    return fit_published(name, own, world.task.validation, paper, lambda e, _: note(f"{name}, epoch {e + 1}"))
