"""The command line: it parses and calls, and holds no logic. Heavy imports are inside the commands, so help is fast."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streams import modelcli
from streams.cliwords import Prefix, Servers, settings_of

if TYPE_CHECKING:
    from streams.settings import Settings

EPILOG = (
    "Exit codes: 0 done · 1 something else went wrong · 2 wrong option, file or log · 3 topics missing or wrong · "
    "4 no broker · 5 bundle refused · 6 state directory unusable · 7 a transaction or write failed · 8 worker stalled. "
    "Settings: browsecast settings"
)

app = typer.Typer(
    name="browsecast",
    help="Click events in, next-session predictions and scores out, each exactly once.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
topics_app = typer.Typer(help="Create and check the topics.", no_args_is_help=True)
rejected_app = typer.Typer(help="Look at rejected events, and send them again.", no_args_is_help=True)
user_app = typer.Typer(help="Show or forget one visitor.", no_args_is_help=True)
app.add_typer(topics_app, name="topics")
app.add_typer(rejected_app, name="rejected")
app.add_typer(user_app, name="user")
items_app = typer.Typer(
    help="Items to put before visitors: publish, remove, judge how they are retrieved.", no_args_is_help=True
)
app.add_typer(items_app, name="items")
app.add_typer(modelcli.models_app, name="models")
app.add_typer(modelcli.trainer_app, name="trainer")


class Role(StrEnum):
    """What a worker may do."""

    sessionize = "sessionize"
    predict = "predict"
    score = "score"


class Clock(StrEnum):
    """What moves event time."""

    live = "live"
    log = "log"


Profile = Annotated[str | None, typer.Option("--profile", metavar="NAME|FILE", help="Site profile.")]
Reason = Annotated[str | None, typer.Option("--reason", metavar="CODE", help="Only events rejected for this reason.")]


def main() -> None:
    """Entry point: a known error becomes one red line and its exit code."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # we draw our own progress; the libraries' bars would go across it
    try:
        app()
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if not isinstance(code, int):
            raise
        from streams.screens import complain

        complain(error)
        sys.exit(code)


@app.command()
def demo(
    bootstrap_servers: Servers = None,
    directory: Annotated[Path, typer.Option(help="Where the demo keeps its files.")] = Path("demo"),
    visitors: Annotated[int, typer.Option(min=20, help="Visitors of the made-up shop.")] = 300,
) -> None:
    """Run everything on made-up and real logs: train on the past, replay the rest, watch scores and models change.

    Without --bootstrap-servers it starts an in-process broker and needs nothing else.
    """
    from streams import demo as demonstration
    from streams.aliases import Aliases
    from trainer import decisions
    from trainer.fit import train as fit
    from trainer.options import TrainOptions
    from trainer.registry import Registry
    from trainer.retrieval_options import XPertOptions

    def train_small(sessions: Path, bundle: Path, progress: Any) -> None:
        retrieval = XPertOptions(**demonstration.RETRIEVAL)
        fit(sessions, bundle, TrainOptions(**demonstration.TRAINING, retrieval=retrieval), progress)

    def publish(settings: "Settings", bundle: Path) -> None:
        grounds = decisions.by_hand("trained on the past")
        decisions.publish(Registry(settings.registry), Aliases(settings), bundle, grounds)

    settings = settings_of(bootstrap_servers=bootstrap_servers)
    options = demonstration.Options(directory, visitors, own_broker=bootstrap_servers is None)
    demonstration.run(settings, options, demonstration.Models(train_small, publish))


@app.command()
def worker(
    role: Annotated[list[Role] | None, typer.Option(help="What it does; repeat for several. All by default.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="Model bundle that predicts.")] = None,
    clock: Annotated[
        Clock | None, typer.Option(help="live: quiet partitions run at wall speed; log: only events move time.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port of /live, /ready and /metrics; 0 takes a free one.")] = None,
    host: Annotated[str | None, typer.Option(help="Address of that port.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Where RocksDB keeps the state.")] = None,
    profile: Profile = None,
    bootstrap_servers: Servers = None,
    topic_prefix: Prefix = None,
) -> None:
    """Run a worker until SIGTERM or SIGINT, which drain it."""
    settings = settings_of(
        bundle=bundle,
        clock=clock and clock.value,
        port=port,
        host=host,
        state_dir=state_dir,
        profile=profile,
        bootstrap_servers=bootstrap_servers,
        topic_prefix=topic_prefix,
    )
    from streams import worker as running

    running.run(settings, [chosen.value for chosen in role or Role])


@topics_app.command("create")
def topics_create(bootstrap_servers: Servers = None, topic_prefix: Prefix = None) -> None:
    """Create the topics that are missing; those that are there stay as they are."""
    from streams import topics

    settings = settings_of(bootstrap_servers=bootstrap_servers, topic_prefix=topic_prefix)
    created = topics.create(settings)
    for name in created:
        typer.echo(f"created {name}")
    if not created:
        typer.echo("nothing to create")
    topics.require(settings)


@topics_app.command("check")
def topics_check(bootstrap_servers: Servers = None, topic_prefix: Prefix = None) -> None:
    """Name each thing that is off with the topics, and how to mend it. Exit code 3 if anything is."""
    from streams import topics

    topics.require(settings_of(bootstrap_servers=bootstrap_servers, topic_prefix=topic_prefix), timeout_s=30.0)
    typer.echo("all topics are as they must be")


@app.command()
def publish(
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="JSON lines; - reads standard input.")] = "-",
    bootstrap_servers: Servers = None,
    topic_prefix: Prefix = None,
) -> None:
    """Publish events to clicks, one JSON object a line."""
    from streams import playing

    playing.publish(settings_of(bootstrap_servers=bootstrap_servers, topic_prefix=topic_prefix), file)


