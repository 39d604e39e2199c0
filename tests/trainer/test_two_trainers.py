"""Two processes publish, promote, roll back and prune on one registry and one topic at the same time."""

import multiprocessing
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from models.bundle import load_bundle
from streams import bundles
from streams.aliases import Aliases
from streams.settings import Settings
from streams.wire import CHALLENGER, CHAMPION
from tests.swapping import variant
from trainer import decisions
from trainer.decisions import Grounds, InService, in_service
from trainer.errors import TrainingError
from trainer.registry import Registry

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["models.bundle"])

pytestmark = [pytest.mark.kafka, pytest.mark.slow]


def work(settings: Settings, name: str, mine: list[Path]) -> None:
    """All that a trainer and its user do, on what they saw a moment ago."""
    registry, aliases = Registry(settings.registry), Aliases(settings)

    def seen() -> tuple[InService, Grounds]:
        pair = in_service(aliases.story())
        return pair, Grounds(name, "a reason", {"seen": list(pair)})

    for number, bundle in enumerate(mine):
        decisions.publish(registry, aliases, bundle, seen()[1])
        pair, grounds = seen()
        if pair.challenger is not None:
            try:
                decisions.promote(registry, aliases, pair.challenger, pair, grounds)
            except TrainingError:  # the other one has just removed it
                assert in_service(aliases.story()) != pair
        if number % 2:
            pair, grounds = seen()
            try:
                decisions.roll_back(registry, aliases, pair, grounds)
            except TrainingError as error:
                assert "no champion before this one can come back" in str(error)
        decisions.prune(registry, aliases, 1, seen()[1])


def test_two_trainers_leave_one_history_and_nothing_half(
    settings_for: Callable[..., Settings], tiny_bundle: Path, tmp_path: Path
) -> None:
    settings = settings_for(partitions=2, registry=str(tmp_path / "registry"))
    made = [variant(tiny_bundle, tmp_path / f"bundle{number}", f"card {number}") for number in range(8)]
    trainers = [forkserver.Process(target=work, args=(settings, name, made[n::2])) for n, name in enumerate("ab")]
    for trainer in trainers:
        trainer.start()
    for trainer in trainers:
        trainer.join(280)
    assert [trainer.exitcode for trainer in trainers] == [0, 0]
    story, registry = Aliases(settings).story(), Registry(settings.registry)
    named: dict[str, str | None] = {CHAMPION: None, CHALLENGER: None}
    for before, one in zip([None, *story.decisions], story.decisions, strict=False):
        assert before is None or before.at_ms < one.at_ms
        if one.decision in ("promoted", "rolled_back"):  # none rests on old news
            assert one.evidence["seen"] == [named[CHAMPION], named[CHALLENGER]]
        named |= one.aliases
    assert {alias: record.digest for alias, record in story.aliases.items()} == {
        alias: digest for alias, digest in named.items() if digest is not None
    }
    for record in story.aliases.values():
        path = bundles.local(record.uri, record.digest, tmp_path / "cache")
        assert load_bundle(path, "cpu").digest == record.digest
    listed = registry.bundles()
    for ref in listed:
        registry.verify(ref)
    fates = {one.digest: one.decision for one in story.decisions}
    assert {digest for digest, fate in fates.items() if fate != "pruned"} == {ref.digest for ref in listed}
    print(Counter(f"{one.decision} by {one.by}" for one in story.decisions))
    assert {one.by for one in story.decisions} == {"a", "b"}
