"""The retriever against the obvious one, whatever happens to catalogue and clicks; and each rule of its own."""

import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import catalogue as catalogues
from models import retriever as module
from models.catalogue import Catalogue
from models.items import ItemTable, SeedRule, unit
from models.retriever import Retriever
from models.search import Graph, exact
from models.seeding import seeds_of
from models.visit import Interest
from tests.goods import WIDTH, goods
from tests.models.plainretriever import PlainRetriever

NUMBER = 8
WINDOW = 6_400
KNOWN = [f"i{number}" for number in range(40)]
NEW = [f"n{number}" for number in range(6)]
RANKERS = ["popularity", "counts", "nearest", "shared", "residual", "personal"]
bounded = settings(max_examples=25, deadline=None)

items = st.sampled_from([*KNOWN, *NEW, "unknown"])
touched = st.lists(items, unique=True, max_size=6)
interests = st.builds(
    Interest,
    seeds=st.lists(st.sampled_from(KNOWN), unique=True, max_size=5).map(
        lambda ids: [(item_id, number, 1.0 / (1 + number)) for number, item_id in enumerate(ids)]
    ),
    recent=touched,
    session=touched,
    bought=touched,
)
changes = st.lists(
    st.one_of(
        st.tuples(st.just("put"), items.filter(lambda one: one != "unknown"), st.booleans()),
        st.tuples(st.just("place"), st.sampled_from(NEW), st.integers(0, 99)),
        st.tuples(st.just("remove"), items, st.none()),
        st.tuples(st.just("click"), st.lists(st.tuples(items, st.integers(0, 30_000)), max_size=8), st.none()),
    ),
    max_size=25,
)


def table(**chosen: Any) -> ItemTable:
    return ItemTable(*goods(window_ms=WINDOW, **chosen), "sha256:table")


def vector(seed: int) -> np.ndarray:
    found: np.ndarray = unit(np.random.default_rng(seed).normal(size=(1, WIDTH)))[0]
    return found


def apply(one: Retriever, plain: PlainRetriever, change: tuple[str, Any, Any]) -> None:
    """One change to both."""
    kind, what, how = change
    if kind == "put":
        one.put(what, how)
        plain.available[what] = how
    elif kind == "place":
        one.place([what], vector(how)[None])
        if what in plain.available and what in NEW:
            plain.vectors[what] = vector(how)
    elif kind == "remove":
        one.remove(what)
        if what in KNOWN:
            plain.available[what] = False
        else:
            plain.available.pop(what, None)
            plain.vectors.pop(what, None)
    else:
        if what and plain.newest < 0:
            plain.began = max(ts for _, ts in what)
        one.click(what)
        plain.clicks += what
        plain.newest = max([plain.newest, *(ts for _, ts in what)])


def assert_same(one: Retriever, plain: PlainRetriever, interest: Interest) -> None:
    (found,) = one.rank([interest])
    seeds = seeds_of(interest, one.catalogue, one.chosen.seeding)
    wanted = plain.scores(interest, seeds)
    best = sorted((score for score, _ in wanted.values()), reverse=True)[: one.number]
    assert [ranked.score for ranked in found] == pytest.approx(best, abs=1e-4)
    for ranked in found:
        score, seed = wanted[ranked.item]
        assert ranked.score == pytest.approx(score, abs=1e-4)
        assert ranked.seed == seed
    assert len({ranked.item for ranked in found}) == len(found)


@pytest.mark.parametrize("ranker", RANKERS)
@bounded
@given(changes=changes, interest=interests, since=st.sampled_from([None, 0, 7_000]))
def test_same_as_the_obvious_one_after_any_changes(
    ranker: str, changes: list[tuple[str, Any, Any]], interest: Interest, since: int | None
) -> None:
    one = Retriever(table(ranker=ranker, clicks_until_ms=since, history=3, counts_seeds=3), NUMBER)
    plain = PlainRetriever(one.table)
    for change in changes:
        apply(one, plain, change)
        assert one.catalogue.window.events == len([1 for _, ts in plain.clicks if plain.counts(ts)])
    assert_same(one, plain, interest)
    assert one.counts().known == len(plain.available)
    assert one.counts().available == sum(plain.available.values())


