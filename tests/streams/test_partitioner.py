from aiokafka.partitioner import DefaultPartitioner
from hypothesis import given
from hypothesis import strategies as st
from kafka.partitioner.default import murmur2 as kafka_murmur2

from streams.partitioner import murmur2, partition_of


@given(st.binary(max_size=80))
def test_hash_is_that_of_kafka(key: bytes) -> None:
    assert murmur2(key) == kafka_murmur2(key) & 0xFFFFFFFF


@given(st.text(min_size=1, max_size=20), st.integers(1, 64))
def test_partition_is_that_of_kafka(user: str, partitions: int) -> None:
    key, every = user.encode(), list(range(partitions))
    assert partition_of(key, partitions) == DefaultPartitioner()(key, every, every)


def test_known_values() -> None:
    """From Kafka's own UtilsTest."""
    assert [murmur2(key) - (1 << 32) for key in (b"21", b"foobar")] == [-973932308, -790332482]
    assert murmur2(b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8") == -58897971 + (1 << 32)
