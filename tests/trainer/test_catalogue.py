"""Items from session files into a bundle: the log is read whole, and a worker ranks as validation ranked."""

import json
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from math import exp
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from rich.progress import Progress

from models.bundle import load_bundle
from models.items import ItemTable, SeedRule, load_items
from models.retriever import Retriever
from models.visit import Interest
from tests.models.conftest import write_tiny
from tests.trainer.conftest import MODES
from trainer import catalogue
from trainer.catalogue import FittedItems, embed_texts, fit_items, read_texts
from trainer.controls import bundle_options
from trainer.covisits import CoVisits
from trainer.errors import TooFewClicks, TrainingError
from trainer.fit import TrainOptions, train
from trainer.fusion import Fused
from trainer.interactions import Cases, Interactions, Snapshot, Task
from trainer.items import Space, click_space
from trainer.protocols import HOUR_MS
from trainer.retrieval_baselines import Counts, Popularity
from trainer.retrieval_choice import Choice, choose
from trainer.retrieval_options import XPertOptions
from trainer.seeds import channel_seeds
from trainer.sessionitems import NextSessions, read_item_log
from trainer.slates import World
from trainer.spaces import choose_spaces
from trainer.xpert import XPertRetriever

KINDS, EACH = 5, 12
OPTIONS = XPertOptions(epochs=2, batch=50, seeds=3, clusters=6)


def rows(users: int = 80, seed: int = 0) -> list[dict[str, Any]]:
    """Sessions of visitors who stay with one kind of item; some events, and some sessions, have none."""
    rng = np.random.default_rng(seed)
    found = []
    for user in range(users):
        kind = int(rng.integers(KINDS))
        starts = np.sort(rng.integers(0, 40 * HOUR_MS, int(rng.integers(2, 7)))) + 1_700_000_000_000
        for number, start in enumerate(starts.tolist(), start=1):
            length = int(rng.integers(2, 6))
            items: list[str | None] = []
            for _ in range(length):
                own = kind if rng.random() < 0.85 else int(rng.integers(KINDS))
                items.append(None if rng.random() < 0.15 else f"{own}-{int(EACH * rng.random() ** 2)}")
            found.append(
                {
                    "user_id": f"u{user}", "session_id": f"u{user}-{number}", "number": number, "start_ms": start,
                    "end_ms": start + (length - 1) * 30_000, "pages": ["home", *["item"] * (length - 1)],
                    "page_ts_ms": [start + place * 30_000 for place in range(length)], "cart": False, "purchase": False,
                    "items": None if all(item is None for item in items) or rng.random() < 0.05 else items,
                }
            )  # fmt: skip
    return found


def written(told: list[dict[str, Any]], directory: Path, without: tuple[str, ...] = ()) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    half = len(told) // 2
    for name, part in (("a", told[half:]), ("b", told[:half])):
        pq.write_table(pa.Table.from_pylist(part).drop_columns(list(without)), directory / f"{name}.parquet")
    return directory


def events(told: list[dict[str, Any]]) -> dict[str, list[tuple[str, int, int]]]:
    """Item, time and number of the session, by user, in order."""
    found: dict[str, list[tuple[str, int, int]]] = {}
    for row in sorted(told, key=lambda row: (row["user_id"], row["number"])):
        for item, ts in zip(row["items"] or [], row["page_ts_ms"], strict=False):
            if item is not None:
                found.setdefault(row["user_id"], []).append((item, ts, row["number"]))
    return found


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Interactions:
    found = read_item_log([written(rows(), tmp_path_factory.mktemp("sessions"))])
    assert found is not None
    return found


def test_the_log_holds_every_event_with_an_item(log: Interactions) -> None:
    wanted = events(rows())
    assert log.users == sorted(wanted)
    for user, name in enumerate(log.users):
        part = slice(int(log.first[user]), int(log.first[user + 1]))
        assert [(log.items[item], ts) for item, ts in zip(log.item[part], log.ts[part], strict=True)] == [
            one[:2] for one in wanted[name]
        ]
        numbers = [one[2] for one in wanted[name]]
        assert log.session[part].tolist() == [sorted(set(numbers)).index(number) for number in numbers]


def test_without_times_of_pages_events_have_the_time_of_their_session(tmp_path: Path) -> None:
    found = read_item_log([written(rows(), tmp_path, ("page_ts_ms",))])
    starts = {(row["user_id"], row["number"]): row["start_ms"] for row in rows()}
    assert found is not None
    wanted = [starts[name, number] for name, seen in sorted(events(rows()).items()) for _, _, number in seen]
    assert found.ts.tolist() == wanted


