"""Fixtures that the whole tree shares: one real broker, and settings of its own for every test on it."""

import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from streams.settings import Settings
from tests.bundle import make_bundle
from tests.kafka import Kafka, Unavailable, create_topics, open_kafka

_numbers = itertools.count()
K = TypeVar("K", bound=Kafka)


def or_skip(opening: Callable[[], K]) -> K:
    """The broker, or the test is skipped with the reason; where a real broker is required it fails."""
    try:
        return opening()
    except Unavailable as reason:
        if os.environ.get("CI", "").lower() == "true" or os.environ.get("BROWSECAST_TEST_KAFKA") == "required":
            pytest.fail(f"a real broker is required here: {reason}")
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def kafka() -> Iterator[Kafka]:
    """A real broker for all tests. A machine without one skips them with the reason; CI must have one."""
    broker = or_skip(open_kafka)
    try:
        yield broker
    finally:
        broker.stop()


@pytest.fixture
def settings_for(kafka: Kafka, request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Settings]:
    """Settings on the real broker with topics of their own, made and compacted; each call is a new deployment."""

    def make(topics: bool = True, **changes: Any) -> Settings:
        name = re.sub(r"\W+", "-", request.node.name)[:60]
        settings = Settings(
            bootstrap_servers=kafka.bootstrap_servers,
            topic_prefix=f"{name}-{next(_numbers)}.",
            state_dir=tmp_path / "state",
            **changes,
        )
        if topics:
            create_topics(settings)
        return settings

    return make


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One real model bundle for all tests, made in seconds."""
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def sessionize_settings(settings_for: Callable[..., Settings]) -> Callable[[], Settings]:
    """Deployments with short gaps and timeouts, in which only the log moves time."""

    def make() -> Settings:
        return settings_for(
            partitions=4,
            gap_ms=60_000,
            grace_ms=10_000,
            ahead_ms=600_000,
            session_timeout_ms=6_000,
            clock="log",
            flush_ms=200,
            flush_events=500,
        )

    return make
