"""What one training run is asked to do."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from models.adapters import ALPHA, RANK
from models.config import Backend, Embedding, Mode
from models.language_model import ARCHITECTURES
from trainer.errors import TrainingError
from trainer.paper import PaperOptions
from trainer.retrieval_options import PaperOptions as XPertPaper
from trainer.retrieval_options import XPertOptions

# Clusters unless set; in mode "behaviour" validation chooses.
PAPER_CLUSTERS, KMEANS_CLUSTERS = 6, 4

FEWEST_HISTORY = 8  # tokens of the context that max_pages must leave

# What mode "paper" starts from instead: the pretraining of the small model, HeTLM's Table 14.
TABLE_14: dict[str, Any] = {
    "epochs": 100, "batch": 32, "accumulate": 4, "lr": 1e-5, "weight_decay": 0.01, "validation_share": 0.05,
    "context_tokens": 512, "patience": 100,
}  # fmt: skip

# Beside it what the mode takes from elsewhere: generated sessions of 64 pages at most (spec/hetlm.md, section 1.6).
PUBLISHED: dict[str, Any] = {**TABLE_14, "max_pages": 64}

# The published rates are for pretrained models of 350 M weights. A new one, which they leave as it is, takes these: at
# width 48 what findings, section 7, had best, and at 1,024 that of OPT-350M (Zhang et al., 2022, table 1).
NEW_LR, NEW_WIDTH, NEW_EXPONENT = 3e-3, 48, 0.75
NEW_SELECTOR_LR = 1e-3

# A large pretrained model, tuned by low-rank adapters beside the published algorithm: HeTLM's Table 16. There its
# weights are loaded in 8 bits, and so is its optimiser; here both are not. And there it reads and writes the names of
# pages with its own tokenizer of texts; here it gets a token for each page, as the small models do, and with it new
# page embeddings that learn beside the adapters: what it knows of the words in those names does not help it.
TABLE_16: dict[str, Any] = {
    "epochs": 10, "batch": 2, "accumulate": 4, "packing": True, "fill_rows": True, "lr": 2e-4, "weight_decay": 0.0,
    "warm_up_steps": 10, "validation_share": 0.05, "context_tokens": 512, "patience": 10, "adapter_rank": 32,
    "adapter_alpha": 16.0, "adapter_dropout": 0.05, "freeze_trunk": True,
}  # fmt: skip

# What [retrieval] says in mode "paper" where a recipe says nothing else: the settings that XPert was published with.
XPERT_PUBLISHED: dict[str, Any] = {
    one.name: one.default for one in fields(XPertPaper) if one.name in {own.name for own in fields(XPertOptions)}
}


@dataclass(frozen=True)
class TrainOptions:
    """Options of `train`; sizes and rates that work on a CPU (hetlm_findings, section 7).

    They are the same for every mode. What mode "paper" starts from instead, Table 14 or the rates of a new model, comes
    with a recipe: `trainer.recipes.read_recipe(None, mode="paper").options`.
    """

    mode: Mode = "behaviour"  # how clusters are found: by what visitors do, as published, or by K-means on page names
    backend: Backend | None = None  # who predicts; None: "token" with behaviour, else "separate"
    soft: bool | None = None  # spread a visitor over the clusters; None: where validation says so
    embedding: Embedding | None = None  # mode "kmeans" on z as in mode "paper", of texts or pages; None: a running sum
    clusters: int | None = None  # None: chosen on validation (behaviour), 6 (paper), 4 (kmeans)
    architecture: str = "opt"  # opt, qwen2 or llama; not used with `pretrained`
    hidden_size: int = 48
    layers: int = 2
    heads: int = 4
    dropout: float = 0.0
    pretrained: Path | None = None  # local directory of a transformers model to start from
    warm_start: Path | None = None  # a bundle to go on from: its sizes, pages, clusters and weights
    encoder: Path | None = None  # local directory of all-MiniLM-L6-v2; None takes the installed package
    large: Path | None = None  # local directory of a large model that `evaluate` tunes as one beside `pretrained`
    adapter_rank: int = RANK  # backend "lora", here and below
    adapter_alpha: float = ALPHA
    adapter_dropout: float = 0.0
    freeze_trunk: bool = False  # only the adapters learn in the fine-tuning; with one cluster, and page embeddings
    epochs: int = 10  # over all sessions
    fine_tune_epochs: int = 4  # over each cluster's sessions; with one model and tokens, that many more over all
    batch: int = 64  # users; rows with `fill_rows`
    accumulate: int = 1  # batches a step
    packing: bool = True  # several users' sessions in one row, in batches of any lengths; else of similar ones
    fill_rows: bool = False  # rows of context_tokens, each with as many users' sessions as find room
    lr: float = 3e-3
    fine_tune_lr: float = 2e-3
    weight_decay: float = 0.05
    warm_up_steps: int | None = None  # of each phase; None: 5 % of its steps
    patience: int = 3  # epochs without a better validation loss before a phase ends
    min_page_count: int = 2  # rarer pages become [UNK]
    context_tokens: int = 512
    rollouts: int = 24
    max_pages: int = 32  # most pages of a generated session; fewer where 99 % of the sessions are shorter
    validation_share: float = 0.08  # of the users with two sessions or more, where no validation users are set apart
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    minutes: float | None = None  # no new step of gradient descent after this
    checkpoint_steps: int = 100
    paper: PaperOptions = field(default_factory=PaperOptions)  # mode "paper"
    retrieve: bool = True  # where sessions hold items, learn which ones to put before visitors
    items: Path | None = None  # JSON lines as in the topic `items`: the texts of items
    retrieval: XPertOptions = field(default_factory=XPertOptions)

    def __post_init__(self) -> None:
        """Raises TrainingError for a value that cannot work."""
        if self.architecture not in ARCHITECTURES:
            raise TrainingError(
                f"architecture {self.architecture!r} is unknown. Take one of {', '.join(ARCHITECTURES)}."
            )
        least = {
            "hidden_size": 2, "layers": 1, "heads": 1, "clusters": 1, "epochs": 1, "fine_tune_epochs": 0, "batch": 1,
            "accumulate": 1, "adapter_rank": 1, "patience": 1, "min_page_count": 1, "context_tokens": 8, "rollouts": 1,
            "max_pages": 1, "checkpoint_steps": 1, "warm_up_steps": 0,
        }  # fmt: skip
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise TrainingError(f"{name} is {value}, but must be at least {lowest}.")
        for name, value in (("lr", self.lr), ("fine_tune_lr", self.fine_tune_lr)):
            if not 0 < value < 1:
                raise TrainingError(f"{name} is {value}, but must lie between 0 and 1.")
        if not (self.adapter_alpha > 0 and 0 <= self.adapter_dropout < 1):
            raise TrainingError(
                f"adapter_alpha is {self.adapter_alpha} and adapter_dropout {self.adapter_dropout}, but they must be "
                "above 0, and at least 0 and below 1."
            )
        if not 0 < self.validation_share < 0.5:
            raise TrainingError(f"validation_share is {self.validation_share}, but must lie between 0 and 0.5.")
        if self.hidden_size % self.heads or (self.architecture != "opt" and self.hidden_size // self.heads % 2):
            raise TrainingError(
                f"hidden_size {self.hidden_size} is no (even) multiple of {self.heads} heads. Change one of them."
            )
        if self.context_tokens < self.max_pages + FEWEST_HISTORY:
            raise TrainingError(
                f"context_tokens is {self.context_tokens}, which leaves no room for a history before max_pages "
                f"{self.max_pages}. Raise the one, or lower the other."
            )
        if self.fill_rows and not self.packing:
            raise TrainingError("fill_rows puts several users' sessions in one row, but packing is off. Change one.")
        if self.large is not None and self.pretrained is None:
            raise TrainingError(
                f"large is {self.large}, but it only stands beside pretrained models: beside new ones the large model "
                "is a wider new one. Give pretrained too, or leave large out."
            )
        if self.mode == "paper" and self.backend not in (None, "separate"):
            raise TrainingError(
                f"mode 'paper' trains a model for each cluster, so backend {self.backend!r} has no place in it. "
                "Take backend 'separate', or mode 'behaviour'."
            )

    @property
    def predictors(self) -> Backend:
        """The backend, chosen or by the mode."""
        return self.backend or ("token" if self.mode == "behaviour" else "separate")

    @property
    def selector_embedding(self) -> Embedding | None:
        """What the selector sees of a visit's sessions, where mode "paper" or "kmeans" lets it see them."""
        return {"paper": self.paper.embedding, "kmeans": self.embedding, "behaviour": None}[self.mode]

    @property
    def tunes_pretrained(self) -> bool:
        """Whether one cluster means adapters on a pretrained trunk that stays as it is."""
        return self.pretrained is not None and self.freeze_trunk

    def check_large(self) -> None:
        """Raises TrainingError when `large` names no model. A bundle keeps the name, and the model may go."""
        if self.large is not None and not (self.large / "config.json").is_file():
            raise TrainingError(
                f"large is {self.large}, but there is no config.json of a transformers model. Put the directory right, "
                "or leave large out."
            )

    def plain(self) -> dict[str, Any]:
        """The options as JSON values."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


def new_model_lr(hidden_size: int) -> float:
    """A rate at which a new model of that width learns, to two digits."""
    return float(f"{NEW_LR * (NEW_WIDTH / hidden_size) ** NEW_EXPONENT:.1e}")


def paper_rates(options: TrainOptions) -> str:
    """The learning rates of mode "paper" in words, beside the published ones."""
    table = PaperOptions()
    own = (options.lr, options.paper.predictor_lr, options.paper.selector_lr)
    published = (TABLE_14["lr"], table.predictor_lr, table.selector_lr)
    told = "{:g} (pretraining), {:g} (predictors), {:g} (selector)".format(*own)
    if own == published:
        return told + (", as published" if options.pretrained else ", as published, at which a new model hardly learns")
    return told + "; published, for pretrained models: {:g}, {:g}, {:g}".format(*published)
