"""What the demo draws: the contest of each log, the champions one after the other, and what to type next."""

import os
import shutil
import sys
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from streams.contest import OURS, Contest
from streams.settings import Settings
from streams.succession import Succession, moment


def screen(contest: Contest, succession: Succession, line: str) -> RenderableType:
    """Everything so far, redrawn as it changes."""
    tables = [contest_table(name, contest) for name in contest.standings]
    return Group(*tables, champions_table(succession), Text(line, "dim"))


def contest_table(name: str, contest: Contest) -> Table:
    """Our predictions of one log beside the baselines'."""
    standing = contest.standings[name]
    title = f"{name}: {standing[OURS].pairs:,} predictions scored"
    table = Table(title=title, header_style="bold", title_justify="left")
    table.add_column("predictor", min_width=32)
    columns = ("hit\nrate", "IoU\n", "cart\nlog loss", "purchase\nlog loss")
    shown = len(columns) if contest.has_outcomes(name) else 2  # a site without a cart has no outcomes to predict
    for column in columns[:shown]:
        table.add_column(column, justify="right")
    for predictor, means in standing.items():
        style = "bold green" if predictor == OURS else ""
        table.add_row(predictor, *(f"{figure:.3f}" for figure in means.figures()[:shown]), style=style)
    return table


def champions_table(succession: Succession) -> Table:
    """A row for each model that has predicted, in the order of their reigns."""
    table = Table(title="by champion, all logs", header_style="bold", title_justify="left")
    table.add_column("champion", min_width=26)
    table.add_column("predicts after\nsessions since")
    for column in ("scored\n", "IoU\n", "IoU of the\nmost seen"):
        table.add_column(column, justify="right")
    for reign in succession.reigns.values():
        iou, other = reign.iou / max(reign.scores, 1), reign.baseline_iou / max(reign.compared, 1)
        table.add_row(reign.version, moment(reign.first_ms), f"{reign.scores:,}", f"{iou:.3f}", f"{other:.3f}")
    return table


def summary(
    console: Console, contest: Contest, succession: Succession, settings: Settings, own_broker: bool, seconds: float
) -> None:
    """The last word: all tables, and what to type next."""
    for name in contest.standings:
        console.print(contest_table(name, contest))
    console.print(champions_table(succession))
    if len(succession.reigns) > 1:
        console.print(
            "The demo shop moved to new addresses on the way, and the first champion did not know them: the last table "
            "tells the champions apart."
        )
    console.print(
        f"{contest.sessions:,} sessions, {contest.pairs:,} predictions scored, in {seconds:.0f} s. Higher hit rate and "
        "IoU are better, lower log loss is better."
    )
    command = Path(sys.argv[0]).name if shutil.which("browsecast") else os.path.relpath(sys.argv[0])
    broker = "HOST:9092" if own_broker else settings.bootstrap_servers
    if not own_broker:
        console.print(
            f"The demo's topics begin with {settings.topic_prefix} and are still there: why the models changed"
        )
        console.print(f"  {command} models show --topic-prefix {settings.topic_prefix} --bootstrap-servers {broker}")
    console.print("\nWith your own access log (other formats: see README, site profiles):\n", style="bold")
    for line in (
        f"{command} replay access.log --profile nasa --sessions sessions",
        f"{command} train --sessions sessions --bundle bundle",
        f"{command} topics create --bootstrap-servers {broker}",
        f"{command} models publish bundle --bootstrap-servers {broker}",
        f"{command} worker --clock log --bootstrap-servers {broker}",
        f"{command} trainer --bootstrap-servers {broker}",
        f"{command} replay access.log --profile nasa --speed 60 --bootstrap-servers {broker}",
        f"{command} watch --bootstrap-servers {broker}",
    ):
        console.print(f"  {line}", highlight=False, soft_wrap=True)
