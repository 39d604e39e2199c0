"""Does it help to cluster visitors? The simulated worlds, trained and judged side by side, beside what is aimed at.

`python -m benchmarks.quality --data ../shared/data/worlds`. For each world: one small model, the same small model for
each K-means cluster and for each cluster found by behaviour, one larger model, and the same larger model that is told
the cluster. All train on `train`, choose on `validation`, and are judged on the last sessions of `test`, with paired
bootstrap intervals. Bundles stay in `--directory`: a second run only judges. It takes about ten minutes a world on a
core; the hidden types of the visitors are read for the NMI alone.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.metrics import normalized_mutual_info_score

from models.bundle import Bundle, load_bundle, use_threads
from models.outcomes import OUTCOMES
from trainer import contenders
from trainer.contenders import SHRUNK_FREQUENCIES, unfitted
from trainer.corpus import TEST, part, read_corpus
from trainer.examples import Example, examples
from trainer.figures import Figure, figures
from trainer.fit import train
from trainer.judging import outcome_pages, score
from trainer.options import TrainOptions
from trainer.rows import Rows
from trainer.scores import Scores

SMALL, KMEANS, CLUSTERED = "one small model", "K-means, a small model each", "behaviour, a small model each"
LARGE, TOLD = "one larger model", "behaviour, one larger model told by a token"
COLUMNS = ("nll_per_token", "iou", "path_iou", "hr", "cart_auc", "purchase_auc")


@dataclass(frozen=True)
class Aim:
    """A figure to reach: `name` of `ours`, less that of `theirs` where there is one; at least or at most `bound`."""

    name: str
    ours: str
    theirs: str | None
    bound: float
    more: bool = False
    worlds: str = ""  # only those whose name begins so

    def words(self) -> str:
        """What is asked."""
        less = f" less {self.theirs}" if self.theirs else ""
        return f"{self.name} of {self.ours}{less} {'>=' if self.more else '<='} {self.bound:g}"


PATH_IOU, FIRST_PASSAGE = "path_iou", "first passage"
AIMS = (
    Aim("NMI of history with hidden type", CLUSTERED, None, 0.85, more=True),
    Aim("nll_per_token", CLUSTERED, SMALL, -0.08),
    Aim("nll_per_token", CLUSTERED, KMEANS, -0.20),
    Aim("nll_per_token", TOLD, LARGE, -0.07, worlds="mid"),
    Aim("iou", TOLD, PATH_IOU, 0.03, more=True),
    Aim("iou", TOLD, SHRUNK_FREQUENCIES, 0.02, more=True),
    Aim("cart_auc", FIRST_PASSAGE, None, 0.72, more=True, worlds="ci"),
    Aim("purchase_auc", FIRST_PASSAGE, None, 0.76, more=True, worlds="ci"),
)  # fmt: skip


def recipes(world: str, seed: int) -> dict[str, TrainOptions]:
    """What is trained: the same epochs, rates and sizes for each pair that is compared."""
    shared: dict[str, Any] = {"min_page_count": 1, "patience": 30, "seed": seed, "rollouts": 24}
    small = shared | {"hidden_size": 32, "lr": 4e-3, "fine_tune_lr": 3e-3}
    clustered = small | {"epochs": 10, "fine_tune_epochs": 8, "backend": "separate"}
    width = 64 if world.startswith("ci") else 88
    large = shared | {"hidden_size": width, "lr": 2.5e-3, "dropout": 0.1, "epochs": 14, "fine_tune_epochs": 0}
    return {
        SMALL: TrainOptions(**small, mode="kmeans", clusters=1, epochs=18, fine_tune_epochs=0),
        KMEANS: TrainOptions(**clustered, mode="kmeans", clusters=6),
        CLUSTERED: TrainOptions(**clustered, mode="behaviour"),
        LARGE: TrainOptions(**large, mode="kmeans", clusters=1),
        TOLD: TrainOptions(**large, mode="behaviour", backend="token"),
    }


def measure(world: Path, directory: Path, seed: int, console: Console) -> dict[str, Any]:
    """Train and judge everything on one world; prints a table and returns the figures."""
    test = part(world, TEST)
    corpus = read_corpus(test or world)
    seen = examples(corpus, corpus.returning(), None)
    rows: dict[str, Rows] = {}
    thresholds: dict[str, tuple[float, float]] = {}
    told: dict[str, Any] = {}
    for number, (name, options) in enumerate(recipes(world.name, seed).items()):
        place, began = directory / f"{world.name}-{seed}-{number}", time.monotonic()
        if not place.exists():
            with Progress(console=console, transient=True) as progress:
                train(world, place, options, progress)
        seconds = time.monotonic() - began
        bundle = load_bundle(place, "cpu")
        judged = contenders.Bundle(bundle)
        rows[name], thresholds[name] = judged.rows(seen, lambda done: None), judged.thresholds
        told[name] = {"clusters": bundle.config.clusters, "soft": bundle.config.soft, "train_s": round(seconds, 1)}
    frequencies = next(one for one in unfitted(bundle) if one.name == SHRUNK_FREQUENCIES)
    rows[SHRUNK_FREQUENCIES] = frequencies.rows(seen, lambda done: None)
    rows[FIRST_PASSAGE] = [row | passed for row, passed in zip(rows[TOLD], first_passage(bundle, seen), strict=True)]
    rows[PATH_IOU] = [row | {"expected": row["path"]} for row in rows[TOLD]]
    thresholds |= dict.fromkeys((SHRUNK_FREQUENCIES, FIRST_PASSAGE, PATH_IOU), (0.5, 0.5))
    scores = score(rows, thresholds, outcome_pages(bundle))
    nmi = normalized_mutual_info_score(hidden_types(world, seen), [row["cluster"] for row in rows[CLUSTERED]])
    show(console, world.name, scores, told)
    return {"models": told, "figures": plain(scores), "aims": judge(world.name, scores, float(nmi), console)}


def first_passage(bundle: Bundle, seen: Sequence[Example]) -> list[dict[str, float]]:
    """P(cart) and P(purchase) of the chains alone, nothing calibrated."""
    posterior = bundle.posterior([example.visit for example in seen])
    columns = [head.passage(posterior) for head in bundle.heads]
    return [
        {f"{name}_p": float(column[i]) for name, column in zip(OUTCOMES, columns, strict=True) if column is not None}
        for i in range(len(seen))
    ]


def hidden_types(world: Path, seen: Sequence[Example]) -> list[int]:
    """The simulation's type of each user."""
    table = pq.read_table(world / "types.parquet", columns=["user_id", "type"]).to_pydict()
    types = dict(zip(table["user_id"], table["type"], strict=True))
    return [types[example.user_id] for example in seen]


