"""Where the demo's replay waits for the trainer, so that what it does is seen before the logs are over."""

import time
from collections.abc import Callable
from typing import NamedTuple

from streams.demologs import SEEN, TRIED, at_day
from streams.succession import Succession
from streams.workerprocess import Process, Worker

HOLD_S = 300.0  # then the replay goes on, whatever it waits for
JUDGE_S = 8.0  # the judge has read everything for so long: it has looked whether there is a verdict
NAP_S = 0.5

Tell = Callable[[str], None]


class Hold(NamedTuple):
    """The replay is held at this moment of the shop (epoch ms), for what `told` says, until `over` says how it ended.

    `over` is told for how many seconds the replay was held already. It gives None as long as this is not over, and no
    words where others tell of it.
    """

    moment_ms: int
    over: Callable[[float], str | None]
    told: str


def holds(succession: Succession, worker: Worker, trainer: Process) -> list[Hold]:
    """For the candidate, then for the judge: at several moments, since some sessions may not be enough for it."""
    judged_s = [0.0]

    def refreshed(held_s: float) -> str | None:
        if succession.on_trial:
            return "" if worker.shows("browsecast_challenger_loaded{") else None
        if trainer.shows("browsecast_refreshes_total{", 'result="failed"'):
            return f"the trainer could make no candidate of what it has seen: see {trainer.log}"
        return "" if succession.decided_by("trainer") else None

    def tried(held_s: float) -> str | None:
        if succession.promoted:
            return "" if worker.shows("browsecast_model_swaps_total") else None
        behind = worker.progress().lag or trainer.shows("browsecast_judged_scores_total") < succession.scores
        if behind or not held_s:
            judged_s[0] = held_s
        return None if succession.on_trial and held_s - judged_s[0] < JUDGE_S else ""

    trial = "the judge compares the challenger with the champion; the replay waits for its verdict, and for the swap"
    return [
        Hold(at_day(SEEN), refreshed, "the trainer fits a candidate on the archived sessions; the replay waits for it"),
        *(Hold(at_day(day), tried, trial) for day in TRIED),
    ]


def wait(hold: Hold, tell: Tell) -> None:
    """Return when it is over, or has taken too long."""
    began = time.monotonic()
    over = hold.over(0.0)
    if over is None:
        tell(hold.told)
    while over is None:
        time.sleep(NAP_S)
        held_s = time.monotonic() - began
        over = hold.over(held_s)
        if over is None and held_s > HOLD_S:
            over = f"this has taken {HOLD_S:g} s: the replay goes on"
    if over:
        tell(over)
