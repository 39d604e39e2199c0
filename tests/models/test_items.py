"""The items of a bundle come back as they were written, or the bundle is refused."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from models import bundle, items
from models.bundle import BundleRefused, load_bundle
from models.items import ItemClusters, ItemsFile, SeedRule, load_items
from tests.damage import resign
from tests.goods import goods
from tests.models.conftest import write_tiny

Tensors = dict[str, np.ndarray]


def test_items_come_back(tmp_path: Path) -> None:
    file, tensors = goods(ranker="personal", fused=True)
    path = write_tiny(tmp_path / "b", items=(file, tensors))
    table, alone = load_bundle(path, "cpu").items, load_items(path)
    assert table is not None and alone is not None and table.digest == alone.digest
    assert (alone.ids, alone.retriever) == (file.ids, file.retriever)
    assert alone.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(table.tensors[name], tensor)
    clusters = ItemClusters(alone)
    assert clusters.cluster("i3") == tensors["clusters"][3] and clusters.cluster("nothing") is None
    assert alone.rows(["i7", "nothing", "i2"]) == [7, 2] and alone.row("i7") == 7


def test_a_bundle_says_its_seeds_unless_it_is_older_than_that() -> None:
    old = msgspec.json.decode(b'{"ids": [], "retriever": {"ranker": "shared", "history": 16}}', type=ItemsFile)
    assert old.retriever.seeding == SeedRule()
    said = msgspec.json.decode(msgspec.json.encode(goods(seeding=SeedRule("recency", 3))[0]), type=ItemsFile)
    assert said.retriever.seeding == SeedRule("recency", 3)


def test_a_bundle_may_know_no_items(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "b")
    assert load_bundle(path, "cpu").items is None and load_items(path) is None


def drop(*names: str) -> Callable[[ItemsFile, Tensors], object]:
    return lambda file, tensors: [tensors.pop(name) for name in names]


def put(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[ItemsFile, Tensors], object]:
    return lambda file, tensors: tensors.update({name: change(tensors[name])})


def poisoned(tensor: np.ndarray) -> np.ndarray:
    tensor = tensor.copy()
    tensor.flat[0] = np.nan
    return tensor


WRONG: list[tuple[Callable[[ItemsFile, Tensors], object], str]] = [
    (drop("vectors"), "holds no `vectors`"),
    (put("vectors", lambda one: one[:-1]), "`vectors` is"),
    (put("vectors", lambda one: one * 2), "not all of length 1"),
    (put("vectors", poisoned), "NaN"),
    (put("clicks", poisoned), "NaN"),
    (put("clicks", lambda one: -one - 1), "fewer than none"),
    (put("clicks", lambda one: one[:-1]), "`clicks` is not one number"),
    (put("clusters", lambda one: one + 100), "names a cluster"),
    (put("centroids", lambda one: one[:, :-1]), "`centroids` is"),
    (put("text_map", lambda one: one[:, :-1]), "`text_map` is"),
    (put("text_map", poisoned), "NaN"),
    (drop("covisits_values"), "holds no `covisits_values`"),
    (drop("covisits_indptr", "covisits_indices", "covisits_values"), "which the retriever needs"),
    (put("covisits_indptr", lambda one: one[:-1]), "no sparse matrix"),
    (put("covisits_indptr", lambda one: one[::-1]), "does not divide"),
    (put("covisits_indices", lambda one: one + 1000), "names an item that is none"),
    (lambda file, tensors: file.ids.append(file.ids[0]), "names an item twice"),
    (
        lambda file, tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("xpert.")],
        "the ranker 'personal' needs",
    ),
    (drop("xpert.prior"), r"Missing key.*\"prior\""),
    (put("xpert.change.create.weight", lambda one: one[:-1]), r"size mismatch for change\.create\.weight"),
]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=[words for _, words in WRONG])
def test_what_does_not_fit_together_is_refused(
    tmp_path: Path, change: Callable[[ItemsFile, Tensors], object], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither written nor, if it is there all the same, read."""
    file, tensors = goods(ranker="personal", fused=True)
    change(file, tensors)
    with pytest.raises(ValueError, match=words):
        write_tiny(tmp_path / "b", items=(file, tensors))
    assert not (tmp_path / "b").exists()
    with monkeypatch.context() as blind:
        blind.setattr(items, "_wrong", lambda file, tensors: None)
        blind.setattr(bundle, "operator_of", lambda chosen, tensors: None)
        write_tiny(tmp_path / "b", items=(file, tensors))
    with pytest.raises(BundleRefused, match=rf"items\.safetensors: .*{words}"):
        load_bundle(tmp_path / "b", "cpu")


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "b", items=goods())
    (path / "items.json").write_text('{"ids": 3}')
    resign(path)
    for load in (load_bundle, load_items):
        with pytest.raises(BundleRefused, match=r"items\.json: not a table of items"):
            load(path)
    write_tiny(path, items=goods())
    (path / "items.safetensors").write_bytes(b"nonsense")
    resign(path)
    with pytest.raises(BundleRefused, match=r"items\.safetensors: not a safetensors file"):
        load_bundle(path, "cpu")
