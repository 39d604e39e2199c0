"""What several commands have in common: options, and the settings that they make of them."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from streams.settings import Settings


class Device(StrEnum):
    """Where a model runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


Servers = Annotated[str | None, typer.Option("--bootstrap-servers", metavar="HOST:PORT", help="Kafka brokers.")]
Prefix = Annotated[str | None, typer.Option("--topic-prefix", metavar="TEXT", help="Put before every topic's name.")]


def settings_of(**given: Any) -> "Settings":
    """The settings, with what was given on the command line; None was not given."""
    from pydantic import ValidationError

    from streams import logs
    from streams.errors import UsageError
    from streams.settings import Settings

    try:
        found = Settings(**{name: value for name, value in given.items() if value is not None})
    except (ValidationError, ValueError) as error:
        raise UsageError(_wrong(error)) from None
    logs.configure(found.log_level)
    return found


def _wrong(error: Exception) -> str:
    """What is wrong with the settings, without the values: one may be a secret."""
    errors = getattr(error, "errors", None)
    if errors is None:
        return f"the settings cannot be read: {error}. Check .env and browsecast.toml"
    found = (f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in errors(include_input=False))
    return "wrong settings: " + "; ".join(found) + ". browsecast settings lists them all, with their variables"
