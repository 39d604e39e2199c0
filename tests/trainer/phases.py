"""One small phase of training for the tests of descent, also as a process that can be killed.

python -m tests.trainer.phases DIRECTORY '{"kill_at": 5, ...}'
"""

import json
import os
import signal
import socket
import subprocess
import sys
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from models.adapters import Adapters
from models.language_model import build
from models.vocabulary import BOS, EOS
from trainer import ranks
from trainer.checkpoints import Run
from trainer.descent import Phase, descend
from trainer.likelihood import Learner, nats
from trainer.windows import lay_out

CPU = torch.device("cpu")
PAGES, CLUSTERS = 8, 2
SIZE = 4 + PAGES


def rows(count: int, seed: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    """Windows of visitors of two clusters, each with four pages of its own, and the cluster of each."""
    rng = np.random.default_rng(seed)
    clusters = rng.integers(0, CLUSTERS, size=count)
    made = []
    for cluster in clusters.tolist():
        sessions = [4 + cluster * 4 + rng.integers(0, 4, size=rng.integers(1, 5)) for _ in range(rng.integers(1, 6))]
        made.append(np.concatenate([[BOS, *session, EOS] for session in sessions]))
    return made, clusters


def model(size: int = SIZE, architecture: str = "opt", dropout: float = 0.0, spread: float = 4.0) -> PreTrainedModel:
    """A model with large random weights, so that a wrong mask shows."""
    torch.manual_seed(7)
    made = build(architecture, size, 16, 2, 2, 64, dropout)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(spread)
    return made


def learner(backend: str, **changes: Any) -> Learner:
    """A model of each back end; the adapters of "lora" are no longer zero."""
    if backend != "lora":
        return model(SIZE + CLUSTERS * (backend == "token"), **changes)
    made = Adapters(model(**changes), CLUSTERS)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=0.1)
    return made


def phase(count: int = 60, posterior: np.ndarray | None = None, **changes: Any) -> Phase:
    """A phase of two epochs."""
    windows, _ = rows(count)
    settings: dict[str, Any] = {
        "name": "pretrain", "rows": windows, "judge": mean_loss, "epochs": 2, "batch": 8, "lr": 1e-2,
        "weight_decay": 0.05, "patience": 3, "seed": 0, "checkpoint_steps": 3, "deadline": inf, "keep_start": False,
        "posterior": posterior,
    }  # fmt: skip
    return Phase(**{**settings, **changes})


def mean_loss(trained: Any) -> float:
    """Nats per token of other visitors, all of cluster 0."""
    windows, _ = rows(20, seed=1)
    clusters = np.zeros(len(windows), dtype=np.int64) if isinstance(trained, Adapters) else None
    layout = lay_out(windows, [[i] for i in range(len(windows))])
    trained.eval()
    with torch.no_grad():
        return float(nats(trained, layout, CPU, clusters)) / int((layout.labels != 0).sum())


def spread(count: int = 60) -> np.ndarray:
    """Unsure clusters for the rows: (count, K)."""
    _, clusters = rows(count)
    return np.where(np.arange(CLUSTERS) == clusters[:, None], 0.8, 0.2)


def steps(directory: Path) -> list[dict[str, Any]]:
    """The step log without what a clock says."""
    lines = (directory / "steps.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("time", "tokens_per_s")} for line in lines]


def tensors(directory: Path) -> dict[str, Tensor]:
    """What the phase has left."""
    found: dict[str, Tensor] = load_file(directory / "run" / "pretrain.safetensors")
    return found


def train(directory: Path, backend: str = "separate", kill_at: int = 0, progress: Any = None, **changes: Any) -> float:
    """Train in `directory`, where a run that was killed goes on; at step `kill_at` the process kills itself."""
    directory.mkdir(parents=True, exist_ok=True)
    if backend != "separate":
        changes = {"posterior": spread(), **changes}
    run = Run(directory / "run", {"backend": backend}, directory / "steps.jsonl")
    made = learner(backend, dropout=changes.pop("dropout", 0.0))
    loss = descend(made, phase(**changes), run, CPU, Killer(kill_at) if kill_at else progress)
    run.close()
    return loss


class Killer:
    """A progress bar that ends the process as kill -9 does, after so many steps."""

    def __init__(self, left: int) -> None:
        self.left = left

    def add_task(self, *words: Any, **fields: Any) -> int:
        return 0

    def update(self, task: int, **fields: Any) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def processes(jobs: list[dict[str, Any]]) -> list[list[int]]:
    """Run each job's `train` in `world` processes, one job after the other; the exit codes of each, -9 if killed."""
    told = subprocess.run([sys.executable, "-m", __name__, json.dumps(jobs)], check=True, stdout=subprocess.PIPE)
    codes: list[list[int]] = json.loads(told.stdout.splitlines()[-1])
    return codes


def fork(rank: int, world: int, port: int, directory: str, kill_rank: int = 0, **changes: Any) -> int:
    """One of the job's processes, as `torchrun` would start it; its id."""
    if child := os.fork():
        return child
    try:
        if world > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
        if rank != kill_rank:
            changes.pop("kill_at", None)
        with ranks.joined():
            train(Path(directory), **changes)
        os._exit(0)
    except BaseException as error:
        print(f"rank {rank}: {error}", file=sys.stderr)
        os._exit(1)


def main(jobs: list[dict[str, Any]]) -> None:
    """Everything is imported once, and then forked: that is most of the time."""
    torch.set_num_threads(1)
    codes = []
    for job in jobs:
        world = job.pop("world", 1)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        children = [fork(rank, world, port, **job) for rank in range(world)]
        codes.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
    print(json.dumps(codes))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
