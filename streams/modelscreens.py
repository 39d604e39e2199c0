"""What `browsecast models` draws: the bundles of a registry, and the story of who served, and why."""

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from models.references import ModelRef
from streams.aliases import Story
from streams.wire import CHALLENGER, CHAMPION, ModelDecision

STYLES = {"promoted": "green", "published": "cyan", "rolled_back": "red", "refused": "yellow", "retired": "yellow"}


def bundles_table(bundles: Iterable[ModelRef], story: Story) -> Table:
    """Version, size, what it is or became, and place of every bundle of the registry."""
    table = Table("version", "MB", "it is", "place", header_style="bold")
    serving = {named.digest: alias for alias, named in story.aliases.items()}
    fates = {decision.digest: _words(decision.decision) for decision in story.decisions}
    for ref in bundles:
        alias = serving.get(ref.digest)
        fate = Text(alias, "green") if alias else Text(fates.get(ref.digest, "not announced"), "dim")
        table.add_row(Text(ref.version), f"{ref.bytes / 1e6:.1f}", fate, Text(ref.uri, "dim"))
    return table


def story_screen(story: Story) -> RenderableType:
    """Who serves now, and below it every decision in the order of time, with its reason and evidence."""
    now = Table.grid(padding=(0, 2))
    for alias in dict.fromkeys((CHAMPION, CHALLENGER, *story.aliases)):
        named = story.aliases.get(alias)
        now.add_row(
            Text(alias, "bold"), *([Text(named.version, "green"), Text(named.uri, "dim")] if named else ["none"])
        )
    table = Table("when (UTC)", "what", "model", "by", "now", "why", header_style="bold")
    versions = {decision.digest: decision.version for decision in story.decisions}
    for decision in story.decisions:
        why = Text(decision.reason)
        if decision.evidence:
            why.append("\n" + "  ".join(_figures(decision.evidence)), "dim")
        what = Text(_words(decision.decision), STYLES.get(decision.decision, ""))
        moves = Text("\n".join(_moves(decision, versions)))
        table.add_row(_when(decision.at_ms), what, Text(decision.version), Text(decision.by), moves, why)
    return Group(now, table if story.decisions else Text("Nothing was published yet: browsecast models publish BUNDLE"))


def decision_line(decision: ModelDecision) -> str:
    """One decision in a line: what, which model, and the aliases that moved."""
    moves = ", ".join(_moves(decision, {decision.digest: decision.version}))
    return f"{_words(decision.decision)} {decision.version}" + (f" ({moves})" if moves else "")


def _moves(decision: ModelDecision, versions: Mapping[str, str]) -> Iterator[str]:
    for alias, digest in decision.aliases.items():
        if digest == decision.digest:
            yield alias
        else:
            yield f"{alias}: {'none' if digest is None else versions.get(digest, _short(digest))}"


def _figures(evidence: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Every value with its name; those of nested objects as `outer.inner`."""
    for name, value in evidence.items():
        if isinstance(value, Mapping):
            yield from _figures(value, f"{above}{name}.")
        else:
            yield f"{above}{name} {value:.4g}" if isinstance(value, float) else f"{above}{name} {value}"


def _words(kind: str) -> str:
    return kind.replace("_", " ")


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]


def _when(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
