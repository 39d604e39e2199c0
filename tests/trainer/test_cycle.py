"""A refresh from plan to decision: what is due, what is published, what is kept, and what is left after a kill."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import msgspec
import pyarrow.parquet as pq
import pytest
from structlog.testing import capture_logs

from models.bundle import load_bundle
from streams.wire import CHALLENGER, CHAMPION, ModelAlias, ModelDecision
from tests.trainer.refreshing import DAY_MS, START_MS, MemoryAliases, Told, Trainer, shop
from trainer import cycle as cycles
from trainer.candidateprocess import make_candidate
from trainer.comparison import Comparison
from trainer.controls import bundle_options
from trainer.cycle import decide
from trainer.errors import TrainingError
from trainer.plan import Outcome, Rival, read_done, read_outcome, read_plan
from trainer.refresh_options import RefreshOptions

NEW = ("express", "pay by phone", "thank you")
Make = Callable[[Path, Event], bool]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    """A trainer after its first refresh, and the candidate's files as they were before the decision."""
    trainer = Trainer(tmp_path_factory.mktemp("trainer"))
    trainer.archive(shop(100, 6))
    kept = tmp_path_factory.mktemp("candidate") / "place"

    def make(place: Path, stop: Event) -> bool:
        made = make_candidate(place, stop)
        shutil.copytree(place, kept)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cycles, "make_candidate", make)
        done = trainer.cycle.run("asked for", Event())
    assert done is not None and done.result == "published", done
    return trainer, kept


