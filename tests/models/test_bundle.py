"""A bundle opens only as it was written: every way of changing it is refused, with the file's name."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from models.bundle import BundleRefused, DeviceUnavailable, is_out_of_memory, load_bundle
from models.manifest import open_manifest, write_bundle
from models.routing import load_router
from models.visit import Forecast, Visit
from tests.models.conftest import ARCHITECTURES, PAGES, SIZE, write_tiny

VISITS = [
    Visit("a", [["home", "shoes"], ["home", "cart", "nowhere"]]),
    Visit("b", [["search"]]),
    Visit("c", [["sale", "help", "sale"]] * 30),
]


@pytest.fixture
def copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that may be broken."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


def resign(bundle: Path, name: str) -> None:
    """Give a changed file a right digest: the attack that digests alone cannot see."""
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    content = (bundle / name).read_bytes()
    manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_bundle_opens_and_answers(architecture: str, tmp_path: Path) -> None:
    bundle = load_bundle(write_tiny(tmp_path / "b", architecture), "cpu")
    assert bundle.digest == "sha256:" + hashlib.sha256((tmp_path / "b" / "manifest.json").read_bytes()).hexdigest()
    assert bundle.digest[7:15] in bundle.version
    forecasts = bundle.forecast(VISITS)
    assert [type(forecast) for forecast in forecasts] == [Forecast] * 3
    for forecast in forecasts:
        assert forecast.cluster in (0, 1)
        assert set(forecast.path) | {page for page, _ in forecast.pages} <= set(PAGES)
        assert 1 <= len(forecast.pages) == len(dict(forecast.pages)) and forecast.path
        p = [p for _, p in forecast.pages]
        assert p == sorted(p, reverse=True) and all(0.0 <= x <= 1.0 for x in p)
        assert 0.0 < forecast.cart < 1.0 and 0.0 < forecast.purchase < 1.0
    assert bundle.forecast([]) == [] and bundle.fallback([]) == []


def test_a_forecast_depends_on_its_visit_only(tiny_bundle: Path) -> None:
    bundle = load_bundle(tiny_bundle, "cpu")
    together = bundle.forecast(VISITS)
    for visit, expected in zip(VISITS[::-1], bundle.forecast(VISITS[::-1]), strict=True):
        assert expected.path == together[VISITS.index(visit)].path
    for visit, expected in zip(VISITS, together, strict=True):
        (alone,) = bundle.forecast([visit])
        assert alone.path == expected.path and alone.cluster == expected.cluster
        assert [page for page, _ in alone.pages] == [page for page, _ in expected.pages]
        np.testing.assert_allclose([p for _, p in alone.pages], [p for _, p in expected.pages], atol=1e-5)
        assert (alone.cart, alone.purchase) == pytest.approx((expected.cart, expected.purchase), abs=1e-5)
    assert bundle.forecast([Visit("another", VISITS[0].sessions)])[0].pages != together[0].pages


def test_running_sums_route_like_the_sessions(tiny_bundle: Path) -> None:
    bundle = load_bundle(tiny_bundle, "cpu")
    router = load_router(tiny_bundle)
    assert router.digest == bundle.router.digest and router.digest.startswith("sha256:") and len(router.digest) == 71
    for visit in VISITS:
        routed = Visit(visit.seed, visit.sessions, router.route(visit.sessions))
        assert bundle.forecast([routed]) == bundle.forecast([visit])
        foreign = Visit(visit.seed, visit.sessions, [0.0] * 7)
        assert bundle.forecast([foreign]) == bundle.forecast([visit])


@pytest.mark.parametrize(
    "sessions",
    [[], [[]], [["nowhere"]], [["x" * 10_000]], [["home"] * 5_000], [["\ud800", "", "\0"]], [["[EOS]", "[PAD]"]] * 3],
)
def test_no_input_makes_it_fail(tiny_bundle: Path, sessions: list[list[str]]) -> None:
    bundle = load_bundle(tiny_bundle, "cpu")
    for forecast in (*bundle.fallback([Visit("s", sessions)]), *bundle.forecast([Visit("\ud800", sessions)])):
        assert forecast.pages and 0.0 < forecast.cart < 1.0 and 0.0 < forecast.purchase < 1.0


def test_the_fallback_is_the_shrunk_frequency_baseline(tiny_bundle: Path) -> None:
    bundle = load_bundle(tiny_bundle, "cpu")
    (forecast,) = bundle.fallback([Visit("s", [["help", "help"], ["help", "sale"]])])
    weight = bundle.config.decoding.own_weight
    share = dict(zip(PAGES, bundle.vocabulary.shares, strict=True))
    seen = {"help": 2, "sale": 1}
    expected = {page: (seen.get(page, 0) + weight * share[page]) / (2 + weight) for page in PAGES}
    best = sorted(PAGES, key=lambda page: -expected[page])[: bundle.config.decoding.fallback_pages]
    assert [page for page, _ in forecast.pages] == best
    assert all(p == pytest.approx(expected[page]) for page, p in forecast.pages)
    assert forecast.path == ["help", "sale"] and forecast.cluster is None


def test_predictors_open_with_transformers(tiny_bundle: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_bundle / "predictors" / "1")
    mine = load_bundle(tiny_bundle, "cpu").predictor
    tokens = torch.tensor([[1, 5, 6, 2, 1]])
    with torch.no_grad():
        logits = mine.models.part(1, 2).logits_at(tokens, torch.zeros(5, dtype=torch.long), torch.arange(5))  # type: ignore[attr-defined]
        torch.testing.assert_close(model.eval()(input_ids=tokens).logits[0], logits)


FILES = ["config.json", "vocabulary.json", "embeddings.safetensors", "selector.safetensors", "outcomes.safetensors",
         "README.md", "predictors/1/model.safetensors", "predictors/0/config.json"]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_a_changed_file_is_refused(copy: Path, name: str, how: str) -> None:
    content = bytearray((copy / name).read_bytes())
    if how == "remove":
        (copy / name).unlink()
    else:
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content if how == "flip" else content[: len(content) // 2])
    with pytest.raises(BundleRefused, match=name) as refused:
        load_bundle(copy, "cpu")
    assert refused.value.exit_code == 5 and str(copy) in str(refused.value)


@pytest.mark.parametrize("name", ["config.json", "vocabulary.json", "selector.safetensors"])
def test_the_router_verifies_what_it_reads(copy: Path, name: str) -> None:
    (copy / "predictors/0/model.safetensors").unlink()
    load_router(copy)
    (copy / name).write_bytes((copy / name).read_bytes() + b" ")
    with pytest.raises(BundleRefused, match=name):
        load_router(copy)


def test_an_extra_file_is_refused(copy: Path) -> None:
    (copy / "predictors" / "0" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(BundleRefused, match=r"pytorch_model\.bin: not in the manifest"):
        load_bundle(copy, "cpu")


@pytest.mark.parametrize("name", ["extra.pkl", "predictors/0/adapter.safetensors"])
def test_a_pickle_is_refused_even_when_the_manifest_lists_it(copy: Path, name: str) -> None:
    torch.save({"weight": torch.zeros(2)}, copy / name)
    resign(copy, name)
    with pytest.raises(BundleRefused, match="pickle"):
        load_bundle(copy, "cpu")


@pytest.mark.parametrize("linked", ["README.md", "predictors/0"])
def test_a_link_is_refused(copy: Path, tmp_path: Path, linked: str) -> None:
    shutil.move(copy / linked, tmp_path / "elsewhere")
    (copy / linked).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleRefused, match="link"):
        load_bundle(copy, "cpu")


def test_a_link_inside_is_refused(copy: Path) -> None:
    (copy / "README.md").unlink()
    (copy / "README.md").symlink_to("config.json")
    with pytest.raises(BundleRefused, match=r"README\.md: a link"):
        load_bundle(copy, "cpu")


def test_a_link_to_a_bundle_is_a_bundle(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "champion").symlink_to(copy)
    assert load_bundle(tmp_path / "champion", "cpu").digest == open_manifest(copy).digest


def edit(bundle: Path, name: str, change: Callable[[dict[str, object]], object]) -> None:
    """Change a JSON file and its digest."""
    value = json.loads((bundle / name).read_bytes())
    change(value)
    (bundle / name).write_text(json.dumps(value))
    resign(bundle, name)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("config.json", lambda c: c.update(format=99), "format 99"),
        ("config.json", lambda c: c.update(kind="cake"), "kind 'cake'"),
        ("config.json", lambda c: c.update(backend="magic"), "Invalid enum value 'magic' - at `.*backend`"),
        ("config.json", lambda c: c.update(clusters=3), "2 clusters, but the config says 3"),
        ("config.json", lambda c: c.pop("decoding"), "decoding"),
        ("vocabulary.json", lambda v: (v["pages"].pop(), v["shares"].pop()), "rows|row"),
        ("vocabulary.json", lambda v: v["pages"].append("home"), "not a vocabulary"),
        ("predictors/1/config.json", lambda c: c.update(vocab_size=SIZE + 1), "do not fit"),
        ("predictors/1/config.json", lambda c: c.update(model_type="nonsense"), "unknown"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    copy: Path, name: str, change: Callable[[dict[str, object]], object], words: str
) -> None:
    edit(copy, name, change)
    edit(copy, "config.json", lambda c: c.update(vocabulary_sha256=None))  # or any other vocabulary is refused at once
    with pytest.raises(BundleRefused, match=words):
        load_bundle(copy, "cpu")


def test_a_vocabulary_of_another_bundle_is_refused(copy: Path) -> None:
    (copy / "vocabulary.json").write_text(json.dumps({"pages": ["a", "b"], "shares": [0.1, 0.1], "sessions": 3}))
    with pytest.raises(BundleRefused, match=r"vocabulary\.json: its \d+ bytes do not match"):
        load_bundle(copy, "cpu")
    resign(copy, "vocabulary.json")
    for load in (load_bundle, load_router):
        with pytest.raises(BundleRefused, match=r"not the vocabulary that config\.json was written with"):
            load(copy)
    edit(copy, "config.json", lambda c: c.update(vocabulary_sha256=None))
    with pytest.raises(BundleRefused, match="6 tokens"):
        load_bundle(copy, "cpu")


@pytest.mark.parametrize("name", ["predictors/0/model.safetensors", "selector.safetensors", "embeddings.safetensors"])
def test_nan_weights_are_refused(copy: Path, name: str) -> None:
    tensors = load_file(copy / name)
    next(iter(tensors.values())).flat[0] = np.nan
    save_file(tensors, copy / name)
    resign(copy, name)
    with pytest.raises(BundleRefused, match="NaN"):
        load_bundle(copy, "cpu")


@pytest.mark.parametrize("content", [None, b"", b"[]", b'{"files": 3}', b'{"files": {}, "format": 2}'])
def test_a_broken_manifest_is_refused(copy: Path, content: bytes | None) -> None:
    (copy / "manifest.json").unlink() if content is None else (copy / "manifest.json").write_bytes(content)
    for load in (load_bundle, load_router):
        with pytest.raises(BundleRefused, match=r"manifest\.json"):
            load(copy)


def test_not_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleRefused, match="cannot be read"):
        load_bundle(tmp_path / "nothing", "cpu")


@pytest.mark.parametrize(
    "name", ["../out.json", "/etc/out.json", "predictors/../out.json", ".", "manifest.json", "a//b"]
)
def test_a_manifest_that_lists_a_place_outside_is_refused(copy: Path, name: str) -> None:
    manifest = json.loads((copy / "manifest.json").read_bytes())
    manifest["files"][name] = manifest["files"]["config.json"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleRefused, match="no place inside a bundle"):
        open_manifest(copy)


def test_writing_is_all_or_nothing(copy: Path) -> None:
    before = load_bundle(copy, "cpu").digest

    def fails(work: Path) -> None:
        (work / "config.json").write_text("{}")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_bundle(copy, fails)
    assert load_bundle(copy, "cpu").digest == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]
    write_tiny(copy, "llama")
    assert load_bundle(copy, "cpu").digest != before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_out_of_memory_is_told_from_other_failures() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    with pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 60)
    assert is_out_of_memory(failed.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_an_absent_device_is_named(tiny_bundle: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(DeviceUnavailable, match="cuda"):
            load_bundle(tiny_bundle, "cuda")
    with pytest.raises(DeviceUnavailable, match="abacus"):
        load_bundle(tiny_bundle, "abacus")  # type: ignore[arg-type]


def test_routing_metrics_and_baselines_need_no_torch() -> None:
    code = (
        "import sys, models.routing, models.metrics, models.baselines, models.visit\n"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'transformers', 'sklearn', 'scipy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
