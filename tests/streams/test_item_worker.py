"""From a click on an item to the items of a prediction, with real workers, while the catalogue changes."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from confluent_kafka import Producer

from models.encoder import Encoder
from models.items import ItemsFile, unit
from streams import itemtopic, wire
from streams.clients import librdkafka
from streams.mock import MockCluster
from streams.settings import Settings
from streams.topics import specs
from tests.goods import goods, with_items
from tests.ledger import Ledger
from tests.oracle import seeds_of
from tests.play import Fault, metric, play
from tests.swapping import digest, name, play_on, shows
from tests.traffic import BASE_MS, Traffic, click
from tests.workers import Fleet, Worker

TEXT = "red running shoes"
NUMBER = 6
MINUTE_MS = 60_000

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def on_mock(tmp_path: Path) -> Iterator[Settings]:
    """A deployment of one partition on the in-process cluster, in which only clicks move time."""
    settings = Settings(
        topic_prefix="mock.",
        partitions=1,
        gap_ms=MINUTE_MS,
        grace_ms=10_000,
        ahead_ms=10 * MINUTE_MS,
        clock="log",
        flush_ms=50,
        ranked_items=NUMBER,
        state_dir=tmp_path,
    )
    with MockCluster(dict.fromkeys(specs(settings), settings.partitions)) as cluster:
        yield settings.but(bootstrap_servers=cluster.bootstrap_servers)


def shelves(seed: int = 0, **chosen: Any) -> tuple[ItemsFile, dict[str, np.ndarray]]:
    """Items of which `i1` lies where TEXT would."""
    file, tensors = goods(seed=seed, **({"prior": (0.0, 0.0)} | chosen))
    tensors["vectors"][1] = unit(Encoder().encode([TEXT]) @ tensors["text_map"])[0]
    return file, tensors


class Visitors:
    """One visitor after another looks at some items; the next one's click closes the session before."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self.ledger = settings, Ledger(settings)
        self._producer = Producer(librdkafka(settings))
        self._count = 0

    def look_at(self, *item_ids: str | None, bought: str | None = None) -> dict[str, Any]:
        """The prediction for a new visitor of these items."""
        self._count += 1
        user, at = f"u{self._count}", BASE_MS + self._count * 4 * MINUTE_MS
        for place, item_id in enumerate(item_ids):
            self._send(user, at + place, item_id, "purchase" if bought and item_id == bought else "view")
        self._send("closer", at + 3 * MINUTE_MS, None, "view")
        deadline = time.monotonic() + 60
        while True:
            made = [one for one in self.ledger.predictions if one["user_id"] == user]
            if made:
                return made[0]
            assert time.monotonic() < deadline, f"no prediction for {user}"
            self.ledger.read(0.1)

    def _send(self, user: str, ts: int, item_id: str | None, kind: str) -> None:
        sent = click(user, ts, "home", f"{user}-{ts}", kind, item_id)
        self._producer.produce(self._settings.topic(wire.CLICKS), sent.value, sent.key, timestamp=ts)
        assert self._producer.flush(30) == 0


def items_of(prediction: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in prediction["items"]]


