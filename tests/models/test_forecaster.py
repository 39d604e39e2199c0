"""How evidence becomes an expected set."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from models.bundle import load_bundle
from models.selector import PageMeans
from models.visit import CONTEXT_TOKENS, Visit, recent
from tests.models.conftest import PAGES, SIZE


def test_outcome_pages_join_by_their_threshold(tiny_bundle: Path) -> None:
    bundle = load_bundle(tiny_bundle, "cpu")
    head = bundle.heads[0]
    q = np.full((2, SIZE), 0.01)
    q[:, 4], q[:, 4 + PAGES.index("cart")] = 0.6, 0.9
    head.outcome = msgspec.structs.replace(head.outcome, threshold=0.5)
    with_cart, without = bundle.expected_sets(q, [[0.7, 0.4], [0.1, 0.1]])
    assert [page for page, _ in with_cart] == ["cart", "home"]
    assert [p for _, p in with_cart] == pytest.approx([0.7, 0.6])
    assert [page for page, _ in without] == ["home"]


def test_a_page_that_marks_both_outcomes_is_expected_once(tiny_bundle: Path) -> None:
    bundle = load_bundle(tiny_bundle, "cpu")
    for head in bundle.heads:
        head.outcome = msgspec.structs.replace(head.outcome, threshold=0.5)
    bundle._outcome_tokens = [np.array([4 + PAGES.index("cart")])] * 2
    q = np.full((1, SIZE), 0.01)
    q[:, 4] = 0.6
    (pages,) = bundle.expected_sets(q, [[0.7], [0.8]])
    assert [page for page, _ in pages] == ["cart", "home"]
    assert [p for _, p in pages] == pytest.approx([0.8, 0.6])


def test_a_live_visit_with_more_history_gives_the_same(tiny_bundle: Path) -> None:
    # The stream adds the session that just closed to a history that is cut already; an archive is cut once.
    bundle = load_bundle(tiny_bundle, "cpu")
    bundle.config = msgspec.structs.replace(bundle.config, context_tokens=2 * CONTEXT_TOKENS)
    before = [["home", *["help", "sale"] * 4] for _ in range(60)]
    live, archived = [*recent(before), ["shoes"] * 9], recent([*before, ["shoes"] * 9])
    assert len(live) > len(archived)
    assert bundle._tokens([Visit("s", live)]) == bundle._tokens([Visit("s", archived)])
    embed = PageMeans(np.random.default_rng(0).normal(size=(SIZE, 5)), bundle.tokenizer)
    np.testing.assert_array_equal(embed([Visit("s", live)]), embed([Visit("s", archived)]))


def test_probabilities_are_shrunk_to_the_visitors_own_pages(tiny_bundle: Path) -> None:
    bundle = load_bundle(tiny_bundle, "cpu")
    visits = [Visit("s", [["help", "sale"], ["help"]])]
    evidence = bundle.evidence(visits)
    decoding = bundle.config.decoding
    prior = np.array([0.0] * 4 + bundle.vocabulary.shares) * decoding.own_weight
    prior[4 + PAGES.index("help")] += 2
    prior[4 + PAGES.index("sale")] += 1
    prior /= 2 + decoding.own_weight
    expected = (decoding.rollouts * evidence.marginals[0] + decoding.shrink * prior) / (
        decoding.rollouts + decoding.shrink
    )
    np.testing.assert_allclose(bundle.probabilities(evidence)[0], expected)
    told = dict(bundle.forecast(visits)[0].pages)
    for page, p in told.items():
        if page != "cart":
            assert p == pytest.approx(expected[4 + PAGES.index(page)])


def test_nll_counts_the_end_of_the_session(tiny_bundle: Path) -> None:
    bundle = load_bundle(tiny_bundle, "cpu")
    nats, tokens = bundle.nll([Visit("s", [["home"]])] * 2, [["home"], ["home", "nowhere"]])
    assert tokens.tolist() == [2, 3] and (nats > 0).all()
