"""A training run's place on disk, from which it goes on after any end, kill -9 included. No pickle."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, Tensor]


class Position(msgspec.Struct):
    """Where a run stands: the next step of a phase, its best epoch so far, and the length of the step log."""

    phase: str
    step: int
    best_loss: float
    worse_epochs: int
    log_bytes: int


class Run:
    """Directory beside the bundle with finished phases, the last checkpoint and the step log.

    A run continues only what was started with the same options on the same sessions (`identity`).
    """

    def __init__(self, directory: Path, identity: dict[str, Any], log: Path) -> None:
        self.directory, self.log_path = directory, log
        mark = directory / "run.json"
        wanted = msgspec.json.encode(identity, order="sorted")
        self.resumed = mark.is_file() and mark.read_bytes() == wanted
        if not self.resumed:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            log.unlink(missing_ok=True)
            mark.write_bytes(wanted)
        self.position = self._read_position()
        self._log = log.open("ab")
        self._log.truncate(self.position.log_bytes if self.position else self._done_bytes())

    def finished(self, name: str) -> Weights | None:
        """Tensors of a finished phase."""
        path = self.directory / f"{name}.safetensors"
        return _load(path) if path.is_file() else None

    def finish(self, name: str, tensors: Weights) -> None:
        """Keep a phase's tensors and drop its checkpoint."""
        self._sync_log()
        work = self.directory / f".{name}.safetensors"
        _save(tensors, work)
        (self.directory / "done.json").write_bytes(msgspec.json.encode(self._log.tell()))
        os.replace(work, self.directory / f"{name}.safetensors")
        shutil.rmtree(self.directory / "checkpoint", ignore_errors=True)
        self.position = None

    def checkpoint(self, position: Position, tensors: dict[str, Weights]) -> None:
        """Write a checkpoint in one step: the old one stays until the new one is whole."""
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
        self._log.write(msgspec.json.encode({**line, "time": round(time.time(), 3)}) + b"\n")
        self._log.flush()

    def close(self) -> None:
        """Close the log; what is on disk stays."""
        self._log.close()

    def remove(self) -> None:
        """The run is over: only the step log stays."""
        self.close()
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
        position = msgspec.json.decode(path.read_bytes(), type=Position)
        return None if (self.directory / f"{position.phase}.safetensors").is_file() else position

    def _done_bytes(self) -> int:
        path = self.directory / "done.json"
        return int(msgspec.json.decode(path.read_bytes(), type=int)) if path.is_file() else 0


def _load(path: Path) -> Weights:
    tensors: Weights = load_file(path)
    return tensors


def _save(tensors: Weights, path: Path) -> None:
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, path)
