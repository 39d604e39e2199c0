"""The watch on drift: what it shows, what it says, and the alert that is raised upon it."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from models.manifest import BundleRefused, verify
from streams import wire
from tests.promql import fires, scraped
from tests.trainer.refreshing import START_MS, MemoryAliases, archive, fetch, shop
from tests.trainer.scorelog import score
from trainer import driftwatch
from trainer.archive import DAY_MS, Archive
from trainer.drift import LIMITS, WINDOW_SCORES, Window
from trainer.driftwatch import DriftWatch
from trainer.fit import train
from trainer.holdout import Holdout
from trainer.options import TrainOptions
from trainer.trainermetrics import TrainerMetrics

ALERTS = Path(__file__).parents[2] / "deploy" / "prometheus" / "alerts.yml"
VISITORS, DAYS = 500, 4
MOVED = ("express", "pay by phone", "all done")  # where the checkout is after a change


@pytest.fixture(scope="module")
def champion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that knows the shop of the first days."""
    directory = tmp_path_factory.mktemp("champion")
    sessions = archive(directory / "archive", shop(VISITORS, DAYS)).read_window(0, 1 << 62)
    Holdout(sessions, sessions, 0).write(directory / "window", directory / "judged")
    options = TrainOptions(
        clusters=2, hidden_size=16, heads=2, layers=1, epochs=1, fine_tune_epochs=0, rollouts=8, max_pages=8,
        context_tokens=48, min_page_count=2, device="cpu",
    )  # fmt: skip
    return train(directory / "window", directory / "bundle", options)


class Watched:
    """A watch over an archive, a champion, and the scores of its predictions."""

    def __init__(self, directory: Path, champion: Path | None) -> None:
        self.directory, self.aliases, self.metrics = directory, MemoryAliases(), TrainerMetrics()
        self.window: Window | None = None
        if champion is not None:
            self.name(champion)
        self.watch = DriftWatch(Archive(directory), self.aliases, fetch, lambda: self.window, self.metrics)

    def name(self, bundle: Path) -> None:
        digest = verify(bundle).digest
        self.aliases.told.aliases["champion"] = wire.ModelAlias("champion", "v1", digest, bundle.as_uri())

    def come(self, buys: Sequence[str]) -> None:
        """A day and more of the shop's visitors."""
        start_ms = START_MS + DAYS * DAY_MS
        archive(self.directory, shop(VISITORS, 1.5, seed=7, start_ms=start_ms, buys=buys))

    def alerts(self) -> set[str]:
        """The kinds that the rule of the compose file alarms of, by what /metrics shows."""
        groups = yaml.safe_load(ALERTS.read_text())["groups"]
        (rule,) = (one["expr"] for group in groups for one in group["rules"] if one["alert"] == "Drift")
        return {labels["kind"] for labels in fires(rule, {}, scraped(self.metrics.render()))}


@pytest.fixture
def watched(tmp_path: Path, champion: Path) -> Watched:
    return Watched(tmp_path / "archive", champion)


def scores(cart: float) -> Window:
    """A full window of scores that expect a cart in half of the sessions."""
    window = Window()
    for number in range(WINDOW_SCORES):
        made = score((0.5, 0.5, 0.5), None, f"u{number % VISITORS}", number / WINDOW_SCORES < cart,
                     purchase=number % 2 == 0, cluster=None)  # fmt: skip
        window.add(made)
    return window


def test_the_same_visitors_raise_no_alert(watched: Watched) -> None:
    watched.come(buys=("basket", "checkout", "thank you"))
    watched.window = scores(cart=0.5)
    assert watched.watch.look() is None
    assert watched.alerts() == set()
    shown = scraped(watched.metrics.render())
    assert {dict(labels)["kind"] for labels in shown["browsecast_drift"]} == set(LIMITS) - {"clusters"}
    assert {dict(labels)["kind"]: limit for labels, limit in shown["browsecast_drift_limit"].items()} == LIMITS


def test_a_checkout_that_has_moved_raises_the_alert_of_its_kinds(watched: Watched) -> None:
    watched.come(buys=MOVED)
    said = watched.watch.look()
    assert said is not None and "unknown pages drifted by 0." in said
    assert watched.alerts() == {"unknown_pages", "pages"}


def test_carts_that_come_less_often_than_expected_raise_theirs(watched: Watched) -> None:
    watched.come(buys=("basket", "checkout", "thank you"))
    watched.window = scores(cart=0.35)
    assert watched.watch.look() == "cart calibration drifted by 9.49"
    assert watched.alerts() == {"cart_calibration"}


def test_it_looks_once_a_minute_and_anew_when_another_champion_reigns(
    watched: Watched, tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1_000.0]
    monkeypatch.setattr("trainer.driftwatch.time.monotonic", lambda: now[0])
    watched.come(buys=("basket", "checkout", "thank you"))
    assert watched.watch.look() is None
    watched.name(tiny_bundle)  # of another shop
    now[0] += driftwatch.LOOK_S - 1
    assert watched.watch.look() is None
    now[0] += 2
    assert "unknown pages" in (watched.watch.look() or "")


def test_without_a_champion_or_an_archive_nothing_is_said(tmp_path: Path, champion: Path) -> None:
    assert Watched(tmp_path / "none", champion).watch.look() is None
    nobody = Watched(tmp_path / "archive", None)
    nobody.come(buys=MOVED)
    assert nobody.watch.look() is None
    assert nobody.alerts() == set()


def test_a_champion_that_cannot_be_read_ends_nothing(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(alias: wire.ModelAlias) -> Path:
        raise BundleRefused(alias.uri, "manifest.json", "not there")

    watched.come(buys=MOVED)
    monkeypatch.setattr(watched.watch, "_fetch", gone)
    assert watched.watch.look() is None
