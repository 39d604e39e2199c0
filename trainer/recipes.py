"""Recipes: one experiment as one readable TOML file, from the log to the bundle.

[sessions]   how a log becomes sessions (`SessionRules`); used when a log is given
[train]      how the bundle is trained (`TrainOptions`)
[paper]      the published algorithm's own settings, with `mode = "paper"` (`PaperOptions`)
[retrieval]  how items are retrieved, where sessions hold some (`XPertOptions`)
"""

import dataclasses
import difflib
import tomllib
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.corpus import TEST, TRAIN, place_of, read_table
from trainer.errors import TrainingError
from trainer.options import NEW_SELECTOR_LR, PUBLISHED, XPERT_PUBLISHED, TrainOptions, new_model_lr, paper_rates
from trainer.paper import PaperOptions
from trainer.retrieval_options import XPertOptions

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class SessionRules:
    """How a log is cut, and which of its sessions make the experiment (HeTLM, section 1.1).

    Sessions that are too short or too long go first, then users with too few sessions; the users that are left are
    drawn, and divided into training and test, by a hash of their ids.
    """

    profile: str | None = None  # site profile: a ready one, or a file beside the recipe
    gap_ms: int | None = None
    min_pages: int = 1
    longest: float = 1.0  # quantile of session lengths; longer sessions are left out
    min_sessions: int = 2
    users: int | None = None  # at most so many
    test_share: float = 0.1

    def __post_init__(self) -> None:
        """Raises TrainingError for a value that cannot work."""
        for name in ("longest", "test_share"):
            if not 0 < getattr(self, name) <= 1:
                raise TrainingError(f"{name} is {getattr(self, name)}, but must lie above 0 and be at most 1.")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a recipe file says."""

    sessions: SessionRules
    options: TrainOptions
    idle: tuple[str, ...] = ()  # what was given and does nothing, and why

    @property
    def told(self) -> list[str]:
        """What is good to know before the training begins, a line each."""
        rates = [f"mode paper, learning rates: {paper_rates(self.options)}"] if self.options.mode == "paper" else []
        return [*rates, *self.idle]


def read_recipe(path: Path | None, **changes: Any) -> Recipe:
    """The recipe in `path`, or one of defaults; `changes` replace values of [train].

    Raises TrainingError that names the file and the key.
    """
    if path is None:
        return Recipe(SessionRules(), *_options("", changes, {}))
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        what = f"recipe {path} cannot be read ({error})"
        raise TrainingError(f"{what}. Give a TOML file like those in recipes/.") from None
    for name in set(content) - {"sessions", "train", "paper", "retrieval"}:
        raise TrainingError(
            f"recipe {path}: there is no table [{name}]. A recipe has [sessions], [train], [paper] and [retrieval]."
        )
    train = content.get("train", {}) | changes
    if "retrieval" in content:
        retrieval = content["retrieval"]
        start = XPERT_PUBLISHED if retrieval.get("mode") == "paper" else {}
        train["retrieval"] = fill(f"recipe {path}, [retrieval]", start | retrieval, XPertOptions)
    rules = fill(f"recipe {path}, [sessions]", content.get("sessions", {}), SessionRules)
    if rules.profile is not None and rules.profile.endswith(".toml"):
        rules = dataclasses.replace(rules, profile=str(path.parent / rules.profile))
    return Recipe(rules, *_options(f"recipe {path}, ", train, content.get("paper", {})))


def divide(cut: Path, directory: Path, rules: SessionRules, seed: int = 0) -> dict[str, int]:
    """Write the sessions in `cut` that the rules keep into `directory`/train and /test; the number of users of each.

    Raises TrainingError when the rules leave nobody.
    """
    table = read_table(cut)
    lengths = pc.list_value_length(table["pages"])
    most = pc.quantile(lengths, rules.longest, interpolation="higher")[0].as_py() if table.num_rows else 0
    table = table.filter(pc.and_(pc.greater_equal(lengths, rules.min_pages), pc.less_equal(lengths, most or 0)))
    counts = table.group_by("user_id").aggregate([("user_id", "count")])
    users = counts.filter(pc.greater_equal(counts["user_id_count"], rules.min_sessions))["user_id"].to_pylist()
    users = sorted(users, key=lambda user: place_of(f"{seed}:{user}"))[: rules.users]
    tests = max(1, round(rules.test_share * len(users)))
    if len(users) <= tests:
        raise TrainingError(
            f"{len(users)} users have {rules.min_sessions} sessions of {rules.min_pages} to {most} pages, too few to "
            "divide. Loosen [sessions] in the recipe, or give a longer log."
        )
    for name, part in ((TEST, users[:tests]), (TRAIN, users[tests:])):
        (directory / name).mkdir(parents=True, exist_ok=True)
        kept = table.filter(pc.is_in(table["user_id"], pa.array(part, table["user_id"].type)))
        pq.write_table(kept, directory / name / "sessions.parquet")
    return {TRAIN: len(users) - tests, TEST: tests}


def _options(where: str, train: dict[str, Any], paper: dict[str, Any]) -> tuple[TrainOptions, tuple[str, ...]]:
    """The options of [train] and [paper], with what mode "paper" starts from, and what of them does nothing.

    `where` goes before the table's name.
    """
    published = train.get("mode") == "paper"
    options = fill(f"{where}[train]", (PUBLISHED if published else {}) | train, TrainOptions)
    rates: dict[str, float] = {}
    if published and options.pretrained is None:
        rate = new_model_lr(options.hidden_size)
        options = dataclasses.replace(options, lr=train.get("lr", rate))
        rates = {"predictor_lr": rate / 2, "selector_lr": NEW_SELECTOR_LR}
    algorithm = fill(f"{where}[paper]", rates | paper, PaperOptions)
    if published:
        # What a refresh of such a bundle goes on with.
        options = dataclasses.replace(options, fine_tune_lr=train.get("fine_tune_lr", algorithm.predictor_lr))
    idle = [f"{key} does nothing, for {why}." for key, why in _idle(options).items() if key in train]
    if paper and not published:
        idle.append(f"[paper] does nothing in mode {options.mode!r}.")
    try:
        options.check_large()
    except TrainingError as error:
        raise TrainingError(f"{where}[train]: {error}") from None
    return dataclasses.replace(options, paper=algorithm), tuple(idle)


def _idle(options: TrainOptions) -> dict[str, str]:
    """Keys of [train] that do nothing beside the others, and why.

    Not among them: the sizes of a new model beside `pretrained`, so that a recipe can be run with it and without.
    """
    idle: dict[str, str] = {}
    if options.pretrained is not None:
        idle |= dict.fromkeys(("architecture", "dropout"), "the pretrained model has its own")
    if options.mode == "paper":
        idle["fine_tune_epochs"] = "mode 'paper' fine-tunes for the epochs of [paper]"
    if options.mode != "kmeans":
        idle["embedding"] = f"mode {options.mode!r} has no use for it"
    if options.predictors != "lora":
        names = ("adapter_rank", "adapter_alpha", "adapter_dropout", "freeze_trunk")
        idle |= dict.fromkeys(names, f"backend {options.predictors!r} has no adapters")
    return idle


def fill(where: str, values: dict[str, Any], kind: type[T]) -> T:
    """The options `kind` with these values. Raises TrainingError that names the key; `where` says in which table."""
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(known)}."
            raise TrainingError(f"{where}: there is no {key!r}. {hint}")
    try:
        return msgspec.convert(values, kind, dec_hook=_path)
    except msgspec.ValidationError as error:
        raise TrainingError(f"{where}: {error}. Put the value right.") from None
    except TrainingError as error:
        raise TrainingError(f"{where}: {error}") from None


def _path(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str | Path):  # from the file, or from the command line
        return Path(value)
    raise NotImplementedError(f"a value of {kind}")
