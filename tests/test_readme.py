"""The README may not promise what is not there, nor keep quiet about what is."""

import re
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from streams import tail, wire
from streams.events import EventDecoder
from streams.metrics import Metrics
from streams.profilefile import ProfileFile
from streams.profiles import SiteProfile, ready_profiles
from streams.settings import CONFIG_VARIABLE, Settings
from tests.streams.test_cli import commands
from trainer.trainermetrics import TrainerMetrics

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
PYTHON = [body for language, body in BLOCKS if language == "python"]


def called() -> set[str]:
    """Each `browsecast ...` of the text, as the command's words."""
    known = commands()
    groups = {words.split()[0] for words in known if " " in words}
    found = set()
    for first, second in re.findall(r"\bbrowsecast ([a-z]+)(?: ([a-z]+))?", README):
        both = f"{first} {second}"
        found.add(both if both in known or (first in groups and first not in known) else first)
    return found - {"is"}


def test_every_command_is_in_the_readme_and_every_command_in_the_readme_exists() -> None:
    assert called() == set(commands())


def test_every_option_in_the_readme_exists() -> None:
    options = {option for of_command in commands().values() for option in of_command}
    for benchmark in (ROOT / "benchmarks").glob("*.py"):
        options |= set(re.findall(r'add_argument\("(--[a-z-]+)"', benchmark.read_text()))
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - {"--build", "--detach"}  # docker's
    assert mentioned <= options


def test_every_variable_in_the_readme_is_a_setting() -> None:
    variables = {f"BROWSECAST_{name.upper()}" for name in Settings.model_fields} | {CONFIG_VARIABLE}
    mentioned = set(re.findall(r"BROWSECAST_[A-Z_]+", README))
    assert mentioned
    assert mentioned <= variables


def test_every_metric_in_the_readme_exists() -> None:
    collected = {
        metric.name + ("_total" if metric.type == "counter" else "")
        for metric in (*Metrics().registry.collect(), *TrainerMetrics().registry.collect())
    }
    mentioned = set(re.findall(r"`(browsecast_[a-z_]+[a-z])`", README))
    assert mentioned
    assert mentioned <= collected


def test_every_topic_and_every_ready_profile_is_in_the_readme() -> None:
    assert all(f"`{topic}`" in README for topic in wire.TOPICS)
    assert all(f"`{profile}`" in README for profile in ready_profiles())


def test_every_make_target_in_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake (demo|test|help|bench)\b", README)) <= targets


def test_the_site_profile_of_the_readme_is_valid() -> None:
    (profile,) = (body for language, body in BLOCKS if language == "toml")
    site = SiteProfile(msgspec.toml.decode(profile.encode(), type=ProfileFile))
    assert site.page("https://shop.example/cart?x=1") == "/cart"
    assert site.page("/style.css") is None


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_the_python_is_python_and_short(number: int) -> None:
    compile(PYTHON[number], "README.md", "exec")
    assert len(PYTHON[number].strip().splitlines()) <= 11


@pytest.mark.kafka
def test_the_producer_of_the_readme_publishes_an_event_that_is_taken(settings_for: Callable[..., Settings]) -> None:
    settings = settings_for(partitions=2)
    topic = settings.topic(wire.CLICKS)
    exec(PYTHON[0].replace("localhost:9092", settings.bootstrap_servers).replace('"clicks"', f'"{topic}"'), {})
    (message,) = tail.until_end(settings, topic)
    event, _ = EventDecoder(SiteProfile(), settings.ahead_ms).decode(
        message.key(), message.value(), message.timestamp()[1]
    )
    assert (event.user_id, event.page, event.event_id) == ("u-1", "/shoes/42", "e-1")