def test_without_items_there_is_no_log(tmp_path: Path) -> None:
    assert read_item_log([written(rows(), tmp_path / "old", ("items",))]) is None
    assert read_item_log([written([row | {"items": None} for row in rows()], tmp_path / "none")]) is None
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.parquet").write_bytes(b"nothing")
    with pytest.raises(TrainingError, match=r"x\.parquet: the items of its sessions cannot be read"):
        read_item_log([tmp_path / "bad"])


def test_cases_are_next_sessions_and_their_labels_new_items_of_the_index(log: Interactions) -> None:
    task = NextSessions().task(log)
    assert len(task.train) and len(task.validation) and not len(task.test)
    assert task.train.at.max() < task.validation.at.min()
    for cases in (task.train, task.validation):
        assert cases.opens.all()
        for row in range(len(cases)):
            user, end = int(cases.user[row]), int(cases.end[row])
            session = log.session[end]
            assert log.session[end - 1] != session and log.first[user] < end
            snapshot = task.snapshots[cases.snapshot[row]]
            assert task.known(cases.snapshot[row]).ts.max() < snapshot.at <= cases.at[row] == log.ts[end]
            inside = [e for e in range(end, int(log.first[user + 1])) if log.session[e] == session]
            seen = set(cases.history(row).tolist())
            wanted = [item for item in dict.fromkeys(log.item[inside].tolist()) if item in snapshot.items]
            labels = cases.labels[cases.starts[row] : cases.starts[row + 1]].tolist()
            assert labels == [item for item in wanted if item not in seen] and labels


@pytest.fixture(scope="module")
def fitted(log: Interactions) -> FittedItems:
    return fit_items(log, OPTIONS)


def table_of(fitted: FittedItems) -> ItemTable:
    return ItemTable(fitted.file, dict(fitted.tensors), "sha256:test")


def test_the_table_holds_what_the_contract_says(fitted: FittedItems, log: Interactions, tmp_path: Path) -> None:
    write_tiny(tmp_path / "bundle", items=(fitted.file, dict(fitted.tensors)))
    table = load_items(tmp_path / "bundle")
    assert table is not None and table.ids == fitted.file.ids
    chosen, until = table.retriever, int(log.ts.max())
    assert chosen.clicks_until_ms == until
    assert chosen.seeding == SeedRule("channels", OPTIONS.seeds, exp(-0.08), True)
    assert table.vectors.shape == (len(table), 64) and len(table.centroids) <= 6
    for row, item in enumerate(table.ids):
        inside = (log.item == log.items.index(item)) & (log.ts > until - chosen.window_ms)
        assert table.clicks[row] == inside.sum()
    assert max(fitted.validation.values()) > 0
    coverage = NextSessions().task(log).coverage["validation"]
    assert fitted.told.endswith(f"; the index held {coverage:.1%} of what was new to their visitors")


@pytest.fixture(scope="module")
def choice(log: Interactions) -> Choice:
    """All candidates, fitted once."""
    task = NextSessions().task(log)
    spaces, _ = choose_spaces(task, OPTIONS, lambda what: None)
    world = World(task, spaces.of, replace(OPTIONS, popularity_ms=6 * HOUR_MS))
    counts = Counts(task, CoVisits.beside, 6 * HOUR_MS, 3, 0.8, 0.5)
    return choose(world, Popularity(task, 6 * HOUR_MS), counts, lambda what: None)


def at_the_end(log: Interactions, space: Space) -> Task:
    """Everybody is asked for after the log's last event."""
    users, at = np.arange(len(log.users)), int(log.ts.max()) + 1
    nothing = np.zeros(0, dtype=np.int32)
    cases = Cases(
        log,
        users,
        log.first[1:],
        np.full(len(users), at),
        0 * users,
        users >= 0,
        np.zeros(len(users) + 1, int),
        nothing,
    )
    return Task("end", log, (Snapshot(at, space.items),), cases, cases, cases, {})


def moved(retriever: object, task: Task, space: Space) -> Any:
    """The same retriever on another task."""
    if isinstance(retriever, XPertRetriever):
        return replace(retriever, world=World(task, [space], retriever.world.options))
    if isinstance(retriever, Fused):
        return replace(
            retriever, first=moved(retriever.first, task, space), second=moved(retriever.second, task, space)
        )
    assert isinstance(retriever, Popularity | Counts)
    return replace(retriever, task=task)


RANKERS = ["popularity", "counts", "nearest", "shared", "residual", "personal"]


