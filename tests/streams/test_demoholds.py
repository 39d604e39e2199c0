"""How long the demo's replay waits, and for what."""

from typing import Any

import msgspec
import pytest

from streams import demoholds
from streams.demoholds import HOLD_S, JUDGE_S, Hold, holds, wait
from streams.succession import Succession
from streams.wire import ModelDecision
from streams.workerprocess import Progress


class Shown:
    """A worker or trainer that shows what it is told to."""

    def __init__(self) -> None:
        self.log, self.lag = "trainer.log", 0
        self.samples: dict[str, int] = {}

    def shows(self, start: str, label: str = "") -> int:
        return self.samples.get(start, 0)

    def progress(self) -> Progress:
        return Progress(0, 0, 0, self.lag)


class Wall:
    """Time that passes while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Wall:
    wall = Wall()
    monkeypatch.setattr(demoholds, "time", wall)
    return wall


def tell(succession: Succession, kind: str, by: str, **aliases: str | None) -> None:
    made = ModelDecision(kind, 1, kind, "v", "sha256:v", "", "", by, {}, aliases)
    succession.record(f"decision/{kind}".encode(), msgspec.json.encode(made))


def staged() -> tuple[Succession, Any, Any, list[Hold]]:
    succession, worker, trainer = Succession(lambda line: None), Shown(), Shown()
    return succession, worker, trainer, holds(succession, worker, trainer)  # type: ignore[arg-type]


def test_the_refresh_is_over_when_the_challenger_stands_or_none_was_published() -> None:
    succession, worker, trainer, (refresh, *_) = staged()
    assert refresh.over(0.0) is None
    trainer.samples["browsecast_refreshes_total{"] = 1
    assert "could make no candidate" in (refresh.over(1.0) or "")
    trainer.samples.clear()
    tell(succession, "refused", "trainer")
    assert refresh.over(1.0) == ""
    tell(succession, "published", "trainer", challenger="sha256:v")
    assert refresh.over(1.0) is None
    worker.samples["browsecast_challenger_loaded{"] = 1
    assert refresh.over(1.0) == ""


def test_the_trial_waits_for_the_judge_to_read_and_to_look_and_for_the_swap() -> None:
    succession, worker, trainer, (_, first, second, _) = staged()
    assert first.over(0.0) == ""  # without a challenger
    tell(succession, "published", "trainer", challenger="sha256:v")
    succession.scores, worker.lag = 10, 3
    assert first.over(0.0) is None
    worker.lag = 0
    assert first.over(20.0) is None
    trainer.samples["browsecast_judged_scores_total"] = 10
    assert first.over(20.0 + JUDGE_S / 2) is None
    assert first.over(20.0 + JUDGE_S) == ""  # no verdict yet: more sessions are needed
    assert second.over(0.0) is None
    assert second.over(JUDGE_S / 2) is None
    tell(succession, "promoted", "judge", champion="sha256:v", challenger=None)
    assert second.over(2 * JUDGE_S) is None
    worker.samples["browsecast_model_swaps_total"] = 1
    assert second.over(2 * JUDGE_S) == ""


def test_no_wait_is_for_ever_and_each_says_what_it_is_for(wall: Wall) -> None:
    told: list[str] = []
    wait(Hold(0, lambda held_s: None, "wait a little"), told.append)
    assert told == ["wait a little", f"this has taken {HOLD_S:g} s: the replay goes on"]
    assert HOLD_S < wall.now < HOLD_S + 2
    wait(Hold(0, lambda held_s: "", "nothing to wait for"), told.append)
    wait(Hold(0, lambda held_s: None if held_s < 3 else "at last", "soon"), told.append)
    assert told[2:] == ["soon", "at last"]
