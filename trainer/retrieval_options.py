"""How retrieval is trained: the better default, and the settings that XPert was published with."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import exp
from typing import Literal

from models.items import Activation
from trainer.errors import TrainingError, at_least_one


@dataclass(frozen=True)
class XPertOptions:
    """How operators are trained. The scalars (temperature, prior, seed bias) have a step size of their own.

    `mode`: "chosen" reports what validation chooses, "paper" the published model, whatever validation says.
    """

    mode: Literal["chosen", "paper"] = "chosen"
    seeds: int = 5
    policy: Literal["channels", "recency"] = "channels"  # how seeds are picked, as `streams.channels` does
    gamma: float = exp(-0.08)  # what an event leaves of every channel's weight
    protect: bool = True  # the channel of the current event stays
    clusters: int | None = None  # global clusters; None: 2 % of the items
    history: int = 16  # events that a visitor's vector is made of
    batch: int = 200
    lr: float = 1e-3
    scalar_lr: float = 0.02
    epochs: int = 8
    patience: int = 2
    candidates: int = 2000  # sampled for each batch where a snapshot has half as many more
    space_ms: int | None = None  # window of the clicks that vectors are made of; None: all
    popularity_ms: int | None = None  # window of the prior's clicks; None: validation chooses, where there are times
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises TrainingError for a value that cannot work."""
        counts = ("seeds", "clusters", "history", "batch", "epochs", "patience", "candidates")
        at_least_one(self, (*counts, "space_ms", "popularity_ms"))
        _above_zero(self, ("lr", "scalar_lr"))
        if not 0 < self.gamma <= 1:
            raise TrainingError(f"gamma is {self.gamma}, but must lie above 0 and be at most 1.")


@dataclass(frozen=True)
class PaperOptions:
    """The model as published (XPert, section 4; settings of its appendix for one ad network)."""

    margins: tuple[float, float] = (1.0, 0.3)  # lambda+ and lambda-
    negatives: int = 10
    negatives_from: Literal["all", "batch"] = "all"  # the most similar items, or other visitors' targets
    most_alike: float = 0.5  # cosine to the target above which an item is no negative
    batching: Literal["items", "users"] = "items"  # distinct targets and a visitor of each, or visitors
    heads: int = 10
    activation: Activation = "relu"
    feedforward: int = 512  # width of the user aggregation's inner layers
    seeds: int = 10
    policy: Literal["channels", "recency"] = "channels"  # of the seeds, whatever [train] says
    history: int = 30
    lr: float = 5e-4
    epochs: int = 20
    merge: Literal["max", "sum"] = "sum"  # of the scores that an item has by several seeds
    quotas: bool = True  # places of the list are dealt to the seeds by their weight; else the highest scores win
    quota_power: float = 0.6  # of a seed's weight
    refill: bool = False  # places that are left go to the highest of the rest

    def __post_init__(self) -> None:
        """Raises TrainingError for a value that cannot work."""
        at_least_one(self, ("negatives", "heads", "feedforward", "seeds", "history", "epochs"))
        _above_zero(self, ("lr",))


def _above_zero(options: object, names: Iterable[str]) -> None:
    for name in names:
        if not getattr(options, name) > 0:
            raise TrainingError(f"{name} is {getattr(options, name)}, but must lie above 0.")