@pytest.mark.parametrize("ranker", [*RANKERS, "personal, fused", "popularity, fused"])
def test_a_worker_ranks_what_the_trainer_ranks(
    log: Interactions, choice: Choice, ranker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each ranker as if validation had chosen it: the bundle's list for everybody after the log is the retriever's."""
    chosen = next(one for one in choice.candidates if one.ranker == ranker.partition(",")[0])
    counts = Counts(NextSessions().task(log), CoVisits.beside, 6 * HOUR_MS, 3, 0.8, 0.5)
    if ranker.endswith("fused"):
        chosen = replace(chosen, fused=True, retriever=Fused("", chosen.retriever, counts))
    monkeypatch.setattr(catalogue, "choose", lambda *args: replace(choice, chosen=chosen))
    monkeypatch.setattr(catalogue, "best_counts", lambda *args: counts)
    found = fit_items(log, replace(OPTIONS, popularity_ms=6 * HOUR_MS))
    assert found.file.retriever.ranker == chosen.ranker
    table = ItemTable(found.file, dict(found.tensors), "sha256:test")
    space = Space(np.array([log.items.index(item) for item in table.ids], dtype=np.int32), table.vectors)
    task = at_the_end(log, space)
    wanted = moved(chosen.retriever, task, space).rank(task.test, len(table))
    worker = Retriever(table, 10)
    for user in range(0, len(log.users), 3):
        history = [log.items[item] for item in log.item[log.first[user] : log.first[user + 1]]]
        clusters = {item: cluster for item in history if (cluster := table.cluster(item)) is not None}
        seeds = [(item, clusters[item], weight) for item, weight in channel_seeds(history, clusters, exp(-0.08), 3)]
        ranked = worker.rank([Interest(seeds, list(dict.fromkeys(reversed(history))), history[-1:])])[0]  # type: ignore[arg-type]
        listed = wanted.items[user] >= 0
        scores = dict(zip((log.items[item] for item in wanted.items[user][listed]), wanted.scores[user], strict=False))
        assert len(ranked) == 10 and len(scores) == len(table) - len(set(history))
        np.testing.assert_allclose([one.score for one in ranked], wanted.scores[user][:10], rtol=1e-4, atol=1e-6)
        for one in ranked:
            assert one.score == pytest.approx(float(scores[one.item]), rel=1e-4, abs=1e-6)


def test_the_published_model_goes_into_a_bundle(log: Interactions, tmp_path: Path) -> None:
    heard: list[str] = []
    found = fit_items(log, replace(OPTIONS, mode="paper", epochs=1, patience=9, history=7), note=heard.append)
    assert (found.file.retriever.ranker, found.file.retriever.heads) == ("personal", 10)
    assert found.file.retriever.activation == "relu" and not found.file.retriever.fused
    assert found.file.retriever.seeding == SeedRule("channels", OPTIONS.seeds, exp(-0.08))
    assert heard[-1] == "XPert as published, epoch 1" and found.file.retriever.history == 7
    assert found.tensors["xpert.seed_bias"].shape == (OPTIONS.seeds,)
    Retriever(table_of(found), 5)


def test_too_few_cases_give_no_items(log: Interactions) -> None:
    with pytest.raises(TooFewClicks, match=r"^In \d+ sessions to learn from, and \d+ to validate on, .* 20 of each"):
        fit_items(log.between(None, int(np.quantile(log.ts, 0.05))), OPTIONS)
    pairs = NextSessions(train=100, validation=100).task(log)
    assert min(len(pairs.train), len(pairs.validation)) >= 20
    alone = replace(log, items=[f"{user}" for user in range(len(log.users) + 1)], item=log.user.astype(np.int32))
    with pytest.raises(TooFewClicks, match="No two items"):
        click_space(alone)


def test_texts_place_items_that_nobody_clicked(log: Interactions) -> None:
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(KINDS, 384)).astype(np.float32)
    kinds = np.array([int(item.split("-")[0]) for item in log.items])
    texts = directions[kinds] + 0.3 * rng.normal(size=(len(kinds), 384)).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    found = fit_items(log, replace(OPTIONS, epochs=1), texts)
    table = table_of(found)
    placed = table.from_text(directions / np.linalg.norm(directions, axis=1, keepdims=True))
    assert placed is not None
    for kind in range(KINDS):
        near = np.argsort(-table.vectors @ placed[kind])[:5]
        assert sum(table.ids[row].startswith(f"{kind}-") for row in near) >= 4


def test_a_catalogue_of_other_items_is_as_good_as_none(log: Interactions, fitted: FittedItems) -> None:
    found = fit_items(log, OPTIONS, np.zeros((len(log.items), 384), dtype=np.float32))
    assert "text_map" not in found.tensors and " by clicks, 0 of them with a text; " in found.told
    np.testing.assert_array_equal(found.tensors["vectors"], fitted.tensors["vectors"])


def test_texts_are_read_from_the_form_of_the_topic(tmp_path: Path) -> None:
    lines = [{"item_id": "1", "text": "red shoes", "category": "shoes"}, {"item_id": "2", "price": 3.0}]
    (tmp_path / "items.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    assert read_texts(tmp_path / "items.jsonl") == {"1": "red shoes shoes", "2": ""}
    (tmp_path / "items.jsonl").write_text('{"item_id": "1"}\n{"text": "x"}\n')
    with pytest.raises(TrainingError, match="line 2: no item"):
        read_texts(tmp_path / "items.jsonl")
    with pytest.raises(TrainingError, match="cannot be read"):
        read_texts(tmp_path / "absent")
    (tmp_path / "items.jsonl").write_text('{"item_id": "1"}\n')
    assert not embed_texts(["1", "9"], read_texts(tmp_path / "items.jsonl"), None, "cpu").any()


def test_a_bundle_trained_on_sessions_with_items_retrieves(
    tmp_path: Path, options: Callable[..., TrainOptions]
) -> None:
    """And one that shall not, or has sessions without items, does not; the card says which."""
    sessions = written(rows(), tmp_path / "sessions")
    kinds = ["shoes", "books", "lamps", "bicycles", "tea"]
    texts = [{"item_id": f"{k}-{i}", "text": f"{kinds[k]} {i}"} for k in range(KINDS) for i in range(EACH + 1)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in texts))
    told = options(**MODES["token"], items=tmp_path / "items.jsonl", retrieval=replace(OPTIONS, epochs=1))
    bundle = load_bundle(train(sessions, tmp_path / "bundle", told), "cpu")
    assert bundle.items is not None and len(bundle.items) > KINDS * EACH // 2
    assert bundle.items.tensors["text_map"].shape == (384, 64)
    assert f"items: {len(bundle.items)} items by " in (tmp_path / "bundle" / "README.md").read_text()
    assert bundle_options(bundle.config.training) == replace(told, warm_start=None)
    for place, plain, why in (
        (sessions, replace(told, retrieve=False), "the options say so"),
        (written(rows(), tmp_path / "old", ("items",)), told, "No event of these sessions names an item"),
        (written([row | {"items": row["items"] if row["number"] == 1 else None} for row in rows()], tmp_path / "few"),
         told, "In 0 sessions to learn from"),
    ):  # fmt: skip
        said = StringIO()
        with Progress(console=Console(file=said), disable=True) as progress:
            without = load_bundle(train(place, tmp_path / "without", plain, progress), "cpu")
        assert without.items is None
        assert f"- items: none: {why}" in (tmp_path / "without" / "README.md").read_text()
        assert (f"items: none: {why}" in said.getvalue()) == plain.retrieve


def test_a_catalogue_that_cannot_be_read_stops_a_training_before_it_begins(
    tmp_path: Path, options: Callable[..., TrainOptions]
) -> None:
    sessions = written(rows(), tmp_path / "sessions")
    (tmp_path / "items.jsonl").write_text('{"item_id": "1"}\n')
    for wrong, words in (
        ({"items": tmp_path / "typo.jsonl"}, r"typo\.jsonl cannot be read \(No such file"),
        ({"items": tmp_path / "items.jsonl", "encoder": tmp_path}, r"holds no sentence-transformers model"),
    ):
        with pytest.raises(TrainingError, match=words):
            train(sessions, tmp_path / "bundle", options(**MODES["token"], **wrong))
    assert not list(tmp_path.glob("bundle*"))


def test_a_run_goes_on_with_other_options_of_items(
    tmp_path: Path, options: Callable[..., TrainOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a training that fails where items are fitted nothing is lost."""
    sessions = written(rows(), tmp_path / "sessions")
    first = options(**MODES["token"], retrieval=OPTIONS)

    def failing(*given: Any) -> FittedItems:
        raise TrainingError("the loss is nan")

    with monkeypatch.context() as patch:
        patch.setattr("trainer.fit.fit_items", failing)
        with pytest.raises(TrainingError, match="the loss is nan"):
            train(sessions, tmp_path / "bundle", first)
    before = (tmp_path / "bundle.steps.jsonl").read_bytes()
    (tmp_path / "items.jsonl").write_text('{"item_id": "1"}\n')
    again = replace(first, items=tmp_path / "items.jsonl", retrieval=replace(OPTIONS, epochs=1, lr=1e-4))
    assert load_bundle(train(sessions, tmp_path / "bundle", again), "cpu").items is not None
    assert (tmp_path / "bundle.steps.jsonl").read_bytes() == before and before