@pytest.mark.parametrize("ranker", ["nearest", "personal", "popularity"])
def test_a_batch_is_its_visitors_one_by_one(ranker: str) -> None:
    """Whatever their numbers of seeds and items."""
    one = Retriever(table(ranker=ranker, fused=True), NUMBER)
    many = [
        Interest([(f"i{n}", n, 1.0) for n in range(count)], [f"i{n}" for n in range(2 * count)]) for count in range(6)
    ]
    for together, interest in zip(one.rank(many), many, strict=True):
        (alone,) = one.rank([interest])
        assert [(r.item, r.seed) for r in together] == [(r.item, r.seed) for r in alone]
        assert [r.score for r in together] == pytest.approx([r.score for r in alone], abs=1e-5)
    assert one.rank([]) == []


@pytest.mark.parametrize("ranker", ["counts", "personal", "residual"])
def test_unknown_items_take_their_places_among_the_newest(ranker: str) -> None:
    """As off line, where the newest items are cut off before they are looked up."""
    one = Retriever(table(ranker=ranker, history=3, counts_seeds=3), NUMBER)
    seeds, recent = [("i3", 0, 1.0)], ["unknown", "i3", "unknown too", "i9", "i1"]
    found = one.rank([Interest(seeds, recent[:3]), Interest(seeds, recent)])
    left = [[ranked for ranked in listed if ranked.item not in ("i9", "i1")][:6] for listed in found]
    assert [(r.item, r.seed) for r in left[0]] == [(r.item, r.seed) for r in left[1]]
    assert [r.score for r in left[0]] == pytest.approx([r.score for r in left[1]], abs=1e-5)
    assert "i3" in {ranked.seed for ranked in left[0]}


@pytest.mark.parametrize("ranker", ["nearest", "personal", "popularity"])
def test_fusion_is_by_reciprocal_ranks(ranker: str) -> None:
    """Of the ranker's list and the counts', each with its own seeds; the ranker's seed goes first."""
    interest = Interest([("i3", 0, 1.0), ("i9", 1, 0.5)], ["i3", "i9", "i1"])
    fused = Retriever(table(ranker=ranker, fused=True, fusion=10), NUMBER).rank([interest])[0]
    lists = [Retriever(table(ranker=name), 40).rank([interest])[0] for name in (ranker, "counts")]
    scores: dict[str, float] = {}
    seeds: dict[str, str | None] = {}
    for ranked in lists:
        for rank, each in enumerate(ranked, 1):
            scores[each.item] = scores.get(each.item, 0.0) + 1 / (10 + rank)
            seeds[each.item] = seeds.get(each.item) or each.seed
    assert [one.score for one in fused] == pytest.approx(sorted(scores.values(), reverse=True)[:NUMBER])
    assert [scores[one.item] for one in fused] == pytest.approx([one.score for one in fused])
    assert [seeds[one.item] for one in fused] == [one.seed for one in fused]


def test_what_was_seen_or_bought_is_left_out_before_the_places_are_dealt() -> None:
    """Else each seed would spend its first place on itself; the list stays full."""
    one = Retriever(table(), NUMBER)
    everything = Interest([("i1", 0, 1.0)], ["i2", "i3"], ["i4"], ["i5"])
    for found in (one.rank([everything])[0], one.popular([everything])[0]):
        assert len(found) == NUMBER
        assert not {ranked.item for ranked in found} & {"i1", "i2", "i3", "i4", "i5"}


def test_a_large_prior_is_popularity() -> None:
    one = Retriever(table(prior=(1e4, 1e4)), NUMBER)
    interest = Interest([("i1", 0, 1.0)])
    ranked, popular = one.rank([interest])[0], one.popular([interest])[0]
    clicks = dict(zip(one.table.ids, one.table.clicks, strict=True))
    assert [clicks[r.item] for r in ranked] == [clicks[r.item] for r in popular]


def test_without_a_seed_it_is_popularity_even_where_the_prior_has_no_weight() -> None:
    one = Retriever(table(prior=(0.0, 0.0)), NUMBER)
    for interest in (Interest(), Interest([("unknown", 0, 1.0)], ["unknown"])):
        assert one.rank([interest]) == one.popular([interest])
        assert all(ranked.seed is None for ranked in one.rank([interest])[0])


