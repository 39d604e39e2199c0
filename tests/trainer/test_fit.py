"""From session files to a bundle and its report; and through kill -9 to the same bundle."""

import json
import subprocess
import sys
from collections.abc import Callable
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.progress import Progress
from safetensors.torch import load_file

from models.bundle import BundleRefused, load_bundle
from models.language_model import build
from models.visit import Visit, recent
from tests.models.test_bundle import edit
from tests.trainer.conftest import MODES, shop, write
from trainer.corpus import read_corpus, split
from trainer.errors import TrainingError
from trainer.evaluate import evaluate, render
from trainer.fit import TrainOptions, train
from trainer.options import TABLE_16
from trainer.paper import PaperOptions

Options = Callable[..., TrainOptions]


def steps(bundle: Path) -> list[dict[str, Any]]:
    """The step log without what a clock says."""
    lines = bundle.with_name(bundle.name + ".steps.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("time", "tokens_per_s")} for line in lines]


@pytest.fixture(scope="module", params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    """A way to a bundle."""
    return str(request.param)


@pytest.fixture(scope="module")
def trained(mode: str, sessions: Path, options: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of that mode, trained without interruption."""
    with Progress(disable=True) as progress:
        return train(sessions, tmp_path_factory.mktemp(mode) / "bundle", options(**MODES[mode]), progress)


FIRST_PHASE = {"token": "tokens"}
LAST_PHASE = {"token": "tokens", "lora": "adapters", "paper": "actor-critic"}


def test_the_bundle_is_whole(mode: str, trained: Path, sessions: Path) -> None:
    bundle = load_bundle(trained, "cpu")
    training_users, _ = split(read_corpus(sessions), 0.2, 0)
    assert bundle.config.mode == MODES[mode]["mode"]
    assert bundle.config.backend == MODES[mode].get("backend", "separate")
    assert bundle.config.clusters == 2
    targets = [user for user in training_users if user in read_corpus(sessions).returning()]
    assert sum(bundle.config.cluster_users) == len(targets if mode == "paper" else training_users)
    assert bundle.config.cart.pages == ["basket"] and bundle.config.purchase.pages == ["thank you"]
    names = ["bundle", "bundle.steps.jsonl", "bundle.steps.svg"]
    assert sorted(path.name for path in trained.parent.iterdir()) == names
    card = (trained / "README.md").read_text()
    assert card.startswith("---\n") and "own page frequencies" in card and "| bundle |" in card
    logged = steps(trained)
    first, last = FIRST_PHASE.get(mode, "pretrain"), LAST_PHASE.get(mode, "cluster-0")
    assert {line["phase"] for line in logged} >= {first, last}
    losses = [line["loss"] for line in logged if "loss" in line and line["phase"] == first]
    assert losses[-1] < losses[0]


def test_killed_twice_it_ends_with_the_same_losses_and_weights(
    mode: str, sessions: Path, trained: Path, options: Options, tmp_path: Path
) -> None:
    # One process imports, and forks a training run for each kill; a step of the progress bar pulls the trigger.
    script = (
        "import os, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from tests.trainer.conftest import MODES, TINY\n"
        "from trainer.fit import TrainOptions, train\n"
        "torch.set_num_threads(1)\n"
        "class Killer:\n"
        "    def __init__(self, left): self.left = left\n"
        "    def add_task(self, *a, **k): return 0\n"
        "    def update(self, task, **k):\n"
        "        self.left -= 1\n"
        "        if self.left == 0: os.kill(os.getpid(), signal.SIGKILL)\n"
        "options = TrainOptions(**{**TINY, **MODES[sys.argv[3]]})\n"
        "for left in (6, 5):\n"
        "    if os.fork() == 0:\n"
        "        train(Path(sys.argv[1]), Path(sys.argv[2]), options, Killer(left))\n"
        "        os._exit(3)\n"
        "    assert os.wait()[1] == signal.SIGKILL and not os.path.exists(sys.argv[2])\n"
    )
    bundle = tmp_path / "bundle"
    subprocess.run([sys.executable, "-c", script, str(sessions), str(bundle), mode], check=True)
    before = len(steps(bundle))
    train(sessions, bundle, options(**MODES[mode]))
    assert 0 < before < len(steps(bundle))  # it went on, and did not begin again
    assert steps(bundle) == steps(trained)
    weights = [path.relative_to(trained) for path in sorted(trained.rglob("*.safetensors"))]
    assert len(weights) > 3
    for place in weights:
        assert (bundle / place).read_bytes() == (trained / place).read_bytes(), place


def test_a_report_can_be_recomputed(trained: Path, sessions: Path, tmp_path: Path) -> None:
    report = evaluate(trained, sessions, tmp_path / "report", "cpu")
    rows = pq.read_table(tmp_path / "report" / "predictions.parquet").to_pylist()
    told = json.loads((tmp_path / "report" / "report.json").read_bytes())
    corpus = read_corpus(sessions)
    assert report.users == told["users"] == len(corpus.returning())
    assert told["bundle_digest"] == load_bundle(trained, "cpu").digest
    for predictor, found in told["figures"].items():
        mine = [row for row in rows if row["predictor"] == predictor]
        assert len(mine) == report.users
        sets = [(set(row["target"]), set(row["expected"])) for row in mine]
        means = {
            "hr": np.mean([bool(a & b) for a, b in sets]),
            "ioa": np.mean([len(a & b) / len(a) for a, b in sets]),
            "iop": np.mean([len(a & b) / len(b) if b else 0.0 for a, b in sets]),
            "iou": np.mean([len(a & b) / len(a | b) for a, b in sets]),
        }
        for name in ("cart", "purchase"):
            said = [row[f"{name}_p"] if row[name] else 1 - row[f"{name}_p"] for row in mine]
            means[f"{name}_log_loss"] = np.mean([-log(max(p, 1e-7)) for p in said])
        if predictor == "bundle":
            means["nll_per_token"] = sum(row["nll"] for row in mine) / sum(row["tokens"] for row in mine)
        else:
            assert found["nll_per_token"] is None
        for name, mean in means.items():
            assert found[name]["mean"] == pytest.approx(float(mean), abs=1e-6)
            assert found[name]["low"] <= found[name]["mean"] <= found[name]["high"]
    for row in rows:
        assert row["target"] and row["tokens"] in (None, len(row["target"]) + 1)
        assert row["cluster_p"] is None or row["cluster_p"][row["cluster"]] == max(row["cluster_p"])
    for name, difference in told["differences"]["last session again"].items():
        if difference is not None:
            figures = told["figures"]
            expected = figures["bundle"][name]["mean"] - figures["last session again"][name]["mean"]
            assert difference["mean"] == pytest.approx(expected)
    assert render(report).row_count == 5


def test_the_report_says_what_the_bundle_says_live(trained: Path, sessions: Path, tmp_path: Path) -> None:
    evaluate(trained, sessions, tmp_path / "report", "cpu")
    rows = pq.read_table(tmp_path / "report" / "predictions.parquet").to_pylist()
    told = {row["user_id"]: row for row in rows if row["predictor"] == "bundle"}
    bundle, corpus = load_bundle(trained, "cpu"), read_corpus(sessions)
    for user in corpus.returning()[:10]:
        running: list[list[str]] = []
        sums, count = None, 0
        for session in corpus.sessions(user)[:-1]:
            pages = corpus.page_names(session)
            running = recent([*running, pages])
            sums, count = bundle.router.add(sums, count, pages)
        (live,) = bundle.forecast([Visit(corpus.session_ids[session], running, sums)])
        row = told[corpus.users[user]]
        assert (row["path"], row["cluster"]) == (live.path, live.cluster)
        assert row["expected"] == [page for page, _ in live.pages]
        assert (row["cart_p"], row["purchase_p"]) == pytest.approx((live.cart, live.purchase), abs=1e-6)


def test_a_selector_of_texts_goes_with_its_own_encoder(options: Options, tmp_path: Path) -> None:
    paper = PaperOptions(embedding="text", selector_epochs=1, epochs=1, batch=32)
    train(write(shop(40), tmp_path / "sessions"), tmp_path / "b", options(mode="paper", paper=paper, epochs=1))
    bundle = load_bundle(tmp_path / "b", "cpu")
    (row,) = bundle.posterior([Visit("s", [["home", "guitar", "drums"]])])
    assert row.sum() == pytest.approx(1.0) and len(row) == bundle.config.clusters
    edit(tmp_path / "b", "config.json", lambda config: config.update(encoder={"sha256": "0" * 64}))
    with pytest.raises(BundleRefused, match="another sentence encoder"):
        load_bundle(tmp_path / "b", "cpu")


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_other_architectures_and_one_cluster(
    architecture: str, sessions: Path, options: Options, tmp_path: Path
) -> None:
    train(sessions, tmp_path / "b", options(architecture=architecture, clusters=1, epochs=1))
    bundle = load_bundle(tmp_path / "b", "cpu")
    assert (bundle.config.architecture, bundle.config.clusters) == (architecture, 1)
    assert bundle.forecast([Visit("s", [["home", "guitar"]])])[0].cluster == 0


def test_a_pretrained_directory_and_no_outcome_pages(options: Options, tmp_path: Path) -> None:
    build("llama", 300, 16, 1, 2, 128).save_pretrained(tmp_path / "base")
    rows = write(shop(90, marked=False), tmp_path / "sessions")
    train(rows, tmp_path / "b", options(pretrained=tmp_path / "base", fine_tune_epochs=0))
    bundle = load_bundle(tmp_path / "b", "cpu")
    assert bundle.config.architecture == "llama" and bundle.config.cart.pages == []
    carts = [forecast.cart for forecast in bundle.forecast([Visit(str(i), [["home", "shoes"]] * i) for i in (1, 9)])]
    assert all(0.0 < p < 1.0 for p in carts)


def test_a_large_model_learns_pages_and_low_rank_changes_only(sessions: Path, options: Options, tmp_path: Path) -> None:
    large = tmp_path / "large"
    build("opt", 300, 32, 2, 4, 128).save_pretrained(large)
    told = {**TABLE_16, "epochs": 2, "context_tokens": 64, "adapter_rank": 3}
    train(sessions, tmp_path / "b", options(mode="kmeans", backend="lora", pretrained=large, **told | {"clusters": 1}))
    bundle = load_bundle(tmp_path / "b", "cpu")
    assert (bundle.config.clusters, bundle.config.backend) == (1, "separate"), "the adapters are merged"
    before, after = (load_file(next(place.glob("*.safetensors"))) for place in (large, tmp_path / "b/predictors/0"))
    for name, weight in after.items():
        if "embed_tokens" in name or "lm_head" in name:
            continue
        change = weight.double() - before[name].double()
        if ".layers." in name and weight.dim() == 2:
            assert change.any() and np.linalg.matrix_rank(change.numpy(), tol=1e-6) <= 3, name
        else:
            assert not change.any(), name
    losses = [line["loss"] for line in steps(tmp_path / "b") if "loss" in line]
    assert np.mean(losses[-5:]) < losses[0] and {line["phase"] for line in steps(tmp_path / "b")} == {"adapters"}


def test_a_time_budget_ends_it_early(sessions: Path, options: Options, tmp_path: Path) -> None:
    train(sessions, tmp_path / "b", options(minutes=1e-6, epochs=50))
    assert len(steps(tmp_path / "b")) < 5
    load_bundle(tmp_path / "b", "cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "gpt9"}, "'gpt9' is unknown. Take one of opt"),
        ({"clusters": 0}, "clusters is 0, but must be at least 1"),
        ({"hidden_size": 17}, "hidden_size 17"),
        ({"lr": 7.0}, "lr is 7.0"),
        ({"validation_share": 0.9}, "validation_share"),
        ({"adapter_dropout": 1.0}, "adapter_dropout 1.0"),
        ({"warm_up_steps": -1}, "warm_up_steps is -1, but must be at least 0"),
        ({"fill_rows": True, "packing": False}, "fill_rows puts several users' sessions in one row, but packing"),
        ({"large": Path("llama")}, "large is llama, but it only stands beside pretrained models"),
    ],
)
def test_options_that_cannot_work_are_named(options: Options, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        options(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder": Path("nowhere")}, "nowhere holds no sentence-transformers model"),
        ({"pretrained": Path("nowhere")}, "nowhere holds no model"),
        ({"min_page_count": 10**6}, "No page is seen 1000000 times"),
        ({"device": "abacus"}, "device 'abacus' is unknown"),
    ],
)
def test_what_is_not_there_is_named(
    sessions: Path, options: Options, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(TrainingError, match=words):
        train(sessions, tmp_path / "b", options(**changes))
    assert not (tmp_path / "b").exists()
