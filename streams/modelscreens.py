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
    versions = {decision.digest: decision.version for decision in story.decisions}
    told = [_told(decision, versions) for decision in story.decisions]
    return Group(now, *(told or [Text("Nothing was published yet: browsecast models publish BUNDLE")]))


def _told(decision: ModelDecision, versions: Mapping[str, str]) -> Text:
    """A paragraph: when, what, by whom, the aliases that moved; then each reason, then the evidence."""
    text = Text(f"\n{_when(decision.at_ms)} UTC  ")
    text.append(_words(decision.decision), STYLES.get(decision.decision, ""))
    text.append(f" {decision.version}", "bold").append(f" by {decision.by}")
    if moves := ", ".join(_moves(decision, versions)):
        text.append(f", now {moves}")
    for reason in decision.reason.split("; "):
        text.append(f"\n  {reason}")
    for line in _evidence(decision.evidence, versions):
        text.append(f"\n    {line}", "dim")
    return text


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


def _evidence(evidence: Mapping[str, Any], versions: Mapping[str, str]) -> Iterator[str]:
    """A line for each group of figures, then the plain values in one; nothing of what is null.

    Of a comparison only the figures: the reasons tell the differences.
    """
    plain: dict[str, Any] = {}
    for name, value in evidence.items():
        if name == "comparison":
            plain["visitors"] = value["users"]
            yield from _groups("", value["figures"])
        elif isinstance(value, Mapping):
            yield from _groups(name, value)
        else:
            plain[name] = value
    yield from _line("", plain, versions)


def _groups(name: str, values: Mapping[str, Any]) -> Iterator[str]:
    """A line for each group within, else one for all."""
    if any(isinstance(value, Mapping) and not _is_figure(value) for value in values.values()):
        for inner, figures in values.items():
            yield from _groups(f"{name} {inner}".strip(), figures)
    else:
        yield from _line(f"{_words(name)}: ", values, {})


def _line(start: str, values: Mapping[str, Any], versions: Mapping[str, str]) -> Iterator[str]:
    told = [
        f"{_words(name.removesuffix('_ms'))} {_value(name, value, versions)}"
        for name, value in values.items()
        if value is not None
    ]
    if told:
        yield start + "  ".join(told)


def _is_figure(value: Any) -> bool:
    return isinstance(value, Mapping) and {"mean", "low", "high"} <= value.keys()


def _value(name: str, value: Any, versions: Mapping[str, str]) -> str:
    if _is_figure(value):
        return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    if isinstance(value, float):
        return f"{value:.4g}"
    if name.endswith("_ms"):
        return " to ".join(_when(moment) for moment in value)
    return str(versions.get(value, value) if isinstance(value, str) else value)


def _words(kind: str) -> str:
    return kind.replace("_", " ")


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:12]


def _when(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
