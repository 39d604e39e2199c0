"""The cycle: when enough is new, a candidate is made of a window, judged on what came after it, and published or kept.

Every cycle has a directory, whose files say how far it is, so a trainer that was killed goes on there: `plan.json`,
then the candidate (`trainer.candidate`, a process of its own), then the decision in the topic `models`, then
`done.json`. The decision's id is the cycle's, so it is made once.
"""

import dataclasses
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event

import msgspec
import structlog

from models.config import decode_config
from models.manifest import BundleRefused, open_manifest
from streams.wire import CHALLENGER, CHAMPION, ModelAlias, ModelDecision
from trainer.archive import Archive
from trainer.candidateprocess import BUNDLE, make_candidate
from trainer.controls import bundle_options
from trainer.decisions import PUBLISHED, REFUSED
from trainer.errors import TrainingError
from trainer.holdout import hold_out
from trainer.options import TrainOptions
from trainer.plan import (
    JUDGED,
    PLAN,
    WINDOW,
    Done,
    Outcome,
    Plan,
    Rival,
    read_done,
    read_outcome,
    read_plan,
    write_done,
    write_plan,
)
from trainer.recipes import read_recipe
from trainer.refresh_options import RefreshOptions
from trainer.registry import Aliases, Registry, Story

CATALOGUE = "items.jsonl"
LEFT = ("window", "judged", CATALOGUE, "fitted", "fitted.training", "lock")  # of a finished cycle, nobody needs these

log = structlog.get_logger(__name__)


class Cycle:
    """Refreshes, one after the other, below one directory that no other trainer uses."""

    def __init__(
        self,
        directory: Path,
        archive: Archive,
        registry: Registry,
        aliases: Aliases,
        fetch: Callable[[ModelAlias], Path],
        options: RefreshOptions,
        clock: Callable[[], float] = time.time,
        items: Callable[[Path], int] = lambda path: 0,
    ) -> None:
        """`fetch` gives the directory of a bundle that an alias names, verified, or raises BundleRefused.

        `items` writes what is known of the items into a file of JSON lines, and says how many they are.
        """
        self.directory, self.options = directory, options
        self._archive, self._registry, self._aliases, self._fetch = archive, registry, aliases, fetch
        self._clock, self._items = clock, items

    def due(self, drift: str | None = None) -> str | None:
        """Why a refresh is due, or None. `drift` says what has drifted, if anything has."""
        if self._unfinished() is not None:
            return "a refresh was under way"
        o, last = self.options, self._last()
        new = self._archive.manifest().sessions - (0 if last is None else last.archived)
        if new >= o.sessions:
            return f"{new:,} new sessions"
        if new >= o.least and last is not None and self._now_ms() - last.planned_at_ms >= o.every_ms:
            return f"{o.every_ms / 3_600_000:g} hours since the last refresh, and {new:,} new sessions"
        if new >= o.least and drift is not None:
            return f"{drift}, and {new:,} new sessions"
        return None

    def asked(self) -> str | None:
        """The reason for a refresh that is not due but asked for; None while nothing is new."""
        last = self._last()
        return None if last is not None and self._archive.manifest().sessions == last.archived else "asked for"

    def blocked(self) -> str | None:
        """Why a refresh that is due must wait: a challenger is being tried."""
        if self._unfinished() is not None:
            return None
        challenger = self._aliases.story().aliases.get(CHALLENGER)
        return None if challenger is None else f"the challenger {challenger.version} is being tried"

    def run(self, reason: str, stop: Event) -> Done | None:
        """Go through one cycle, or to the end of one that was under way; None when `stop` came first.

        A candidate that cannot be made ends the cycle as failed. Raises TrainingError and BundleRefused when there is
        nothing to plan with.
        """
        place = self._unfinished() or self._plan(reason)
        plan = read_plan(place)
        try:
            if read_outcome(place) is None and not make_candidate(place, stop):
                return None
            outcome = read_outcome(place)
            assert outcome is not None
            done = self._conclude(place, plan, outcome)
        except (TrainingError, BundleRefused) as error:
            done = Done("failed", str(error), self._now_ms())
            log.error("a refresh failed", cycle=plan.cycle, error=str(error))
        write_done(place, done)
        self._tidy()
        log.info("refreshed", cycle=plan.cycle, result=done.result, reason=done.reason)
        return done

    def _plan(self, reason: str) -> Path:
        """A new directory with the sessions and the plan."""
        now_ms, last, manifest = self._now_ms(), self._last(), self._archive.manifest()
        story, o = self._aliases.story(), self.options
        champion = _rival(story, self._fetch)
        options = _train_options(o, champion)
        start_ms, end_ms = manifest.newest_ms - o.window_ms, manifest.newest_ms
        new = manifest.sessions - (0 if last is None else last.archived)
        held = hold_out(self._archive.read_window(start_ms, end_ms + 1), new, o.judged_share, o.judged_users)
        cycle = f"{time.strftime('%Y-%m-%dT%H%M%S', time.gmtime(now_ms / 1000))}-{manifest.sessions}"
        place = self.directory / cycle
        shutil.rmtree(place, ignore_errors=True)  # killed before the plan was written
        held.write(place / WINDOW, place / JUDGED)
        options = self._with_catalogue(place, options)
        plan = Plan(
            cycle=cycle, planned_at_ms=now_ms, reason=reason, archived=manifest.sessions, start_ms=start_ms,
            cut_ms=held.cut_ms, end_ms=end_ms, champion=champion, start=o.start, options=options.plain(),
            device=o.device, margin=o.margin, seed=options.seed,
        )  # fmt: skip
        write_plan(place, plan)
        log.info("a refresh begins", cycle=cycle, reason=reason, sessions=held.window.num_rows)
        return place

    def _with_catalogue(self, place: Path, options: TrainOptions) -> TrainOptions:
        """With the items' texts as the topic has them now; where it has none, as in the file that the options name.

        That file was given to another command, perhaps on another machine.
        """
        if not options.retrieve:
            return options
        if self._items(place / CATALOGUE):
            return dataclasses.replace(options, items=(place / CATALOGUE).resolve())
        if options.items is None or options.items.is_file():
            return options
        log.warning("items are fitted without texts: the topic items is empty, and the file is not here",
                    file=str(options.items))  # fmt: skip
        return dataclasses.replace(options, items=None)

    def _conclude(self, place: Path, plan: Plan, outcome: Outcome) -> Done:
        """Publish the candidate or not, and make the decision known; all that was done before is found done."""
        bundle = place / BUNDLE
        decided = decide(plan, outcome, bundle.resolve().as_uri(), self._aliases.story(), self._now_ms())
        uri = decided.uri
        if decided.decision == PUBLISHED:
            uri = self._registry.publish(bundle).uri

        def change(story: Story) -> Sequence[ModelDecision]:
            nonlocal decided
            if decided.decision == PUBLISHED:  # it lies in the registry; one that was refused stays so
                decided = decide(plan, outcome, uri, story, self._now_ms())
            return [] if any(one.decision_id == decided.decision_id for one in story.decisions) else [decided]

        self._aliases.change(change)
        return Done("published" if decided.decision == PUBLISHED else "refused", decided.reason, self._now_ms())

    def _places(self) -> list[Path]:
        """Of all cycles that have a plan, oldest first."""
        return sorted(path.parent for path in self.directory.glob(f"*/{PLAN}"))

    def _unfinished(self) -> Path | None:
        return next((place for place in self._places() if read_done(place) is None), None)

    def _last(self) -> Plan | None:
        places = self._places()
        return read_plan(places[-1]) if places else None

    def _tidy(self) -> None:
        """Of finished cycles only the reports stay, and refused bundles; they hold no visitor's sessions."""
        finished = [(place, done) for place in self._places() if (done := read_done(place)) is not None]
        for place, done in finished:
            for name in (*LEFT, *([BUNDLE] if done.result == "published" else [])):
                path = place / name
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        for place, _ in finished[: -self.options.keep]:
            shutil.rmtree(place)

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)


