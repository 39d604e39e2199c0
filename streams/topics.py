"""The topics that Browsecast needs: create them, say what is wrong with those that are there, and how to mend it."""

import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import structlog
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, ClusterMetadata
from kafka.admin import ConfigResource, KafkaAdminClient
from kafka.errors import KafkaError, TopicAlreadyExistsError

from streams import clients, wire
from streams.errors import BrokerUnavailable, WrongTopics
from streams.settings import DAY_MS, Settings

ROLES = ("sessionize", "predict", "score")
MOCK_CLUSTER = "mockCluster"  # how the cluster id of librdkafka's mock begins
KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
MIN_CLICK_BYTES = 300 * KIB  # events of up to 256 KiB are used
MIN_SESSION_BYTES = 4 * MIB
MIN_CHANGELOG_BYTES = 8 * MIB
MIN_RETENTION_MS = DAY_MS
# Where a null value must hold for good, as items of a bundle's table are shown until it is read. A hundred years, since
# Kafka adds it to the time of day, and the largest number it takes would overflow.
FOR_GOOD_MS = 36_500 * DAY_MS
FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.5, 15.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is off with a topic, and how to mend it."""

    topic: str
    what: str
    mend: str

    def __str__(self) -> str:
        return f"{self.topic}: {self.what}. To mend it: {self.mend}"


@dataclass(frozen=True, slots=True)
class Spec:
    """What a topic must be, and the settings it is created with. Sizes in bytes."""

    compacted: bool
    min_message_bytes: int
    configs: dict[str, str]


def specs(settings: Settings, roles: Iterable[str] = ROLES) -> dict[str, Spec]:
    """Every topic by its full name: those of the wire, then the changelogs of `roles`."""
    # A replayed record has the time of its event, so a limit by time would delete an old log while it is read.
    kept = {"retention.ms": "-1", "retention.bytes": str(10 * GIB)}
    month = {"retention.ms": str(30 * DAY_MS)}
    small = Spec(False, 0, month)
    found = {name: small for name in (wire.LATE, wire.PREDICTIONS, wire.SCORES)}
    found[wire.CLICKS] = Spec(False, MIN_CLICK_BYTES, kept)
    found[wire.REJECTED] = Spec(False, 2 * MIN_CLICK_BYTES, month | {"max.message.bytes": str(3 * MIB)})
    found[wire.SESSIONS] = Spec(False, MIN_SESSION_BYTES, month | {"max.message.bytes": str(MIN_SESSION_BYTES)})
    found[wire.MODELS] = Spec(True, 0, {})
    found[wire.ITEMS] = Spec(True, 0, {"delete.retention.ms": str(FOR_GOOD_MS)})
    topics = {settings.topic(name): found[name] for name in wire.TOPICS}
    changelog = {"max.message.bytes": str(MIN_CHANGELOG_BYTES), "segment.bytes": str(64 * MIB)}
    return topics | {settings.changelog(role): Spec(True, MIN_CHANGELOG_BYTES, changelog) for role in roles}


def wait_for_broker(settings: Settings, timeout_s: float | None) -> ClusterMetadata:
    """Return the cluster's metadata once a broker answers; None waits for ever. BrokerUnavailable after `timeout_s`."""
    admin = AdminClient(clients.librdkafka(settings) | {"log_level": 0})
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    backoff = FIRST_BACKOFF_S
    while True:
        try:
            return admin.list_topics(timeout=min(timeout_s or LAST_BACKOFF_S, 5.0))
        except KafkaException as error:
            reason = error.args[0].str()
        if deadline is not None and time.monotonic() >= deadline:
            raise BrokerUnavailable(
                f"no Kafka broker answered at {settings.bootstrap_servers} within {timeout_s:g} s ({reason}). Start it "
                "or name another with --bootstrap-servers or BROWSECAST_BOOTSTRAP_SERVERS; check the security settings"
            )
        log.warning(
            "waiting for the broker", bootstrap_servers=settings.bootstrap_servers, reason=reason, again_s=backoff
        )
        time.sleep(backoff * random.uniform(0.8, 1.2))
        backoff = min(2 * backoff, LAST_BACKOFF_S)


