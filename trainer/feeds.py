"""What the trainer needs of a topic: its committed records in order, from positions that the trainer keeps itself.

`streams.feed` reads Kafka this way; tests need no broker.
"""

from collections.abc import Mapping
from typing import Protocol

from streams.wire import Record


class Feed(Protocol):
    """All partitions of one topic, read by one reader. A position is the offset of the next record to read."""

    topic: str  # full name, prefix included

    def assign(self, positions: Mapping[int, int]) -> None:
        """Go on at these positions; a partition that is not named is read from its beginning."""

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        """The next records, those of a partition in the order of their offsets; none when nothing came in time."""

    def reached(self) -> dict[int, int]:
        """How far each partition has been read, Kafka's own control records included: compare this with `ends`."""

    def ends(self) -> dict[int, int]:
        """Where each partition ends now, for those who read committed."""

    def commit(self, positions: Mapping[int, int]) -> None:
        """Tell the broker's group, for lag tools only: nobody starts from there. Failing is no error."""

    def close(self) -> None:
        """Let go of the connection."""
