"""The token budget, the vocabulary and the outcome heads."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.config import Outcome
from models.outcomes import OutcomeHead, sigmoid
from models.visit import recent
from models.vocabulary import BOS, EOS, SPECIALS, UNK, Tokenizer, Vocabulary, presence

histories = st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=12), max_size=10)


@given(histories, st.integers(3, 40))
def test_the_budget_is_kept_and_used(sessions: list[list[str]], tokens: int) -> None:
    kept = recent(sessions, tokens)
    used = sum(len(session) + 2 for session in kept)
    assert used <= tokens and all(kept)
    pages = [page for session in sessions for page in session]
    left = [page for session in kept for page in session]
    assert left == pages[len(pages) - len(left) :]
    if len(left) < len(pages):
        assert used >= tokens - 2  # no room was left for a session of one page more


@given(histories, st.integers(3, 40))
def test_cutting_after_each_session_is_cutting_at_the_end(sessions: list[list[str]], tokens: int) -> None:
    running: list[list[str]] = []
    for session in sessions:
        running = recent([*running, session], tokens)
    assert running == recent(sessions, tokens)


def test_rare_pages_become_unknown_and_special_tokens_never_pages() -> None:
    vocabulary = Vocabulary.fit(Counter("aaabbc"), Counter("abc"), 4, 2)
    assert vocabulary.pages == ["a", "b"] and vocabulary.shares == [0.25, 0.25]
    tokenizer = Tokenizer(vocabulary)
    assert tokenizer.encode(["b", "c", "a", "[EOS]"]) == [5, UNK, 4, UNK]
    assert tokenizer.render([[5, 4], [UNK]]) == [BOS, 5, 4, EOS, BOS, UNK, EOS, BOS]
    assert tokenizer.decode([BOS, 5, UNK, 4, EOS]) == ["b", "a"]
    assert presence([[4, 4, UNK], [4, 5]], len(vocabulary)).tolist() == [0, 0, 0, 0, 2, 1]


def test_an_outcome_page_is_certain() -> None:
    head = OutcomeHead(Outcome(["b"], base_rate=0.2), {"a": 4, "b": 5}, 6)
    assert head.sessions([[4], [4, 5], []]) == [0.0, 1.0, 0.0]
    assert head.rate([[4], [5]]) == pytest.approx((1 + 0.4) / 4)
    np.testing.assert_allclose(head.combine(np.array([0.3]), np.array([0.9])), [0.3])
    never, always = (float(head.combine(np.array([p]), np.array([0.0]))[0]) for p in (0.0, 1.0))
    assert 0.0 < never < always < 1.0


def test_without_outcome_pages_all_pages_weigh() -> None:
    weights = np.array([-1.0, 9.0, 9.0, 9.0, 2.0, -3.0])
    weights[1 : len(SPECIALS)] = 0.0
    head = OutcomeHead(Outcome([], base_rate=0.2), {"a": 4, "b": 5}, 6, weights)
    one, both = float(sigmoid(np.array(1.0))), float(sigmoid(np.array(-2.0)))
    assert head.sessions([[4, 4], [4, 5]]) == pytest.approx([one, both])
    sequences = np.array([[[4, 4, EOS], [5, 4, EOS]]])
    assert head.rollouts(sequences) == pytest.approx([(one + both) / 2])
