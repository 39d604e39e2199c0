"""Settings of mode "paper", with the readings of what the paper leaves open (spec/hetlm.md, sections 1.3 to 1.5)."""

from dataclasses import dataclass
from typing import Literal

from models.config import Embedding
from trainer.errors import TrainingError
from trainer.losses import Reduction
from trainer.samples import LossOn


@dataclass(frozen=True)
class PaperOptions:
    """Settings of HeTLM. Numbers are those of Table 15, for pretrained models of 350 M weights and more."""

    embedding: Embedding = "text"  # what the selector sees: the encoded text of the sessions, or mean page embeddings
    selector_epochs: int = 12  # of learning the K-means clusters by heart; after few it is unsure, and K may shrink
    epochs: int = 10
    batch: int = 16  # users
    selector_lr: float = 5e-5
    selector_weight_decay: float = 1e-4
    predictor_lr: float = 1e-5
    predictor_weight_decay: float = 0.01
    alpha: float = 5.0  # weight of the entropy L_2
    beta: float = 9.0  # weight of the separation L_3
    critic: Literal["hard", "soft"] = "hard"  # who teaches a predictor: those who chose it (eq. 2), or all (line 10)
    reduction: Reduction = "mean"  # of a session's token losses; the paper writes a sum, its alphas fit a mean
    loss_on: LossOn = "target"  # tokens whose loss counts; the sessions before it are then context
    l3: Literal["paper", "scaled"] = "scaled"  # eq. (4) as printed, whose gradient is 0 in practice, or made to scale
    dictionary: Literal["soft", "hard"] = "soft"  # centroids in L_3: batch means with a gradient, or the last epoch's
    memory: float = 0.9  # share of the old centroids in the soft ones
    clip: float = 1.0  # largest gradient norm of the selector, and of each predictor; not in the paper

    def __post_init__(self) -> None:
        """Raises TrainingError for a value that cannot work."""
        for name, least in (("selector_epochs", 0), ("epochs", 1), ("batch", 1), ("alpha", 0), ("beta", 0)):
            if getattr(self, name) < least:
                raise TrainingError(f"paper.{name} is {getattr(self, name)}, but must be at least {least}.")
        for name in ("selector_lr", "predictor_lr"):
            if not 0 < getattr(self, name) < 1:
                raise TrainingError(f"paper.{name} is {getattr(self, name)}, but must lie between 0 and 1.")
        if not 0 <= self.memory < 1:
            raise TrainingError(f"paper.memory is {self.memory}, but must be at least 0 and below 1.")
        if not self.clip > 0:
            raise TrainingError(f"paper.clip is {self.clip}, but must be above 0; inf clips nothing.")
