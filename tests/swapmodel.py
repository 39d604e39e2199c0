"""A model that only knows which bundle it is, in the place of the real one, so that a swap takes half a second.

`python -m tests.swapmodel` is what `streams.nursery` runs; with arguments it is the command line, whose workers
have such children. What else the model does stands in the bundle's card.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from models.config import CARD
from models.manifest import verify
from models.routing import router_digest
from models.visit import Forecast, Visit
from streams import modelserver, nursery
from streams.forecasting import Forecasting

SLOW, HANGING, DYING = "slow to load", "hangs", "dies"
LOAD_S, HANG_S = 1.5, 3_600.0


class SwapModel:
    """Answers with its digest as the path, so that a prediction tells who made it."""

    def __init__(self, bundle: Path) -> None:
        verified = verify(bundle)
        self.card = verified.read(CARD).decode()
        self.digest, self.version = verified.digest, verified.digest[7:15]
        self.router_digest = router_digest(verified.manifest.files)

    def forecast(self, visits: Sequence[Visit]) -> list[Forecast]:
        """The last session's pages."""
        if DYING in self.card:
            sys.exit("it was told to")
        if HANGING in self.card:
            time.sleep(HANG_S)
        return [self._of(visit, self.digest) for visit in visits]

    def fallback(self, visits: Sequence[Visit]) -> list[Forecast]:
        """The same, by nobody."""
        return [self._of(visit, "frequencies") for visit in visits]

    @staticmethod
    def _of(visit: Visit, maker: str) -> Forecast:
        return Forecast(None, [(page, 0.5) for page in dict.fromkeys(visit.sessions[-1])], [maker], 0.25, 0.125)


def load(setup: modelserver.Setup) -> Forecasting:
    """In the place of the bundle."""
    model = SwapModel(Path(setup.bundle))
    if SLOW in model.card:
        time.sleep(LOAD_S)
    return Forecasting(model, lambda error: False, setup.retries)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        from streams.cli import main

        nursery.MODULE = "tests.swapmodel"
        main()
    else:
        modelserver.load = load
        nursery.nurse((), modelserver.serve)