def judge(world: str, scores: Mapping[str, Scores], nmi: float, console: Console) -> list[dict[str, Any]]:
    """Every aim of this world, with what was found."""
    found = []
    for aim in AIMS:
        if not world.startswith(aim.worlds):
            continue
        figure = Figure(nmi, nmi, nmi) if aim.name.startswith("NMI") else compared(scores, aim)
        reached = figure.mean >= aim.bound if aim.more else figure.mean <= aim.bound
        mark = "[green]reached[/]" if reached else "[red]missed[/]"
        console.print(
            f"{mark} {aim.words()}: {figure.mean:+.3f} [{figure.low:+.3f}, {figure.high:+.3f}]", highlight=False
        )
        found.append({"aim": aim.words(), "mean": figure.mean, "low": figure.low, "high": figure.high, "ok": reached})
    return found


def compared(scores: Mapping[str, Scores], aim: Aim) -> Figure:
    """The aim's figure, with its paired bootstrap interval."""
    pair = {name: scores[name] for name in (aim.ours, aim.theirs) if name is not None}
    alone, against = figures(pair, aim.ours)
    figure = alone[aim.ours][aim.name] if aim.theirs is None else against[aim.theirs][aim.name]
    assert figure is not None
    return figure


def show(console: Console, world: str, scores: Mapping[str, Scores], told: Mapping[str, Any]) -> None:
    """One line a predictor."""
    table = Table("predictor", "K", *COLUMNS, title=world, title_justify="left")
    for name, one in scores.items():
        if name == PATH_IOU:
            continue
        values = one.measure(np.ones((1, one.users)))
        cells = (f"{values[column][0]:.3f}" if column in values else "-" for column in COLUMNS)
        table.add_row(name, str(told.get(name, {}).get("clusters", "")), *cells)
    console.print(table)


def plain(scores: Mapping[str, Scores]) -> dict[str, dict[str, float]]:
    """The table's figures, for the JSON line."""
    every = {name: one.measure(np.ones((1, one.users))) for name, one in scores.items()}
    return {name: {key: round(float(v[key][0]), 4) for key in COLUMNS if key in v} for name, v in every.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory of the worlds")
    parser.add_argument("--worlds", default="ci-0,ci-1,mid-0,mid-1", help="which of them")
    parser.add_argument("--directory", type=Path, default=Path("quality"), help="where the bundles are kept")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    given = parser.parse_args()
    use_threads(given.threads)
    console = Console(stderr=True, width=150)
    found = {
        world: measure(given.data / world, given.directory, given.seed, console) for world in given.worlds.split(",")
    }
    print(json.dumps({"benchmark": "quality", "seed": given.seed, "worlds": found}))


if __name__ == "__main__":
    main()
