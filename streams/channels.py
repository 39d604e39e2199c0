"""Seed events: the items that stand for what a visitor is after, one a channel. Pure, like `streams.sessions`.

Algorithm 1 of XPert (SIGIR 2023). An event whose item has a global cluster lets the weight of every channel fall to
gamma of it and gives one to the channel of that cluster. The newest item represents its channel, and only the heaviest
channels survive. Done lazily: a channel keeps its weight as it was when it was last touched, and how many events came
since, so an event touches its own channel only. The items of a session are applied when it closes, by event time:
seeds are read nowhere else, and so the order of arrival cannot change them.
"""

from collections.abc import Iterable
from math import log
from typing import TYPE_CHECKING, Protocol

import msgspec

from streams.settings import Settings
from streams.wire import Seed

if TYPE_CHECKING:  # who sessionizes without a bundle needs no table of items
    from models.items import RetrieverConfig

SAME_GAMMA = 0.0005  # what is as near as that to another one makes no other seeds
NO_CHANNELS = msgspec.Raw(b"\xc0")  # null: what is kept of a visitor who never touched a known item


class ItemClusters(Protocol):
    """What a table of items says (`models.items.ItemClusters`)."""

    def cluster(self, item_id: str) -> int | None:
        """The item's global cluster; None for an item that the table does not know."""
        ...


class Kept(msgspec.Struct, array_like=True, gc=False):
    """A channel in the visitor's record. Its cluster is its item's, looked up anew: so another table maps it anew."""

    item_id: str  # the newest
    ts_ms: int  # of that item
    weight: float  # when it was last touched
    age: int  # events with a known item since then


# A channel at work: rank, when it was touched, weight then, item, time of the item, cluster. The rank is the log of the
# weight that it would have had at event 0, as all decay alike since; of two with the same rank the older is the lesser.
_Channel = tuple[float, int, float, str, int, int]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[Kept] | None).decode


def to_put_right(settings: Settings, chosen: "RetrieverConfig") -> list[str]:
    """The settings with which sessions would get the seeds that a bundle's retriever was trained with."""
    rule = chosen.seeding
    if chosen.ranker in ("popularity", "counts"):  # which look at no seeds
        return []
    found = [f"BROWSECAST_SEEDS={rule.policy}"] if rule.policy != settings.seeds else []
    if rule.most != settings.seed_events:
        found.append(f"BROWSECAST_SEED_EVENTS={rule.most}")
    if rule.policy == "channels" and abs(rule.gamma - settings.seed_gamma) > SAME_GAMMA:
        found.append(f"BROWSECAST_SEED_GAMMA={rule.gamma:.6g}")
    if rule.policy == "channels" and rule.protect != settings.seed_protect:
        found.append(f"BROWSECAST_SEED_PROTECT={str(rule.protect).lower()}")
    return found


def channels_of(kept: msgspec.Raw) -> list[Kept]:
    """The channels in a visitor's record, the last touched at the end."""
    return _decode(kept) or []


class Channels:
    """Picks the seed events of visitors, at most `most` each.

    `gamma` is in (0, 1]. With `protect` a channel survives the event that touches it, even when all others are
    heavier; the printed algorithm does not say so. With `recency` each item is a channel of its own and only its
    newest event counts, which makes the seeds the last items touched.
    """

    def __init__(
        self, clusters: ItemClusters, gamma: float, most: int, protect: bool = True, recency: bool = False
    ) -> None:
        self._cluster, self._gamma, self._fall = clusters.cluster, gamma, log(gamma)
        self._most, self._protect, self._recency = most, protect, recency

    @classmethod
    def of(cls, settings: Settings, clusters: ItemClusters) -> "Channels":
        """As the settings say."""
        return cls(
            clusters, settings.seed_gamma, settings.seed_events, settings.seed_protect, settings.seeds == "recency"
        )

    def update(self, kept: msgspec.Raw, events: Iterable[tuple[str | None, int]]) -> tuple[msgspec.Raw, list[Seed]]:
        """What to keep of the visitor after a session, and the seeds, heaviest first.

        `events` are the session's in order: item, if any, and time in epoch milliseconds. Items without a cluster
        count for nothing.
        """
        channels: dict[int | str, _Channel] = {}  # in the order of their last touch
        for one in channels_of(kept):
            cluster = self._cluster(one.item_id)
            if cluster is not None:
                self._touch(channels, one.item_id, one.ts_ms, cluster, -one.age, one.weight)
        now = 0
        for item_id, ts_ms in events:
            cluster = None if item_id is None else self._cluster(item_id)
            if item_id is not None and cluster is not None:
                now += 1
                self._touch(channels, item_id, ts_ms, cluster, now, 1.0)
        if not channels:
            return NO_CHANNELS, []
        gamma = self._gamma
        records = [
            (item_id, ts_ms, weight, now - touched) for _, touched, weight, item_id, ts_ms, _ in channels.values()
        ]
        seeds = [
            Seed(item_id, cluster, weight * gamma ** (now - touched), ts_ms)
            for _, touched, weight, item_id, ts_ms, cluster in sorted(channels.values(), reverse=True)
        ]
        return msgspec.Raw(_encode(records)), seeds

    def _touch(
        self,
        channels: dict[int | str, _Channel],
        item_id: str,
        ts_ms: int,
        cluster: int,
        touched: int,
        weight: float,
    ) -> None:
        """Give the item's channel some weight. `touched`: the number of the event, higher than all before."""
        place = item_id if self._recency else cluster
        before = channels.pop(place, None)
        if self._recency:
            weight = 1.0
        elif before is not None:
            weight += before[2] * self._gamma ** (touched - before[1])
        channel = (log(weight) - touched * self._fall, touched, weight, item_id, ts_ms, cluster)
        if len(channels) == self._most:
            least = min(channels, key=channels.__getitem__)
            if not self._protect and channel < channels[least]:
                return
            del channels[least]
        channels[place] = channel
