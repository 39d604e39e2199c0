"""Who the clusters are: their size, the pages and steps they are fond of, in numbers and in words."""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np

from trainer.rows import Rows

SHOWN = 6  # pages and transitions of a portrait
FEWEST = 0.02  # a page or step that fewer of the cluster's sessions hold is not characteristic


class Habit(msgspec.Struct, frozen=True):
    """A page, or a step from one page to the next, that a cluster's sessions hold more often than others."""

    name: str
    share: float  # of the cluster's input sessions that hold it
    lift: float  # that share over the share in all users' input sessions


class Portrait(msgspec.Struct, frozen=True):
    """A cluster of visitors, described by their input sessions; the rates are those of the sessions that came."""

    cluster: int
    users: int
    share: float
    words: str
    sessions: float  # known of a visitor, mean
    pages_per_session: float
    repeats: float  # share of a session's pages that it held before
    returns: float  # share of a session's distinct pages that the visitor's sessions before held
    certainty: float | None  # mean probability of the visitor's cluster under the selector
    cart: float
    purchase: float
    pages: list[Habit]
    steps: list[Habit]


def portraits(rows: Rows, clusters: int) -> list[Portrait]:
    """One portrait a cluster that has users among the rows of the bundle, by cluster."""
    everybody = _Group(rows)
    groups = {k: _Group([row for row in rows if row["cluster"] == k]) for k in range(clusters)}
    return [_portrait(k, group, everybody) for k, group in groups.items() if group.rows]


class _Group:
    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.history: list[list[str]] = [pages for row in rows for pages in row["input"]]
        self.pages = Counter(page for pages in self.history for page in set(pages))
        self.steps = Counter(f"{a} → {b}" for pages in self.history for a, b in set(pairwise(pages)) if a != b)
        self.length = float(np.mean([len(pages) for pages in self.history])) if self.history else 0.0

        self.repeats = 1 - sum(len(set(pages)) for pages in self.history) / max(sum(map(len, self.history)), 1)
        self.returns = _returns(rows)

    def rate(self, name: str) -> float:
        return float(np.mean([row[name] for row in self.rows]))


def _portrait(cluster: int, group: _Group, everybody: _Group) -> Portrait:
    share = len(group.rows) / len(everybody.rows)
    certain = [row["cluster_p"][cluster] for row in group.rows if row["cluster_p"] is not None]
    found: dict[str, Any] = {
        "sessions": len(group.history) / len(group.rows),
        "pages_per_session": group.length,
        "repeats": group.repeats,
        "returns": group.returns,
        "cart": group.rate("cart"),
        "purchase": group.rate("purchase"),
        "pages": _habits(group.pages, everybody.pages, len(group.history), len(everybody.history)),
        "steps": _habits(group.steps, everybody.steps, len(group.history), len(everybody.history)),
    }
    return Portrait(
        cluster=cluster,
        users=len(group.rows),
        share=share,
        words=_words(found, everybody, share),
        certainty=float(np.mean(certain)) if certain else None,
        **found,
    )


def _returns(rows: Rows) -> float:
    """Over all sessions but each visitor's first."""
    known = pages = 0
    for row in rows:
        before: set[str] = set()
        for session in map(set, row["input"]):
            known += len(session & before)
            pages += len(session) if before else 0
            before |= session
    return known / max(pages, 1)


def _habits(own: Counter[str], everybody: Counter[str], sessions: int, all_sessions: int) -> list[Habit]:
    """The most characteristic: a larger share than everybody's, by share times log lift."""
    found = [
        Habit(name, count / sessions, (count / sessions) / (everybody[name] / all_sessions))
        for name, count in own.items()
        if count >= FEWEST * sessions
    ]
    return sorted(found, key=lambda habit: (-habit.share * float(np.log(habit.lift)), -habit.share, habit.name))[:SHOWN]


def _words(found: dict[str, Any], everybody: _Group, share: float) -> str:
    if share == 1.0:
        return f"All visitors. They look most at {_list([habit.name for habit in found['pages'][:3]])}."
    fond = [habit for habit in found["pages"] if habit.lift >= 1.15][:3]
    said: list[str] = []
    if fond:
        shares = [f"{habit.name} ({habit.share:.0%} of sessions, {habit.lift:.1f} times the average)" for habit in fond]
        said.append(f"They are fond of {_list(shares)}.")
    else:
        said.append("They look at the same pages as everybody.")
    steps = [habit.name for habit in found["steps"] if habit.lift >= 1.15][:2]
    if steps:
        said.append(f"Typical steps: {_list(steps)}.")
    cart, rate = found["cart"], everybody.rate("cart")
    traits = [
        _compared(found["pages_per_session"], everybody.length, "have longer sessions", "have shorter sessions"),
        _compared(found["repeats"], everybody.repeats, "look at pages again", "seldom look at a page again"),
        _compared(found["returns"], everybody.returns, "come back to known pages", "look for new pages"),
    ]
    told = [trait for trait in traits if trait]
    if told:
        said.append(f"They {_list(told)}.")
    said.append(
        f"{cart:.0%} of their next sessions have a cart (of all {rate:.0%}), {found['purchase']:.0%} a purchase."
    )
    return " ".join(said)


def _compared(own: float, average: float, more: str, less: str) -> str:
    return more if own > 1.1 * average else less if own < 0.9 * average else ""


def _list(words: Sequence[str]) -> str:
    if len(words) < 2:
        return "".join(words)
    return ", ".join(words[:-1]) + " and " + words[-1]
