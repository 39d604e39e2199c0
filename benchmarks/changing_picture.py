"""The picture of `benchmarks.changing`: in colours that can be seen on white and on black."""

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure

from streams.settings import DAY_MS

INK, WITHOUT, WITH = "#7d8590", "#d1762b", "#2f81f7"
COLOURS = {"without": WITHOUT, "with": WITH}
WORDS = {"without": "without refresh", "with": "with browsecast trainer"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "changing", "font.family": "sans-serif", "font.size": 10,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "figure.facecolor": "none", "axes.facecolor": "none",
}  # fmt: skip


class Moment(NamedTuple):
    """Something that happened, in the log's time."""

    what: str
    at_ms: int


def draw(lines: Mapping[str, Sequence[tuple[int, float]]], change_ms: int, moments: Sequence[Moment]) -> str:
    """SVG: mean IoU over days since the change, a line for each deployment, and the moments as marks."""
    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(9.2, 4.0))
        axes = canvas.add_subplot()
        for name, points in lines.items():
            days = [(at_ms - change_ms) / DAY_MS for at_ms, _ in points]
            axes.plot(days, [iou for _, iou in points], color=COLOURS[name], linewidth=2, label=WORDS[name])
        marks = [("the shop is rebuilt", change_ms), *moments]
        for place, (what, at_ms) in enumerate(marks):
            day = (at_ms - change_ms) / DAY_MS
            axes.axvline(day, color=INK, linewidth=1, linestyle="-" if place == 0 else ":")
            axes.annotate(
                what, (day, 1), (3, -11 * (place % 4)), ("data", "axes fraction"), "offset points",
                va="top", fontsize=9,
            )  # fmt: skip
        axes.set_ylim(bottom=0)
        axes.set_xlabel("days since the change")
        axes.set_ylabel("IoU of predicted and real pages")
        axes.legend(loc="upper right", frameon=False, labelcolor=INK)
        canvas.tight_layout()
        out = StringIO()
        canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()
