"""What a candidate has besides its language models: items of its own, or else the champion's."""

from pathlib import Path

import msgspec
import pytest

from models.bundle import load_bundle
from models.config import BundleConfig
from models.manifest import BundleRefused, open_manifest, write_bundle
from tests.goods import goods
from tests.models.conftest import write_tiny
from trainer.candidate import items_of, section, write_bundle_with
from trainer.comparison import Comparison
from trainer.options import TrainOptions
from trainer.plan import Plan, Rival

WHY = "none: No event of these sessions names an item (item_id)."


def fitted(path: Path, told: str) -> Path:
    """A bundle without items that says why."""
    tiny = write_tiny(path.with_name("tiny"))

    def fill(work: Path) -> None:
        for name in open_manifest(tiny).manifest.files:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_bytes((tiny / name).read_bytes())
        config = msgspec.json.decode((work / "config.json").read_bytes(), type=BundleConfig)
        config = msgspec.structs.replace(config, training={"chosen": {"items": told}})
        (work / "config.json").write_bytes(msgspec.json.encode(config))

    write_bundle(path, fill)
    return path


def planned(champion: Path | None, retrieve: bool = True) -> Plan:
    rival = None if champion is None else Rival("v1", open_manifest(champion).digest, str(champion))
    options = TrainOptions(retrieve=retrieve).plain()
    return Plan("c", 0, "asked for", 9, 0, 1, 2, rival, "champion", options, "cpu", 0.05, 0)


@pytest.fixture
def champion(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "champion", items=goods())


def test_a_candidate_without_items_keeps_those_of_the_champion_and_tells_why(tmp_path: Path, champion: Path) -> None:
    plan, comparison = planned(champion), Comparison(True, ["because"], 50, 0.05, {}, {})
    items = items_of(plan, fitted(tmp_path / "fitted", WHY))
    assert items.told == f"those of the champion v1, as this fit has {WHY}"
    made = write_bundle_with(tmp_path / "fitted", tmp_path / "bundle", section(plan, comparison, items), items.kept)
    own, kept = load_bundle(champion, "cpu").items, load_bundle(made, "cpu").items
    assert own is not None and kept is not None and kept.digest == own.digest, "seeds keep their clusters"
    assert (made / "README.md").read_text().endswith(f"Its items are {items.told}\n")


@pytest.mark.parametrize("case", ["no champion", "a champion without items", "none are wanted", "its own"])
def test_else_it_has_what_was_fitted(case: str, tmp_path: Path, champion: Path) -> None:
    plan = planned(champion)
    candidate = fitted(tmp_path / "fitted", WHY)
    if case == "no champion":
        plan = planned(None)
    elif case == "a champion without items":
        plan = planned(write_tiny(tmp_path / "other"))
    elif case == "none are wanted":
        plan = planned(champion, retrieve=False)
    else:
        candidate = write_tiny(tmp_path / "own", items=goods(seed=1))
    items = items_of(plan, candidate)
    assert not items.kept and items.told == ("" if case == "its own" else WHY)
    assert "Its items" not in section(plan, Comparison(True, ["because"], 50, 0.05, {}, {}), items)


def test_damaged_items_of_the_champion_are_not_kept(tmp_path: Path, champion: Path) -> None:
    plan = planned(champion)
    content = bytearray((champion / "items.safetensors").read_bytes())
    content[-1] ^= 1
    (champion / "items.safetensors").write_bytes(content)
    with pytest.raises(BundleRefused, match=r"items\.safetensors"):
        items_of(plan, fitted(tmp_path / "fitted", WHY))
