"""What people decide about models at the command line, by one compare-and-set each."""

from pathlib import Path

import pytest

from models.manifest import BundleRefused
from streams.wire import CHALLENGER, CHAMPION
from tests import damage
from tests.swapping import digest, variant
from tests.trainer.memoryaliases import MemoryAliases
from trainer import decisions
from trainer.decisions import by_hand, in_service
from trainer.errors import TrainingError
from trainer.registry import Registry

WHY = by_hand("a reason")


class Desk:
    """A registry, a story and some bundles."""

    def __init__(self, tiny_bundle: Path, place: Path) -> None:
        self.registry, self.aliases = Registry(str(place / "registry")), MemoryAliases()
        self.bundles = [variant(tiny_bundle, place / f"bundle{number}", f"card {number}") for number in range(4)]

    def publish(self, number: int) -> str:
        return decisions.publish(self.registry, self.aliases, self.bundles[number], WHY).digest

    def promote(self, name: str | None) -> None:
        assert decisions.promote(self.registry, self.aliases, name, in_service(self.aliases.story()), WHY)

    def roll_back(self) -> None:
        assert decisions.roll_back(self.registry, self.aliases, in_service(self.aliases.story()), WHY)

    def prune(self, keep: int) -> set[str]:
        return {ref.digest for ref in decisions.prune(self.registry, self.aliases, keep, WHY)}

    def harm(self, number: int) -> None:
        """Spoil the copy in the registry."""
        damage.flip_a_byte(Path(self.registry.find(digest(self.bundles[number])).uri.removeprefix("file://")))

    @property
    def named(self) -> dict[str, int]:
        """Alias -> number of the bundle."""
        numbers = {digest(bundle): number for number, bundle in enumerate(self.bundles)}
        return {alias: numbers[one.digest] for alias, one in self.aliases.story().aliases.items()}

    @property
    def told(self) -> list[str]:
        return [one.decision for one in self.aliases.story().decisions]


@pytest.fixture
def desk(tiny_bundle: Path, tmp_path: Path) -> Desk:
    return Desk(tiny_bundle, tmp_path)


def test_the_first_is_champion_the_next_challenger_and_a_newer_one_takes_its_place(desk: Desk) -> None:
    desk.publish(0)
    assert desk.named == {CHAMPION: 0}
    desk.publish(1)
    assert desk.named == {CHAMPION: 0, CHALLENGER: 1}
    desk.publish(2)
    assert desk.named == {CHAMPION: 0, CHALLENGER: 2}
    assert desk.told == ["published", "published", "retired", "published"]
    desk.publish(2)  # again
    desk.publish(0)
    assert len(desk.told) == 4
    desk.promote(desk.publish(2))
    assert desk.named == {CHAMPION: 2} and desk.told[-1] == "promoted"
    with pytest.raises(TrainingError, match="is the champion already"):
        desk.promote(digest(desk.bundles[2]))
    with pytest.raises(TrainingError, match="there is no challenger"):
        desk.promote(None)


def test_a_damaged_bundle_is_never_promoted_and_verify_names_it(desk: Desk) -> None:
    desk.publish(0)
    challenger = desk.publish(1)
    desk.harm(1)
    with pytest.raises(BundleRefused, match="do not match"):
        desk.promote(challenger)
    assert desk.named == {CHAMPION: 0, CHALLENGER: 1}
    found = {ref.digest: error for ref, error in decisions.verify_all(desk.registry, desk.aliases, None)}
    assert found[digest(desk.bundles[0])] is None and found[challenger] is not None and len(found) == 2
    ((_, error),) = decisions.verify_all(desk.registry, desk.aliases, challenger)
    assert error is not None and "model.safetensors" in str(error)


def test_a_rollback_passes_over_what_is_damaged_or_gone(desk: Desk) -> None:
    for number in range(4):
        desk.publish(number)
        if number:
            desk.promote(digest(desk.bundles[number]))
    desk.harm(2)
    desk.registry.remove(desk.registry.find(digest(desk.bundles[1])))
    desk.roll_back()
    assert desk.named == {CHAMPION: 0}
    passed_over = desk.aliases.story().decisions[-1].evidence["passed_over"]
    assert set(passed_over) == {digest(desk.bundles[number]) for number in (1, 2)}
    with pytest.raises(TrainingError, match="no champion before this one can come back"):
        desk.roll_back()
    assert desk.named == {CHAMPION: 0}


def test_a_rollback_goes_back_step_by_step(desk: Desk) -> None:
    for number in (0, 1, 2):
        desk.publish(number)
        if number:
            desk.promote(digest(desk.bundles[number]))
    desk.roll_back()
    assert desk.named == {CHAMPION: 1}
    desk.roll_back()
    assert desk.named == {CHAMPION: 0}


def test_pruning_keeps_who_serves_and_the_last_champions(desk: Desk) -> None:
    for number in (0, 1, 2):
        desk.publish(number)
        if number:
            desk.promote(digest(desk.bundles[number]))
    desk.publish(3)
    assert desk.prune(keep=2) == set()
    assert desk.prune(keep=1) == {digest(desk.bundles[0])}
    assert desk.named == {CHAMPION: 2, CHALLENGER: 3} and desk.told[-1] == "pruned"
    assert desk.prune(keep=1) == set() and desk.told.count("pruned") == 1
    with pytest.raises(TrainingError):
        desk.promote(digest(desk.bundles[0]))


def test_a_pruning_that_died_before_the_files_went_is_finished_by_the_next(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk.publish(0)
    desk.promote(desk.publish(1))
    with monkeypatch.context() as patch:
        patch.setattr(desk.registry, "remove", lambda ref: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            desk.prune(keep=0)
    seen = in_service(desk.aliases.story())
    assert not decisions.promote(desk.registry, desk.aliases, digest(desk.bundles[0]), seen, WHY)  # it is about to go
    assert desk.prune(keep=0) == {digest(desk.bundles[0])}
    assert len(desk.registry.bundles()) == 1


def test_who_decides_on_old_news_changes_nothing(desk: Desk) -> None:
    desk.publish(0)
    old = in_service(desk.aliases.story())
    desk.promote(desk.publish(1))
    for decided in (
        decisions.promote(desk.registry, desk.aliases, desk.publish(2), old, WHY),
        decisions.retire(desk.aliases, old, WHY),
        decisions.roll_back(desk.registry, desk.aliases, old, WHY),
    ):
        assert decided == []
    assert desk.named == {CHAMPION: 1, CHALLENGER: 2}
