"""The candidate's process, from outside: started, watched, and started again where it died."""

import subprocess
import sys
from pathlib import Path
from threading import Event

import structlog

from trainer.errors import TrainingError

MODULE = "trainer.candidate"  # what the child runs
BUNDLE = "bundle"  # what it leaves in the cycle's directory
LOG = "candidate.log"
DEATHS = 3  # in a row, after which the candidate is given up
LOOK_S, END_S = 0.2, 10.0

log = structlog.get_logger(__name__)


def make_candidate(place: Path, stop: Event) -> bool:
    """Have the candidate of a cycle made and judged; False when `stop` came first.

    The child ends when its standard input ends, so it does not outlive the trainer, whatever ends that. A child that
    dies is started again and goes on where it was. Raises TrainingError with what the child said.
    """
    for _ in range(DEATHS):
        code = _run(place, stop)
        if code is None:
            return False
        if code == 0:
            return True
        said = (place / LOG).read_text(errors="replace").strip().splitlines()[-1:] or ["nothing"]
        if code > 1:  # an error of ours, with its exit code
            raise TrainingError(said[0])
        log.error("the candidate's process died", cycle=place.name, code=code, said=said[0])
    raise TrainingError(
        f"The process that fits the candidate died {DEATHS} times; {place / LOG} has what it said. Is there enough "
        "memory? Give it a smaller window or model."
    )


def _run(place: Path, stop: Event) -> int | None:
    """The exit code; None when `stop` came first."""
    command = [sys.executable, "-m", MODULE, str(place)]
    with (place / LOG).open("wb") as said:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said)
    try:
        while process.poll() is None:
            if stop.wait(LOOK_S):
                return None
        return process.returncode
    finally:
        process.terminate()
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdin is not None
        process.stdin.close()
