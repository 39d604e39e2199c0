"""Judging a bundle on session files: every user's last session predicted from the ones before, beside baselines."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq
from rich.table import Table

from models.bundle import Device, load_bundle
from trainer.corpus import read_corpus
from trainer.errors import TrainingError
from trainer.examples import examples
from trainer.judging import FIGURES, Figure, Figures, figures, predict, table

PREDICTIONS = "predictions.parquet"
REPORT = "report.json"


class Report(msgspec.Struct, frozen=True):
    """report.json: figures by predictor, and the bundle's less each baseline's, each a mean with a 95 % interval.

    The mean of nll_per_token is pooled: all nats over all tokens.
    """

    bundle_version: str
    bundle_digest: str
    users: int
    figures: Figures
    differences: Figures


def evaluate(
    bundle: Path, sessions: Path, report: Path, device: Device = "auto", progress: Any = None, seed: int = 0
) -> Report:
    """Predict each returning user's last session and write predictions.parquet and report.json into `report`.

    Raises BundleRefused, and TrainingError when no user has two sessions. `progress` is a rich Progress or None.
    """
    loaded = load_bundle(bundle, device)
    corpus = read_corpus(Path(sessions))
    seen = examples(corpus, corpus.returning(), loaded.router)
    if not seen:
        raise TrainingError(f"No user in {sessions} has two sessions: there is nothing to predict. Give a longer log.")
    task = None if progress is None else progress.add_task("evaluate", total=len(seen))
    rates = {"cart": loaded.config.cart.base_rate, "purchase": loaded.config.purchase.base_rate}
    rows = predict(loaded, seen, rates, lambda done: None if task is None else progress.update(task, advance=done))
    alone, against = figures(rows, seed)
    result = Report(loaded.version, loaded.digest, len(seen), alone, against)
    report.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(rows), report / PREDICTIONS)
    (report / REPORT).write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
    return result


def render(report: Report) -> Table:
    """The report as a rich table."""
    shown = Table(title=f"{report.users:,} users, bundle {report.bundle_version}", caption="mean [95 % interval]")
    shown.add_column("predictor")
    for name in FIGURES:
        shown.add_column(name.replace("_", " "), justify="right")
    for name, columns in report.figures.items():
        shown.add_row(name, *_cells(columns))
    for name, columns in report.differences.items():
        shown.add_row(f"less {name}", *_cells(columns), style="dim")
    return shown


def _cells(columns: Mapping[str, Figure | None]) -> list[str]:
    found = (columns[name] for name in FIGURES)
    return ["-" if f is None else f"{f.mean:.3f}\n[{f.low:.3f}, {f.high:.3f}]" for f in found]
