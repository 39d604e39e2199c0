"""report.html: one page that needs nothing else, with the verdict, tables, pictures and examples."""

from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from models.metrics import iou
from trainer.contenders import BUNDLE
from trainer.figures import Figure
from trainer.measures import HEADLINE, MEASURES, OUTCOMES
from trainer.pictures import calibration, forest
from trainer.report import Report, standing
from trainer.rows import Rows

PAGE = "report.html"
TEMPLATE = "report.html.j2"
QUANTILES = (0.95, 0.75, 0.5, 0.25, 0.05)  # of users by overlap: whose sessions are shown as examples
TITLES = {
    "nll_per_token": "nats per token", "hr": "hit rate", "ioa": "IoA", "iop": "IoP", "iou": "IoU",
    "path_iou": "IoU, greedy", "cart_auc": "AUC cart", "purchase_auc": "AUC purchase",
    "cart_log_loss": "log loss cart", "purchase_log_loss": "log loss purchase",
}  # fmt: skip


class Page(NamedTuple):
    """A page of a session or a set; `hit`: it came and was expected."""

    name: str
    hit: bool
    p: float | None = None


class Shown(NamedTuple):
    """A visitor's last known session, what was predicted, and what came."""

    user: str
    cluster: int | None
    overlap: float
    last: list[Page]
    came: list[Page]
    expected: list[Page]
    path: list[Page]
    outcomes: list[tuple[str, float, bool]]


def write_page(report: Report, rows: dict[str, Rows], directory: Path) -> Path:
    """Write report.html; returns its path."""
    path = directory / PAGE
    path.write_text(html(report, rows), encoding="utf-8")
    return path


def html(report: Report, rows: dict[str, Rows]) -> str:
    """The page. `rows`: by predictor, as in predictions.parquet."""
    with_p = [BUNDLE] + [name for name in (report.rival,) if report.reliability[name]]
    bundle = rows[BUNDLE]
    return template(TEMPLATE).render(
        report=report,
        bundle=BUNDLE,
        headline=HEADLINE,
        titles=TITLES,
        measures=MEASURES,
        best={name: _best(report, name) for name in HEADLINE},
        clearly=lambda rival, name: standing(report, rival, name),
        forest=Markup(forest(report.differences, TITLES)),
        calibration=Markup(calibration(report.reliability, with_p)),
        examples=examples(bundle),
        base={name: sum(row[name] for row in bundle) / len(bundle) for name in OUTCOMES},
        worst=[name for name in MEASURES if name.endswith("_worst_decile")],
    )


def template(name: str) -> jinja2.Template:
    """A page of resources/, with the filters `figure` and `number`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("trainer", "resources"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": _figure, "number": _number}
    return environment.get_template(name)


def examples(rows: Rows) -> list[Shown]:
    """Visitors across the range of overlaps, from well to badly foretold."""
    ranked = sorted(rows, key=lambda row: (iou(row["target"], row["expected"]), row["user_id"]))
    places = dict.fromkeys(min(int(share * len(ranked)), len(ranked) - 1) for share in QUANTILES)
    return [_shown(ranked[place]) for place in places]


def _shown(row: dict[str, Any]) -> Shown:
    came, expected = set(row["target"]), set(row["expected"])
    return Shown(
        user=row["user_id"],
        cluster=row["cluster"],
        overlap=iou(came, expected),
        last=[Page(page, False) for page in (row["input"] or [[]])[-1]],
        came=[Page(page, page in expected) for page in row["target"]],
        expected=[Page(page, page in came, p) for page, p in zip(row["expected"], row["expected_p"], strict=True)],
        path=[Page(page, page in came) for page in row["path"]],
        outcomes=[(name, row[f"{name}_p"], row[name]) for name in OUTCOMES],
    )


def _best(report: Report, measure: str) -> float | None:
    sign = MEASURES[measure].better
    found = [figure.mean for columns in report.figures.values() if (figure := columns[measure]) is not None]
    return max(found, key=lambda mean: sign * mean) if found else None


def _figure(figure: Figure | None, signed: bool = False) -> Markup:
    if figure is None:
        return Markup("-")
    mean = f"{figure.mean:+.3f}" if signed else f"{figure.mean:.3f}"
    return Markup(f"{mean} <small>[{figure.low:.3f}, {figure.high:.3f}]</small>")


def _number(value: float | None, form: str = ",") -> str:
    return "-" if value is None else format(value, form)
