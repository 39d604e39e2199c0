"""Where each setting came from, for `browsecast settings`."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic_settings import DotEnvSettingsSource, EnvSettingsSource, TomlConfigSettingsSource

from streams.settings import CONFIG_VARIABLE, DEFAULT_CONFIG, Settings


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting; the value of a secret is masked."""

    name: str
    variable: str
    value: str
    source: str
    description: str


def listing(settings: Settings) -> Iterator[Setting]:
    """Every setting in the order of the declaration."""
    toml = Path(os.environ.get(CONFIG_VARIABLE, DEFAULT_CONFIG))
    given = (
        ("environment", EnvSettingsSource(Settings)()),
        (".env", DotEnvSettingsSource(Settings)()),
        (str(toml), TomlConfigSettingsSource(Settings, toml)()),
    )
    prefix = Settings.model_config.get("env_prefix", "")
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)  # a secret's text is asterisks
        came_from = next((source for source, values in given if name in values), "default")
        yield Setting(
            name, f"{prefix}{name}".upper(), "" if value is None else str(value), came_from, field.description or ""
        )