def decide(plan: Plan, outcome: Outcome, uri: str, story: Story, now_ms: int) -> ModelDecision:
    """What becomes of a judged candidate, given what the aliases name now. One that was decided already stays so."""
    decision_id = f"refresh-{plan.cycle}-{outcome.digest[7:15]}"
    for made in story.decisions:
        if made.decision_id == decision_id:
            return made
    reasons = "; ".join(outcome.comparison.reasons)
    standing = story.aliases.get(CHAMPION)
    alias = CHAMPION if plan.champion is None else CHALLENGER
    accepted = False
    if not outcome.comparison.accepted:
        pass
    elif (standing and standing.digest) != (plan.champion and plan.champion.digest):
        reasons = "the champion is another one than the candidate was compared with; " + reasons
    elif alias == CHALLENGER and CHALLENGER in story.aliases:
        reasons = f"the challenger {story.aliases[CHALLENGER].version} is being tried; " + reasons
    else:
        accepted = True
    return ModelDecision(
        decision_id=decision_id,
        at_ms=now_ms,
        decision=PUBLISHED if accepted else REFUSED,
        version=outcome.version,
        digest=outcome.digest,
        uri=uri,
        reason=reasons,
        by="trainer",
        evidence={
            "cycle": plan.cycle,
            "due": plan.reason,
            "window_ms": [plan.start_ms, plan.cut_ms],
            "judged_ms": [plan.cut_ms, plan.end_ms],
            "start": outcome.start,
            "items": outcome.items,
            "champion": plan.champion and plan.champion.digest,
            "comparison": msgspec.to_builtins(outcome.comparison),
        },
        aliases={alias: outcome.digest} if accepted else {},
    )


def _rival(story: Story, fetch: Callable[[ModelAlias], Path]) -> Rival | None:
    champion = story.aliases.get(CHAMPION)
    if champion is None:
        return None
    return Rival(champion.version, champion.digest, str(fetch(champion).resolve()))


def _train_options(options: RefreshOptions, champion: Rival | None) -> TrainOptions:
    """Those of the recipe, else those that the champion was trained with."""
    if options.recipe is not None or champion is None:
        return read_recipe(options.recipe, device=options.device).options
    own = bundle_options(decode_config(open_manifest(Path(champion.path))).training)
    return dataclasses.replace(own, device=options.device)