def test_an_item_without_a_vector_comes_by_its_clicks_alone() -> None:
    one = Retriever(table(), NUMBER)
    interest = Interest([("i1", 0, 1.0)])
    assert one.put("new", True)
    assert "new" not in [ranked.item for ranked in one.rank([interest])[0]]
    one.click([("new", 1_000)] * 10_000)
    (first, *_), (most, *_) = one.rank([interest])[0], one.popular([interest])[0]
    assert (first.item, first.seed, most.item) == ("new", None, "new")


def test_a_new_item_is_found_by_its_vector_and_is_gone_when_it_is_removed() -> None:
    one = Retriever(table(prior=(0.0, 0.0)), NUMBER)
    interest = Interest([("i1", 0, 1.0)])
    one.put("new", True)
    one.place(["new", "never put"], np.stack([one.table.vectors[1], vector(3)]))
    first = one.rank([interest])[0][0]
    assert (first.item, first.seed) == ("new", "i1")
    one.put("new", False)
    assert first not in one.rank([interest])[0]
    one.put("new", True)
    assert one.rank([interest])[0][0] == first
    one.remove("new")
    one.place(["new"], vector(3)[None])
    assert "new" not in [ranked.item for ranked in one.rank([interest])[0]]
    assert one.counts().known == len(KNOWN)


@pytest.mark.parametrize("limit", [10, 1_000])
def test_clicks_of_an_item_count_however_late_it_is_published(limit: int) -> None:
    """By the graph as by exact search; and the same after it was removed, as after a restart."""
    one = Retriever(table(prior=(1.0, 1.0), seed_bias=()), NUMBER, exact_up_to=limit)
    if limit < len(KNOWN):
        with_graph(one)
    one.click([("new", 1_000)] * 10_000)
    assert one.rank([Interest()])[0][0].item != "new" and one.counts().known == len(KNOWN)
    for _ in range(2):
        one.put("new", True)
        for ranked in (one.rank([Interest([("i1", 0, 1.0)])])[0][0], one.popular([Interest()])[0][0]):
            assert ranked.item == "new" and ranked.score == pytest.approx(np.log1p(10_000), abs=1e-3)
        one.remove("new")
        assert one.rank([Interest([("i1", 0, 1.0)])])[0][0].item != "new"


def test_clicks_of_unknown_items_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogues, "STRANGERS", 100)
    one = Retriever(table(), NUMBER)
    for number in range(5_000):
        one.click([(f"n{number}", 1_000), ("n3", 1_000), ("i3", 1_000)])
    counts = one.catalogue.window.counts
    assert len(counts) == len(KNOWN) + 100 and counts["n3"] == counts["i3"] + 1 == 5_001
    one.put("n4999", True)
    one.click([("n4999", 1_000)])
    assert counts["n4999"] == 1


def test_rows_of_removed_items_are_used_again() -> None:
    one = Retriever(table(), NUMBER)
    for number in range(5_000):
        one.put(f"n{number}", True)
        one.click([(f"n{number}", number)])
        one.remove(f"n{number}")
    assert one.catalogue.size == len(KNOWN) + 1
    one.put("last", True)
    assert one.catalogue.log_clicks[-1] == 0.0


# ---------------------------------------------------------------- seeds that the table did not know


def seeds_by(one: Retriever, seeds: list[tuple[str, int, float]], recent: list[str], rule: SeedRule) -> list[str]:
    return seeds_of(Interest(seeds, recent), one.catalogue, rule)


def with_new(place: int = 1) -> tuple[Retriever, int]:
    """`new` lies where the item of that row does; and the channel of the two."""
    one = Retriever(table(), NUMBER)
    one.put("new", True)
    one.place(["new"], one.table.vectors[place][None])
    return one, one.table.nearest(one.table.vectors[place])


