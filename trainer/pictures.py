"""The pictures of a report, as SVG that takes the colours of its page."""

from collections.abc import Mapping, Sequence
from io import StringIO
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure as Canvas

from trainer.figures import Figure, Figures
from trainer.measures import MEASURES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from trainer.report import Bin

# Drawn in these, then replaced by the page's own: ink for lines and words, and for what is better, worse and unclear.
INK, GOOD, BAD, PLAIN, FAINT = "#010101", "#020202", "#030303", "#040404", "#050505"
PAGE_COLOURS = {
    INK: "currentColor",
    GOOD: "var(--good)",
    BAD: "var(--bad)",
    PLAIN: "var(--plain)",
    FAINT: "var(--faint)",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9.5, "text.color": INK, "axes.labelcolor": INK,
    "axes.edgecolor": FAINT, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "figure.facecolor": "none", "axes.facecolor": "none",
}  # fmt: skip
FOREST = ("nll_per_token", "iou", "hr", "cart_auc", "purchase_auc", "cart_log_loss")


def forest(differences: Figures, words: Mapping[str, str]) -> str:
    """The bundle's figures less those of each other, a panel a measure; `words` are the panels' titles."""
    shown = [name for name in FOREST if any(columns[name] is not None for columns in differences.values())]
    names = list(differences)
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "forest"}):
        columns = min(3, max(1, len(shown)))
        rows = -(-len(shown) // columns)
        canvas = Canvas(figsize=(10.2, rows * (0.9 + 0.27 * len(names))))
        for place, measure in enumerate(shown):
            axes = canvas.add_subplot(rows, columns, place + 1)
            panel(axes, [differences[name][measure] for name in names], MEASURES[measure].better)
            axes.set_yticks(range(len(names)), names if place % columns == 0 else [""] * len(names))
            axes.set_ylim(len(names) - 0.5, -0.5)
            side = "right" if MEASURES[measure].better > 0 else "left"
            axes.set_title(f"{words[measure]}, {side} is better", fontsize=9.5, loc="left")
        canvas.tight_layout()
        return svg(canvas)


def calibration(bins: Mapping[str, Mapping[str, Sequence["Bin"]]], names: Sequence[str]) -> str:
    """Reliability diagrams, one an outcome: predictors `names`, the first with its intervals."""
    outcomes = list(bins[names[0]])
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "calibration"}):
        canvas = Canvas(figsize=(4.6 * max(len(outcomes), 1), 3.9))
        for place, outcome in enumerate(outcomes):
            axes = canvas.add_subplot(1, len(outcomes), place + 1)
            most = max((max(bin.p, bin.rate) for name in names for bin in bins[name].get(outcome, ())), default=1.0)
            axes.plot([0, most], [0, most], color=FAINT, linewidth=1, linestyle="--")
            for name in names[1:]:
                _reliability(axes, bins[name].get(outcome, ()), PLAIN, name, spread=False)
            _reliability(axes, bins[names[0]][outcome], GOOD, names[0], spread=True)
            axes.set_xlabel(f"predicted P({outcome})")
            axes.set_ylabel(f"share with a {outcome}")
            axes.legend(frameon=False, loc="upper left")
        canvas.tight_layout()
        return svg(canvas)


def panel(axes: "Axes", found: Sequence[Figure | None], better: int) -> None:
    """Differences with their intervals, one below the other; `better`: 1 where more is better, -1 where less is."""
    axes.axvline(0, color=FAINT, linewidth=1)
    for place, figure in enumerate(found):
        if figure is None:
            continue
        unclear = figure.low <= 0 <= figure.high
        colour = PLAIN if unclear else GOOD if better * figure.mean > 0 else BAD
        axes.plot([figure.low, figure.high], [place, place], color=colour, linewidth=2, solid_capstyle="round")
        axes.plot([figure.mean], [place], "o", color=colour, markersize=5)
    axes.tick_params(length=0)
    axes.locator_params(axis="x", nbins=5)


def _reliability(axes: "Axes", bins: Sequence["Bin"], colour: str, name: str, spread: bool) -> None:
    p, rate = [bin.p for bin in bins], [bin.rate for bin in bins]
    away = [[bin.rate - bin.low for bin in bins], [bin.high - bin.rate for bin in bins]] if spread else None
    axes.errorbar(p, rate, yerr=away, fmt="o-", color=colour, linewidth=1.4, markersize=4, label=name)


def svg(canvas: Canvas) -> str:
    """The picture, in the colours of its page."""
    out = StringIO()
    canvas.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for drawn, own in PAGE_COLOURS.items():
        text = text.replace(drawn, own)
    return text
