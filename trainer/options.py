"""What one training run is asked to do."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from models.language_model import ARCHITECTURES
from trainer.errors import TrainingError


@dataclass(frozen=True)
class TrainOptions:
    """Options of `train`; sizes and rates that work on a CPU (hetlm_findings, section 7)."""

    architecture: str = "opt"  # opt, qwen2 or llama; not used with `pretrained`
    hidden_size: int = 48
    layers: int = 2
    heads: int = 4
    dropout: float = 0.0
    pretrained: Path | None = None  # local directory of a transformers model to start from
    encoder: Path | None = None  # local directory of all-MiniLM-L6-v2; None takes the installed package
    clusters: int = 4
    epochs: int = 10  # over all sessions
    fine_tune_epochs: int = 4  # over each cluster's sessions
    batch: int = 64  # users
    lr: float = 3e-3
    fine_tune_lr: float = 2e-3
    weight_decay: float = 0.05
    patience: int = 3  # epochs without a better validation loss before a phase ends
    min_page_count: int = 2  # rarer pages become [UNK]
    context_tokens: int = 512
    rollouts: int = 24
    max_pages: int = 32  # most pages of a generated session; fewer where 99 % of the sessions are shorter
    validation_share: float = 0.08  # of the users with two sessions or more
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    minutes: float | None = None  # no new step of gradient descent after this
    checkpoint_steps: int = 100

    def __post_init__(self) -> None:
        """Raises TrainingError for a value that cannot work."""
        if self.architecture not in ARCHITECTURES:
            raise TrainingError(
                f"architecture {self.architecture!r} is unknown. Take one of {', '.join(ARCHITECTURES)}."
            )
        least = {
            "hidden_size": 2, "layers": 1, "heads": 1, "clusters": 1, "epochs": 1, "fine_tune_epochs": 0, "batch": 1,
            "patience": 1, "min_page_count": 1, "context_tokens": 8, "rollouts": 1, "max_pages": 1,
            "checkpoint_steps": 1,
        }  # fmt: skip
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise TrainingError(f"{name} is {getattr(self, name)}, but must be at least {lowest}.")
        for name, value in (("lr", self.lr), ("fine_tune_lr", self.fine_tune_lr)):
            if not 0 < value < 1:
                raise TrainingError(f"{name} is {value}, but must lie between 0 and 1.")
        if not 0 < self.validation_share < 0.5:
            raise TrainingError(f"validation_share is {self.validation_share}, but must lie between 0 and 0.5.")
        if self.hidden_size % self.heads or (self.architecture != "opt" and self.hidden_size // self.heads % 2):
            raise TrainingError(
                f"hidden_size {self.hidden_size} is no (even) multiple of {self.heads} heads. Change one of them."
            )

    def plain(self) -> dict[str, Any]:
        """The options as JSON values."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}
