"""A prediction that is published live is the one that `evaluate` makes off line for the same session."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from confluent_kafka import Producer

from models.config import Backend
from streams import replay, wire
from streams.clients import librdkafka
from streams.mock import MockCluster
from streams.settings import DAY_MS, Settings
from streams.shop import shop_events
from streams.topics import specs
from tests.ledger import Ledger
from tests.traffic import closing
from tests.workers import Fleet, Worker
from trainer.contenders import BUNDLE
from trainer.evaluate import evaluate
from trainer.fit import TrainOptions, train

START_MS = 1_760_000_000_000
VISITORS, DAYS = 70, 12
CONTEXT = 44  # tokens: fewer than most visitors have, so that histories are cut

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def live(settings: Settings, directory: Path, wanted: set[str]) -> dict[str, dict[str, Any]]:
    """Predictions by session, `wanted` among them, of a worker with all roles that gets the shop's clicks."""
    with Fleet([Worker(settings, directory)]) as fleet:
        fleet.start()
        fleet.workers[0].wait_ready()
        replay.publish(shop_events(VISITORS, DAYS, 1, START_MS), settings)
        producer = Producer(librdkafka(settings))
        for one in closing(settings.partitions, START_MS + DAYS * DAY_MS, settings):
            producer.produce(settings.topic(wire.CLICKS), one.value, one.key, one.partition, timestamp=one.timestamp_ms)
        assert producer.flush(30) == 0
        ledger = Ledger(settings)
        ledger.read_until(lambda: wanted <= {one["session_id"] for one in ledger.predictions}, fleet.tick)
        ledger.close()
    return {one["session_id"]: one for one in ledger.predictions}


@pytest.mark.parametrize(("backend", "soft"), [("token", True), ("lora", False)])
def test_live_is_as_off_line(backend: Backend, soft: bool, tmp_path: Path) -> None:
    settings = Settings(topic_prefix="live.", partitions=2, clock="log", flush_ms=50, state_dir=tmp_path / "state")
    sessions = tmp_path / "sessions"
    replay.cut(shop_events(VISITORS, DAYS, 1, START_MS), settings, sessions)
    options = TrainOptions(
        backend=backend, soft=soft, clusters=3, hidden_size=16, layers=1, heads=2, epochs=3, rollouts=8, max_pages=12,
        context_tokens=CONTEXT, device="cpu",
    )  # fmt: skip
    bundle = train(sessions, tmp_path / "bundle", options)
    evaluate(bundle, sessions, tmp_path / "report", "cpu")
    rows = pq.read_table(tmp_path / "report" / "predictions.parquet").to_pylist()
    rows = [row for row in rows if row["predictor"] == BUNDLE]
    assert len(rows) > 40 and len({row["cluster"] for row in rows}) > 1
    assert sum(sum(map(len, row["input"])) > CONTEXT for row in rows) > 5
    cut = pq.read_table(sessions).to_pylist()
    ids = {(one["user_id"], one["number"]): one["session_id"] for one in cut}
    before = {one["session_id"]: ids.get((one["user_id"], one["number"] - 1), "") for one in cut}
    with MockCluster(dict.fromkeys(specs(settings), settings.partitions)) as cluster:
        deployed = settings.but(bootstrap_servers=cluster.bootstrap_servers, bundle=bundle)
        found = live(deployed, tmp_path / "worker", {before[row["session_id"]] for row in rows})
    for row in rows:
        made = found[before[row["session_id"]]]
        assert made["fallback"] is None and made["cluster"] == row["cluster"] and made["path"] == row["path"]
        assert [page["page"] for page in made["pages"]] == row["expected"]
        assert [page["p"] for page in made["pages"]] == pytest.approx(row["expected_p"], abs=1e-5)
        assert (made["cart"], made["purchase"]) == pytest.approx((row["cart_p"], row["purchase_p"]), abs=1e-5)
