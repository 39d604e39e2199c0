"""Waves: which rollouts decode together, so that little is padded and, on a GPU, shapes are few."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from models.language_model import SMALLEST_BUCKET, Ensemble, bucket

MANY = 16_384  # prompt tokens: more in a wave, and its length is worth a shape of its own


class Branch(NamedTuple):
    """The rollouts of one visit that one cluster of the network makes."""

    visit: int
    cluster: int
    prompt: Sequence[int]  # ends with [BOS]
    rollouts: np.ndarray  # which of the visit's R
    greedy: bool  # and the most likely session too


@dataclass(frozen=True)
class Pace:
    """How waves are cut: a matter of speed and memory alone."""

    lanes: int  # most rollouts of a wave
    cache: int  # most bytes of its keys and values
    narrow: int  # rows that are worth a wave of their own, of like length
    few: int  # so few padded rollouts, of so few padded tokens of prompts, go in one wave, whatever their shapes
    short: int
    small: int  # so few padded rollouts go in one wave, whatever their clusters
    filled: float  # else clusters share a wave when so much of it is no padding
    check: int  # steps between two looks at what has ended
    compact: float  # lanes are dropped when fewer than this share goes on


CPU = Pace(lanes=2048, cache=1 << 28, narrow=48, few=512, short=4_096, small=256, filled=2.0, check=1, compact=0.4)
GPU = Pace(lanes=32_768, cache=1 << 34, narrow=512, few=0, short=0, small=4_096, filled=0.75, check=4, compact=0.5)


def on_gpu(device: torch.device) -> Pace:
    """GPU, on a card with less memory too: a wave's cache takes an eighth of it at most."""
    return replace(GPU, cache=min(GPU.cache, torch.cuda.get_device_properties(device).total_memory // 8))


def waves(
    branches: Sequence[Branch], steps: int, models: Ensemble, pace: Pace
) -> list[tuple[int, int, list[list[Branch]]]]:
    """Branches that decode together: first and last cluster (exclusive), and the branches of each between.

    They are alike in length and in number of rollouts, so little is padded, unless there are so few that a wave more
    costs more than the padding.
    """
    alike: dict[tuple[int, int], list[Branch]] = {}
    for branch in branches:
        shape = (bucket(length(branch)), rung(1 + len(branch.rollouts)))
        alike.setdefault(shape, []).append(branch)
    found = []
    for columns, group in _gathered(sorted(alike.items()), pace):
        for part in _routed(group, columns, models, pace):
            for wave in _cut(sorted(part, key=length), columns, steps, models, pace):
                by_cluster = _by_cluster(wave)
                first, last = min(by_cluster), max(by_cluster) + 1
                found.append((first, last, [by_cluster.get(cluster, []) for cluster in range(first, last)]))
    return found


def _gathered(alike: Sequence[tuple[tuple[int, int], list[Branch]]], pace: Pace) -> Iterator[tuple[int, list[Branch]]]:
    """Columns and branches of each group, of (length, columns) in ascending order; small ones that follow are one."""
    rows: list[Branch] = []
    most = longest = 0
    for (wide, columns), group in alike:
        together = len(rows) + len(group)
        small = together * max(most, columns) <= pace.few and together * max(longest, wide) <= pace.short
        if rows and not small:
            yield most, rows
            rows, most, longest = [], 0, 0
        rows, most, longest = [*rows, *group], max(most, columns), max(longest, wide)
    if rows:
        yield most, rows


def _routed(group: list[Branch], columns: int, models: Ensemble, pace: Pace) -> list[list[Branch]]:
    """All clusters together where few rows would be padding, else each by itself."""
    by_cluster = _by_cluster(group)
    padded = (max(by_cluster) + 1 - min(by_cluster)) * max(map(len, by_cluster.values()))
    dense = padded * columns <= pace.small or len(group) >= pace.filled * padded
    return [group] if models.stacked and dense else [by_cluster[cluster] for cluster in sorted(by_cluster)]


def _cut(rows: list[Branch], columns: int, steps: int, models: Ensemble, pace: Pace) -> Iterator[list[Branch]]:
    """Waves of rows in order of length: as many as fit, and of one length where there are enough of it."""
    start, bytes_each = 0, models.token_bytes
    for end in range(1, len(rows) + 1):
        count = end - start
        if end < len(rows):
            wide, following = (length_rung(length(branch)) for branch in rows[end - 1 : end + 1])
            room = (count + 1) * (following + columns * steps) * bytes_each
            full = (count + 1) * columns > pace.lanes or room > pace.cache
            if not full and not (wide < following and count >= pace.narrow):
                continue
        yield rows[start:end]
        start = end


def _by_cluster(branches: Sequence[Branch]) -> dict[int, list[Branch]]:
    found: dict[int, list[Branch]] = {}
    for branch in branches:
        found.setdefault(branch.cluster, []).append(branch)
    return found


def length(branch: Branch) -> int:
    """Tokens of its prompt."""
    return len(branch.prompt)


def rung(count: int) -> int:
    """The power of two that bounds `count`."""
    return 1 << max(count - 1, 0).bit_length()


def row_rung(count: int) -> int:
    """Rows of static shapes: powers of two, and from 64 on eight between a power of two and the next."""
    step = rung(count) // 16 if count > 64 else rung(count)
    return -(-count // step) * step


def length_rung(length: int) -> int:
    """Lengths of static shapes: four between a power of two and the next, multiples of 16."""
    step = max(16, rung(length) // 8)
    return -(-length // step) * step


def width_rung(rows: int, longest: int) -> int:
    """To what length prompts are padded: few shapes for small waves, little padding for big ones."""
    return length_rung(longest) if rows * longest > MANY else max(SMALLEST_BUCKET, rung(longest))
