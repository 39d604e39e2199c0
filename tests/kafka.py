"""A real Kafka broker for tests and benchmarks: a container where a Docker daemon answers, else Kafka's published jars.

It can be killed and started again on the same port with the same data. The jars are fetched once, through Maven, into
~/.cache/browsecast. Creation of topics sets short segments, so that changelogs are really compacted while a test runs.
"""

import base64
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, NewTopic

from streams.settings import Settings
from streams.topics import specs

VERSION = "4.1.0"
CACHE = Path.home() / ".cache" / "browsecast"
START_SECONDS = 90
POM = """<project><modelVersion>4.0.0</modelVersion><groupId>browsecast</groupId><artifactId>broker</artifactId>
<version>1</version><dependencies>
<dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{version}</version></dependency>
<dependency><groupId>org.apache.logging.log4j</groupId><artifactId>log4j-slf4j-impl</artifactId><version>2.24.3</version>
</dependency></dependencies></project>
"""
# A broker that lives for a minute on two cores spends more on its optimising compiler than that gives back.
BRIEF = ("-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
LASTING = ("-Xms1g", "-Xmx1g", "-XX:+UseSerialGC")
# What a single node needs: internal topics without replicas and few partitions, no waiting for a group's first members,
# a cleaner that works at once, and no deletion by time, since the tests' events are years old.
NODE = {
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "4",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "group.initial.rebalance.delay.ms": "0",
    "broker.session.timeout.ms": "4000",
    "broker.heartbeat.interval.ms": "1000",
    "auto.create.topics.enable": "false",
    "log.retention.ms": "-1",
    "log.cleaner.backoff.ms": "1000",
    "log.cleaner.dedupe.buffer.size": "16777216",
}
COMPACTED = {"cleanup.policy": "compact", "segment.ms": "5000", "min.cleanable.dirty.ratio": "0.01"}


class Unavailable(Exception):
    """There is no way to a real broker here; the message says what is missing."""


class Kafka(Protocol):
    """One broker. `kill` is SIGKILL; `restart` brings it back on the same port, with the same data."""

    bootstrap_servers: str

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...
    def restart(self) -> None: ...


class JarKafka:
    """Apache Kafka in KRaft mode as a Java process of this machine."""

    def __init__(self, jvm: Sequence[str] = BRIEF, secure: Mapping[str, str] | None = None) -> None:
        """Fetch the jars if need be and choose free ports. Raises `Unavailable` without Java 17 or Maven.

        `jvm` are Java's options, `secure` those of a second listener, SECURE, that asks for TLS and SASL, at
        `secure_servers`.
        """
        self._libraries = _jars()
        self._java = shutil.which("java") or "java"
        self._directory = Path(tempfile.mkdtemp(prefix="browsecast-kafka-"))
        self._jvm = jvm
        self._process: subprocess.Popen[bytes] | None = None
        client, controller, secured = _free_ports(3)
        self.bootstrap_servers, self.secure_servers = f"127.0.0.1:{client}", f"127.0.0.1:{secured}"
        listeners = f"PLAINTEXT://{self.bootstrap_servers}"
        if secure is not None:
            listeners += f",SECURE://{self.secure_servers}"
        settings = NODE | {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "controller.listener.names": "CONTROLLER",
            "listeners": f"{listeners},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": listeners,
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SECURE:SASL_SSL",
            "log.dirs": str(self._directory / "data"),
            **{f"listener.name.secure.{name}": value for name, value in (secure or {}).items()},
        }
        self._config = self._directory / "server.properties"
        self._config.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))

    def start(self) -> None:
        """Format the data directory, start, and wait until clients get an answer."""
        self._run_tool("kafka.tools.StorageTool", "format", "-t", _cluster_id(), "-c", str(self._config))
        self.restart()

    def restart(self) -> None:
        """Start again on the same port and data, after `kill`; nothing happens if it runs."""
        if self._process is not None and self._process.poll() is None:
            return
        with (self._directory / "broker.log").open("ab") as log:
            command = [self._java, *self._jvm, "-cp", self._classpath]
            self._process = subprocess.Popen([*command, "kafka.Kafka", str(self._config)], stdout=log, stderr=log)
        wait_until_up(self.bootstrap_servers, self._process, self._directory / "broker.log")

    def kill(self) -> None:
        """End the broker as a power cut would end its process."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End the broker and remove its data."""
        self._end(signal.SIGTERM)
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def _classpath(self) -> str:
        return f"{self._libraries}{os.sep}*"

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(how)
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _run_tool(self, name: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._java, *BRIEF, "-cp", self._classpath, name, *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Unavailable(f"{name} failed (is Java 17 or later first on the path?): {done.stderr[-500:]}")


class DockerKafka:
    """The official image on a fixed port of this machine."""

    def __init__(self) -> None:
        """Describe the container. Raises `Unavailable` if no Docker daemon answers."""
        try:
            import docker
            from testcontainers.core.container import DockerContainer

            docker.from_env(timeout=5).ping()
        except Exception as error:  # the client's errors have no common root
            raise Unavailable(f"no Docker daemon answers ({error})") from error
        (port,) = _free_ports(1)
        self.bootstrap_servers = f"127.0.0.1:{port}"
        container = DockerContainer(f"apache/kafka:{VERSION}").with_bind_ports(19092, port)
        settings = NODE | {
            "node.id": "1",
            "process.roles": "broker,controller",
            "controller.quorum.voters": "1@localhost:9093",
            "controller.listener.names": "CONTROLLER",
            "listeners": "PLAINTEXT://0.0.0.0:19092,CONTROLLER://localhost:9093",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{port}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        }
        for name, value in settings.items():
            container = container.with_env("KAFKA_" + name.upper().replace(".", "_"), value)
        self._container: Any = container

    def start(self) -> None:
        """Start the container and wait until clients get an answer."""
        self._container.start()
        wait_until_up(self.bootstrap_servers)

    def stop(self) -> None:
        """Remove the container and its data."""
        self._container.stop()

    def kill(self) -> None:
        """End the broker as a power cut would end its process; the container's data stays."""
        self._container.get_wrapped_container().kill()

    def restart(self) -> None:
        """Start the killed container again; nothing happens if it runs."""
        self._container.get_wrapped_container().start()
        wait_until_up(self.bootstrap_servers)


def open_kafka(jvm: Sequence[str] = BRIEF) -> Kafka:
    """A started broker, from Docker or from the jars with these options. Raises `Unavailable` with both reasons."""
    reasons = []
    kinds: tuple[Callable[[], Kafka], ...] = (DockerKafka, lambda: JarKafka(jvm))
    for kind in kinds:
        try:
            kafka = kind()
        except Unavailable as error:
            reasons.append(str(error))
            continue
        try:
            kafka.start()
        except BaseException:  # also when interrupted: no broker without an owner stays behind
            kafka.stop()
            raise
        return kafka
    raise Unavailable("no real Kafka: " + "; ".join(reasons))


def create_topics(settings: Settings) -> None:
    """Create every topic as `browsecast topics create` does, but compacted at once and never deleted by time."""
    wanted = {
        name: spec.configs | (COMPACTED if spec.compacted else {"retention.ms": "-1"})
        for name, spec in specs(settings).items()
    }
    admin = AdminClient({"bootstrap.servers": settings.bootstrap_servers})
    topics = [NewTopic(name, settings.partitions, 1, config=config) for name, config in wanted.items()]
    for future in admin.create_topics(topics).values():
        future.result(30)


def wait_until_up(
    bootstrap_servers: str, process: subprocess.Popen[bytes] | None = None, log: Path | None = None
) -> None:
    """Return once the broker answers a client. Raises `Unavailable` with the end of its log if it does not."""
    client = AdminClient({"bootstrap.servers": bootstrap_servers, "log_level": 0})
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and (process is None or process.poll() is None):
        try:
            if client.list_topics(timeout=2).brokers:
                return
        except KafkaException:
            time.sleep(0.2)
    tail = log.read_text(errors="replace")[-1500:] if log is not None else ""
    raise Unavailable(f"the broker at {bootstrap_servers} did not come up: {tail}")


def _jars() -> Path:
    """The directory of Kafka's jars, fetched through Maven on first use."""
    target = CACHE / f"kafka-{VERSION}"
    if target.is_dir():
        return target
    if shutil.which("java") is None or shutil.which("mvn") is None:
        raise Unavailable("neither Docker nor Java 17 with Maven is installed")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        Path(scratch, "pom.xml").write_text(POM.format(version=VERSION))
        command = ["mvn", "-q", "-B", "dependency:copy-dependencies", "-DoutputDirectory=jars"]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"Maven could not fetch Kafka {VERSION}: {done.stdout[-800:]}")
        os.replace(Path(scratch, "jars"), target)  # all or nothing: a broken download leaves no half cache
    return target


def _cluster_id() -> str:
    """A random id in Kafka's form: 22 characters of URL-safe base64 of 16 bytes."""
    return base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "a")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()
