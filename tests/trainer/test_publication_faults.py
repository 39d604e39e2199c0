"""F13: a trainer is killed at every step of a publication, with the registry on a disk and a real broker."""

import multiprocessing
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from models.bundle import load_bundle
from models.manifest import open_manifest
from streams import aliases, bundles
from streams.aliases import Aliases
from streams.settings import Settings
from streams.wire import CHALLENGER, CHAMPION, ModelDecision
from tests.swapping import digest, variant
from trainer import decisions
from trainer.decisions import by_hand, in_service, publish
from trainer.registry import Registry

# Each child is a copy of a process that has torch, and so begins at once.
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["models.bundle"])

WHY = by_hand("a reason")
KILLED = 9

pytestmark = [pytest.mark.kafka, pytest.mark.slow]


def die_at(settings: Settings, bundle: Path, step: int) -> None:
    """Publish the bundle, and promote it, in a process that ends without a word at the given step of it."""
    steps = iter(range(1_000))

    def reach() -> None:
        if next(steps) == step:
            os._exit(KILLED)

    class MortalRegistry(Registry):
        def _put(self, path: str, content: bytes) -> None:
            self._storage.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._storage.pipe_file(path, content[: len(content) // 2])
            reach()
            super()._put(path, content)

    class MortalProducer(Producer):
        def init_transactions(self, *args: Any) -> None:
            reach()
            super().init_transactions(*args)

        def produce(self, *args: Any) -> None:
            super().produce(*args)
            self.flush(10)  # it is at the broker, and not committed
            reach()

        def commit_transaction(self, *args: Any) -> None:
            super().commit_transaction(*args)
            reach()

    vars(aliases)["Producer"] = MortalProducer
    store, models = MortalRegistry(settings.registry), Aliases(settings)
    ref = publish(store, models, bundle, WHY)
    decisions.promote(store, models, ref.digest, in_service(models.story()), WHY)


class Scene:
    """An old bundle is champion, a new one is to be published; both on the disk and the broker that are set."""

    def __init__(self, settings: Settings, tiny_bundle: Path, place: Path) -> None:
        self.old, self.new = (variant(tiny_bundle, place / name, name) for name in ("old", "new"))
        self.registry, self.aliases, self._cache = Registry(settings.registry), Aliases(settings), place / "cache"
        publish(self.registry, self.aliases, self.old, WHY)

    def check(self) -> dict[str, str]:
        """What is named can serve, what is listed is whole; returns alias -> old or new."""
        names = {digest(self.old): "old", digest(self.new): "new"}
        named = self.aliases.story().aliases
        for one in named.values():
            path = bundles.local(one.uri, one.digest, self._cache)
            assert load_bundle(path, "cpu").digest == one.digest
        for ref in self.registry.bundles():
            self.registry.verify(ref)
        return {alias: names[one.digest] for alias, one in named.items()}

    def begin_again(self) -> None:
        """Undo all of the new bundle."""
        old, new = self.registry.find(digest(self.old)), self.registry.find(digest(self.new))
        moves: dict[str, str | None] = {CHAMPION: old.digest, CHALLENGER: None}
        decision = ModelDecision(
            uuid.uuid4().hex, 0, "rolled_back", new.version, new.digest, new.uri, "", "", {}, moves
        )
        self.aliases.change(lambda story: [decision])
        self.registry.remove(new)


def test_a_publication_killed_at_each_step_is_there_whole_or_not_at_all(
    settings_for: Callable[..., Settings], tiny_bundle: Path, tmp_path: Path
) -> None:
    """And the next trainer comes to its end."""
    settings = settings_for(partitions=2, registry=str(tmp_path / "registry"))
    scene = Scene(settings, tiny_bundle, tmp_path)
    found = []
    for step in range(100):
        child = forkserver.Process(target=die_at, args=(settings, scene.new, step))
        child.start()
        child.join(120)
        found.append(scene.check())
        if child.exitcode == 0:
            break
        assert child.exitcode == KILLED
        publish(scene.registry, scene.aliases, scene.new, WHY)
        assert "new" in scene.check().values()
        scene.begin_again()
    print(f"{len(found) - 1} kills; named after each: {found}")
    files = len(open_manifest(scene.new).manifest.files) + 1
    tried = {CHAMPION: "old", CHALLENGER: "new"}
    assert found[:files] == [{CHAMPION: "old"}] * files  # the files come first
    assert [one for one in found if one not in ({CHAMPION: "old"}, tried, {CHAMPION: "new"})] == []
    assert tried in found and found[-2:] == [{CHAMPION: "new"}] * 2  # the last kill came after the promotion
