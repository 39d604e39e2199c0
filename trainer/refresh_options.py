"""When the models are refreshed, on what, and how much better a candidate must be."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.errors import TrainingError

DAY_MS = 86_400_000


@dataclass(frozen=True)
class RefreshOptions:
    """Options of the cycle. Sessions count as new until a refresh has looked at them."""

    sessions: int = 5_000  # so many new sessions make a refresh due
    every_ms: int = DAY_MS  # so long after the last refresh fewer are enough: `least` of them
    least: int = 500  # new sessions without which neither time nor drift makes a refresh due
    window_ms: int = 30 * DAY_MS  # how far back the window reaches
    judged_share: float = 0.2  # of the new sessions, the latest: they come after the window, and judge the candidate
    judged_users: int = 2_000  # at most so many visitors judge it
    margin: float = 0.05  # a candidate may be worse by this share of a rival's figure
    start: Literal["champion", "scratch"] = "champion"  # what a fit goes on from, where it can
    recipe: Path | None = None  # how to train; None: as the champion was trained
    device: Literal["auto", "cpu", "cuda"] = "auto"
    keep: int = 10  # finished cycles whose reports are kept, and their bundles if they were refused

    def __post_init__(self) -> None:
        """Raises TrainingError for a value that cannot work."""
        for name in ("sessions", "every_ms", "least", "window_ms", "judged_users", "keep"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        if not 0 < self.judged_share < 1:
            raise TrainingError(f"judged_share is {self.judged_share}, but must lie between 0 and 1.")
        if self.margin < 0:
            raise TrainingError(f"margin is {self.margin}, but must not be below 0.")
