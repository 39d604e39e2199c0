"""The lazy channels against Algorithm 1 as it is printed, and each rule that they add to it."""

import random
from collections.abc import Mapping, Sequence
from math import exp

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.items import Ranker, RetrieverConfig, SeedRule
from streams.channels import NO_CHANNELS, Channels, channels_of, to_put_right
from streams.settings import Settings
from streams.wire import Seed
from tests.oracle import last_items, naive_channels
from tests.streams.itemtable import Clusters

GAMMA = exp(-0.08)
CLUSTERS = {f"i{number}": number % 7 for number in range(21)}
EACH_ITS_OWN = {f"i{number}": number for number in range(21)}
bounded = settings(max_examples=150, deadline=None)
logs = st.lists(st.sampled_from([*CLUSTERS, None, "unknown"]), max_size=60)
gammas = st.sampled_from([0.3, 0.9, GAMMA, 0.99, 1.0])
sizes = st.integers(1, 9)


def channels(gamma: float = GAMMA, most: int = 3, clusters: Mapping[str, int] = CLUSTERS, **changes: bool) -> Channels:
    return Channels(Clusters(clusters), gamma, most, **changes)


def after(
    by: Channels, items: Sequence[str | None], kept: msgspec.Raw = NO_CHANNELS, start_ms: int = 0
) -> tuple[msgspec.Raw, list[Seed]]:
    return by.update(kept, zip(items, range(start_ms, start_ms + len(items)), strict=True))


def assert_same(seeds: Sequence[Seed], wanted: Sequence[tuple[str, int, float]]) -> None:
    assert [(seed.item_id, seed.channel) for seed in seeds] == [one[:2] for one in wanted]
    assert [seed.weight for seed in seeds] == pytest.approx([one[2] for one in wanted], rel=1e-9)


# ---------------------------------------------------------------- the printed algorithm


@bounded
@given(logs, gammas, sizes, st.booleans(), st.randoms(use_true_random=False))
def test_same_as_printed_at_every_prefix_and_through_any_restart(
    items: list[str | None], gamma: float, most: int, protect: bool, choose: random.Random
) -> None:
    """One event after the other through the stored bytes, all at once, and cut at random: always the same."""
    by, kept = channels(gamma, most, protect=protect), NO_CHANNELS
    for number, item in enumerate(items):
        kept, seeds = after(by, [item], kept, number)
        assert_same(seeds, naive_channels(items[: number + 1], CLUSTERS, gamma, most, protect))
    cut = choose.randint(0, len(items))
    in_two, seeds_in_two = after(by, items[cut:], after(by, items[:cut])[0], cut)
    assert after(by, items) == (in_two, seeds_in_two)
    assert bytes(in_two) == bytes(kept)


@pytest.mark.parametrize("most", [3, 5, 10])
def test_same_as_printed_beyond_20_000_events(most: int) -> None:
    """In sessions of ten. Three channels are never touched again: float64 would have lost them after 9,000 events."""
    choose = random.Random(most)
    long = ["i20", "i19", "i18"] + [f"i{choose.choice([0, 1, 7, 8])}" for _ in range(25_000)]
    by, kept, seeds = channels(most=most), NO_CHANNELS, list[Seed]()
    for start in range(0, len(long), 10):
        kept, seeds = after(by, long[start : start + 10], kept, start)
    expected = naive_channels(long, CLUSTERS, GAMMA, most)
    assert len(expected) == min(most, 5)
    assert [seed.item_id for seed in seeds] == [one[0] for one in expected]
    assert [seed.weight for seed in seeds[:2]] == pytest.approx([one[2] for one in expected[:2]])
    assert all(seed.weight == 0.0 for seed in seeds[2:])
    assert {one.age > 24_990 for one in channels_of(kept)[:-2]} == {True}


def test_the_newest_item_represents_its_channel() -> None:
    _, seeds = after(channels(0.5), ["i0", "i1", "i7"])
    assert seeds == [Seed("i7", 0, 1.25, 2), Seed("i1", 1, 0.5, 1)]


def test_a_channel_survives_its_own_event_unless_the_printed_rule_is_wanted() -> None:
    items = ["i0", "i0", "i0", "i1", "i1", "i1", "i2"]
    assert [seed.item_id for seed in after(channels(0.99, 2), items)[1]] == ["i1", "i2"]
    assert [seed.item_id for seed in after(channels(0.99, 2, protect=False), items)[1]] == ["i1", "i0"]


@pytest.mark.parametrize("protect", [True, False])
def test_of_two_with_the_same_weight_the_older_goes(protect: bool) -> None:
    _, seeds = after(channels(1.0, 2, protect=protect), ["i0", "i1", "i2"])
    assert [seed.item_id for seed in seeds] == ["i2", "i1"]


# ---------------------------------------------------------------- the last items


@bounded
@given(logs, gammas, sizes)
def test_recency_is_the_last_known_items(items: list[str | None], gamma: float, most: int) -> None:
    by, kept = channels(gamma, most, recency=True), NO_CHANNELS
    for number, item in enumerate(items):
        kept, seeds = after(by, [item], kept, number)
        assert_same(seeds, last_items(items[: number + 1], CLUSTERS, gamma, most))


