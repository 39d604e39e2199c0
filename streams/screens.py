"""What the command line draws: tables for a terminal, plain lines for a pipe."""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from datetime import UTC, datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from streams.provenance import Setting
from streams.rejected import Reject
from streams.watching import Record, Watch, describe

ORIGINAL_CHARACTERS = 60
PIPE_COLUMNS = 240


def settings_table(settings: Iterable[Setting]) -> Table:
    """Name, variable, value, source and meaning of every setting."""
    table = Table("setting", "variable", "value", "from", "what it means", header_style="bold")
    for setting in settings:
        style = None if setting.source == "default" else "green"
        name, variable, value = Text(setting.name), Text(setting.variable, "dim"), Text(setting.value, style or "")
        table.add_row(name, variable, value, Text(setting.source, style or "dim"), Text(setting.description))
    return table


def rejected_table(rejects: Iterable[Reject]) -> Table:
    """Reason, place in `clicks`, message and the start of the original."""
    table = Table("reason", "came", "place", "message", "original", header_style="bold")
    for reject in rejects:
        record = reject.record
        original = reject.original or b""
        shown = original[:ORIGINAL_CHARACTERS].decode("utf-8", "backslashreplace")
        more = "…" if len(original) > ORIGINAL_CHARACTERS else ""
        came = datetime.fromtimestamp(reject.timestamp_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
        place = f"{record.topic}/{record.partition}@{record.offset}"
        table.add_row(Text(record.reason, "yellow"), came, place, Text(record.message), Text(shown + more, "dim"))
    return table


def watch_screen(watch: Watch) -> RenderableType:
    """The last records, and the running means below."""
    table = Table("", "user", "pages", "cart", "purchase", header_style="bold", expand=True)
    for record in watch.rows:
        kind, *rest = describe(record)
        style = "cyan" if kind == "prediction" else "green" if rest[1].startswith("hit") else "red"
        table.add_row(Text(kind, style), *(Text(cell) for cell in rest))
    return Group(table, Text(watch_summary(watch), "bold"))


def watch_line(record: Record) -> str:
    """One record as a line of tab-separated words."""
    return "\t".join(describe(record))


def watch_summary(watch: Watch) -> str:
    """Counts and running means in one line."""
    parts = [f"{watch.predictions} predictions ({watch.fallbacks} fallbacks)", f"{watch.running.scores} scores"]
    parts += [f"{name} {value:.3f}" for name, value in watch.running.means().items()]
    if watch.forgotten:
        parts.append(f"{watch.forgotten} users forgotten")
    return "   ".join(parts)


def complain(error: Exception) -> None:
    """An error in red on standard error, without a traceback."""
    Console(stderr=True).print(Text(f"error: {error}", "red"), soft_wrap=True)


class TokenSpeedColumn(ProgressColumn):
    """Tokens a second of a training phase; empty for any other work."""

    def render(self, task: Task) -> Text:
        """The task's field `tokens_per_s`."""
        speed = task.fields.get("tokens_per_s")
        return Text("" if speed is None else f"{speed:,.0f} tokens/s", "cyan")


def progress() -> Progress:
    """A progress bar on standard error, shown on a terminal only."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(show_speed=True),
        TokenSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def show(content: RenderableType) -> None:
    """A table on standard output; in a pipe it is as wide as it needs to be."""
    console = Console()
    Console(width=None if console.is_terminal else PIPE_COLUMNS).print(content)


def show_watch(records: Iterator[tuple[Watch, Record | None]]) -> None:
    """Live on a terminal, plain lines in a pipe; the summary at the end, also after Ctrl-C."""
    console = Console()
    last = Watch()
    with Live(console=console, refresh_per_second=8) if console.is_terminal else nullcontext() as live:
        try:
            for last, record in records:
                if live is not None:
                    live.update(watch_screen(last))
                elif record is not None:
                    print(watch_line(record), flush=True)
        except KeyboardInterrupt:
            pass
    print(watch_summary(last))
