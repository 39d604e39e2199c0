"""The proof: visitors change their ways; the trainer notices, learns and hands over, and nobody touches anything."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pytest

from streams.aliases import Aliases, Story
from streams.settings import DAY_MS, Settings
from streams.wire import CHAMPION
from tests.changing import Deployment, Live, clicks_of, mean_iou, refreshing
from tests.play import metric
from tests.swapping import digest
from tests.traffic import Sent
from tests.trainer.refreshing import START_MS, TRAINING, archive, shop
from tests.workers import ROOT, Fleet, Trainer, Worker, environment
from trainer.fit import train
from trainer.recipes import read_recipe

VISITORS, PAST_DAYS, CALM_DAYS = 100, 6, 5
CHANGE_MS = START_MS + (PAST_DAYS + CALM_DAYS) * DAY_MS
BEFORE = (CHANGE_MS - 3 * DAY_MS, CHANGE_MS)
NEW = ("express", "pay by phone", "thank you")
SPEED = DAY_MS / 2.5  # of the log's time a second

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(1_200)]


def browsecast(settings: Settings, *words: str) -> str:
    """What a command prints."""
    command = [sys.executable, "-m", "streams.cli", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment(settings), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(TRAINING.format(epochs=8))
    return path


@pytest.fixture(scope="module")
def trained(recipe: Path) -> Path:
    """A bundle of the past."""
    past = recipe.parent / "past"
    archive(past, shop(VISITORS, PAST_DAYS))
    return train(past, recipe.parent / "bundle", read_recipe(recipe).options)


def the_clicks() -> Iterator[Sent]:
    """From the end of the past on: first as before, then otherwise."""
    now_ms = START_MS + PAST_DAYS * DAY_MS
    calm = shop(VISITORS, CALM_DAYS, 1, now_ms)
    return chain(clicks_of(calm), clicks_of(shop(VISITORS, 200, 2, CHANGE_MS, NEW)))


def told(settings: Settings) -> Callable[[], Story]:
    return Aliases(settings).story


def test_visitors_change_their_ways_and_the_models_follow(
    settings_for: Callable[..., Settings], trained: Path, tiny_bundle: Path, recipe: Path, tmp_path: Path
) -> None:
    options = {
        "partitions": 2, "clock": "log", "flush_ms": 100, "bundle": trained, "shadow_share": 1.0,
        "shadow_wait_ms": 2_000, "registry": str(tmp_path / "registry"), "archive_flush_ms": 1_000,
        "refresh_sessions": 300, "window_days": 6, "refresh_margin": 0.5, "model_threads": 1,
    }  # fmt: skip
    still, followed = settings_for(**options), settings_for(**options)
    alone, worker = Worker(still, tmp_path / "still"), Worker(followed, tmp_path / "followed")
    trainer = Trainer(followed, tmp_path / "trainer", (), "--recipe", str(recipe))
    browsecast(followed, "models", "publish", str(trained))
    with Fleet([alone]) as first, Fleet([worker, trainer]) as second:
        first.start()
        second.start()
        for process in (alone, worker, trainer):
            process.wait_ready()

        def busy() -> bool:
            return refreshing(trainer.settings.trainer_dir)

        live = Live([Deployment(still, first), Deployment(followed, second)], the_clicks(), SPEED, busy)
        story = told(followed)

        def champion() -> str:
            return story().aliases["champion"].digest

        live.play(lambda: champion() != digest(trained) and metric(worker, "browsecast_model_swaps_total") >= 1)
        swapped_ms = live.now_ms

        def lately() -> tuple[int, int]:
            return live.now_ms - 2 * DAY_MS, live.now_ms

        def recovered() -> bool:
            scores, (start_ms, end_ms) = live.deployments[1].ledger.scores, lately()
            if start_ms <= swapped_ms or not any(start_ms <= one["session_end_ms"] < end_ms for one in scores):
                return False  # too soon, or a busy machine is behind by more than that
            return mean_iou(scores, start_ms, end_ms) > mean_iou(scores, *BEFORE) - 0.05

        live.play(recovered)
        after = lately()
        browsecast(followed, "models", "publish", str(tiny_bundle))
        browsecast(followed, "models", "promote", digest(tiny_bundle), "--reason", "by mistake")
        live.play(lambda: champion() != digest(tiny_bundle))
        assert metric(trainer, "browsecast_decisions_total", decision="rolled_back") >= 1
        outcomes = live.finish()
        assert not first.ended and not second.ended
    for outcome in outcomes:
        assert not outcome.faults, "\n".join(outcome.faults[:10])
    without, with_refresh = (
        (mean_iou(one.ledger.scores, *BEFORE), mean_iou(one.ledger.scores, *after)) for one in outcomes
    )
    print(f"IoU before and after the change: {without} without, {with_refresh} with refresh")
    assert without[1] < without[0] - 0.1
    assert with_refresh[1] > without[1] + 0.1 and with_refresh[1] > with_refresh[0] - 0.05
    decisions = story().decisions
    assert {("published", "trainer"), ("promoted", "judge")} <= {(one.decision, one.by) for one in decisions}
    (rolled_back,) = (one for one in decisions if (one.decision, one.digest) == ("rolled_back", digest(tiny_bundle)))
    champions = [one.aliases[CHAMPION] for one in decisions if CHAMPION in one.aliases]
    assert rolled_back.by == "judge"
    assert rolled_back.aliases[CHAMPION] == champions[champions.index(digest(tiny_bundle)) - 1]
    assert rolled_back.evidence["iou"] < max(one["iou"] for one in rolled_back.evidence["baselines"].values())
    shown = browsecast(followed, "models", "show")
    for words in ("published", "promoted", "rolled back", "by mistake", "its IoU is below that of the best baseline"):
        assert words in shown