@bounded
@given(logs, sizes)
def test_where_each_item_is_its_own_cluster_a_fast_decay_is_recency(items: list[str | None], most: int) -> None:
    """Below a half, one event outweighs all before it."""
    by_channels = after(channels(0.3, most, EACH_ITS_OWN), items)[1]
    by_recency = after(channels(0.3, most, EACH_ITS_OWN, recency=True), items)[1]
    assert [seed.item_id for seed in by_channels] == [seed.item_id for seed in by_recency]


# ---------------------------------------------------------------- what is kept


def test_unknown_items_count_for_nothing() -> None:
    plain, with_others = after(channels(), ["i0", "i1"]), after(channels(), ["i0", None, "unknown", "i1"])
    assert bytes(plain[0]) == bytes(channels().update(NO_CHANNELS, [("i0", 0), ("i1", 1)])[0])
    assert [seed.weight for seed in plain[1]] == [seed.weight for seed in with_others[1]]
    assert after(channels(), [None, "unknown"]) == (NO_CHANNELS, [])


def test_a_session_without_items_repeats_the_seeds_and_keeps_the_record() -> None:
    kept, seeds = after(channels(), ["i0", "i1", "i8"])
    assert after(channels(), [None, None], kept) == (kept, seeds)


@bounded
@given(logs, sizes)
def test_the_record_is_bounded(items: list[str | None], most: int) -> None:
    kept, seeds = after(channels(most=most), items * 3)
    assert len(channels_of(kept)) == len(seeds) <= most
    assert len(kept) <= 1 + most * 30  # a name of three characters and 26 bytes


def test_fewer_seeds_than_before_keep_the_heaviest() -> None:
    """And the channel touched last, where the setting protects it."""
    kept, seeds = after(channels(most=5), ["i0"] * 4 + ["i1"] * 3 + ["i2", "i3", "i2"])
    assert [seed.item_id for seed in seeds] == ["i0", "i1", "i2", "i3"]
    assert after(channels(most=2, protect=False), [], kept)[1] == seeds[:2]
    assert after(channels(most=2), [], kept)[1] == [seeds[0], seeds[2]]


# ---------------------------------------------------------------- another table


def test_another_table_maps_the_channels_anew() -> None:
    """What falls together adds up, as if it had always been one; what is unknown now is gone."""
    items = ["i0", "i1", "i2", "i1", "i3"]
    kept, _ = after(channels(most=4), items)
    other = {"i0": 5, "i1": 5, "i3": 0}
    kept, seeds = after(channels(most=4, clusters=other), [], kept)
    assert [(seed.item_id, seed.channel, seed.ts_ms) for seed in seeds] == [("i1", 5, 3), ("i3", 0, 4)]
    assert seeds[0].weight == pytest.approx((GAMMA**3 + GAMMA**2 + 1) * GAMMA)
    assert len(channels_of(kept)) == 2
    assert after(channels(clusters={}), [], kept) == (NO_CHANNELS, [])


def test_the_same_clusters_by_other_numbers_give_the_same_seeds() -> None:
    items = ["i0", "i1", "i2", "i1", "i3"]
    kept, seeds = after(channels(most=4), items)
    again, renamed = after(channels(most=4, clusters={item: 100 - one for item, one in CLUSTERS.items()}), [], kept)
    assert bytes(again) == bytes(kept)
    assert [(seed.item_id, seed.weight, 100 - seed.channel) for seed in renamed] == [
        (seed.item_id, seed.weight, seed.channel) for seed in seeds
    ]


def test_the_settings_choose() -> None:
    items = ["i0", "i0", "i0", "i1", "i1", "i2"]

    def chosen(**changes: object) -> list[str]:
        by = Channels.of(Settings().but(**{"seed_gamma": 0.99, "seed_events": 2} | changes), Clusters(CLUSTERS))
        return [seed.item_id for seed in after(by, items)[1]]

    assert chosen() == ["i0", "i2"]
    assert chosen(seeds="recency") == ["i2", "i1"]
    assert chosen(seed_protect=False) == ["i0", "i1"]
    assert chosen(seed_events=3) == ["i0", "i1", "i2"]


RANKERS: list[Ranker] = ["nearest", "shared", "residual", "personal"]


@pytest.mark.parametrize("ranker", RANKERS)
def test_settings_that_a_bundle_was_not_trained_with_are_named(ranker: Ranker) -> None:
    def wrong(rule: SeedRule, **changes: object) -> list[str]:
        return to_put_right(Settings().but(**changes), RetrieverConfig(ranker, rule))

    trained = SeedRule("channels", 10, 0.99, False)
    assert wrong(SeedRule()) == wrong(SeedRule(gamma=GAMMA)) == []
    assert wrong(trained, seed_events=10, seed_gamma=0.99, seed_protect=False) == []
    named = wrong(trained, seeds="recency")
    assert named == [
        "BROWSECAST_SEEDS=channels", "BROWSECAST_SEED_EVENTS=10", "BROWSECAST_SEED_GAMMA=0.99",
        "BROWSECAST_SEED_PROTECT=false",
    ]  # fmt: skip
    assert wrong(SeedRule("recency", gamma=0.5, protect=False)) == ["BROWSECAST_SEEDS=recency"]  # has no channels
    changes = dict(one.removeprefix("BROWSECAST_").lower().split("=") for one in named)
    assert wrong(trained, **changes) == []


@pytest.mark.parametrize("ranker", ["popularity", "counts"])
def test_a_bundle_that_asks_with_no_seeds_may_have_any(ranker: Ranker) -> None:
    assert to_put_right(Settings(), RetrieverConfig(ranker, SeedRule("recency", 10))) == []
