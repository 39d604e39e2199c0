"""Seeds of a history, off line: what `streams.channels` keeps of the same events."""

from collections.abc import Iterable, Mapping
from math import log
from typing import NamedTuple

import numpy as np

from trainer.interactions import NONE


class Seeds(NamedTuple):
    """Up to s seeds of B cases, heaviest first."""

    items: np.ndarray  # (B, s) int32, -1 where there are fewer
    weights: np.ndarray  # (B, s) float32, 0 where there are fewer

    @classmethod
    def of(cls, rows: Iterable[list[tuple[int, float]]], most: int) -> "Seeds":
        """From (item, weight) of each case."""
        told = list(rows)
        items = np.full((len(told), most), NONE, dtype=np.int32)
        weights = np.zeros((len(told), most), dtype=np.float32)
        for row, seeds in enumerate(told):
            for place, (item, weight) in enumerate(seeds):
                items[row, place], weights[row, place] = item, weight
        return cls(items, weights)


def channel_seeds(
    events: Iterable[int], clusters: Mapping[int, int], gamma: float, most: int, protect: bool = True
) -> list[tuple[int, float]]:
    """The newest item of each of the heaviest channels, and the channel's weight (XPert, Algorithm 1), heaviest first.

    `events` are items, oldest first; those without a cluster count for nothing. Lazy: a channel keeps its weight as it
    was when last touched, and is ranked by the log of the weight that it would have had at event 0.
    """
    fall = log(gamma)
    channels: dict[int, tuple[float, int, float, int]] = {}  # cluster -> rank, touched, weight, item
    now = 0
    for item in events:
        cluster = clusters.get(item)
        if cluster is None:
            continue
        now += 1
        weight, before = 1.0, channels.pop(cluster, None)
        if before is not None:
            weight += before[2] * gamma ** (now - before[1])
        channel = (log(weight) - now * fall, now, weight, item)
        if len(channels) == most:
            least = min(channels, key=channels.__getitem__)
            if not protect and channel < channels[least]:
                continue
            del channels[least]
        channels[cluster] = channel
    heaviest = sorted(channels.values(), reverse=True)
    return [(item, weight * gamma ** (now - touched)) for _, touched, weight, item in heaviest]


def recent_seeds(events: Iterable[int], known: Mapping[int, int], gamma: float, most: int) -> list[tuple[int, float]]:
    """The distinct known items clicked last, newest first; each weighs what gamma has left of 1."""
    clicked = [item for item in events if item in known]
    newest: dict[int, int] = {}
    for age, item in enumerate(reversed(clicked)):
        newest.setdefault(item, age)
        if len(newest) == most:
            break
    return [(item, gamma**age) for item, age in newest.items()]
