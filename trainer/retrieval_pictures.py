"""The pictures of a retrieval report, as SVG that takes the colours of its page."""

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure as Canvas

from trainer.figures import Figures
from trainer.pictures import FAINT, GOOD, INK, PLAIN, STYLE, panel, svg
from trainer.retrieval_report import Bin

FOREST = ("recall_10", "recall_50", "recall_100")
DASHES = ((0, ()), (0, (5, 2)), (0, (1, 2)), (0, (5, 2, 1, 2)))  # tell the others apart, all in one colour


def differences(found: Figures) -> str:
    """Ours less each other's Recall, a panel a depth."""
    names = list(found)
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "retrieval"}):
        canvas = Canvas(figsize=(10.2, 0.9 + 0.27 * len(names)))
        for place, measure in enumerate(FOREST):
            axes = canvas.add_subplot(1, len(FOREST), place + 1)
            panel(axes, [found[name][measure] for name in names], 1)
            axes.set_yticks(range(len(names)), names if place == 0 else [""] * len(names))
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_title(f"Recall@{measure.removeprefix('recall_')}, right is better", fontsize=9.5, loc="left")
        canvas.tight_layout()
        return svg(canvas)


def depths(found: Mapping[str, Sequence[float]], ours: str) -> str:
    """Recall by the length of the list."""
    lines = {name: (range(1, len(shares) + 1), shares) for name, shares in found.items()}
    return _lines(lines, ours, "items in the list", "Recall")


def by_clicks(found: Mapping[str, Sequence[Bin]], ours: str) -> str:
    """Recall@100 by how often the clicked item had been clicked, in bins of equal size."""
    lines = {name: (range(1, len(bins) + 1), [bin.recall for bin in bins]) for name, bins in found.items()}
    ticks = [f"{bin.fewest:,} to {bin.most:,}" for bin in found[ours]]
    return _lines(lines, ours, "clicks of the item before, a fifth of the cases each", "Recall@100", ticks)


def _lines(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], ours: str, x: str, y: str, ticks: Sequence[str] = ()
) -> str:
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": y}):
        canvas = Canvas(figsize=(10.2, 4.4))
        axes = canvas.add_subplot(1, 1, 1)
        others = [name for name in lines if name != ours]
        for place, name in enumerate(others):
            shade, dash = (PLAIN, INK, FAINT)[place // len(DASHES) % 3], DASHES[place % len(DASHES)]
            axes.plot(*lines[name], color=shade, linestyle=dash, linewidth=1.2, label=name)
        axes.plot(*lines[ours], color=GOOD, linewidth=2.4, label=ours)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_ylim(bottom=0)
        if ticks:
            axes.set_xticks(range(1, len(ticks) + 1), ticks)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        canvas.tight_layout()
        return svg(canvas)
