"""What a cycle is going to do and what came of it: files in its directory, each written in one step."""

import os
from pathlib import Path
from typing import Any, Literal

import msgspec

from trainer.comparison import Comparison

PLAN, OUTCOME, DONE = "plan.json", "outcome.json", "done.json"
WINDOW, JUDGED = "window", "judged"  # directories with session files


class Rival(msgspec.Struct, frozen=True):
    """The champion when the cycle was planned, and the directory where it can be read."""

    version: str
    digest: str
    path: str


class Plan(msgspec.Struct, frozen=True):
    """plan.json: which sessions the candidate is fitted to and judged on. Times are epoch ms of sessions' ends."""

    cycle: str
    planned_at_ms: int
    reason: str  # why the refresh was due
    archived: int  # sessions ever archived when it was planned
    start_ms: int  # the window: sessions that ended in [start_ms, cut_ms)
    cut_ms: int  # judged are sessions that began at or after this
    end_ms: int  # end of the newest session
    champion: Rival | None
    start: Literal["champion", "scratch"]
    options: dict[str, Any]  # of the fit (TrainOptions)
    device: Literal["auto", "cpu", "cuda"]
    margin: float
    seed: int


class Outcome(msgspec.Struct, frozen=True):
    """outcome.json: the bundle that was made, what it went on from, how it compares, and which items it has."""

    version: str
    digest: str
    start: str
    comparison: Comparison
    items: str = ""  # in words


class Done(msgspec.Struct, frozen=True):
    """done.json: how the cycle ended."""

    result: Literal["published", "refused", "failed"]
    reason: str
    at_ms: int


def read_plan(place: Path) -> Plan:
    """The plan in a cycle's directory."""
    return msgspec.json.decode((place / PLAN).read_bytes(), type=Plan)


def read_outcome(place: Path) -> Outcome | None:
    """What the candidate came to; None while it is not there."""
    path = place / OUTCOME
    return msgspec.json.decode(path.read_bytes(), type=Outcome) if path.exists() else None


def read_done(place: Path) -> Done | None:
    """How the cycle ended; None while it has not."""
    path = place / DONE
    return msgspec.json.decode(path.read_bytes(), type=Done) if path.exists() else None


def write_plan(place: Path, plan: Plan) -> None:
    """From here on the cycle goes on after any end."""
    _write(place / PLAN, plan)


def write_outcome(place: Path, outcome: Outcome) -> None:
    """The candidate is ready and judged."""
    _write(place / OUTCOME, outcome)


def write_done(place: Path, done: Done) -> None:
    """The cycle is over."""
    _write(place / DONE, done)


def _write(path: Path, value: msgspec.Struct) -> None:
    """All of it or nothing, on disk when it returns."""
    work = path.with_suffix(".coming")
    with work.open("wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(value), indent=1))
        file.flush()
        os.fsync(file.fileno())
    work.replace(path)