def test_a_new_item_represents_its_channel() -> None:
    one, channel = with_new()
    seeds, by = [("i2", channel, 1.0), ("i3", channel + 1, 0.9)], SeedRule(gamma=0.5, most=2)
    assert seeds_by(one, seeds, ["new", "i3", "i2"], by) == ["new", "i3"]
    assert seeds_by(one, seeds, ["i2", "new", "i3"], by) == ["i2", "i3"]  # it is not the newest
    assert seeds_by(one, seeds, ["i3"], by) == ["i2", "i3"]
    assert seeds_by(one, seeds, ["unknown"], by) == ["i2", "i3"]
    alone = [("i3", channel + 1, 0.9), ("i4", channel + 2, 0.6)]
    assert seeds_by(one, alone, ["new", "i3"], by) == ["new", "i3"]
    assert seeds_by(one, alone, ["i3", "new"], by) == ["i3", "i4"]  # lighter than both


@pytest.mark.parametrize(("protect", "wanted"), [(True, ["i2", "new"]), (False, ["i2", "i3"])])
def test_the_channel_of_the_newest_item_stays(protect: bool, wanted: list[str]) -> None:
    """However heavy the others are: it is what the visitor is after right now."""
    one, channel = with_new()
    heavy = [("i2", channel + 1, 3.0), ("i3", channel + 2, 2.0)]
    for recent in (["new", "i3"], ["unknown", "new", "i3"]):
        assert seeds_by(one, heavy, recent, SeedRule(gamma=0.5, most=2, protect=protect)) == wanted
    assert seeds_by(one, heavy, ["new"], SeedRule(most=1, protect=protect)) == [wanted[1] if protect else "i2"]


def test_the_last_items_are_seeds_where_the_bundle_was_trained_so() -> None:
    """Whatever the sessions carry, which only goes on where the newest items end."""
    one, channel = with_new()
    one.put("unplaced", True)
    by = SeedRule("recency", 4)
    seeds = [("i7", channel, 3.0), ("i3", channel + 1, 0.9), ("i8", channel, 0.1), ("i9", channel, 0.1)]
    assert seeds_by(one, seeds, ["unknown", "new", "unplaced", "i3"], by) == ["new", "i3", "i7", "i8"]
    assert seeds_by(one, seeds, ["i5", "i6", "i1", "i3", "new"], by) == ["i5", "i6", "i1", "i3"]


def test_the_last_items_are_gathered_into_channels_where_the_bundle_was_trained_so() -> None:
    one = Retriever(table(), NUMBER)
    last = [("i5", 0, 1.0), ("i6", 1, 0.9), ("i7", 1, 0.8), ("i8", 2, 0.7)]
    assert seeds_by(one, last, [], SeedRule(most=2)) == ["i6", "i5"]


def test_the_bundle_says_which_seeds_ask() -> None:
    visitor = Interest([(f"i{n}", n, 1.0 / (1 + n)) for n in range(8)], ["i20", "i21", "i0"])
    for rule, wanted in ((SeedRule(most=7), [f"i{n}" for n in range(7)]), (SeedRule("recency", 2), ["i20", "i21"])):
        one = Retriever(table(prior=(0.0, 0.0), seed_bias=(), seeding=rule), len(KNOWN))
        found = {ranked.seed for ranked in one.rank([visitor])[0]}
        (asked,) = one._queries([visitor])
        assert asked is not None and asked.seeds == wanted and found <= set(wanted)


def test_where_no_seed_is_known_the_newest_items_are() -> None:
    """Heaviest channel first, as Algorithm 1 has it."""
    one, clusters = Retriever(table(), NUMBER), table().clusters
    here = [f"i{row}" for row in range(40) if clusters[row] == clusters[0]]
    there = [f"i{row}" for row in range(40) if clusters[row] == clusters[1] != clusters[0]]
    recent = [there[0], here[1], here[0], "unknown"]
    for seeds in ([], [("unknown", 0, 1.0)]):
        assert seeds_by(one, seeds, recent, SeedRule(gamma=0.9)) == [here[1], there[0]]
    assert seeds_by(one, [("i5", 0, 1.0)], recent, SeedRule(gamma=0.9)) == ["i5"]


# ---------------------------------------------------------------- the graph


def with_graph(one: Retriever) -> Retriever:
    deadline = time.monotonic() + 60
    while one.graph is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert one.graph is not None
    return one


