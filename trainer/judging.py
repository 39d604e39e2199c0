"""Judging: contenders predict the same sessions, and their figures follow from the rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from models.forecaster import Forecaster
from trainer.contenders import BUNDLE, Advance, Contender
from trainer.examples import Example
from trainer.figures import Figures, figures
from trainer.rows import Rows
from trainer.scores import Scores
from trainer.textmetrics import bert_scores

BERT_USERS = 500  # BERTScore takes about a CPU second for twenty of a predictor's users

Note = Callable[[str, int], Advance]  # the name of a piece of work and its size -> what to call with what is done


def silent(name: str, total: int) -> Advance:
    """No progress is shown."""
    return lambda done: None


@dataclass(frozen=True)
class Judgement:
    """Rows of each contender in the order of the examples, the bundle first, and what follows from them."""

    rows: dict[str, Rows]
    scores: dict[str, Scores]
    figures: Figures
    differences: Figures  # the bundle's less each other's


def judge(
    contenders: Sequence[Contender],
    seen: Sequence[Example],
    pages: Mapping[str, Sequence[str]],
    seed: int = 0,
    bertscore: bool = False,
    note: Note = silent,
) -> Judgement:
    """The contenders, the bundle among them, on the same examples. `pages`: those that mark each outcome in a path."""
    rows = {contender.name: contender.rows(seen, note(contender.name, len(seen))) for contender in contenders}
    bert = {name: _bert(name, part, note) for name, part in rows.items()} if bertscore else {}
    scores = score(rows, {contender.name: contender.thresholds for contender in contenders}, pages, bert)
    alone, against = figures(scores, BUNDLE, seed)
    return Judgement(rows, scores, alone, against)


def score(
    rows: Mapping[str, Rows],
    thresholds: Mapping[str, tuple[float, float]],
    pages: Mapping[str, Sequence[str]],
    bert: Mapping[str, np.ndarray | None] = MappingProxyType({}),
) -> dict[str, Scores]:
    """Each predictor's rows as numbers. `pages`: those that mark a cart and a purchase in a path."""
    return {name: Scores(part, thresholds[name], pages, bert.get(name)) for name, part in rows.items()}


def _bert(name: str, rows: Rows, note: Note) -> np.ndarray | None:
    """BERTScore of the first users, None for a predictor without paths."""
    some = [(row["target"], row["path"]) for row in rows[:BERT_USERS]]
    if not any(path for _, path in some):
        return None
    done = note(f"BERTScore of {name}", len(some))
    scores = bert_scores(some)
    done(len(some))
    return scores


def outcome_pages(forecaster: Forecaster) -> dict[str, list[str]]:
    """The pages that mark each outcome; none where the bundle learned it from all pages."""
    cart, purchase = (head.outcome.pages for head in forecaster.heads)
    return {"cart": cart, "purchase": purchase}
