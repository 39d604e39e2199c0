"""The step log of a training run as a picture: losses and learning rate, phase by phase."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SMOOTHING = 0.95  # share of the last mean in the next
INCHES = (9.0, 5.5)
DPI = 150


def draw(steps: Path, picture: Path) -> None:
    """Draw the log of `train` (one JSON object a line) into `picture`, .png or .svg by its ending.

    Training and validation losses are in nats per token, over the steps of all phases one after the other. Without a
    step there is nothing to draw, and no picture is written.
    """
    lines = [msgspec.json.decode(line) for line in steps.read_bytes().splitlines()]
    phases = _by_phase(lines)
    if not phases:
        return
    figure = Figure(figsize=INCHES, layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    start = 0
    for i, (name, found) in enumerate(phases.items()):
        start = _draw_phase(losses, rates, name, found, start, colormaps["tab10"](i % 10))
    losses.set_ylabel("nats per token")
    losses.legend(loc="upper right", fontsize="small", ncols=math.ceil(len(phases) / 8))
    losses.set_title("line: training, smoothed; dots: validation", fontsize="small")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    rates.set_ylim(bottom=0)
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    with rc_context({"svg.hashsalt": "browsecast", "svg.fonttype": "none"}):
        # Without a date and random ids the same log gives the same file.
        figure.savefig(picture, dpi=DPI, metadata={"Date": None} if picture.suffix == ".svg" else None)


def _by_phase(lines: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Lines of each phase that has a training step, in order."""
    phases: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        phases.setdefault(line["phase"], []).append(line)
    return {name: found for name, found in phases.items() if any("loss" in line for line in found)}


def _draw_phase(losses: Axes, rates: Axes, name: str, lines: Sequence[dict[str, Any]], start: int, colour: Any) -> int:
    """Draw one phase from step `start` of the picture on; returns where it ends."""
    steps = [line for line in lines if "loss" in line]
    judged = [line for line in lines if line.get("validation_loss") is not None]
    places = [start + line["step"] for line in steps]
    raw = [line["loss"] for line in steps]
    losses.plot(places, raw, color=colour, alpha=0.2, linewidth=0.8)
    losses.plot(places, smoothed(raw), color=colour, label=name)
    losses.plot(
        [start + line["step"] for line in judged],
        [line["validation_loss"] for line in judged],
        "o--", color=colour, markersize=4, linewidth=0.8,
    )  # fmt: skip
    rates.plot(places, [line["lr"] for line in steps], color=colour)
    end = int(places[-1]) + 1
    for axes in (losses, rates):
        axes.axvline(end, color="grey", linewidth=0.5)
    return end


def smoothed(values: Sequence[float], keep: float = SMOOTHING) -> list[float]:
    """Exponential moving mean, free of the pull of its start (Adam, Kingma & Ba 2015, section 3)."""
    mean, found = 0.0, []
    for i, value in enumerate(values, 1):
        mean = keep * mean + (1 - keep) * value
        found.append(mean / (1 - keep**i))
    return found