@bounded
@given(changes=changes, interest=interests, prior=st.sampled_from([0.0, 0.3, -0.2]))
def test_the_graph_finds_what_exact_search_finds(
    changes: list[tuple[str, Any, Any]], interest: Interest, prior: float
) -> None:
    """The graph is as wide as there are items, so what differs would be the threshold algorithm's."""
    both = [Retriever(table(prior=(prior, prior)), NUMBER, exact_up_to=limit) for limit in (10, 1_000)]
    with_graph(both[0])
    for change in changes:
        for one in both:
            apply(one, PlainRetriever(one.table), change)
    by_graph, exactly = (one.rank([interest])[0] for one in both)
    assert both[1].graph is None
    assert [r.score for r in by_graph] == pytest.approx([r.score for r in exactly], abs=1e-5)
    assert {(r.item, r.seed) for r in by_graph} == {(r.item, r.seed) for r in exactly}


@pytest.mark.parametrize("prior", [0.0, 0.02, 0.3])
def test_a_wide_graph_is_exact_among_many_and_does_not_look_at_all(prior: float) -> None:
    """Clustered vectors, skewed clicks that change, most of the popular rows blocked."""
    rng = np.random.default_rng(1)
    count = 3_000
    file, tensors = goods(count=count, clusters=60)
    near = tensors["centroids"][rng.integers(60, size=count)]
    tensors |= {"vectors": unit(near + 0.15 * rng.normal(size=near.shape)), "clicks": rng.pareto(1.0, count)}
    catalogue = Catalogue(ItemTable(file, tensors, "d"))
    graph = Graph(np.arange(count), catalogue.vectors, search_width=1_000)
    looked_at = []
    for turn in range(8):
        rows = rng.integers(count, size=5)
        clicks = [(f"i{row}", 1_000 + turn) for row in rows for _ in range(50)]
        graph.clicked(catalogue.click(clicks))
        queries = np.c_[catalogue.vectors[rows], np.full(5, prior), [0.2, 0.1, 0.0, 0.0, 0.0]].astype(np.float32)
        blocked = [*rows.tolist(), *np.argsort(-catalogue.log_clicks)[:20].tolist()]
        found, wanted = (
            graph.best(catalogue, queries, blocked, 20),
            exact(catalogue, queries, blocked, 20),
        )
        np.testing.assert_array_equal(found.rows, wanted.rows)
        np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-5)
        looked_at.append(len(graph._candidates(catalogue, queries, 80)[0]))
    assert max(looked_at) < count / 4


def test_the_graph_is_built_beside_and_takes_over_what_changed_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may = threading.Event(), threading.Event()

    class Slow(Graph):
        def __init__(self, rows: np.ndarray, vectors: np.ndarray) -> None:
            begun.set()
            assert may.wait(30)
            super().__init__(rows, vectors)

    monkeypatch.setattr(module, "Graph", Slow)
    one = Retriever(table(prior=(0.0, 0.0)), NUMBER, exact_up_to=41)
    one.put("before", True)
    one.place(["before"], vector(1)[None])
    assert one.graph is None
    one.put("over", True)
    one.place(["over"], vector(2)[None])
    assert begun.wait(30)
    one.place(["before"], one.table.vectors[1][None])
    one.remove("over")
    interest = Interest([("i1", 0, 1.0)])
    exactly = one.rank([interest])
    assert one.graph is None and exactly[0][0].item == "before"
    may.set()
    assert with_graph(one).rank([interest]) == exactly


def test_a_worn_graph_is_built_anew() -> None:
    one = with_graph(Retriever(table(prior=(0.0, 0.0)), NUMBER, exact_up_to=10))
    first = one.graph
    one.put("new", True)
    for seed in range(30):
        one.place(["new"], vector(seed)[None])
    deadline = time.monotonic() + 60
    while (one.graph is first or one.graph is None or one._building) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert one.graph is not first and one.graph is not None and one.graph.dead < 30
    one.place(["new"], one.table.vectors[1][None])
    assert one.rank([Interest([("i1", 0, 1.0)])])[0][0].item == "new"
