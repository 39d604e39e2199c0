"""Kafka's default partitioner, so that work off line sees the partitions that a topic would have.

murmur2 (Appleby 2008, 32-bit variant) with the seed of Kafka's `org.apache.kafka.common.utils.Utils.murmur2`.
"""

from functools import lru_cache

SEED = 0x9747B28C
FACTOR = 0x5BD1E995
MASK = 0xFFFFFFFF
CACHED_KEYS = 65_536


def murmur2(data: bytes) -> int:
    """The unsigned 32-bit hash of `data`."""
    length = len(data)
    value = (SEED ^ length) & MASK
    whole = length & ~3
    for at in range(0, whole, 4):
        word = int.from_bytes(data[at : at + 4], "little") * FACTOR & MASK
        word = (word ^ (word >> 24)) * FACTOR & MASK
        value = (value * FACTOR & MASK) ^ word
    if length & 3:
        value = (value ^ int.from_bytes(data[whole:], "little")) * FACTOR & MASK
    value = (value ^ (value >> 13)) * FACTOR & MASK
    return value ^ (value >> 15)


@lru_cache(CACHED_KEYS)
def partition_of(key: bytes, partitions: int) -> int:
    """The partition, of `partitions`, that every Kafka client chooses for `key`."""
    return (murmur2(key) & 0x7FFFFFFF) % partitions
