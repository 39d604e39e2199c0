"""A shop whose visitors change their ways half-way, live: the same clicks for several deployments, at a pace."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from streams.settings import DAY_MS, Settings
from streams.wire import Session
from tests.ledger import Ledger
from tests.play import Outcome
from tests.swapping import finish
from tests.traffic import Publisher, Sent, click
from tests.workers import Fleet
from trainer.plan import DONE, PLAN

TICK_S, LONGEST_TICK_S = 0.05, 0.2  # what a busy machine did not send in time comes later, not all at once
SLOWER = 8
LOOK_S = 1.0  # between two looks whether it is enough
PATIENCE_S = 600.0


def clicks_of(sessions: list[Session]) -> Iterator[Sent]:
    """The clicks of sessions, in the order of time; the first and last page of one with a cart put in and buy."""
    made = []
    for one in sessions:
        kinds = ["view"] * len(one.pages)
        if one.cart:
            kinds[0], kinds[-1] = "cart", "purchase"
        for place, (page, ts, kind) in enumerate(zip(one.pages, one.page_ts_ms, kinds, strict=True)):
            made.append(click(one.user_id, ts, page, f"{one.session_id}-{place}", kind))
    return iter(sorted(made, key=lambda sent: sent.timestamp_ms))


@dataclass
class Deployment:
    """Where the clicks go, and what comes out."""

    settings: Settings
    fleet: Fleet
    ledger: Ledger = field(init=False)
    publisher: Publisher = field(init=False)

    def __post_init__(self) -> None:
        self.ledger, self.publisher = Ledger(self.settings), Publisher(self.settings)


@dataclass
class Live:
    """Plays the clicks to all deployments, at `speed` ms of the log's time a second.

    While `busy` says so, it goes at an eighth of that: a day has few seconds here, and a slow machine would be weeks
    behind.
    """

    deployments: list[Deployment]
    clicks: Iterator[Sent]
    speed: float
    busy: Callable[[], bool]
    now_ms: int = 0  # in the log
    moments: list[tuple[float, int]] = field(default_factory=list)  # of every look: wall time in s, and the log's in ms

    def __post_init__(self) -> None:
        self._next = next(self.clicks)
        self.now_ms = self._next.timestamp_ms

    def play(self, enough: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
        """Until it is enough, which is looked at once a second. Raises AssertionError when that does not come."""
        before = looked = time.monotonic()
        deadline, speed = before + patience_s, self.speed
        while True:
            now = time.monotonic()
            self._send_up_to(self.now_ms + int(speed * min(now - before, LONGEST_TICK_S)))
            before = now
            for one in self.deployments:
                one.fleet.tick()
                one.ledger.read(TICK_S / len(self.deployments))
            if now - looked >= LOOK_S:
                looked = now
                speed = self.speed / (SLOWER if self.busy() else 1)
                self.moments.append((time.time(), self.now_ms))
                if enough():
                    return
                assert now < deadline, f"it did not come to pass in {patience_s:g} s"

    def finish(self) -> list[Outcome]:
        """Close all sessions and compare every record of each deployment with the oracle's."""
        ends = (finish(one.settings, one.fleet, one.publisher, one.ledger, self.now_ms) for one in self.deployments)
        return list(ends)

    def log_ms(self, wall_ms: float) -> int:
        """Where the log was at a moment of the wall clock."""
        passed = [log_ms for at_s, log_ms in self.moments if at_s * 1000 <= wall_ms]
        return passed[-1] if passed else self.moments[0][1]

    def _send_up_to(self, now_ms: int) -> None:
        chunk = []
        while self._next.timestamp_ms <= now_ms:
            chunk.append(self._next)
            self._next = next(self.clicks)
        for one in self.deployments:
            one.publisher.send(chunk)
        self.now_ms = now_ms


def refreshing(directory: Path) -> bool:
    """Whether a trainer with this directory is in the middle of a refresh."""
    return any(not (plan.parent / DONE).exists() for plan in directory.glob(f"cycles/*/{PLAN}"))


def mean_iou(scores: list[dict[str, Any]], start_ms: int, end_ms: int) -> float:
    """Of the sessions that ended in [start_ms, end_ms)."""
    chosen = [one["iou"] for one in scores if start_ms <= one["session_end_ms"] < end_ms]
    assert chosen, "no session was scored in that time"
    return float(sum(chosen) / len(chosen))


def by_day(scores: list[dict[str, Any]], start_ms: int, end_ms: int, step_ms: int = DAY_MS) -> list[tuple[int, float]]:
    """(end of the span, mean IoU) for each span of the log's time that has scores."""
    found = []
    for low, high in pairwise(range(start_ms, end_ms + 1, step_ms)):
        if any(low <= one["session_end_ms"] < high for one in scores):
            found.append((high, mean_iou(scores, low, high)))
    return found