def create(settings: Settings, timeout_s: float = 30.0) -> list[str]:
    """Create the topics that are missing and return their names; those that are there stay as they are."""
    there = wait_for_broker(settings, timeout_s).topics
    missing = {name: spec for name, spec in specs(settings).items() if name not in there}
    if not missing:
        return []
    wanted = {
        name: {
            "num_partitions": settings.partitions,
            "replication_factor": settings.replication_factor,
            "configs": spec.configs | _common(settings, spec),
        }
        for name, spec in missing.items()
    }
    with _admin(settings) as admin:
        try:
            admin.create_topics(wanted, raise_errors=True)
            admin.wait_for_topics(list(wanted))
        except TopicAlreadyExistsError:  # somebody else creates them too
            pass
        except KafkaError as error:
            raise WrongTopics(
                f"the broker at {settings.bootstrap_servers} did not create {', '.join(wanted)}: {error}. "
                "Check REPLICATION_FACTOR against the number of brokers, and the right to create topics"
            ) from error
    return list(wanted)


def check(settings: Settings, roles: Iterable[str] = ROLES, timeout_s: float | None = 30.0) -> list[Problem]:
    """Everything that is off with the topics that `roles` need; empty when all is well."""
    cluster = wait_for_broker(settings, timeout_s)
    wanted = specs(settings, roles)
    found = [problem for name in wanted for problem in _shape_problems(name, cluster, settings)]
    there = [name for name in wanted if name in cluster.topics]
    if str(cluster.cluster_id).startswith(MOCK_CLUSTER):
        log.info("in-process broker: it has no topic settings, so only the partitions were checked")
        return found
    configs = _configs(settings, there)
    found += [problem for name in there for problem in _config_problems(name, wanted[name], configs, settings)]
    return found


def require(settings: Settings, roles: Iterable[str] = ROLES, timeout_s: float | None = None) -> None:
    """Raise WrongTopics with every problem that `check` finds."""
    problems = check(settings, roles, timeout_s)
    if problems:
        raise WrongTopics("the topics are not as they must be:\n" + "\n".join(f"  - {problem}" for problem in problems))


def retention_ms(settings: Settings, name: str = wire.CLICKS) -> int | None:
    """How long the topic keeps records, by their own time; None when for ever, or when the broker does not say."""
    cluster = wait_for_broker(settings, 30.0)
    topic = settings.topic(name)
    if str(cluster.cluster_id).startswith(MOCK_CLUSTER) or topic not in cluster.topics:
        return None
    limit = int(_configs(settings, [topic])[topic].get("retention.ms", -1))
    return limit if limit >= 0 else None


def alter_command(settings: Settings, topic: str, name: str, value: str | int) -> str:
    """The command of Kafka's own tools that sets one setting of a topic."""
    if "," in str(value):
        value = f"[{value}]"
    return _tool(
        settings, "kafka-configs.sh", f"--alter --entity-type topics --entity-name {topic} --add-config {name}={value}"
    )


def _common(settings: Settings, spec: Spec) -> dict[str, str]:
    policy = "compact" if spec.compacted else "delete"
    return {"cleanup.policy": policy, "min.insync.replicas": str(settings.min_insync_replicas)}


def _admin(settings: Settings) -> Any:
    return KafkaAdminClient(
        **clients.kafka_python(settings), client_id="browsecast-topics", bootstrap_timeout_ms=30_000
    )


def _tool(settings: Settings, tool: str, arguments: str) -> str:
    secure = "" if settings.security_protocol == "PLAINTEXT" else " --command-config client.properties"
    return f"{tool} --bootstrap-server {settings.bootstrap_servers}{secure} {arguments}"


