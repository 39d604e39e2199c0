from collections.abc import Callable

import pytest
from kafka.admin import ConfigResource, KafkaAdminClient

from streams import topics, wire
from streams.errors import BrokerUnavailable, WrongTopics
from streams.mock import MockCluster
from streams.settings import DAY_MS, Settings

NOWHERE = "127.0.0.1:1"


def names(settings: Settings) -> list[str]:
    return [settings.topic(name) for name in wire.TOPICS] + [settings.changelog(role) for role in topics.ROLES]


def test_every_topic_of_the_wire_and_every_changelog_has_a_spec() -> None:
    settings = Settings(topic_prefix="shop.")
    assert list(topics.specs(settings)) == names(settings)


def test_without_a_broker_the_wait_ends_with_its_address() -> None:
    with pytest.raises(BrokerUnavailable, match=NOWHERE):
        topics.wait_for_broker(Settings(bootstrap_servers=NOWHERE), 0.2)


def test_the_in_process_broker_is_checked_for_partitions_only() -> None:
    settings = Settings(partitions=3)
    with MockCluster({name: 3 for name in names(settings)}) as mock:
        settings = settings.but(bootstrap_servers=mock.bootstrap_servers)
        assert topics.check(settings) == []
        assert topics.retention_ms(settings) is None
        (*_, last) = topics.check(settings.but(partitions=4))
        assert (last.topic, "3 partitions" in last.what) == (names(settings)[-1], True)
        missing = topics.check(settings.but(topic_prefix="x."))
        assert {problem.what for problem in missing} == {"missing"}
        assert f"browsecast topics create --bootstrap-servers {mock.bootstrap_servers}" in missing[0].mend


@pytest.mark.kafka
def test_created_topics_pass_the_check_and_are_created_once(settings_for: Callable[..., Settings]) -> None:
    settings = settings_for(topics=False, partitions=3)
    with pytest.raises(WrongTopics, match="missing"):
        topics.require(settings, timeout_s=10.0)
    assert topics.create(settings) == names(settings)
    assert topics.create(settings) == []
    assert topics.check(settings) == []
    topics.require(settings, timeout_s=10.0)


@pytest.mark.kafka
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("topic", "name", "value", "words"),
    [
        ("clicks", "retention.ms", "1000", "retention.ms=-1"),
        ("clicks", "cleanup.policy", "compact", "cleanup.policy=delete"),
        ("clicks", "max.message.bytes", "2000000", "max.message.bytes=4000001"),
        ("clicks", "message.timestamp.type", "LogAppendTime", "message.timestamp.type=CreateTime"),
        ("sessions", "max.message.bytes", "1000000", "max.message.bytes=4194304"),
        ("models", "cleanup.policy", "compact,delete", "cleanup.policy=compact"),
        ("items", "cleanup.policy", "delete", "cleanup.policy=compact"),
        ("items", "delete.retention.ms", str(DAY_MS), "delete.retention.ms=3153600000000"),
        ("browsecast-score-state-changelog", "cleanup.policy", "delete", "cleanup.policy=compact"),
    ],
)
def test_each_wrong_setting_is_named_with_the_command_that_mends_it(
    settings_for: Callable[..., Settings], topic: str, name: str, value: str, words: str
) -> None:
    settings = settings_for(topics=False, partitions=1)
    topics.create(settings)
    with KafkaAdminClient(bootstrap_servers=settings.bootstrap_servers) as admin:
        admin.alter_configs([ConfigResource("topic", settings.topic(topic), {name: value})])
    problems: list[topics.Problem] = []
    while not problems:  # the broker applies a setting a moment after it has confirmed it; the test's timeout ends this
        problems = topics.check(settings)
    (problem,) = problems
    assert "kafka-configs.sh" in problem.mend
    assert problem.mend.endswith(words)


@pytest.mark.kafka
def test_what_the_settings_ask_for_is_checked(settings_for: Callable[..., Settings]) -> None:
    settings = settings_for(topics=False, partitions=2)
    topics.create(settings)
    problems = topics.check(settings.but(partitions=4, replication_factor=3, min_insync_replicas=2))
    of_clicks = [problem.what for problem in problems if problem.topic == settings.topic(wire.CLICKS)]
    assert len(of_clicks) == 3
    assert [word in what for word, what in zip(("PARTITIONS", "REPLICATION", "INSYNC"), of_clicks, strict=True)] == [
        True
    ] * 3
    assert topics.retention_ms(settings) is None
    assert topics.retention_ms(settings, wire.SCORES) == 30 * DAY_MS
