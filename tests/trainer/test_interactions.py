"""Logs of items, the moments to judge at, and what a snapshot may know."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.trainer.clicked import DAYS, ITEMS, by_days, by_place, clicks, histories, sessions
from trainer.errors import TrainingError
from trainer.interactionfiles import (
    first_clicks,
    read_attributes,
    read_clicks,
    read_released,
    read_sequences,
    read_sessions,
)
from trainer.interactions import Cases, Interactions, Task
from trainer.protocols import DAY_MS, HOUR_MS, Histories, LastItems, LaterDays

TASKS = {"by place": by_place, "by days": by_days}


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param]()


def parts(task: Task) -> list[Cases]:
    return [task.train, task.validation, task.test]


def test_between_keeps_the_events_of_the_time_and_whose_they_are() -> None:
    log = clicks()
    start, end = np.quantile(log.ts, [0.3, 0.6]).astype(int).tolist()
    part = log.between(start, end)
    wanted = [(user, item, ts) for user, item, ts in zip(log.user, log.item, log.ts, strict=True) if start <= ts < end]
    assert list(zip(part.user, part.item, part.ts, strict=True)) == wanted
    assert part.popularity().tolist() == [sum(item == one for _, item, _ in wanted) for one in range(len(ITEMS))]
    assert len(log.between(None, end).item) == (log.ts < end).sum()


def test_no_snapshot_knows_the_time_that_its_cases_ask_about(task: Task) -> None:
    for cases in parts(task):
        for row in range(len(cases)):
            at = task.snapshots[cases.snapshot[row]].at
            assert at <= cases.at[row]
            assert task.known(cases.snapshot[row]).ts.max() < at
            assert task.log.ts[cases.end[row]] >= cases.at[row], "the first label lies in the future"
            assert (task.log.ts[task.log.first[cases.user[row]] : cases.end[row]] <= cases.at[row]).all()


def test_histories_seeds_and_labels_are_those_of_the_log(task: Task) -> None:
    for cases in parts(task):
        assert len(cases)
        seen, truth, recent = cases.seen().toarray(), cases.truth().toarray(), cases.recent(3)
        for row in range(len(cases)):
            start, end = task.log.first[cases.user[row]], cases.end[row]
            before = task.log.item[start:end].tolist()
            labels = cases.labels[cases.starts[row] : cases.starts[row + 1]].tolist()
            assert cases.history(row).tolist() == before
            assert cases.history(row, 2).tolist() == before[-2:]
            assert np.flatnonzero(seen[row]).tolist() == sorted(set(before))
            assert labels == task.log.item[end : end + len(labels)].tolist()
            assert np.flatnonzero(truth[row]).tolist() == sorted(set(labels))
            newest = [item for place, item in enumerate(before[::-1]) if item not in before[::-1][:place]][:3]
            assert recent[row].tolist() == newest + [-1] * (3 - len(newest))


def test_taken_cases_are_the_cases(task: Task) -> None:
    rows = np.array([3, 0, 3, 7])
    taken = task.test.take(rows)
    for place, row in enumerate(rows.tolist()):
        assert taken.history(place).tolist() == task.test.history(row).tolist()
        assert taken.truth().toarray()[place].tolist() == task.test.truth().toarray()[row].tolist()
    together = np.concatenate([found for _, found in task.test.by_snapshot()])
    assert sorted(together.tolist()) == list(range(len(task.test)))


def test_the_last_two_items_are_the_labels_and_the_one_before_is_trained_on() -> None:
    told, task = histories(), by_place()
    place = {user: number for number, user in enumerate(told.users)}
    for cases, kept in ((task.train, -1), (task.test, None), (task.validation, None)):
        for row in range(len(cases)):
            number = place[task.log.users[cases.user[row]]]
            wanted = told.items[number][-1:] if kept else told.labels[number]
            before = told.items[number][:kept]
            assert [ITEMS[item] for item in cases.history(row)] == before
            assert [ITEMS[i] for i in cases.labels[cases.starts[row] : cases.starts[row + 1]]] == wanted
    assert not set(task.validation.user) & set(task.test.user)
    assert (len(task.validation), len(task.test)) == (30, 60)
    assert len(task.known(0).item) == sum(len(row) - 1 for row in told.items)
    assert len(task.known(1).item) == sum(len(row) for row in told.items)


def test_a_user_without_labels_teaches_but_is_not_judged() -> None:
    told = Histories(["a", "b", "c"], [["x", "y"], ["y", "x"], ["y", "x", "z"]], [["z"], ["z"], []])
    task = LastItems(validation=1, test=None).task("few", told, None, ["x", "y", "z"])
    assert sorted(task.validation.user.tolist() + task.test.user.tolist()) == [0, 1]
    assert task.train.user.tolist() == [0, 1], "z is not in the index that c's training asks"
    assert task.coverage == {"train": 2 / 3, "validation": 1.0, "test": 1.0}
    with pytest.raises(TrainingError, match="0 users have a history and labels"):
        LastItems().task("none", Histories(["a"], [["x"]], [[]]), None, ["x"])


def test_one_unseen_indexed_click_of_each_user_is_asked_for() -> None:
    task = by_days()
    zero = int(task.log.ts.min())
    for cases, (start, end) in ((task.train, DAYS.train_days), (task.test, DAYS.test_days)):
        assert len(np.unique(cases.user)) == len(cases)
        for row in range(len(cases)):
            label = int(cases.labels[row])
            assert label not in cases.history(row) and len(cases.history(row))
            assert label in task.snapshots[cases.snapshot[row]].items
            assert zero + start * DAY_MS <= cases.at[row] < zero + end * DAY_MS
            sessions = task.log.session[cases.end[row] - 1 : cases.end[row] + 1]
            assert cases.opens[row] == (sessions[0] != sessions[1])
    assert 0 < task.test.opens.mean() < 1


def test_the_index_holds_what_was_clicked_often_enough_of_late() -> None:
    task = by_days()
    assert np.diff([snapshot.at for snapshot in task.snapshots]).tolist() == [6 * HOUR_MS] * 15
    for snapshot in task.snapshots:
        late = [
            item
            for item, ts in zip(task.log.item, task.log.ts, strict=True)
            if snapshot.at - 48 * HOUR_MS <= ts < snapshot.at
        ]
        assert snapshot.items.tolist() == [item for item in range(len(ITEMS)) if late.count(item) >= DAYS.index_clicks]


def test_coverage_is_the_share_of_clicks_that_the_index_held() -> None:
    task = by_days()
    zero, held = int(task.log.ts.min()) + 5 * DAY_MS, []
    for user in range(len(task.log.users)):
        events = range(task.log.first[user], task.log.first[user + 1])
        for event in events:
            new = event > events[0] and task.log.item[event] not in task.log.item[events[0] : event]
            if new and zero <= task.log.ts[event] < zero + DAY_MS:
                snapshot = max((one for one in task.snapshots if one.at <= task.log.ts[event]), key=lambda one: one.at)
                held.append(task.log.item[event] in snapshot.items)
    assert 0 < task.coverage["test"] < 1
    assert task.coverage["test"] == pytest.approx(np.mean(held))


def test_days_without_clicks_are_refused() -> None:
    with pytest.raises(TrainingError, match="no click to predict for test, days 9 to 9"):
        LaterDays((2, 4), (4, 5), (9, 10), index_clicks=1).task("short", clicks())


@pytest.mark.parametrize(
    ("days", "says"),
    [
        ({"train_days": (2, 4), "validation_days": (1, 2)}, r"validation_days is \[1, 2\]: from a day .* not before 4"),
        ({"validation_days": (10, 12)}, r"validation_days is \[10, 12\]"),
        ({"test_days": (11, 16)}, r"test_days is \[11, 16\]: from a day that is not before 12"),
        ({"train_days": (4, 4)}, r"train_days is \[4, 4\]"),
        ({"train_days": (-1, 4)}, r"train_days is \[-1, 4\]"),
        ({"snapshot_hours": 0}, "snapshot_hours is 0, but must be at least 1"),
        ({"index_hours": -2}, "index_hours is -2"),
        ({"index_clicks": 0}, "index_clicks is 0"),
        ({"test": 0}, "test is 0"),
    ],
)
def test_days_that_would_be_answered_from_the_future_are_refused(days: dict[str, Any], says: str) -> None:
    with pytest.raises(TrainingError, match=says):
        LaterDays(**days)


@pytest.mark.parametrize(("counts", "says"), [({"validation": 0}, "validation is 0"), ({"test": 0}, "test is 0")])
def test_nobody_to_validate_or_to_test_on_is_refused(counts: dict[str, int], says: str) -> None:
    with pytest.raises(TrainingError, match=says):
        LastItems(**counts)


def test_what_leaves_nothing_to_judge_or_to_train_on_is_refused() -> None:
    with pytest.raises(TrainingError, match="0 users have a history"):
        LastItems().task("empty", Histories([], [], []), None, [])
    with pytest.raises(TrainingError, match="nobody's last item before the labels can be trained on"):
        LastItems().task("short", Histories(["a", "b"], [["x"], ["y"]], [["z"], ["z"]]), None, ["x", "y", "z"])


def test_sequences_are_read_with_their_attributes(tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("u1 a b c d\n\nu2 c a b\n")
    (tmp_path / "attributes.json").write_text(json.dumps({"a": [2, 0], "c": [1], "elsewhere": [7]}))
    told = read_sequences(tmp_path / "s.txt")
    assert told == Histories(["u1", "u2"], [["a", "b"], ["c"]], [["c", "d"], ["a", "b"]])
    found = read_attributes(tmp_path / "attributes.json", ["a", "b", "c"])
    assert found.toarray().tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    (tmp_path / "s.txt").write_text("u1 a b c\nu2 c a\n")
    with pytest.raises(TrainingError, match="line 2: 2 items after the user"):
        read_sequences(tmp_path / "s.txt")
    with pytest.raises(TrainingError, match="cannot be read as attributes"):
        read_attributes(tmp_path / "s.txt", ["a"])
    with pytest.raises(TrainingError, match="attributes for none of the 2 items of the log"):
        read_attributes(tmp_path / "attributes.json", ["x", "y"])


def test_clicks_are_read_in_any_order(tmp_path: Path) -> None:
    rows = [(7, 70, 5, 400), (3, 31, 6, 100), (7, 71, 6, 900), (3, 30, 5, 50), (7, 70, 9, 300), (3, 31, 9, 200)]
    names = ("user_id", "session_id", "article_id", "ts_ms")
    pq.write_table(pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), tmp_path / "c.parquet")
    log = read_clicks(tmp_path / "c.parquet")
    assert (log.users, log.items) == (["3", "7"], ["5", "6", "9"])
    assert log.first.tolist() == [0, 3, 6]
    assert [log.items[item] for item in log.item] == ["5", "6", "9", "9", "5", "6"]
    assert log.ts.tolist() == [50, 100, 200, 300, 400, 900]
    assert log.session.tolist() == [0, 1, 1, 0, 0, 1]
    with pytest.raises(TrainingError, match="cannot be read as clicks"):
        read_clicks(tmp_path / "absent.parquet")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"user_id": [1, None]}, "1 rows have null in the column user_id"),
        ({"article_id": [None, None]}, "2 rows have null in the column article_id"),
        ({"ts_ms": ["noon", "night"]}, "cannot be read as clicks .*Give Parquet with user_id, session_id"),
        ({"ts_ms": None}, "cannot be read as clicks"),
        ({"user_id": [], "session_id": [], "article_id": [], "ts_ms": []}, "holds no click"),
    ],
)
def test_what_is_wrong_with_clicks_is_named(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    columns = {"user_id": [1, 2], "session_id": [1, 2], "article_id": [5, 6], "ts_ms": [10, 20]} | changes
    held = {
        name: pa.array(values, pa.int64() if not values else None)
        for name, values in columns.items()
        if values is not None
    }
    pq.write_table(pa.table(held), tmp_path / "c.parquet")
    with pytest.raises(TrainingError, match=says):
        read_clicks(tmp_path / "c.parquet")


def test_session_files_are_the_log_that_their_clicks_are(tmp_path: Path) -> None:
    made = clicks(users=40)  # no two sessions of one of them overlap
    columns = {
        "user_id": np.array(made.users)[made.user], "session_id": made.user * 100 + made.session,
        "article_id": np.array(made.items)[made.item], "ts_ms": made.ts,
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    wanted, found = read_clicks(tmp_path / "c.parquet"), read_sessions(sessions(made, tmp_path / "sessions"))
    assert (found.users, found.items) == (wanted.users, wanted.items)
    for one in ("first", "item", "ts", "session"):
        np.testing.assert_array_equal(getattr(found, one), getattr(wanted, one))
    half = read_sessions(tmp_path / "sessions" / "0.parquet")
    assert set(half.users) < set(found.users)


def test_what_is_wrong_with_session_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="does not exist"):
        read_sessions(tmp_path / "absent")
    place = sessions(clicks(users=4), tmp_path / "sessions")
    table = pq.read_table(place / "0.parquet")
    (place / "1.parquet").unlink()
    pq.write_table(table.drop_columns(["items"]), place / "0.parquet")
    with pytest.raises(TrainingError, match=r"no session of .* has items"):
        read_sessions(place)
    nobody = pa.array([None] * table.num_rows, pa.string())
    pq.write_table(table.set_column(0, "user_id", nobody), place / "0.parquet")
    with pytest.raises(TrainingError, match="null in the column user_id"):
        read_sessions(place)


def test_of_a_log_with_times_the_last_new_items_are_the_labels() -> None:
    clicked = np.array([0, 1, 0, 2, 1, 1, 1], dtype=np.int32)
    log = Interactions(
        ["a", "b"], ["x", "y", "z"], np.array([0, 5, 7]), clicked, np.arange(7), np.zeros(7, dtype=np.int32)
    )
    assert first_clicks(log) == Histories(["a", "b"], [["x"], ["y"]], [["y", "z"], []])


RELEASED = {
    "final_data_train.txt": "u1\tp3\t30\tp1:10 p2:20\nu3\tp1\t9\tp4:1 p2:3\n",
    "final_data_test.txt": "u1\tp4,p1\t50\tp2:20 p1:10 p3:30\nu2\tp2\t60\tp1:40 p3:50\n",
    "item_features.txt": "p1 3 4\np2 0 2\np3 1 0\np4 0 -1\n",
}


def released(directory: Path, **changes: str) -> Path:
    for name, text in RELEASED.items():
        (directory / name).write_text(changes.get(name.partition(".")[0], text))
    return directory


def test_amazon_reviews_are_read_as_they_were_released(tmp_path: Path) -> None:
    told, items, vectors = read_released(released(tmp_path))
    assert told.users == ["u1", "u3", "u2"]
    assert told.items == [["p1", "p2", "p3"], ["p4", "p2", "p1"], ["p1", "p3"]], "by time"
    assert told.labels == [["p4", "p1"], [], ["p2"]]
    assert items == ["p1", "p2", "p3", "p4"]
    np.testing.assert_allclose(np.asarray(vectors), np.array([[0.6, 0.8], [0, 1], [1, 0], [0, -1]]))
    task = LastItems(validation=1, test=None).task("released", told, vectors, items)
    assert sorted(task.log.users[user] for user in (*task.validation.user, *task.test.user)) == ["u1", "u2"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"final_data_test": "u1 p4 50 p2:20\n"}, "final_data_test.txt, line 1: 1 fields, not four"),
        ({"final_data_train": "u1\tp3\t30\tp1 p2:20\n"}, "final_data_train.txt, line 1: 'p1' is no item:time"),
        ({"item_features": "p1 3 4\np2 0\n"}, "item_features.txt, line 2: 1 numbers after the item, not 2"),
        ({"item_features": "p1 3 four\n"}, "item_features.txt, line 1: could not convert"),
        ({"item_features": "p1 3 4\np2 0 1\np4 1 1\n"}, "item 'p3' of user 'u1' has no vector"),
    ],
)
def test_what_is_wrong_with_a_release_is_named(tmp_path: Path, changes: dict[str, str], says: str) -> None:
    with pytest.raises(TrainingError, match=says):
        read_released(released(tmp_path, **changes))