def _shape_problems(name: str, cluster: ClusterMetadata, settings: Settings) -> Iterator[Problem]:
    """Is it there, with the right number of partitions and replicas?"""
    topic = cluster.topics.get(name)
    if topic is None:
        options = f" --topic-prefix {settings.topic_prefix}" if settings.topic_prefix else ""
        yield Problem(
            name, "missing", f"browsecast topics create --bootstrap-servers {settings.bootstrap_servers}{options}"
        )
        return
    partitions = len(topic.partitions)
    if partitions != settings.partitions:
        if partitions < settings.partitions:
            grow = _tool(settings, "kafka-topics.sh", f"--alter --topic {name} --partitions {settings.partitions}")
        else:
            delete = _tool(settings, "kafka-topics.sh", f"--delete --topic {name}")
            grow = f"{delete} and then browsecast topics create"
        yield Problem(
            name,
            f"{partitions} partitions, but the setting PARTITIONS is {settings.partitions}",
            f"if all topics have {partitions}, set BROWSECAST_PARTITIONS={partitions}; otherwise, only while no user's "
            f"state is kept yet, {grow}",
        )
    replicas = min((len(partition.replicas) for partition in topic.partitions.values()), default=0)
    if replicas < settings.replication_factor:
        yield Problem(
            name,
            f"{replicas} replicas, but the setting REPLICATION_FACTOR is {settings.replication_factor}",
            f"set BROWSECAST_REPLICATION_FACTOR={replicas}, or add replicas with "
            + _tool(settings, "kafka-reassign-partitions.sh", "--reassignment-json-file FILE --execute"),
        )


def _configs(settings: Settings, names: list[str]) -> dict[str, dict[str, str]]:
    """The settings in force of each topic."""
    with _admin(settings) as admin:
        found = admin.describe_configs([ConfigResource("topic", name) for name in names], config_filter="all")
    topics = found.get("topic", {})
    return {name: {key: entry["value"] for key, entry in topics.get(name, {}).items()} for name in names}


def _config_problems(
    name: str, spec: Spec, configs: dict[str, dict[str, str]], settings: Settings
) -> Iterator[Problem]:
    config = configs[name]

    def problem(key: str, what: str, value: str | int) -> Problem:
        return Problem(name, f"{key} is {config.get(key)}, {what}", alter_command(settings, name, key, value))

    if not config:
        yield Problem(name, "its settings cannot be read", "grant this user DescribeConfigs on the topic")
        return
    policy = "compact" if spec.compacted else "delete"
    if config.get("cleanup.policy") != policy:
        reason = "it must be compact and nothing else, or state is lost" if spec.compacted else "it must be delete"
        yield problem("cleanup.policy", reason, policy)
    if int(config.get("min.insync.replicas", 1)) < settings.min_insync_replicas:
        yield problem("min.insync.replicas", "less than MIN_INSYNC_REPLICAS", settings.min_insync_replicas)
    least = spec.min_message_bytes
    clicks = settings.topic(wire.CLICKS)
    if name == settings.topic(wire.REJECTED) and clicks in configs:
        least = max(least, 2 * int(configs[clicks].get("max.message.bytes", 0)) + 1)
    if int(config.get("max.message.bytes", least)) < least:
        yield problem("max.message.bytes", f"it must be at least {least}", least)
    retention = int(config.get("retention.ms", -1))
    if not spec.compacted and 0 <= retention < MIN_RETENTION_MS:
        yield problem("retention.ms", f"records may vanish unread; it must be -1 or at least {MIN_RETENTION_MS}", -1)
    removed = int(spec.configs.get("delete.retention.ms", 0))
    if int(config.get("delete.retention.ms", removed)) < removed:
        yield problem(
            "delete.retention.ms", "after which removed items come back; remove again those that have", removed
        )
    if config.get("message.timestamp.type", "CreateTime") != "CreateTime":
        yield problem("message.timestamp.type", "replays need the events' own time", "CreateTime")
