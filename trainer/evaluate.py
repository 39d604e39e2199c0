"""Judging a bundle on session files: every user's last session predicted from the ones before, beside baselines."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.table import Table
from rich.text import Text

from models.bundle import Device, load_bundle
from models.forecaster import Forecaster
from trainer.contenders import Bundle, Contender, parameters_of, unfitted
from trainer.controls import went_on
from trainer.corpus import TEST, TRAIN, Corpus, part, read_corpus, read_training
from trainer.errors import TrainingError
from trainer.examples import examples
from trainer.judging import judge, outcome_pages
from trainer.report import Report, compose, standing, write
from trainer.reportpage import TITLES, write_page
from trainer.rows import table

PREDICTIONS = "predictions.parquet"
TERMINAL = ("nll_per_token", "iou", "hr", "path_iou", "cart_auc", "purchase_auc")
COLOURS = {"worse": "green", "better": "red", "": ""}


def evaluate(
    bundle: Path,
    sessions: Path,
    report: Path,
    device: Device = "auto",
    progress: Any = None,
    seed: int = 0,
    train: Path | None = None,
    contenders: Sequence[str] = ("fast",),
    bertscore: bool = False,
) -> Report:
    """Predict each returning user's last session; write predictions.parquet, report.json and report.html.

    With `train`, the sessions that the bundle was trained on, the fitted baselines named in `contenders` (or the groups
    "fast" and "all") are fitted on them and stand beside it. Of a directory that is divided into train and test the
    bundle is judged on the test, and the baselines are fitted on the rest. `progress` is a rich Progress or None.
    Raises BundleRefused, and TrainingError when no user has two sessions or a baseline cannot be fitted: without
    the sessions of the training only `fast`, which is then left out, may be named.
    """
    loaded = load_bundle(bundle, device)
    test = part(Path(sessions), TEST)
    if test is not None:
        train, sessions = train or sessions, test
    elif part(Path(sessions), TRAIN) is not None:
        raise TrainingError(f"{sessions} has a part for {TRAIN}, but none for {TEST}. Give the sessions to judge on.")
    if train is None and set(contenders) - {"fast"}:
        raise TrainingError(
            f"{', '.join(contenders)}: these contenders must be fitted. Give the sessions of the training (--train)."
        )
    corpus = read_corpus(Path(sessions))
    seen = examples(corpus, corpus.returning(), loaded.router)
    if not seen:
        raise TrainingError(f"No user in {sessions} has two sessions: there is nothing to predict. Give a longer log.")
    report.mkdir(parents=True, exist_ok=True)
    judged: list[Contender] = [Bundle(loaded, parameters_of(bundle)), *unfitted(loaded)]
    if train is not None:
        judged += _fitted(train, loaded, parameters_of(bundle), contenders, report, seed, device, progress)

    def note(name: str, total: int) -> Any:
        task = None if progress is None else progress.add_task(name, total=total)
        return lambda done: None if task is None else progress.update(task, advance=done)

    judgement = judge(judged, seen, outcome_pages(loaded), seed, bertscore, note)
    version = loaded.version, loaded.digest
    told = remarks(loaded, corpus, train, fitted=set(contenders) != {"fast"})
    result = compose(judgement, judged, outcome_pages(loaded), loaded.config.clusters, version, seed, told)
    pq.write_table(table(judgement.rows), report / PREDICTIONS, compression="zstd")
    write(result, report)
    write_page(result, judgement.rows, report)
    return result


def remarks(loaded: Forecaster, judged: Corpus, train: Path | None, fitted: bool) -> list[str]:
    """What a reader must know of the sessions: those judged that were trained on, and baselines on other footing.

    `fitted`: more baselines are wanted than the fast ones.
    """
    found, learned = [], loaded.config.training.get("sessions")
    corpus = judged if train is None else read_training(train)[0]
    seen = set(_sessions(judged)) & set(_sessions(corpus)) if corpus.digest == learned or train is not None else set()
    if seen:
        found.append(
            f"{len(seen):,} of the {len(judged.session_ids):,} sessions here are among those of the training: the "
            "figures flatter whoever learned from them. Judge on later sessions, or on other visitors."
        )
    if train is not None and learned not in (None, corpus.digest):
        found.append(f"The bundle was trained on other sessions than {train}, which the fitted baselines learned from.")
    if train is not None and fitted and went_on(loaded):
        found.append(
            "No language models were trained beside the bundle: it went on from another, so it has seen more sessions "
            "than they would."
        )
    return found


def _sessions(corpus: Corpus) -> Iterator[tuple[str, str]]:
    for user, name in enumerate(corpus.users):
        yield from ((name, corpus.session_ids[session]) for session in corpus.sessions(user))


def render(report: Report) -> Table:
    """The report as a rich table that fits a terminal; report.html has the intervals."""
    said = [*report.remarks, report.verdict.headline]
    caption = "\n".join([*said, "Green: worse than the bundle by the paired interval; red: better."])
    shown = Table(title=f"{report.users:,} users, bundle {report.bundle_version}", caption=caption)
    shown.add_column("predictor")
    for name in TERMINAL:
        shown.add_column(TITLES[name], justify="right")
    for name, columns in report.figures.items():
        cells = ((columns[key], standing(report, name, key)) for key in TERMINAL)
        shown.add_row(name, *("-" if f is None else Text(f"{f.mean:.3f}", COLOURS[how]) for f, how in cells))
    return shown


def _fitted(
    train: Path, loaded: Forecaster, parameters: int, names: Sequence[str], report: Path, seed: int, device: Device,
    progress: Any,
) -> list[Contender]:  # fmt: skip
    from trainer.baselines import GROUPS, fit_contenders  # gradient boosting and networks, for nothing but this

    chosen = dict.fromkeys(one for name in names for one in GROUPS.get(name, (name,)))
    return fit_contenders(train, loaded, parameters, tuple(chosen), report / "baselines", seed, device, progress)
