"""Session files as a task of retrieval: all that is judged is as old as it is in service."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.trainer.clicked import clicks
from trainer.catalogue import WINDOWS_MS
from trainer.corpus import TRAIN, VALIDATION
from trainer.covisits import CoVisits
from trainer.interactions import Cases, Interactions, Task
from trainer.items import Space
from trainer.protocols import DAY_MS, HOUR_MS
from trainer.retrieval_baselines import Counts, Popularity
from trainer.retrieval_contenders import best_popularity
from trainer.retrieval_metrics import recall
from trainer.retrieval_options import XPertOptions
from trainer.sessionitems import NextSessions
from trainer.slates import World
from trainer.spaces import make_spaces

HOT_HOURS, HOT = 12, 8


def news(users: int = 400, days: int = 20, seed: int = 0) -> Interactions:
    """Every 12 hours other items are hot and nearly all clicks go to them, as on a site of news."""
    rng = np.random.default_rng(seed)
    item, ts, session, sizes = [], [], [], []
    for _ in range(users):
        starts = np.sort(rng.integers(0, days * DAY_MS, 12))
        for number, start in enumerate(starts.tolist()):
            hot = start // (HOT_HOURS * HOUR_MS) * HOT
            for place in range(3):
                item.append(int(hot + rng.integers(HOT)) if rng.random() < 0.9 else int(rng.integers(HOT)))
                ts.append(start + 60_000 * place)
                session.append(number)
        sizes.append(3 * len(starts))
    first = np.concatenate([[0], np.cumsum(sizes)])
    names = [f"i{place}" for place in range(max(item) + 1)]
    return Interactions(
        [f"u{user}" for user in range(users)], names, first, np.array(item, dtype=np.int32),
        np.array(ts) + 1_700_000_000_000, np.array(session, dtype=np.int32),
    )  # fmt: skip


@pytest.fixture(scope="module")
def log() -> Interactions:
    return news()


@pytest.fixture(scope="module")
def task(log: Interactions) -> Task:
    return NextSessions().task(log)


def test_where_news_are_hot_for_hours_the_window_is_of_hours(task: Task) -> None:
    chosen = best_popularity(task, WINDOWS_MS)
    assert chosen.span is not None and chosen.span <= 6 * HOUR_MS
    ranked = chosen.rank(task.validation, 10)
    assert recall(ranked.items, task.validation, 10) > 0.5
    week = Popularity(task, WINDOWS_MS[-1]).rank(task.validation, 10)
    assert recall(week.items, task.validation, 10) < 0.3


def test_clicks_are_no_older_than_the_shortest_window_and_what_is_learned_is(task: Task, log: Interactions) -> None:
    learned = np.unique(np.quantile(log.ts, NextSessions().learned, method="lower") + 1)
    for cases, oldest in ((task.train, 2 * min(WINDOWS_MS)), (task.validation, min(WINDOWS_MS))):
        for row in range(len(cases)):
            snapshot = task.snapshots[cases.snapshot[row]]
            assert 0 <= cases.at[row] - snapshot.at < oldest
            assert snapshot.learned == learned[learned <= cases.at[row]][-1] <= snapshot.at
    some = int(task.validation.snapshot[0])
    assert task.known(some).ts.max() < task.snapshots[some].at
    assert task.learned(some).ts.max() < task.learned_at(some) < task.snapshots[some].at
    assert task.learned(some, DAY_MS).ts.min() >= task.learned_at(some) - DAY_MS
    assert {task.learned_at(one) for one in range(len(task.snapshots))} == set(learned.tolist())


def test_where_few_come_back_a_snapshot_to_train_on_is_asked_by_several() -> None:
    for users, hours in ((400, 2), (100, 8)):
        task = NextSessions().task(news(users=users))
        cases = task.train
        old = max(int(cases.at[row]) - task.snapshots[cases.snapshot[row]].at for row in range(len(cases)))
        assert (hours - 1) * HOUR_MS < old < hours * HOUR_MS
        assert len(cases) > 8 * len(np.unique(cases.snapshot))


def plainly(log: Interactions, at: int) -> dict[str, tuple[int, int]]:
    """By part: items that were new to a visitor who came back, and those that had been clicked an hour before."""
    learned = np.unique(np.quantile(log.ts, NextSessions().learned, method="lower") + 1)
    found = {TRAIN: [0, 0], VALIDATION: [0, 0]}
    born = {item: log.ts[log.item == item].min() for item in range(len(log.items))}
    for user in range(len(log.users)):
        seen: set[int] = set()
        rows = range(int(log.first[user]), int(log.first[user + 1]))
        for number in dict.fromkeys(log.session[list(rows)].tolist()):
            inside = [row for row in rows if log.session[row] == number]
            start, items = int(log.ts[inside[0]]), dict.fromkeys(log.item[inside].tolist())
            if seen and start >= learned[0]:
                counts = found[VALIDATION if start >= at else TRAIN]
                since = learned[learned <= start][-1]
                every = HOUR_MS if start >= at else 2 * HOUR_MS  # hardly 16 sessions begin in an hour
                moment = since + (start - since) // every * every
                new = [item for item in items if item not in seen]
                counts[0] += len(new)
                counts[1] += sum(born[item] < moment for item in new)
            seen.update(items)
    return {part: (new, held) for part, (new, held) in found.items()}


def test_the_coverage_is_the_share_of_new_items_that_the_index_held(log: Interactions, task: Task) -> None:
    learned = np.unique(np.quantile(log.ts, NextSessions().learned, method="lower") + 1)
    for part, (new, held) in plainly(log, int(learned[-2])).items():
        assert task.coverage[part] == pytest.approx(held / new) and task.coverage[part] < 1.0
    assert len(task.validation.labels) == plainly(log, int(learned[-2]))[VALIDATION][1]


def test_cases_and_snapshots_are_bounded(log: Interactions) -> None:
    few = NextSessions(train=150, validation=60, train_snapshots=20, validation_snapshots=9)
    task = few.task(log)
    assert len(task.train) <= 150 and len(task.validation) <= 60
    assert len(np.unique(task.train.snapshot)) <= 20 and len(np.unique(task.validation.snapshot)) <= 9
    assert len(task.snapshots) == len(np.unique(np.concatenate([task.train.snapshot, task.validation.snapshot])))
    large = replace(few, work=1).task(log)  # as if the log were too long for more
    assert len(large.snapshots) == 16 and len(large.validation) > 20


@pytest.fixture(scope="module")
def spaces(task: Task) -> list[Space]:
    heard: list[str] = []
    found = make_spaces(task, XPertOptions(), heard.append)["clicks"].of
    assert len(heard) == 6, "once for all that learn the same"
    return found


def test_snapshots_that_learn_the_same_share_a_space_and_its_clusters(task: Task, spaces: list[Space]) -> None:
    assert len(spaces) == len(task.snapshots) > 80
    by_moment: dict[int, set[int]] = {}
    for place, space in enumerate(spaces):
        by_moment.setdefault(task.learned_at(place), set()).add(id(space))
    assert [len(same) for same in by_moment.values()] == [1] * 6
    world = World(task, spaces, XPertOptions())
    assert world.clusters(0) is world.clusters(1) and world.clusters(0) is not world.clusters(len(task.snapshots) - 1)


def test_slates_that_do_not_fit_are_made_again(
    task: Task, spaces: list[Space], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(task, spaces, XPertOptions(popularity_ms=HOUR_MS))
    first = world.slate(0)
    assert world.slate(0) is first
    monkeypatch.setattr("trainer.slates.KEPT", first.index.numel() + 1)
    other = world.slate(1)
    again = world.slate(0)
    assert again is not first and world.slate(1) is not other
    np.testing.assert_array_equal(again.index, first.index)


def test_co_visits_are_counted_once_where_several_snapshots_learn_the_same(task: Task) -> None:
    counted: list[Interactions] = []

    def beside(log: Interactions) -> CoVisits:
        counted.append(log)
        return CoVisits.beside(log)

    found = Counts(task, beside, DAY_MS).rank(task.validation, 10)
    assert len(counted) == 2
    apart = [
        Counts(task, CoVisits.beside, DAY_MS).rank(task.validation.take(task.validation.snapshot == snapshot), 10)
        for snapshot in np.unique(task.validation.snapshot)[:3]
    ]
    for snapshot, ranked in zip(np.unique(task.validation.snapshot)[:3], apart, strict=True):
        np.testing.assert_array_equal(found.items[task.validation.snapshot == snapshot], ranked.items)


def test_events_are_found_by_their_times() -> None:
    """Few of all, which are looked up, and many, which are counted over."""
    log = clicks(users=60, days=10)
    begin = int(log.ts.min())
    for start, end in ((0, DAY_MS // 2), (3 * DAY_MS, 4 * DAY_MS), (0, 9 * DAY_MS), (5 * DAY_MS, 5 * DAY_MS)):
        part = log.between(begin + start, begin + end)
        kept = (log.ts >= begin + start) & (log.ts < begin + end)
        wanted: dict[str, Any] = {name: getattr(log, name)[kept] for name in ("item", "ts", "session", "user")}
        for name, values in wanted.items():
            np.testing.assert_array_equal(getattr(part, name), values)


def test_a_log_that_nobody_came_back_in_has_no_case() -> None:
    log = news(users=30)
    once = replace(log, session=np.zeros_like(log.session))
    found: list[Cases] = [getattr(NextSessions().task(once), name) for name in ("train", "validation", "test")]
    assert [len(cases) for cases in found] == [0, 0, 0]
