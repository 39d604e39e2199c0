"""A training run's place on disk, from which it goes on after any end, kill -9 included. No pickle."""

import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer import ranks
from trainer.errors import TrainingError

Weights = dict[str, Tensor]
OTHER = 2  # state of a directory: steps of another run are in it


class Position(msgspec.Struct):
    """Where a run stands: the next step of a phase, its best epoch so far, and the length of the step log."""

    phase: str
    step: int
    best_loss: float
    worse_epochs: int
    log_bytes: int


class Run:
    """Directory beside the bundle with finished phases, the last checkpoint and the step log.

    A run continues only what was started with the same options on the same sessions (`identity`). Of several processes
    only the first writes; all read, so the directory must be one that all can see.
    """

    def __init__(self, directory: Path, identity: dict[str, Any], log: Path) -> None:
        """Raises TrainingError where steps of a run with another identity would be lost."""
        self.directory, self.log_path = directory, log
        self.writes = ranks.rank() == 0
        mark = directory / "run.json"
        wanted = msgspec.json.encode(identity, order="sorted")
        # Only the first process looks: it may clear the directory while the others are still on their way here.
        found = mark.read_bytes() if self.writes and mark.is_file() else b""
        other = bool(found) and found != wanted and log.is_file() and log.stat().st_size > 0
        state = int(ranks.from_first(OTHER if other else self.writes and found == wanted))
        if state == OTHER:
            raise TrainingError(
                f"{directory} holds a training that was begun otherwise ({_changed(found, identity)}). Give what it "
                "was begun with, and it goes on; remove the directory to begin anew."
            )
        self.resumed = bool(state)
        if not self.resumed and self.writes:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            log.unlink(missing_ok=True)
            mark.write_bytes(wanted)
        ranks.wait()
        self.position = self._read_position()
        if self.writes:
            self._log = log.open("ab")
            self._log.truncate(self.position.log_bytes if self.position else self._done_bytes())

    def finished(self, name: str) -> Weights | None:
        """Tensors of a finished phase."""
        path = self.directory / f"{name}.safetensors"
        return _load(path) if ranks.from_first(path.is_file()) else None  # the first rank may be writing it just now

    def finish(self, name: str, tensors: Weights) -> None:
        """Keep a phase's tensors and drop its checkpoint; returns in every process when that is done."""
        if self.writes:
            self._sync_log()
            work = self.directory / f".{name}.safetensors"
            _save(tensors, work, {"log_bytes": str(self._log.tell())})
            os.replace(work, self.directory / f"{name}.safetensors")
            shutil.rmtree(self.directory / "checkpoint", ignore_errors=True)
        self.position = None
        ranks.wait()

    def tell(self, name: str, value: Any) -> None:
        """Keep a JSON value."""
        if ranks.rank() == 0:
            (self.directory / f"{name}.json").write_bytes(msgspec.json.encode(value))

    def told(self, name: str) -> Any:
        """A JSON value that was kept."""
        return msgspec.json.decode((self.directory / f"{name}.json").read_bytes())

    def checkpoint(self, position: Position, tensors: dict[str, Weights]) -> None:
        """Write a checkpoint in one step: the old one stays until the new one is whole."""
        if not self.writes:
            return
        self._sync_log()
        position.log_bytes = self._log.tell()
        work, old, place = (self.directory / name for name in (".checkpoint", ".old", "checkpoint"))
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        work.mkdir()
        for name, values in tensors.items():
            _save(values, work / f"{name}.safetensors")
        (work / "position.json").write_bytes(msgspec.json.encode(position))
        if place.exists():
            place.rename(old)
        work.rename(place)
        shutil.rmtree(old, ignore_errors=True)

    def restore(self, name: str) -> Weights:
        """Tensors of the last checkpoint."""
        return _load(self._place() / f"{name}.safetensors")

    def log(self, line: dict[str, Any]) -> None:
        """One JSON line."""
        if self.writes:
            self._log.write(msgspec.json.encode({**line, "time": round(time.time(), 3)}) + b"\n")
            self._log.flush()

    def close(self) -> None:
        """Close the log; what is on disk stays."""
        if self.writes:
            self._log.close()

    def remove(self) -> None:
        """The run is over: only the step log stays."""
        self.close()
        if self.writes:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _sync_log(self) -> None:
        self._log.flush()
        os.fsync(self._log.fileno())

    def _place(self) -> Path:
        place = self.directory / "checkpoint"
        return place if place.exists() else self.directory / ".old"  # killed between the two renames

    def _read_position(self) -> Position | None:
        path = self._place() / "position.json"
        if not path.is_file():
            return None
        read = msgspec.json.decode(path.read_bytes())
        if read["best_loss"] is None:  # JSON has no infinity: no epoch has been judged yet
            read["best_loss"] = math.inf
        position = msgspec.convert(read, Position)
        return None if (self.directory / f"{position.phase}.safetensors").is_file() else position

    def _done_bytes(self) -> int:
        """Length of the log when the last phase had ended; that number is in the phase's own file."""
        ends = [0]
        for path in self.directory.glob("[!.]*.safetensors"):
            with safe_open(path, framework="pt") as tensors:
                ends.append(int(tensors.metadata()["log_bytes"]))
        return max(ends)


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> Weights:
    """The optimizer's state by parameter: `<parameter>:<key>`."""
    names, state = _names(optimizer, model), optimizer.state_dict()["state"]
    return {f"{names[i]}:{key}": value for i, values in state.items() for key, value in values.items()}


def load_optimizer(optimizer: Optimizer, model: nn.Module, tensors: Weights) -> None:
    """Set the optimizer's state from `optimizer_tensors`."""
    index = {name: i for i, name in enumerate(_names(optimizer, model))}
    state: dict[int, Weights] = {}
    for place, value in tensors.items():
        name, key = place.rsplit(":", 1)
        state.setdefault(index[name], {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _names(optimizer: Optimizer, model: nn.Module) -> list[str]:
    names = {id(value): name for name, value in model.named_parameters()}
    return [names[id(value)] for group in optimizer.param_groups for value in group["params"]]


def _changed(found: bytes, identity: dict[str, Any]) -> str:
    """Which parts of the identity are others now; nothing in processes that did not look."""
    before, now = msgspec.json.decode(found or b"{}"), msgspec.json.decode(msgspec.json.encode(identity))
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    return ", ".join("other sessions" if name == "sessions" else f"{name} {before.get(name)!r}" for name in names)


def _load(path: Path) -> Weights:
    tensors: Weights = load_file(path)
    return tensors


def _save(tensors: Weights, path: Path, metadata: dict[str, str] | None = None) -> None:
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, path, metadata)
