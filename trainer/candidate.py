"""A candidate: fitted on a window of sessions, judged on those that came after it. A process of its own.

    python -m trainer.candidate DIRECTORY

works in a cycle's directory, where `plan.json`, `window/` and `judged/` are, and leaves a bundle and `outcome.json`
there. It runs at low priority beside the rest of the trainer, ends with its parent, and goes on where it was killed.
"""

import fcntl
import os
import shutil
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from models.bundle import Bundle as Loaded
from models.bundle import load_bundle
from models.config import CARD, decode_config
from models.items import ITEMS, TENSORS
from models.manifest import MANIFEST, open_manifest, write_bundle
from trainer.candidateprocess import BUNDLE
from trainer.card import day
from trainer.comparison import CHAMPION, GUARDED, Comparison, compare
from trainer.contenders import Advance, Bundle, Contender, parameters_of, unfitted
from trainer.controls import bundle_options
from trainer.corpus import Corpus, read_corpus
from trainer.errors import TrainingError
from trainer.examples import Example, examples
from trainer.figures import Figure
from trainer.fit import ITEMS_TOLD, train
from trainer.judging import judge, outcome_pages
from trainer.plan import JUDGED, WINDOW, Outcome, Plan, read_plan, write_outcome
from trainer.report import compose, write
from trainer.rows import Rows
from trainer.warmstart import obstacle

FITTED = "fitted"
NICE = 10


class Champion(Bundle):
    """The champion on the candidate's examples, but routed by its own router."""

    name = CHAMPION

    def __init__(self, forecaster: Loaded, parameters: int, routed: Sequence[Example]) -> None:
        """`routed`: the examples to be judged on, made with the champion's router."""
        super().__init__(forecaster, parameters)
        self._visits = {example.session_id: example.visit for example in routed}

    def rows(self, seen: Sequence[Example], advance: Advance) -> Rows:
        """See Contender."""
        return super().rows([replace(one, visit=self._visits[one.session_id]) for one in seen], advance)


def make(place: Path) -> None:
    """Fit and judge what the plan says; a step that was done before is not done again. Raises TrainingError."""
    plan = read_plan(place)
    fitted = place / FITTED
    corpus = read_corpus(place / WINDOW)
    options = bundle_options(plan.options)
    start = _start(plan, corpus)
    if not fitted.exists():
        champion = None if start is not None or plan.champion is None else Path(plan.champion.path)
        train(place / WINDOW, fitted, replace(options, warm_start=champion))
    comparison = _judge(place, plan)
    items = items_of(plan, fitted)
    bundle = write_bundle_with(fitted, place / BUNDLE, section(plan, comparison, items), items.kept)
    loaded = load_bundle(bundle, "cpu")
    write_outcome(place, Outcome(loaded.version, loaded.digest, start or "the champion", comparison, items.told))


@dataclass(frozen=True)
class Items:
    """Which items a candidate has, in words, and the champion's files of items, where it keeps these."""

    told: str
    kept: Mapping[str, bytes]


def items_of(plan: Plan, fitted: Path) -> Items:
    """Those that were fitted; where none could be, those of the champion, which nothing else in a bundle depends on.

    Visitors would lose their items for a window in which hardly anybody clicked one. Raises BundleRefused.
    """
    candidate = open_manifest(fitted)
    told = str(decode_config(candidate).training.get("chosen", {}).get(ITEMS_TOLD, ""))
    if ITEMS in candidate.manifest.files or plan.champion is None or not bundle_options(plan.options).retrieve:
        return Items(told, {})
    champion = open_manifest(Path(plan.champion.path))
    if ITEMS not in champion.manifest.files:
        return Items(told, {})
    kept = {name: champion.read(name) for name in (ITEMS, TENSORS)}
    return Items(f"those of the champion {plan.champion.version}, as this fit has {told}", kept)


