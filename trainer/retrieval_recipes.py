"""Recipes of retrieval: one experiment as one readable TOML file, from the log to the report.

[log]         how the log is read (`ItemLog`)
[last_items]  each user's last items are the labels (`LastItems`), or
[later_days]  the days after those of the training are (`LaterDays`)
[train]       how operators and networks are trained (`XPertOptions`)
[paper]       how the published model is (`PaperOptions`)
[baselines]   names: who stands beside them
"""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any, Literal

from trainer.errors import TrainingError
from trainer.interactionfiles import (
    first_clicks,
    read_attributes,
    read_clicks,
    read_released,
    read_sequences,
    read_sessions,
)
from trainer.interactions import Task
from trainer.protocols import LastItems, LaterDays
from trainer.recipes import fill
from trainer.retrieval_contenders import WAYS
from trainer.retrieval_options import PaperOptions, XPertOptions
from trainer.retrieval_published import NAMES as AS_PUBLISHED

DIVISIONS = {  # how a log may be divided; the first unless another is given
    "sequences": ["last_items"], "clicks": ["later_days"], "released": ["last_items"],
    "sessions": ["later_days", "last_items"],
}  # fmt: skip
CONTENDERS = (*WAYS, *AS_PUBLISHED)
TABLES = ("log", "last_items", "later_days", "train", "paper", "baselines")


@dataclasses.dataclass(frozen=True)
class ItemLog:
    """What the log is: a file of sequences or of clicks, session files, or the directory of AmazonReviews-1M."""

    format: Literal["sequences", "clicks", "released", "sessions"]
    attributes: str | None = None  # a file beside the log: attributes of the items of sequences

    def __post_init__(self) -> None:
        """Raises TrainingError for a value that would do nothing."""
        if self.attributes is not None and self.format != "sequences":
            raise TrainingError(f"attributes are read for sequences, not for a log of {self.format}. Leave them out.")


@dataclasses.dataclass(frozen=True)
class Baselines:
    """Who stands beside the trained retrievers: `CONTENDERS`."""

    names: tuple[str, ...] = ("popularity", "counts", "nearest items")

    def __post_init__(self) -> None:
        """Raises TrainingError for a name that nobody has."""
        for name in self.names:
            if name not in CONTENDERS:
                raise TrainingError(f"there is no baseline {name!r}. There are {', '.join(CONTENDERS)}.")


@dataclasses.dataclass(frozen=True)
class ItemsRecipe:
    """What a recipe file says."""

    log: ItemLog
    protocol: LastItems | LaterDays
    options: XPertOptions
    paper: PaperOptions
    baselines: tuple[str, ...]

    def task(self, path: Path) -> Task:
        """The task that the protocol makes of the log at `path`. Raises TrainingError."""
        name = path.stem
        if self.log.format in ("clicks", "sessions"):
            log = (read_clicks if self.log.format == "clicks" else read_sessions)(path)
            if isinstance(self.protocol, LaterDays):
                return self.protocol.task(name, log)
            return self.protocol.task(name, first_clicks(log), None, log.items)
        assert isinstance(self.protocol, LastItems)
        if self.log.format == "released":
            told, items, vectors = read_released(path)
            return self.protocol.task(name, told, vectors, items)
        told = read_sequences(path)
        items = sorted({item for row in (*told.items, *told.labels) for item in row})
        beside = None if self.log.attributes is None else path.parent / self.log.attributes
        return self.protocol.task(name, told, None if beside is None else read_attributes(beside, items), items)


def read_items_recipe(path: Path) -> ItemsRecipe:
    """The recipe in `path`. Raises TrainingError that names the file and the key."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        what = f"recipe {path} cannot be read ({error})"
        raise TrainingError(f"{what}. Give a TOML file like those in recipes/items.") from None
    for name in set(content) - set(TABLES):
        raise TrainingError(f"recipe {path}: there is no table [{name}]. There are {', '.join(TABLES)}.")

    def table(name: str, kind: type[Any]) -> Any:
        return fill(f"recipe {path}, [{name}]", content.get(name, {}), kind)

    log = table("log", ItemLog)
    wanted = _division(path, log, [name for name in ("later_days", "last_items") if name in content])
    protocol = table(wanted, LaterDays if wanted == "later_days" else LastItems)
    options, paper = table("train", XPertOptions), table("paper", PaperOptions)
    if isinstance(protocol, LastItems):
        for name in ("space_ms", "popularity_ms"):
            if getattr(options, name) is not None:
                raise TrainingError(
                    f"recipe {path}, [train]: {name} is a window of time, but [last_items] goes by the order of "
                    "clicks, not by their times. Leave it out."
                )
    return ItemsRecipe(log, protocol, options, paper, table("baselines", Baselines).names)


def _division(path: Path, log: ItemLog, given: list[str]) -> str:
    """The table that says how the log is divided. Raises TrainingError."""
    allowed = DIVISIONS[log.format]
    for name in given:
        if name not in allowed:
            raise TrainingError(f"recipe {path}: a log of {log.format} is divided by [{allowed[0]}], not by [{name}].")
    if len(given) > 1:
        raise TrainingError(
            f"recipe {path}: [{given[0]}] and [{given[1]}] cannot both divide the log. Give one of them."
        )
    return given[0] if given else allowed[0]