@app.command()
def replay(
    log: Annotated[str, typer.Argument(help="A file or a directory of files, gzip too; - reads standard input.")],
    profile: Profile = None,
    speed: Annotated[
        str, typer.Option(metavar="N|max", help="Event time over wall time: 60 plays an hour a minute.")
    ] = "max",
    sessions: Annotated[
        Path | None, typer.Option(help="Cut the sessions into this directory instead; needs no Kafka.")
    ] = None,
    bootstrap_servers: Servers = None,
    topic_prefix: Prefix = None,
) -> None:
    """Play a log through Kafka, or cut its sessions off line into Parquet. Both ways give the same sessions."""
    from streams import playing

    settings = settings_of(profile=profile, bootstrap_servers=bootstrap_servers, topic_prefix=topic_prefix)
    playing.replay(settings, log, speed, sessions)


@app.command()
def watch(
    count: Annotated[int | None, typer.Option(min=1, help="End after this many records.")] = None,
    from_beginning: Annotated[bool, typer.Option("--from-beginning", help="Show what is there already, too.")] = False,
    bootstrap_servers: Servers = None,
    topic_prefix: Prefix = None,
) -> None:
    """Show predictions and scores as they come, with the running hit rate and log losses."""
    from streams import screens, watching

    settings = settings_of(bootstrap_servers=bootstrap_servers, topic_prefix=topic_prefix)
    screens.show_watch(watching.watch(settings, from_beginning=from_beginning, count=count))


@rejected_app.command("show")
def rejected_show(
    limit: Annotated[int, typer.Option(min=1, help="How many, the newest.")] = 20,
    reason: Reason = None,
    bootstrap_servers: Servers = None,
    topic_prefix: Prefix = None,
) -> None:
    """Show rejected events: why, where, and how they began."""
    from streams import rejected, screens

    settings = settings_of(bootstrap_servers=bootstrap_servers, topic_prefix=topic_prefix)
    screens.show(screens.rejected_table(rejected.last(settings, limit, reason)))


@rejected_app.command("resend")
def rejected_resend(
    reason: Reason = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what would be sent.")] = False,
    bootstrap_servers: Servers = None,
    topic_prefix: Prefix = None,
) -> None:
    """Publish rejected events to clicks again, unchanged, each once however often this is called."""
    from streams import rejected

    settings = settings_of(bootstrap_servers=bootstrap_servers, topic_prefix=topic_prefix)
    sent = rejected.resend(settings, reason, dry_run=dry_run)
    for code, events in sent.most_common():
        typer.echo(f"{code}\t{events}")
    typer.echo(f"{sent.total()} events {'would be sent' if dry_run else 'sent'} again")


@user_app.command("show")
def user_show(user_id: str, bootstrap_servers: Servers = None, topic_prefix: Prefix = None) -> None:
    """Print what is kept of a visitor, as JSON."""
    import msgspec

    from streams import users
    from streams.errors import UsageError

    state = users.show(settings_of(bootstrap_servers=bootstrap_servers, topic_prefix=topic_prefix), user_id)
    if state is None:
        raise UsageError(f"nothing is kept of user {user_id!r}")
    typer.echo(msgspec.json.format(msgspec.json.encode(state.lines())))


@user_app.command("forget")
def user_forget(user_id: str, bootstrap_servers: Servers = None, topic_prefix: Prefix = None) -> None:
    """Have every table forget a visitor, by a null value in clicks."""
    from streams import users

    settings = settings_of(bootstrap_servers=bootstrap_servers, topic_prefix=topic_prefix)
    partition, offset = users.forget(settings, user_id)
    typer.echo(
        f"user {user_id} will be forgotten when the workers reach {settings.topic('clicks')}/{partition}@{offset}"
    )


@items_app.command("publish")
def items_publish(
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="JSON lines; - reads standard input.")] = "-",
    bootstrap_servers: Servers = None,
    topic_prefix: Prefix = None,
) -> None:
    """Publish items, one JSON object a line; one that is there already is replaced as a whole."""
    from streams import playing

    playing.publish_items(settings_of(bootstrap_servers=bootstrap_servers, topic_prefix=topic_prefix), file)


@items_app.command("remove")
def items_remove(
    item_ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Items that are no more.")],
    bootstrap_servers: Servers = None,
    topic_prefix: Prefix = None,
) -> None:
    """Have items forgotten, by null values in the topic items."""
    from streams import itemtopic

    itemtopic.remove(settings_of(bootstrap_servers=bootstrap_servers, topic_prefix=topic_prefix), item_ids)
    typer.echo(f"{len(item_ids)} items removed")


app.command()(modelcli.train)
app.command()(modelcli.evaluate)
items_app.command("evaluate")(modelcli.items_evaluate)


@app.command()
def schema(topic: Annotated[str | None, typer.Argument(help="One topic; all by default.")] = None) -> None:
    """Print the JSON Schema of what goes over the wire."""
    import msgspec

    from streams.errors import UsageError
    from streams.schema import schemas

    found = schemas()
    if topic is not None and topic not in found:
        raise UsageError(f"there is no topic {topic!r}; there are {', '.join(found)}")
    typer.echo(msgspec.json.format(msgspec.json.encode(found if topic is None else found[topic])))


@app.command()
def settings() -> None:
    """List every setting: its variable, value, where that came from, and what it means. Secrets are masked."""
    from streams import provenance, screens

    screens.show(screens.settings_table(provenance.listing(settings_of())))


if __name__ == "__main__":
    main()
