"""A model that dies, in the place of a bundle: `python -m tests.mortalmodel` is what `streams.nursery` runs.

The bundle's path is a directory for notes: `version`, and which visits have killed it.
"""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from models.visit import Forecast, Visit
from streams import modelserver, nursery
from streams.forecasting import Forecasting


class MortalModel:
    """Answers with its own process id as the path; what else it does depends on the visits' seeds."""

    router_digest = "sha256:1"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.version = (directory / "version").read_text()
        self.digest = f"sha256:{self.version}"

    def forecast(self, visits: Sequence[Visit]) -> list[Forecast]:
        """`poison` kills it, `once` only the first time, `slow` takes long, `raise` is an ordinary error."""
        print("libraries print what they like", flush=True)
        for visit in visits:
            note = self._directory / f"asked-{visit.seed}"
            first = not note.exists()
            note.touch()
            if visit.seed.startswith(("poison", "deadly")) or (visit.seed.startswith("once") and first):
                os.kill(os.getpid(), signal.SIGKILL)
            if visit.seed == "slow":
                time.sleep(60)
            if visit.seed == "raise":
                raise ValueError
        return [Forecast(0, [("home", 0.5)], [str(os.getpid())], 0.5, 0.25) for _ in visits]

    def fallback(self, visits: Sequence[Visit]) -> list[Forecast]:
        """`deadly` kills it even here."""
        if any(visit.seed == "deadly" for visit in visits):
            os.kill(os.getpid(), signal.SIGKILL)
        return [Forecast(None, [], ["frequencies"], 0.5, 0.25) for _ in visits]


def load(setup: modelserver.Setup) -> Forecasting:
    """In the place of the bundle."""
    return Forecasting(MortalModel(Path(setup.bundle)), lambda error: False, setup.retries)


if __name__ == "__main__":
    modelserver.load = load
    nursery.nurse((), modelserver.serve)
