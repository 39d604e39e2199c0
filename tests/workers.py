"""Real worker processes for tests: started, killed, frozen, and started again when they end by themselves."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from streams.settings import Settings

ROOT = Path(__file__).parents[1]
STARTUP_SECONDS = 90


def environment(settings: Settings) -> dict[str, str]:
    """This process's environment with every setting in it, so that no file on this machine changes a test."""
    values = settings.model_dump(mode="json", exclude_none=True)
    own = {name: value for name, value in os.environ.items() if not name.startswith("BROWSECAST_")}
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if settings.sasl_password is not None:
        values["sasl_password"] = settings.sasl_password.get_secret_value()
    return own | threads | {f"BROWSECAST_{name.upper()}": str(value) for name, value in values.items()}


class Worker:
    """One worker process with its own state directory and log."""

    def __init__(
        self,
        settings: Settings,
        directory: Path,
        roles: Sequence[str] = (),
        module: Sequence[str] = ("streams.cli", "worker"),
    ) -> None:
        """Nothing is started yet. `module` is the module to run and its first arguments."""
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.settings = settings.but(state_dir=directory / "state", port=free_port())
        self.log = directory / "worker.log"
        self._command = [sys.executable, "-m", *module, *(word for role in roles for word in ("--role", role))]
        self._process: subprocess.Popen[bytes] | None = None
        self.wanted = False  # whether the supervisor starts it again when it ends
        self.starts = 0

    def start(self) -> None:
        """Start the process; it keeps the state directory that is there."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=ROOT, env=environment(self.settings), stdout=log, stderr=log
            )
        self.wanted = True
        self.starts += 1

    @property
    def process(self) -> "subprocess.Popen[bytes]":
        """The running process."""
        assert self._process is not None, "the worker was not started"
        return self._process

    @property
    def exit_code(self) -> int | None:
        """How the process ended; None while it runs."""
        return None if self._process is None else self._process.poll()

    @property
    def running(self) -> bool:
        """Whether the process is there, frozen or not."""
        return self._process is not None and self._process.poll() is None

    def kill(self, wipe: bool = False) -> None:
        """SIGKILL, and with `wipe` the state directory is lost too."""
        self._signal(signal.SIGKILL)
        self.wait(10)
        if wipe:
            shutil.rmtree(self.settings.state_dir, ignore_errors=True)

    def kill_model(self) -> None:
        """SIGKILL to the process of its model."""
        (model,) = models(self.process.pid)
        os.kill(model, signal.SIGKILL)

    def freeze(self) -> None:
        """SIGSTOP: the process sleeps and knows nothing of it."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._signal(signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM: the worker should drain and leave; it is not started again."""
        self.wanted = False
        self._signal(signal.SIGTERM)

    def wait(self, seconds: float) -> int:
        """The exit code, once it has ended. Raises subprocess.TimeoutExpired."""
        assert self._process is not None
        return self._process.wait(timeout=seconds)

    def stop(self) -> None:
        """End it one way or another: for the end of a test."""
        self.wanted = False
        if self.running:
            self.thaw()
            self._signal(signal.SIGKILL)
            self.wait(10)

    def get(self, path: str) -> str | None:
        """What the worker's port answers with status 200, else None."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.settings.port}{path}", timeout=3) as answer:
                return str(answer.read().decode())
        except (urllib.error.URLError, OSError):
            return None

    def wait_ready(self, seconds: float = STARTUP_SECONDS) -> None:
        """Return once /ready says yes. Raises AssertionError with the end of its log."""
        deadline = time.monotonic() + seconds
        while self.get("/ready") is None:
            assert self.running, f"the worker ended with {self.exit_code}:\n{self.tail()}"
            assert time.monotonic() < deadline, f"the worker is not ready after {seconds} s:\n{self.tail()}"
            time.sleep(0.1)

    def tail(self, characters: int = 3000) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-characters:] if self.log.exists() else ""

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


class Trainer(Worker):
    """One `browsecast trainer` process; what it keeps lies in its directory, but for the registry that is set."""

    def __init__(self, settings: Settings, directory: Path, roles: Sequence[str] = (), *arguments: str) -> None:
        """Nothing is started yet. `arguments` are further ones of the command."""
        super().__init__(settings, directory, roles, ("streams.cli", "trainer", *arguments))
        self.settings = self.settings.but(
            trainer_port=self.settings.port, trainer_dir=directory / "state", archive_dir=directory / "archive"
        )

    def wait_ready(self, seconds: float = STARTUP_SECONDS) -> None:
        """Return once it shows metrics. Raises AssertionError with the end of its log."""
        deadline = time.monotonic() + seconds
        while self.get("/metrics") is None:
            assert self.running, f"the trainer ended with {self.exit_code}:\n{self.tail()}"
            assert time.monotonic() < deadline, f"the trainer is not ready after {seconds} s:\n{self.tail()}"
            time.sleep(0.1)


class Fleet:
    """Some workers and their supervisor: call `tick` often, it starts again what ended, as Kubernetes would."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        """Take charge of the workers; `start` starts them."""
        self.workers = list(workers)
        self.ended: list[tuple[str, int]] = []  # worker and exit code of each one that ended by itself

    def start(self) -> None:
        """Start all."""
        for worker in self.workers:
            worker.start()

    def tick(self) -> None:
        """Start again every worker that should run and does not."""
        for worker in self.workers:
            if worker.wanted and not worker.running:
                self.ended.append((worker.directory.name, worker.exit_code or 0))
                worker.start()

    def __enter__(self) -> "Fleet":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.stop()


def children(pid: int) -> list[int]:
    """Processes that a process has started and that still run."""
    lists = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for line in lists for child in line.split()]


def models(pid: int) -> list[int]:
    """The processes of a worker's models, which are the children of its nursery."""
    return [model for nursery in children(pid) for model in children(nursery)]


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
