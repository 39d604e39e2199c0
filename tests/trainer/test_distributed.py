"""Two processes learn what one learns, from a phase to a bundle, and a killed pair goes on."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.bundle import load_bundle
from tests.trainer import phases
from tests.trainer.conftest import MODES
from trainer.corpus import read_corpus
from trainer.examples import examples
from trainer.fit import train
from trainer.options import TrainOptions

PAIRS: list[tuple[str, dict[str, Any]]] = [
    ("separate", {}),
    ("token", {"packing": True, "accumulate": 2}),
    ("lora", {"packing": True}),
    ("few rows", {"batch": 59}),  # the second batch has one row, and one process none of it
]


def close(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    """Whether two logs are the same but for rounding."""
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(a[key] == pytest.approx(b[key], rel=1e-3) for key in a.keys() - {"phase"})
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.slow
def test_two_processes_are_one_and_go_on_after_a_kill(tmp_path: Path) -> None:
    def job(name: str, changes: dict[str, Any], **more: Any) -> dict[str, Any]:
        backend = name if name in ("token", "lora") else "separate"
        return {"directory": str(tmp_path / name), "backend": backend, "world": 2, **changes, **more}

    jobs = [job(name, changes) for name, changes in PAIRS]
    killed = [job(f"killed {rank}", {"kill_at": 5, "kill_rank": rank}) for rank in (0, 1)]
    again = [job(f"killed {rank}", {}) for rank in (0, 1)]
    codes = phases.processes([*jobs, *killed, *again])
    assert codes[: len(jobs)] == [[0, 0]] * len(jobs) and codes[-2:] == [[0, 0]] * 2
    # The one that is left cannot go on alone.
    assert codes[len(jobs) : -2] == [[-signal.SIGKILL, 1], [1, -signal.SIGKILL]]
    for name, changes in PAIRS:
        backend = name if name in ("token", "lora") else "separate"
        phases.train(tmp_path / f"{name} alone", backend, **changes)
        alone, pair = phases.steps(tmp_path / f"{name} alone"), phases.steps(tmp_path / name)
        # Both took part, as a kill of either shows above; whether another order of sums rounds otherwise is chance.
        assert close(alone, pair)
    for rank in (0, 1):
        place = tmp_path / f"killed {rank}"
        assert phases.steps(place) == phases.steps(tmp_path / "separate")
        torch.testing.assert_close(phases.tensors(place), phases.tensors(tmp_path / "separate"), rtol=0, atol=0)


# The processes that `torchrun` would start, forked from one that has imported everything.
PAIR = """
import os, sys, torch
from pathlib import Path
from tests.trainer.conftest import MODES, TINY
from trainer.fit import TrainOptions, train
torch.set_num_threads(1)
names = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[3]}
children = []
for rank in ("0", "1"):
    if child := os.fork():
        children.append(child)
        continue
    os.environ.update(names, RANK=rank, LOCAL_RANK=rank)
    train(Path(sys.argv[1]), Path(sys.argv[2]), TrainOptions(**{**TINY, **MODES["token"]}))
    os._exit(0)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


def logged(bundle: Path) -> list[dict[str, Any]]:
    """A step log without what a clock says."""
    lines = bundle.with_name(bundle.name + ".steps.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("time", "tokens_per_s")} for line in lines]


@pytest.mark.slow
def test_two_processes_make_the_bundle_of_one(
    sessions: Path, options: Callable[..., TrainOptions], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    subprocess.run([sys.executable, "-c", PAIR, str(sessions), str(tmp_path / "pair"), port], check=True)
    train(sessions, tmp_path / "one", options(**MODES["token"]))
    one, pair = tmp_path / "one", tmp_path / "pair"
    assert close(logged(one), logged(pair)) and len(logged(one)) > 3
    names = [path.relative_to(one) for path in sorted(one.rglob("*.safetensors"))]
    assert names == [path.relative_to(pair) for path in sorted(pair.rglob("*.safetensors"))] and len(names) > 3
    for name in ("embeddings.safetensors", "selector.safetensors"):
        assert (one / name).read_bytes() == (pair / name).read_bytes()
    # Not the weights one by one: where a gradient is zero but for rounding, Adam makes steps of the rounding.
    seen = examples(corpus := read_corpus(sessions), corpus.returning()[:20], None)
    alone, together = (
        load_bundle(place, "cpu").nll([example.visit for example in seen], [example.target for example in seen])[0]
        for place in (one, pair)
    )
    assert together == pytest.approx(alone, rel=1e-2)
    assert not (tmp_path / "pair.training").exists()
