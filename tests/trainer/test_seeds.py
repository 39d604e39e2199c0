"""Seeds off line are those that the stream keeps."""

from math import exp

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.channels import NO_CHANNELS, Channels
from tests.streams.itemtable import Clusters
from tests.trainer.clicked import by_days, by_place
from trainer.interactions import NONE
from trainer.items import aligned, click_space
from trainer.retrieval_options import XPertOptions
from trainer.seeds import Seeds, channel_seeds, recent_seeds
from trainer.slates import World

CLUSTERS = {item: item % 7 for item in range(18)}  # 18, 19 and 20 are unknown
events_of = st.lists(st.integers(0, 20), max_size=80)
gammas = st.sampled_from([0.3, 0.9, exp(-0.08), 1.0])


@settings(max_examples=200, deadline=None)
@given(events_of, gammas, st.integers(1, 8), st.booleans(), st.booleans())
def test_the_same_seeds_and_weights_as_on_line(
    events: list[int], gamma: float, most: int, protect: bool, recency: bool
) -> None:
    table = Clusters({str(item): cluster for item, cluster in CLUSTERS.items()})
    live = Channels(table, gamma, most, protect, recency)
    _, wanted = live.update(NO_CHANNELS, [(str(item), ts) for ts, item in enumerate(events)])
    if recency:
        found = recent_seeds(events, CLUSTERS, gamma, most)
    else:
        found = channel_seeds(events, CLUSTERS, gamma, most, protect)
    assert [str(item) for item, _ in found] == [seed.item_id for seed in wanted]
    assert [weight for _, weight in found] == pytest.approx([seed.weight for seed in wanted], rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(events_of, st.integers(1, 8))
def test_where_each_item_is_its_own_cluster_a_fast_decay_is_recency(events: list[int], most: int) -> None:
    own = {item: item for item in CLUSTERS}
    channels, last = channel_seeds(events, own, 0.3, most), recent_seeds(events, own, 0.3, most)
    assert [item for item, _ in channels] == [item for item, _ in last]


def test_a_history_of_20_000_events_does_not_underflow() -> None:
    found = channel_seeds([0] + [1, 2] * 10_000, CLUSTERS, exp(-0.08), 3)
    assert [item for item, _ in found] == [2, 1, 0]


def test_seeds_of_cases_are_those_of_their_histories() -> None:
    for task in (by_place(), by_days()):
        spaces, _ = aligned(click_space(task.known(snapshot), width=8) for snapshot in range(len(task.snapshots)))
        for policy in ("channels", "recency"):
            world = World(task, spaces, XPertOptions(seeds=3, policy=policy, clusters=5))
            found = world.seeds(task.test)
            assert found.items.shape == found.weights.shape == (len(task.test), 3)
            for row in range(len(task.test)):
                clusters = world.clusters(int(task.test.snapshot[row]))
                pick = channel_seeds if policy == "channels" else recent_seeds
                wanted = pick(task.test.history(row).tolist(), clusters, exp(-0.08), 3)
                assert found.items[row].tolist() == [item for item, _ in wanted] + [NONE] * (3 - len(wanted))


def test_rows_are_padded() -> None:
    found = Seeds.of([[(4, 2.0)], []], 2)
    assert found.items.tolist() == [[4, NONE], [NONE, NONE]]
    np.testing.assert_array_equal(found.weights, [[2, 0], [0, 0]])
