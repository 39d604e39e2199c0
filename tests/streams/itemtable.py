"""A table of items from a plain mapping."""

from collections.abc import Mapping


class Clusters:
    """item -> cluster; all others are unknown."""

    def __init__(self, clusters: Mapping[str, int]) -> None:
        self.cluster = clusters.get