def _start(plan: Plan, corpus: Corpus) -> str | None:
    """Why the fit begins from scratch; None where it goes on from the champion."""
    if plan.start == "scratch":
        return "scratch: the settings say so"
    if plan.champion is None:
        return "scratch: there is no champion"
    found = obstacle(Path(plan.champion.path), bundle_options(plan.options), corpus.names)
    return None if found is None else f"scratch: {found}"


def _judge(place: Path, plan: Plan) -> Comparison:
    """The candidate beside champion and baselines on the judged visitors' last sessions; writes report.json."""
    loaded = load_bundle(place / FITTED, plan.device)
    corpus = read_corpus(place / JUDGED)
    seen = examples(corpus, corpus.returning(), loaded.router)
    contenders: list[Contender] = [Bundle(loaded, parameters_of(place / FITTED))]
    vocabularies = [set(loaded.vocabulary.pages)]
    if plan.champion is not None:
        path = Path(plan.champion.path)
        champion = load_bundle(path, plan.device)
        if champion.digest != plan.champion.digest:
            raise TrainingError(f"{path} holds {champion.digest}, but the champion is {plan.champion.digest}")
        routed = examples(corpus, corpus.returning(), champion.router)
        contenders.append(Champion(champion, parameters_of(path), routed))
        vocabularies.append(set(champion.vocabulary.pages))
    contenders += unfitted(loaded)
    pages = outcome_pages(loaded)
    judgement = judge(contenders, seen, pages, plan.seed)
    version = loaded.version, loaded.digest
    write(compose(judgement, contenders, pages, loaded.config.clusters, version, plan.seed), place)
    known = [all(vocabulary.issuperset(one.target) for vocabulary in vocabularies) for one in seen]
    return compare(judgement, {one.name: one.thresholds for one in contenders}, known, plan.margin, plan.seed)


def write_bundle_with(fitted: Path, bundle: Path, words: str, more: Mapping[str, bytes]) -> Path:
    """A copy of the fitted bundle whose card ends with these words, and with more files; returns its path."""

    def fill(work: Path) -> None:
        shutil.copytree(fitted, work, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
        card = work / CARD
        card.write_text(f"{card.read_text(encoding='utf-8').rstrip()}\n\n{words}", encoding="utf-8")
        for name, content in more.items():
            (work / name).write_bytes(content)

    write_bundle(bundle, fill)
    return bundle


def section(plan: Plan, comparison: Comparison, items: Items) -> str:
    """What the card says of the judgement on later sessions, in Markdown."""
    names = list(comparison.figures)
    lines = [
        "## Judged on later sessions",
        "",
        f"Fitted on the sessions that ended in {day(plan.start_ms)} to {day(plan.cut_ms)}; judged on sessions of "
        f"{comparison.users:,} visitors",
        f"that began after that, up to {day(plan.end_ms)}. No weight, no choice and no calibration has seen these.",
        "",
        "| predictor | " + " | ".join(key.replace("_", " ") for key in GUARDED) + " |",
        "|" + " --- |" * (len(GUARDED) + 1),
        *(
            f"| {name} | " + " | ".join(_cell(comparison.figures[name][key]) for key in GUARDED) + " |"
            for name in names
        ),
        "",
        f"{'Accepted' if comparison.accepted else 'Refused'}, with a margin of {comparison.margin:.0%}:",
        "",
        *(f"- {reason}" for reason in comparison.reasons),
        *(["", f"Its items are {items.told}"] if items.kept else []),
    ]
    return "\n".join(lines) + "\n"


def _cell(figure: Figure | None) -> str:
    return "-" if figure is None else f"{figure.mean:.3f} [{figure.low:.3f}, {figure.high:.3f}]"


def main(place: Path) -> int:
    """Make the candidate of one directory; returns the exit code, and says on standard error what went wrong."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.nice(NICE)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a child of a parent that was killed may still be on its way out
        try:
            make(place)
        except Exception as error:
            code = getattr(error, "exit_code", None)
            if not isinstance(code, int):
                raise
            print(error, file=sys.stderr)
            return code
    return 0


def _end_with_parent() -> None:
    """The parent holds the other end of our standard input, and never writes."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
