"""Kafka's protocol in this process, for the demo and for tests: librdkafka's mock cluster through its C symbols."""

import ctypes
import ctypes.util
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import confluent_kafka

from streams.errors import BrokerUnavailable

_PRODUCER = 0  # rd_kafka_type_t
_ERROR_BYTES = 512


class MockCluster:
    """A broker without Java or Docker: groups, commits and transactional calls work, and every client can connect.

    It lives in librdkafka's threads of this process, so workers may be processes of their own. Its limits:

    - It keeps the last 5 MiB of a partition, in memory; older records vanish without a word.
    - Topics come from `create_topic` alone: there is no CreateTopics, DescribeConfigs or ListGroups for clients.
    - Nothing is compacted, and nothing survives `close`.
    - Transactions are accepted but not atomic: aborted records stay, and transactional offsets are ignored.

    Use it as a context manager. Raises `BrokerUnavailable` if librdkafka's library cannot be loaded.
    """

    def __init__(self, topics: dict[str, int] | None = None, brokers: int = 1, rebalance_delay_ms: int = 100) -> None:
        """Start `brokers` brokers with `topics` (name -> partitions); a new group waits `rebalance_delay_ms`."""
        self._library = _load()
        message = ctypes.create_string_buffer(_ERROR_BYTES)
        settings = self._library.rd_kafka_conf_new()
        # The handle only carries the cluster: without this it warns that it has no broker of its own.
        self._library.rd_kafka_conf_set(settings, b"log_level", b"3", message, _ERROR_BYTES)
        handle = self._library.rd_kafka_new(_PRODUCER, settings, message, _ERROR_BYTES)
        if not handle:
            raise BrokerUnavailable(f"librdkafka did not start: {message.value.decode()}")
        self._handle: int | None = handle
        self._cluster = self._library.rd_kafka_mock_cluster_new(handle, brokers)
        if not self._cluster:
            raise BrokerUnavailable("librdkafka could not open its mock cluster on 127.0.0.1: is a port free?")
        self._library.rd_kafka_mock_group_initial_rebalance_delay_ms(self._cluster, rebalance_delay_ms)
        self.bootstrap_servers: str = self._library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()
        for name, partitions in (topics or {}).items():
            self.create_topic(name, partitions)

    def create_topic(self, name: str, partitions: int) -> None:
        """Create a topic; raises `BrokerUnavailable` if it exists already."""
        code = self._library.rd_kafka_mock_topic_create(self._cluster, name.encode(), partitions, 1)
        if code:
            raise BrokerUnavailable(f"the mock cluster refused topic {name!r} (librdkafka error {code}): is it there?")

    def close(self) -> None:
        """Stop the brokers and free the memory; a second call does nothing."""
        if self._handle is not None:
            self._library.rd_kafka_mock_cluster_destroy(self._cluster)
            self._library.rd_kafka_destroy(self._handle)
            self._handle = None

    def __enter__(self) -> "MockCluster":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _candidates() -> Iterator[str]:
    """Where wheels of confluent-kafka put librdkafka (Linux, Windows, macOS), then the system's own."""
    package = Path(confluent_kafka.__file__).parent
    for folder in (package.parent / "confluent_kafka.libs", package / ".dylibs", package):
        yield from (str(path) for path in sorted(folder.glob("*rdkafka[-.]*")) if path.suffix != ".py")
    system = ctypes.util.find_library("rdkafka")
    if system is not None:
        yield system


def _load() -> ctypes.CDLL:
    for path in _candidates():
        try:
            library = ctypes.CDLL(path)
            _declare(library)
        except (OSError, AttributeError):  # not a library for this machine, or one built without the mock cluster
            continue
        return library
    raise BrokerUnavailable(
        "librdkafka's library was not found beside the package confluent_kafka, so there is no in-process broker: "
        "install confluent-kafka from its wheel, or name a broker with --bootstrap-servers HOST:PORT"
    )


def _declare(library: ctypes.CDLL) -> None:
    """Tell ctypes the signatures: without them pointers are cut to 32 bits."""
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    for name, result, arguments in (
        ("rd_kafka_conf_new", pointer, ()),
        ("rd_kafka_conf_set", number, (pointer, text, text, text, ctypes.c_size_t)),
        ("rd_kafka_new", pointer, (number, pointer, text, ctypes.c_size_t)),
        ("rd_kafka_destroy", None, (pointer,)),
        ("rd_kafka_mock_cluster_new", pointer, (pointer, number)),
        ("rd_kafka_mock_cluster_destroy", None, (pointer,)),
        ("rd_kafka_mock_cluster_bootstraps", text, (pointer,)),
        ("rd_kafka_mock_topic_create", number, (pointer, text, number, number)),
        ("rd_kafka_mock_group_initial_rebalance_delay_ms", None, (pointer, ctypes.c_int32)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, list(arguments)
