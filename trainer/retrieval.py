"""Judging retrieval: a recipe and a log in, the chosen retriever beside its baselines out, as a report."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from trainer.errors import TrainingError
from trainer.interactions import Task
from trainer.items import Space
from trainer.rankings import Judged, write_rankings
from trainer.retrieval_choice import NAMES, Choice, choose, fit_operator, other_policy
from trainer.retrieval_contenders import COUNTS, POPULARITY, best_counts, best_popularity, contenders, windows
from trainer.retrieval_page import TITLES, write_page
from trainer.retrieval_published import PUBLISHED, as_published
from trainer.retrieval_published import contrasts as of_published
from trainer.retrieval_recipes import ItemsRecipe, read_items_recipe
from trainer.retrieval_report import DEPTH, Contrast, RetrievalReport, compose, standing, write
from trainer.retrievers import Ranking, Retriever
from trainer.slates import World
from trainer.spaces import choose_spaces

TERMINAL = ("recall_10", "recall_50", "recall_100", "ndcg_100", "mrr_100", "precision_1")
COLOURS = {"worse": "green", "better": "red", "": ""}

Note = Callable[[str], None]


@dataclass
class _Fitted:
    """What is to be ranked, in the order of the report, which of it is ours, and pairs that answer a question."""

    retrievers: dict[str, Retriever]
    ours: str
    contrasts: dict[str, tuple[str, str]]
    validation: dict[str, float]
    choice: list[str]
    spaces: list[Space]


def evaluate_items(recipe: Path, log: Path, report: Path, progress: Any = None, seed: int = 0) -> RetrievalReport:
    """Fit all retrievers of a recipe on a log, let validation choose, and judge them on the test cases.

    Writes retrieval.json, retrieval.parquet and retrieval.html into `report`. `progress` is a rich Progress or None;
    `seed` is that of the resamples. Raises TrainingError.
    """
    read = read_items_recipe(Path(recipe))
    _make(report)
    with _noting(progress) as note:
        note("reading the log")
        task = read.task(Path(log))
        fitted = _fit(task, read, note)
        rankings: dict[str, Ranking] = {}
        for name, retriever in fitted.retrievers.items():
            note(f"ranking by {name}")
            rankings[name] = retriever.rank(task.test, DEPTH)
        note("figures and pictures")
        judged = Judged.of(task, task.test, fitted.spaces)
        composed = compose(
            task, judged, rankings, fitted.ours, seed, fitted.contrasts, fitted.validation, fitted.choice
        )
        write_rankings(judged, rankings, report)
        write(composed, report)
        write_page(composed, judged, rankings[fitted.ours], report)
    return composed


def _make(report: Path) -> None:
    """The directory, before hours are spent on what goes into it."""
    try:
        report.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(
            f"{report} cannot be a directory for the report ({error.strerror}). Name another."
        ) from None


def _fit(task: Task, recipe: ItemsRecipe, note: Note) -> _Fitted:
    options = recipe.options
    spaces, by_space = choose_spaces(task, options, note)
    note(POPULARITY)
    popularity = best_popularity(task, windows(task))
    if options.popularity_ms is None:
        options = replace(options, popularity_ms=popularity.span)
    note(COUNTS)
    counts = best_counts(task, windows(task))
    world = World(task, spaces.of, options)
    choice = choose(world, popularity, counts, note)
    found: dict[str, Retriever] = {one.retriever.name: one.retriever for one in choice.candidates}
    contrasts = _ablate(found, choice, world, note)
    published = {*recipe.baselines, *([PUBLISHED] if options.mode == "paper" else [])}
    found |= as_published(published, world, recipe.paper, note)
    contrasts |= of_published(found)
    wanted = [name for name in recipe.baselines if name not in found]
    found |= dict(contenders(wanted, world, note))
    ours = PUBLISHED if options.mode == "paper" else choice.chosen.retriever.name
    validation = {f"vectors from {name}": value for name, value in by_space.items()}
    validation |= {one.retriever.name: one.found for one in choice.candidates}
    return _Fitted(found, ours, contrasts, validation, choice.why, spaces.of)


def _ablate(found: dict[str, Retriever], choice: Choice, world: World, note: Note) -> dict[str, tuple[str, str]]:
    """The best operator without what it consists of; adds what must be fitted to `found`."""
    best = choice.operator
    name = best.retriever.name
    other = other_policy(world)
    without = f"{name}, {'recent seeds' if other.options.policy == 'recency' else 'channels'}"
    found[without] = fit_operator(best.ranker, other, note, without)
    channels = (without, name) if other.options.policy == "channels" else (name, without)
    contrasts = {"channels, and not the last items": channels}
    if best.ranker != "nearest":
        contrasts["morphs, and not the seeds as they are"] = (name, NAMES["nearest"])
    contrasts["an operator of the visitor's own, and not one for all"] = (NAMES["personal"], NAMES["shared"])
    fused = choice.candidates[-1]
    contrasts["fused with counts, and not alone"] = (fused.retriever.name, NAMES[fused.ranker])
    return contrasts


def render(report: RetrievalReport) -> Table:
    """The report as a rich table that fits a terminal; retrieval.html has the intervals."""
    told = [report.verdict.headline, *map(contrast_line, report.contrasts)]
    told.append("Green: worse than ours by the paired interval; red: better. In percent.")
    shown = Table(title=f"{report.task}: {report.cases:,} visitors, ours: {report.ours}", caption="\n".join(told))
    shown.add_column("retriever")
    for name in TERMINAL:
        shown.add_column(TITLES[name], justify="right")
    for name, columns in report.figures.items():
        cells = ((columns[key], standing(report.differences, name, key)) for key in TERMINAL)
        texts = ("-" if f is None else Text(f"{100 * f.mean:.1f}", COLOURS[how]) for f, how in cells)
        shown.add_row(Text(name, "bold" if name == report.ours else ""), *texts)
    return shown


def contrast_line(contrast: Contrast) -> str:
    """A contrast in words: what it is worth, over all cases and over those with a long history."""
    told = []
    for what, figures in contrast.differences.items():
        found = figures["recall_50"], figures["recall_100"]
        points = " / ".join(f"{100 * f.mean:+.1f} [{100 * f.low:+.1f}, {100 * f.high:+.1f}]" for f in found if f)
        told.append(f"{what}: {points}")
    return f"{contrast.question}: Recall@50 / @100 {'; '.join(told)}"


@contextmanager
def _noting(progress: Any) -> Iterator[Note]:
    """Tells what is being done, as the description of a task of unknown length."""
    if progress is None:
        yield lambda what: None
        return
    with progress:
        task = progress.add_task("", total=None)
        yield lambda what: progress.update(task, description=what)
