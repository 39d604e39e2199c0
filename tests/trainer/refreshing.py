"""What the tests of the cycle have instead of Kafka: an archive of made-up sessions, and a topic `models` in memory."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from models.manifest import verify
from streams import wire
from trainer.archive import Archive
from trainer.archivewriter import open_archive
from trainer.cycle import Cycle
from trainer.refresh_options import RefreshOptions
from trainer.registry import Aliases, Registry, Story

START_MS = 1_790_000_000_000
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
TRAINING = """
[train]
clusters = 1
hidden_size = 16
heads = 2
layers = 1
epochs = {epochs}
fine_tune_epochs = 0
patience = 99
lr = 1e-2
fine_tune_lr = 1e-2
batch = 8
context_tokens = 24
rollouts = 24
max_pages = 6
min_page_count = 2
device = "cpu"
"""
LOOKS = ("shoes", "boots", "sandals", "lamps", "chairs", "tables")
BUYS = ("basket", "checkout", "thank you")


def shop(
    users: int, days: float, seed: int = 0, start_ms: int = START_MS, buys: Sequence[str] = BUYS
) -> list[wire.Session]:
    """Sessions of visitors who look around and come back to buy, by turns, about every 16 hours; in order of time."""
    rng = np.random.default_rng(seed)
    made = []
    for user in range(users):
        at, turn, number = start_ms + int(rng.uniform(0, 16 * HOUR_MS)), int(rng.integers(0, 2)), 0
        while at < start_ms + days * DAY_MS:
            look = ["home", *rng.choice(LOOKS, size=2, replace=False).tolist(), "wish list"]
            pages = list(buys) if turn else look
            times = [at + 20_000 * i for i in range(len(pages))]
            number += 1
            made.append(
                wire.Session(
                    session_id=f"{seed}-{start_ms}-{user}-{number}", user_id=f"u{user:04d}", number=number,
                    start_ms=times[0], end_ms=times[-1], pages=pages, page_ts_ms=times, items=None,
                    cart=bool(turn), purchase=bool(turn), context=wire.Context([], None, None, None),
                )
            )  # fmt: skip
            at, turn = at + int(rng.uniform(12, 20) * HOUR_MS), 1 - turn
    return sorted(made, key=lambda session: session.end_ms)


def archive(directory: Path, sessions: Iterable[wire.Session]) -> Archive:
    """Archive more sessions; returns the archive."""
    with open_archive(directory, "sessions") as writer:
        offset = writer.manifest.positions.get(0, 0)
        writer.append(
            wire.Record(0, offset + i, one.user_id.encode(), msgspec.json.encode(one), one.end_ms)
            for i, one in enumerate(sessions)
        )
        writer.flush()
    return Archive(directory)


@dataclass
class Told:
    """A story in memory."""

    aliases: dict[str, wire.ModelAlias] = field(default_factory=dict)
    decisions: list[wire.ModelDecision] = field(default_factory=list)


class MemoryAliases:
    """`Aliases` without Kafka; `before` runs ahead of each decision, as another trainer might come between."""

    def __init__(self) -> None:
        self.told = Told()
        self.before: Callable[[Told], None] = lambda told: None

    def story(self) -> Story:
        return self.told

    def change(self, decide: Callable[[Story], Sequence[wire.ModelDecision]]) -> Sequence[wire.ModelDecision]:
        self.before(self.told)
        made = decide(self.told)
        self.told.decisions += made
        for one in made:
            for alias, digest in one.aliases.items():
                self.told.aliases.pop(alias, None)
                if digest is not None:
                    self.told.aliases[alias] = wire.ModelAlias(alias, one.version, digest, one.uri)
        return made


def fetch(alias: wire.ModelAlias) -> Path:
    """The directory that the alias names, verified."""
    path = Path(alias.uri.removeprefix("file://"))
    assert verify(path).digest == alias.digest
    return path


class Trainer:
    """A directory with an archive, a registry and cycles, as a trainer has one."""

    def __init__(
        self,
        directory: Path,
        aliases: Aliases | None = None,
        epochs: int = 8,
        items: Callable[[Path], int] = lambda path: 0,
        **options: Any,
    ) -> None:
        self.directory, self.aliases = directory, aliases or MemoryAliases()
        directory.mkdir(parents=True, exist_ok=True)
        recipe = directory / "recipe.toml"
        recipe.write_text(TRAINING.format(epochs=epochs))
        self.now_ms = START_MS
        self.registry = Registry(str(directory / "registry"))
        chosen = RefreshOptions(**{"sessions": 300, "least": 100, "recipe": recipe, "device": "cpu", **options})
        self.cycle = Cycle(
            directory / "cycles", Archive(directory / "archive"), self.registry, self.aliases, fetch, chosen,
            lambda: self.now_ms / 1000, items,
        )  # fmt: skip

    def archive(self, sessions: Iterable[wire.Session]) -> None:
        """More sessions came."""
        archive(self.directory / "archive", sessions)