@pytest.fixture
def ready(trained: tuple[Trainer, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate is the first one, at once."""
    _, kept = trained

    def make(place: Path, stop: Event) -> bool:
        shutil.copytree(kept / "bundle", place / "bundle", dirs_exist_ok=True)
        shutil.copy(kept / "outcome.json", place)
        return True

    monkeypatch.setattr(cycles, "make_candidate", make)


def test_the_first_candidate_that_beats_the_baselines_is_the_champion(trained: tuple[Trainer, Path]) -> None:
    trainer, _ = trained
    told = trainer.aliases.story()
    [decision] = told.decisions
    champion = told.aliases[CHAMPION]
    [published] = trainer.registry.bundles()
    assert list(told.aliases) == [CHAMPION] and champion.digest == published.digest == decision.digest
    assert champion.uri == published.uri and decision.decision == "published"
    comparison = msgspec.convert(decision.evidence["comparison"], Comparison)
    assert comparison.users >= 30 and set(comparison.differences) >= {"popularity", "last session again"}
    assert "cart log loss is better than that of popularity" in decision.reason
    bundle = load_bundle(Path(champion.uri.removeprefix("file://")), "cpu")
    card = (Path(champion.uri.removeprefix("file://")) / "README.md").read_text()
    assert bundle.digest == champion.digest and "## Judged on later sessions" in card and "Accepted" in card
    [place] = (trainer.directory / "cycles").iterdir()
    left = {path.name for path in place.iterdir()}
    assert {"plan.json", "outcome.json", "done.json", "report.json"} <= left
    assert not left & {"window", "judged", "fitted", "bundle"}  # no visitor's sessions, and no second copy


def test_judged_sessions_came_after_the_window_and_nothing_of_them_is_in_it(trained: tuple[Trainer, Path]) -> None:
    _, kept = trained
    plan = read_plan(kept)
    window, judged = (pq.read_table(kept / name / "sessions.parquet").to_pylist() for name in ("window", "judged"))
    assert all(session["end_ms"] < plan.cut_ms for session in window)
    later = [session for session in judged if session["start_ms"] >= plan.cut_ms]
    assert later and not {session["session_id"] for session in later} & {session["session_id"] for session in window}
    users = {session["user_id"] for session in later}
    assert {session["user_id"] for session in judged} == users
    outcome = read_outcome(kept)
    assert outcome is not None and outcome.comparison.users == len(users)


def test_visitors_who_change_their_ways_bring_a_challenger_with_more_pages(
    trained: tuple[Trainer, Path], tmp_path: Path
) -> None:
    trainer = _again(trained[0], tmp_path, epochs=24, window_ms=4 * DAY_MS, margin=0.5)
    champion = trainer.aliases.story().aliases[CHAMPION]
    trainer.archive(shop(100, 5, seed=1, start_ms=START_MS + 6 * DAY_MS, buys=NEW))
    assert trainer.cycle.due() == f"{_count(trainer):,} new sessions"
    done = trainer.cycle.run("new sessions", Event())
    assert done is not None and done.result == "published", done
    told = trainer.aliases.story()
    assert told.aliases[CHAMPION] == champion
    before, after = (load_bundle(Path(told.aliases[name].uri[7:]), "cpu") for name in (CHAMPION, CHALLENGER))
    pages = before.vocabulary.pages
    assert after.vocabulary.pages[: len(pages)] == pages
    assert sorted(after.vocabulary.pages[len(pages) :]) == ["express", "pay by phone"]
    evidence = told.decisions[-1].evidence
    assert evidence["start"] == "the champion" and evidence["champion"] == champion.digest
    assert evidence["items"].startswith("none: No event of these sessions names an item")
    assert evidence["comparison"]["differences"]["champion"]["iou"]["low"] > 0
    assert "the challenger" in str(trainer.cycle.blocked())


def test_a_candidate_that_is_no_better_is_kept_with_its_report(trained: tuple[Trainer, Path], tmp_path: Path) -> None:
    trainer = _again(trained[0], tmp_path)
    before = dict(trainer.aliases.story().aliases)
    trainer.archive(shop(100, 4, seed=2, start_ms=START_MS + 6 * DAY_MS))
    done = trainer.cycle.run("new sessions", Event())
    assert done is not None and done.result == "refused"
    told = trainer.aliases.story()
    assert told.aliases == before and len(trainer.registry.bundles()) == 1
    refused = told.decisions[-1]
    assert refused.decision == "refused" and refused.aliases == {}
    assert re.search(r"(no measure is shown to be better|may be worse) than that of champion", refused.reason)
    place = Path(refused.uri.removeprefix("file://"))
    assert load_bundle(place, "cpu").digest == refused.digest and (place.parent / "report.json").exists()


STEPS = ["write_plan", "make_candidate", "publish", "before change", "after change", "write_done", "_tidy"]


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_it_ends_with_one_decision(
    step: str, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aliases = MemoryAliases()
    trainer = Trainer(tmp_path, aliases)
    trainer.archive(shop(100, 6))
    with monkeypatch.context() as patch:
        holder: Any = {"publish": trainer.registry, "_tidy": trainer.cycle}.get(step, cycles)
        name = step
        if step.endswith("change"):
            holder, name, after = aliases, "change", step.startswith("after")
        real = getattr(holder, name)

        def dying(*arguments: Any) -> Any:
            if after:
                real(*arguments)
            raise KeyboardInterrupt

        patch.setattr(holder, name, dying)
        with pytest.raises(KeyboardInterrupt):
            trainer.cycle.run("asked for", Event())
    for alias in aliases.told.aliases.values():
        assert load_bundle(Path(alias.uri.removeprefix("file://")), "cpu").digest == alias.digest
    trainer = Trainer(tmp_path, aliases)
    trainer.now_ms += 60_000
    if (reason := trainer.cycle.due()) is not None:
        trainer.cycle.run(reason, Event())
    assert [one.decision for one in aliases.told.decisions] == ["published"]
    assert aliases.told.aliases[CHAMPION].digest == aliases.told.decisions[0].digest
    assert trainer.cycle.due() is None and len(trainer.registry.bundles()) == 1
    [place] = (path.parent for path in (tmp_path / "cycles").glob("*/plan.json"))
    done = read_done(place)
    assert done is not None and done.result == "published"


@pytest.mark.usefixtures("ready")
def test_of_two_trainers_one_gives_the_champion(tmp_path: Path) -> None:
    aliases = MemoryAliases()
    first, second = (Trainer(tmp_path / name, aliases) for name in ("a", "b"))
    for trainer in (first, second):
        trainer.archive(shop(100, 6))
    second.now_ms += 5_000  # so that it is another cycle, with a decision of its own

    def overtaken(told: Told) -> None:
        aliases.before = lambda told: None
        second.cycle.run("asked for", Event())

    aliases.before = overtaken  # between the first one's publication and its change of the aliases
    done = first.cycle.run("asked for", Event())
    assert done is not None and done.result == "refused"
    assert done.reason.startswith("the champion is another one than the candidate was compared with")
    assert [one.decision for one in aliases.told.decisions] == ["published", "refused"]


@pytest.mark.usefixtures("ready")
def test_storage_that_refuses_leaves_the_aliases_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tmp_path)
    trainer.archive(shop(100, 6))

    def full(bundle: Path) -> None:
        raise TrainingError("registry: No space left on device")

    monkeypatch.setattr(trainer.registry, "publish", full)
    done = trainer.cycle.run("asked for", Event())
    assert done is not None and done.result == "failed" and "No space left" in done.reason
    assert trainer.aliases.story().aliases == {} and trainer.aliases.story().decisions == []


def test_what_makes_a_refresh_due(tmp_path: Path, trained: tuple[Trainer, Path]) -> None:
    trainer = _again(trained[0], tmp_path)
    cycle, hour_ms = trainer.cycle, 3_600_000
    assert cycle.due() is None and cycle.due("pages have drifted by 0.30") is None and cycle.asked() is None
    sessions = iter(shop(100, 6, seed=3, start_ms=START_MS + 6 * DAY_MS))
    trainer.archive([next(sessions) for _ in range(100)])
    assert cycle.due() is None and cycle.asked() == "asked for"
    assert cycle.due("pages have drifted by 0.30") == "pages have drifted by 0.30, and 100 new sessions"
    trainer.now_ms += 24 * hour_ms
    assert cycle.due() == "24 hours since the last refresh, and 100 new sessions"
    trainer.archive([next(sessions) for _ in range(200)])
    assert cycle.due() == "300 new sessions"


def test_too_few_to_judge_is_said(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    trainer.archive(shop(8, 3))
    with pytest.raises(TrainingError, match="too few to judge a candidate: 30 are needed"):
        trainer.cycle.run("asked for", Event())
    assert trainer.cycle.due() is None


def told_items(path: Path) -> int:
    """As the topic `items` would."""
    path.write_text('{"item_id": "1", "text": "red shoes"}\n')
    return 1


@pytest.mark.parametrize(
    ("items", "named", "wanted"),
    [
        (told_items, None, "items.jsonl"),
        (told_items, "elsewhere.jsonl", "items.jsonl"),
        (None, "shop.jsonl", "shop.jsonl"),
        (None, "elsewhere.jsonl", None),
        (None, None, None),
    ],
)
def test_texts_of_items_come_from_the_topic_else_from_a_file_that_is_there(
    items: Callable[[Path], int] | None, named: str | None, wanted: str | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The champion's config may name a file of another machine."""
    trainer = Trainer(tmp_path, items=items or (lambda path: 0))
    (tmp_path / "shop.jsonl").write_text('{"item_id": "1"}\n')
    if named is not None:
        recipe = tmp_path / "recipe.toml"
        recipe.write_text(recipe.read_text() + f'items = "{tmp_path / named}"\n')
    trainer.archive(shop(100, 6))
    seen: list[tuple[Path | None, bool]] = []

    def make(place: Path, stop: Event) -> bool:
        told = bundle_options(read_plan(place).options).items
        seen.append((told, told is None or told.is_file()))
        raise TrainingError("enough")

    monkeypatch.setattr(cycles, "make_candidate", make)
    with capture_logs() as logs:
        trainer.cycle.run("asked for", Event())
    [(told, there)] = seen
    assert (told and told.name) == wanted and there
    assert not list(tmp_path.glob("cycles/*/items.jsonl")), "nobody needs it any more"
    said = [one for one in logs if "without texts" in one["event"]]
    assert [one["file"] for one in said] == ([str(tmp_path / named)] if named and not wanted else [])


def test_a_stop_ends_the_candidate_and_the_next_run_goes_on(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    trainer.archive(shop(100, 6))
    stop = Event()
    stop.set()
    assert trainer.cycle.run("asked for", stop) is None
    assert trainer.cycle.due() == "a refresh was under way" and trainer.cycle.blocked() is None


@pytest.mark.parametrize(
    ("accepted", "standing", "challenger", "decision", "moves"),
    [
        (True, "sha256:old", None, "published", CHALLENGER),
        (False, "sha256:old", None, "refused", None),
        (True, "sha256:other", None, "refused", None),
        (True, None, None, "refused", None),
        (True, "sha256:old", "sha256:third", "refused", None),
    ],
)
def test_what_becomes_of_a_candidate(
    trained: tuple[Trainer, Path], accepted: bool, standing: str | None, challenger: str | None, decision: str,
    moves: str | None,
) -> None:  # fmt: skip
    _, kept = trained
    plan = msgspec.structs.replace(
        read_plan(kept), champion=msgspec.convert({"version": "v", "digest": "sha256:old", "path": "/"}, Rival)
    )
    outcome = Outcome("v2", "sha256:new", "the champion", Comparison(accepted, ["because"], 50, 0.05, {}, {}))
    named = {CHAMPION: standing, CHALLENGER: challenger}
    story = Told({name: ModelAlias(name, "v", digest, "file:///") for name, digest in named.items() if digest})
    made = decide(plan, outcome, "file:///new", story, 7)
    assert made.decision == decision and made.aliases == ({moves: "sha256:new"} if moves else {})
    story.decisions.append(msgspec.structs.replace(made, reason="told before"))
    again: ModelDecision = decide(plan, outcome, "file:///new", story, 8)
    assert again.reason == "told before"  # what was decided stays


def test_options_that_cannot_work_are_named() -> None:
    for changes, words in (
        ({"judged_share": 1.0}, "judged_share"),
        ({"margin": -1.0}, "margin"),
        ({"keep": 0}, "keep"),
    ):
        with pytest.raises(TrainingError, match=words):
            RefreshOptions(**changes)


def _again(trainer: Trainer, place: Path, **options: Any) -> Trainer:
    """The same trainer in another place, with its archive and story."""
    told = trainer.aliases.story()
    aliases = MemoryAliases()
    aliases.told = Told(dict(told.aliases), list(told.decisions))
    for name in ("archive", "cycles", "registry"):
        shutil.copytree(trainer.directory / name, place / name)
    again = Trainer(place, aliases, **options)
    again.now_ms = trainer.now_ms + 60_000
    return again


def _count(trainer: Trainer) -> int:
    places = sorted((trainer.directory / "cycles").glob("*/plan.json"))
    last = read_plan(places[-1].parent)
    return trainer.cycle._archive.manifest().sessions - last.archived