def until(visitors: Visitors, looks: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first prediction that looks so; visitors of `i1` come until then."""
    deadline = time.monotonic() + 60
    while not looks(prediction := visitors.look_at("i1")):
        assert time.monotonic() < deadline, prediction
        time.sleep(0.1)
    return prediction


def test_the_catalogue_changes_while_the_worker_predicts(on_mock: Settings, tiny_bundle: Path, tmp_path: Path) -> None:
    made = shelves()
    settings = on_mock.but(bundle=with_items(tiny_bundle, tmp_path / "bundle", made))
    nearest = [made[0].ids[row] for row in np.argsort(-(made[1]["vectors"] @ made[1]["vectors"][1]), kind="stable")]
    assert nearest[0] == "i1"
    with Fleet([Worker(settings, tmp_path / "w")]) as fleet:
        fleet.start()
        (worker,) = fleet.workers
        worker.wait_ready()
        visitors = Visitors(settings)
        first = visitors.look_at("i1")
        assert items_of(first) == nearest[1 : NUMBER + 1] and first["fallback"] is None
        assert {item["seed"] for item in first["items"]} == {"i1"}
        assert not {nearest[1], nearest[2]} & set(items_of(visitors.look_at(nearest[2], "i1", nearest[1])))

        (tmp_path / "items.jsonl").write_text(json.dumps({"item_id": "new", "text": TEXT}))
        itemtopic.publish(settings, tmp_path / "items.jsonl", print)
        found = until(visitors, lambda one: "new" in items_of(one))
        assert (found["items"][0]["item_id"], found["items"][0]["seed"]) == ("new", "i1")
        itemtopic.remove(settings, ["new"])
        until(visitors, lambda one: "new" not in items_of(one))

        (tmp_path / "items.jsonl").write_text(json.dumps({"item_id": nearest[1], "available": False}) + "\n[]")
        itemtopic.publish(settings, tmp_path / "items.jsonl", lambda bad: None)
        until(visitors, lambda one: items_of(one) == nearest[2 : NUMBER + 2])
        bought = visitors.look_at("i1", nearest[2], bought=nearest[2])
        assert nearest[2] not in items_of(bought)

        nobody = visitors.look_at(None)
        assert {item["seed"] for item in nobody["items"]} == {None}  # nothing is known but what is popular
        states = [metric(worker, "browsecast_catalogue_items", state=state) for state in ("available", "unavailable")]
        assert states == [39, 1]
        assert metric(worker, "browsecast_popularity_clicks") > 5
        visitors.ledger.close()


def check_seeds(sessions: list[dict[str, Any]], made: tuple[ItemsFile, dict[str, np.ndarray]], rules: Settings) -> None:
    """Each session has the seeds that Algorithm 1 as printed gives, over all sessions of the visitor."""
    in_order = sorted(sessions, key=lambda one: (one["user_id"], one["number"]))
    clusters = dict(zip(made[0].ids, made[1]["clusters"].tolist(), strict=True))
    for session, wanted in zip(in_order, seeds_of(in_order, clusters, rules), strict=True):
        found = session["context"]["seeds"]
        assert [(seed["item_id"], seed["channel"]) for seed in found] == [one[:2] for one in wanted]
        assert [seed["weight"] for seed in found] == pytest.approx([one[2] for one in wanted])


@pytest.mark.kafka
def test_killed_in_the_middle_with_items(
    sessionize_settings: Callable[[], Settings], tiny_bundle: Path, tmp_path: Path
) -> None:
    """kill -9 of the worker, once with its disk, and of the model's process: channels, items and predictions, once."""
    made = shelves(ranker="personal", fused=True)
    bundle = with_items(tiny_bundle, tmp_path / "bundle", made)
    settings = sessionize_settings().but(bundle=bundle, flush_ms=20, flush_events=50, ranked_items=NUMBER)
    with Fleet([Worker(settings, tmp_path / "w")]) as fleet:
        fleet.start()
        (worker,) = fleet.workers
        worker.wait_ready()
        faults = [
            Fault(0.2, worker, worker.kill),
            Fault(0.4, worker, worker.kill_model),
            Fault(0.6, worker, lambda: worker.kill(wipe=True)),
        ]
        traffic = Traffic(seed=51, events=4_000, users=120, items=60)
        outcome = play(settings, fleet, traffic, faults, predicted=True, patience_s=60)
        assert not outcome.faults, "\n".join(outcome.faults[:10]) + worker.tail()
        check_seeds(outcome.ledger.sessions, made, settings)
        assert any(one["context"]["bought_items"] for one in outcome.ledger.sessions)
        sessions = {one["session_id"]: one for one in outcome.ledger.sessions}
        for one in outcome.ledger.predictions:
            context, items = sessions[one["session_id"]]["context"], sessions[one["session_id"]]["items"] or ()
            left = set(made[0].ids) - {*items, *context["recent_items"], *context["bought_items"]}
            assert len(one["items"]) == min(NUMBER, len(left))
        assert any(item["seed"] for one in outcome.ledger.predictions for item in one["items"])


def test_another_bundle_maps_the_seeds_anew(on_mock: Settings, tiny_bundle: Path, tmp_path: Path) -> None:
    """The second table has other vectors and clusters, and lacks half of the items."""
    small = goods(count=20, clusters=3, seed=7)
    bundles = [with_items(tiny_bundle, tmp_path / f"b{number}", made) for number, made in enumerate((shelves(), small))]
    settings = on_mock.but(bundle=bundles[0])
    with Fleet([Worker(settings, tmp_path / "w")]) as fleet:
        fleet.start()
        (worker,) = fleet.workers
        worker.wait_ready()

        def steps() -> Iterator[None]:
            for _ in range(40):
                yield
            name(settings, "champion", bundles[1])
            yield from shows(worker, 1, "model_swaps_total")
            for _ in range(60):
                yield

        outcome = play_on(settings, fleet, Traffic(seed=52, events=100_000, users=60, items=50), steps())
        assert not outcome.faults, "\n".join(outcome.faults[:10]) + worker.tail()
    sessions = {one["session_id"]: one for one in outcome.ledger.sessions}
    makers = {digest(bundle): bundle for bundle in bundles}
    clusters = dict(zip(small[0].ids, small[1]["clusters"].tolist(), strict=True))
    after = [one for one in outcome.ledger.sessions if one["context"]["routing"]]
    last = {one["user_id"]: one for one in after}
    assert {one["model_digest"] for one in outcome.ledger.predictions} == set(makers)
    for session in last.values():  # all of them closed with the second table
        assert all(seed["channel"] == clusters[seed["item_id"]] for seed in session["context"]["seeds"])
    known = {digest(bundles[0]): 40, digest(bundles[1]): 20}
    for one in outcome.ledger.predictions:
        assert sessions[one["session_id"]]["user_id"] == one["user_id"]
        assert all(int(item["item_id"][1:]) < known[one["model_digest"]] for item in one["items"])
