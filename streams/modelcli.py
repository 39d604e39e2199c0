"""The commands of those who make models: train, evaluate, trainer, models. Like `streams.cli`, it holds no logic."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from streams.cliwords import Device, Prefix, Servers, settings_of

if TYPE_CHECKING:
    from streams.aliases import Aliases
    from streams.settings import Settings
    from streams.wire import ModelDecision
    from trainer.registry import Registry
    from trainer.service import Connections, ServiceOptions

models_app = typer.Typer(help="Published models: see, promote, roll back, tidy up.", no_args_is_help=True)
trainer_app = typer.Typer(help="Archive sessions, refresh the models, judge challengers.", invoke_without_command=True)


class TrainerRole(StrEnum):
    """What a trainer may do."""

    archive = "archive"
    judge = "judge"
    refresh = "refresh"


RegistryAt = Annotated[
    str | None, typer.Option("--registry", metavar="ADDRESS", help="A directory or an address of fsspec.")
]
Why = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Told by `models show` ever after.")]


def train(
    sessions: Annotated[Path, typer.Option(help="Directory of session files; with --log they are cut into it first.")],
    bundle: Annotated[Path, typer.Option(help="Directory of the bundle to write.")],
    recipe: Annotated[Path | None, typer.Option(help="A TOML file with all that is below, and more.")] = None,
    log: Annotated[str | None, typer.Option(help="A log to cut by the recipe into training and test first.")] = None,
    mode: Annotated[str | None, typer.Option(metavar="behaviour|paper|kmeans", help="How clusters are found.")] = None,
    backend: Annotated[str | None, typer.Option(metavar="separate|lora|token", help="Who predicts.")] = None,
    clusters: Annotated[int | None, typer.Option(help="Of visitors; in behaviour validation chooses.")] = None,
    architecture: Annotated[str | None, typer.Option(metavar="opt|qwen2|llama", help="Kind of language model.")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Width of the model.")] = None,
    layers: Annotated[int | None, typer.Option(help="Depth of the model.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads.")] = None,
    pretrained: Annotated[Path | None, typer.Option(help="Local transformers model to start from.")] = None,
    encoder: Annotated[Path | None, typer.Option(help="Local all-MiniLM-L6-v2; the installed one by default.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Over all sessions.")] = None,
    fine_tune_epochs: Annotated[int | None, typer.Option(help="Over each cluster's sessions.")] = None,
    batch: Annotated[int | None, typer.Option(help="Visitors in a batch.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    rollouts: Annotated[int | None, typer.Option(help="Sampled sessions behind each prediction.")] = None,
    min_page_count: Annotated[int | None, typer.Option(help="Rarer pages become one.")] = None,
    items: Annotated[
        Path | None, typer.Option(help="JSON lines as in the topic items: texts of the items that sessions hold.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything that is random.")] = None,
    device: Annotated[Device | None, typer.Option(help="Where to train.")] = None,
    minutes: Annotated[float | None, typer.Option(help="No new step of gradient descent after this.")] = None,
) -> None:
    """Train a bundle from sessions. A run that was killed goes on where it was.

    A directory divided into train, validation and test is used as such; in any other all sessions are for training.
    """
    apart = ("sessions", "bundle", "recipe", "log")
    given = {name: value for name, value in locals().items() if value is not None and name not in ("apart", *apart)}
    given |= {"device": device.value} if device else {}
    from streams import screens
    from trainer.fit import train as fit
    from trainer.recipes import divide, read_recipe

    chosen = read_recipe(recipe, **given)
    for line in chosen.told:
        typer.echo(line)
    if log is not None:
        from streams import playing

        rules = chosen.sessions
        playing.replay(settings_of(profile=rules.profile, gap_ms=rules.gap_ms), log, playing.MAX, sessions / "cut")
        divided = divide(sessions / "cut", sessions, rules, chosen.options.seed)
        typer.echo(", ".join(f"{users:,} users to {part}" for part, users in divided.items()))
    with screens.progress() as progress:
        made = fit(sessions, bundle, chosen.options, progress)
    typer.echo(f"bundle {made}")


Recipe = Annotated[
    Path | None, typer.Option("--recipe", help="A TOML file that says how to train; else as the champion was trained.")
]


@trainer_app.callback()
def trainer(
    context: typer.Context,
    role: Annotated[
        list[TrainerRole] | None, typer.Option(help="What it does; repeat for several. All by default.")
    ] = None,
    recipe: Recipe = None,
    registry: RegistryAt = None,
    port: Annotated[int | None, typer.Option(help="Port of /metrics; 0 takes a free one.")] = None,
    host: Annotated[str | None, typer.Option(help="Address of that port.")] = None,
    bootstrap_servers: Servers = None,
    topic_prefix: Prefix = None,
) -> None:
    """Archive sessions, refresh the models and judge challengers, until SIGTERM or SIGINT.

    A trainer that was killed goes on where it was. `trainer once` does what there is to do now, and ends.
    """
    if context.invoked_subcommand is not None:
        return
    settings = settings_of(
        registry=registry,
        trainer_port=port,
        host=host,
        bootstrap_servers=bootstrap_servers,
        topic_prefix=topic_prefix,
    )
    from streams import topics
    from trainer import service

    topics.wait_for_broker(settings, None)
    roles: list[service.Role] = [chosen.value for chosen in role or TrainerRole]
    service.run(roles, *options_of(settings, recipe), settings.host, settings.trainer_port)


@trainer_app.command("once")
def trainer_once(
    recipe: Recipe = None,
    registry: RegistryAt = None,
    bootstrap_servers: Servers = None,
    topic_prefix: Prefix = None,
) -> None:
    """Archive to the present end, judge what is there, refresh the models once, and end: for cron."""
    settings = settings_of(registry=registry, bootstrap_servers=bootstrap_servers, topic_prefix=topic_prefix)
    from trainer import service

    typer.echo(service.once(*options_of(settings, recipe)))


def options_of(settings: "Settings", recipe: Path | None) -> "tuple[ServiceOptions, Connections]":
    """What a trainer works with, and what it is connected to."""
    from streams import itemtopic
    from streams.aliases import Aliases
    from streams.bundles import local
    from streams.feed import Feed
    from trainer.archiver import Upkeep
    from trainer.refresh_options import DAY_MS, RefreshOptions
    from trainer.service import Connections, ServiceOptions
    from trainer.trial import Rules

    s = settings
    refresh = RefreshOptions(
        sessions=s.refresh_sessions,
        every_ms=s.refresh_ms,
        least=s.refresh_least,
        window_ms=s.window_days * DAY_MS,
        judged_share=s.judged_share,
        judged_users=s.judged_users,
        margin=s.refresh_margin,
        start=s.refresh_from,
        recipe=recipe,
        device=s.device,
    )
    options = ServiceOptions(
        directory=s.trainer_dir,
        archive=s.archive_dir,
        registry=s.registry,
        flush_ms=s.archive_flush_ms,
        flush_sessions=s.archive_flush_sessions,
        upkeep=Upkeep(s.archive_retention_days, s.archive_forget_ms),
        refresh=refresh,
        rules=Rules(
            alpha=s.judge_alpha,
            brier_margin=s.judge_margin,
            most_sessions=s.judge_sessions,
            visitor_sessions=s.judge_visitor_sessions,
            fall_alpha=s.judge_fall_alpha,
        ),
    )
    cache = s.trainer_dir / "bundles"
    connections = Connections(
        feed=lambda topic, role: Feed(s, topic, role),
        aliases=Aliases(s),
        fetch=lambda alias: local(alias.uri, alias.digest, cache),
        items=lambda path: itemtopic.save(s, path),
    )
    return options, connections


def evaluate(
    bundle: Annotated[Path, typer.Option(help="Directory of the bundle to judge.")],
    sessions: Annotated[Path, typer.Option(help="Session files that it was not trained on, or a divided directory.")],
    report: Annotated[Path, typer.Option(help="Directory for report.html, report.json and predictions.parquet.")],
    train: Annotated[Path | None, typer.Option(help="Sessions it was trained on, to fit the contenders.")] = None,
    contenders: Annotated[
        list[str] | None, typer.Option(metavar="fast|all|NAME", help="Fitted baselines beside it; repeat for several.")
    ] = None,
    bertscore: Annotated[bool, typer.Option("--bertscore", help="Compare paths as texts, too; takes minutes.")] = False,
    seed: Annotated[int, typer.Option(help="Of the resamples, and of contenders that are no language models.")] = 0,
    device: Annotated[Device, typer.Option(help="Where to predict.")] = Device.auto,
) -> None:
    """Judge a bundle beside its baselines on each visitor's last session.

    Of a directory divided into train and test the test is judged, and contenders are fitted on the rest.
    """
    from streams import screens
    from trainer import evaluate as judging

    chosen = contenders or ["fast"]
    with screens.progress() as progress:
        found = judging.evaluate(
            bundle, sessions, report, device.value, progress, seed, train, contenders=chosen, bertscore=bertscore
        )
    screens.show(judging.render(found))
    typer.echo(f"report {report / 'report.html'}")


def items_evaluate(
    recipe: Annotated[Path, typer.Option(help="A TOML file like those in recipes/items.")],
    log: Annotated[Path, typer.Option(help="The log that the recipe is for.")],
    report: Annotated[Path, typer.Option(help="Directory for retrieval.html, retrieval.json and retrieval.parquet.")],
    seed: Annotated[int, typer.Option(help="Of the resamples.")] = 0,
) -> None:
    """Fit retrievers on a log, let validation choose one, and judge it beside all others."""
    from streams import screens
    from trainer import retrieval

    found = retrieval.evaluate_items(recipe, log, report, screens.progress(), seed)
    screens.show(retrieval.render(found))
    typer.echo(f"report {report / 'retrieval.html'}")


@models_app.command("list")
def models_list(registry: RegistryAt = None, bootstrap_servers: Servers = None, topic_prefix: Prefix = None) -> None:
    """List the bundles of the registry, and what became of each."""
    from streams import modelscreens, screens

    found, aliases = _models(registry=registry, bootstrap_servers=bootstrap_servers, topic_prefix=topic_prefix)
    screens.show(modelscreens.bundles_table(found.bundles(), aliases.story()))


@models_app.command("show")
def models_show(bootstrap_servers: Servers = None, topic_prefix: Prefix = None) -> None:
    """Tell the story: who is champion and challenger, and each decision with its reason and evidence."""
    from streams import modelscreens, screens

    _, aliases = _models(bootstrap_servers=bootstrap_servers, topic_prefix=topic_prefix)
    screens.show(modelscreens.story_screen(aliases.story()))


@models_app.command("publish")
def models_publish(
    bundle: Annotated[Path, typer.Argument(help="Directory of a bundle that you trained.")],
    reason: Why = "published by hand",
    registry: RegistryAt = None,
    bootstrap_servers: Servers = None,
    topic_prefix: Prefix = None,
) -> None:
    """Publish a bundle as the challenger; as the champion where there is none."""
    from trainer import decisions

    found, aliases = _models(registry=registry, bootstrap_servers=bootstrap_servers, topic_prefix=topic_prefix)
    ref = decisions.publish(found, aliases, bundle, decisions.by_hand(reason))
    typer.echo(f"published {ref.version} at {ref.uri}")


@models_app.command("promote")
def models_promote(
    name: Annotated[str | None, typer.Argument(help="How its version or digest begins; the challenger else.")] = None,
    reason: Why = "promoted by hand",
    registry: RegistryAt = None,
    bootstrap_servers: Servers = None,
    topic_prefix: Prefix = None,
) -> None:
    """Make a published bundle the champion, after a check of every byte of it."""
    from trainer import decisions

    found, aliases = _models(registry=registry, bootstrap_servers=bootstrap_servers, topic_prefix=topic_prefix)
    seen = decisions.in_service(aliases.story())
    _tell(decisions.promote(found, aliases, name or seen.challenger, seen, decisions.by_hand(reason)))


@models_app.command("rollback")
def models_rollback(
    reason: Why = "rolled back by hand",
    registry: RegistryAt = None,
    bootstrap_servers: Servers = None,
    topic_prefix: Prefix = None,
) -> None:
    """Have the champion before this one come back; one that is gone or damaged is passed over."""
    from trainer import decisions

    found, aliases = _models(registry=registry, bootstrap_servers=bootstrap_servers, topic_prefix=topic_prefix)
    seen = decisions.in_service(aliases.story())
    _tell(decisions.roll_back(found, aliases, seen, decisions.by_hand(reason)))


@models_app.command("verify")
def models_verify(
    name: Annotated[str | None, typer.Argument(help="How its version or digest begins; all by default.")] = None,
    registry: RegistryAt = None,
    bootstrap_servers: Servers = None,
    topic_prefix: Prefix = None,
) -> None:
    """Check every byte of published bundles, and open them. Exit code 5 if one is refused."""
    from trainer import decisions

    found, aliases = _models(registry=registry, bootstrap_servers=bootstrap_servers, topic_prefix=topic_prefix)
    checked = list(decisions.verify_all(found, aliases, name))
    for ref, error in checked:
        typer.echo(f"{ref.version} is whole" if error is None else str(error))
    if not checked:
        typer.echo(f"there are no bundles in registry {found.address}")
    if refused := [error for _, error in checked if error is not None]:
        raise typer.Exit(refused[0].exit_code)


@models_app.command("prune")
def models_prune(
    keep: Annotated[int, typer.Option(min=0, help="Former champions that stay, to roll back to.")] = 3,
    reason: Why = "pruned by hand",
    registry: RegistryAt = None,
    bootstrap_servers: Servers = None,
    topic_prefix: Prefix = None,
) -> None:
    """Remove all bundles but those that an alias names and the last former champions."""
    from trainer import decisions

    found, aliases = _models(registry=registry, bootstrap_servers=bootstrap_servers, topic_prefix=topic_prefix)
    gone = decisions.prune(found, aliases, keep, decisions.by_hand(reason))
    for ref in gone:
        typer.echo(f"removed {ref.version}")
    typer.echo(f"{len(gone)} bundles removed")


def _models(**given: Any) -> "tuple[Registry, Aliases]":
    from streams.aliases import Aliases
    from trainer.registry import Registry

    settings = settings_of(**given)
    return Registry(settings.registry), Aliases(settings)


def _tell(decisions: "Sequence[ModelDecision]") -> None:
    """The decisions that were written; none were if somebody else changed the models in service meanwhile."""
    from streams.errors import UsageError
    from streams.modelscreens import decision_line

    if not decisions:
        raise UsageError("nothing was changed: other models are in service by now. browsecast models show tells which")
    for decision in decisions:
        typer.echo(decision_line(decision))
