"""The expected set against every prefix, shrinkage against its formula."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.sets import own_frequencies, rank, set_size, shrink

probabilities = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12)


@given(probabilities, st.floats(0.0, 6.0))
def test_no_other_prefix_has_a_larger_expected_overlap(values: list[float], more: float) -> None:
    q = np.sort(np.array(values))[::-1]
    total = q.sum() + more

    def overlap(m: int) -> float:
        return float(q[:m].sum() / (m + total - q[:m].sum()))

    size = int(set_size(q[None], np.array([total]))[0])
    assert overlap(size) >= max(overlap(m) for m in range(1, len(q) + 1)) - 1e-12


def test_certain_pages_are_all_kept_and_unlikely_ones_are_not() -> None:
    q = np.array([[1.0, 1.0, 1.0, 0.01, 0.01], [0.9, 0.05, 0.05, 0.05, 0.05]])
    assert set_size(q, q.sum(axis=1)).tolist() == [3, 1]


def test_shrinkage_and_own_frequencies() -> None:
    prior = own_frequencies(np.array([[2.0, 0.0]]), np.array([3.0]), np.array([0.5, 0.1]), 2.0)
    np.testing.assert_allclose(prior, [[3.0 / 5.0, 0.2 / 5.0]])
    q = shrink(np.array([[0.25, 1.0]]), 24, prior, 16.0)
    np.testing.assert_allclose(q, [[(6 + 16 * 0.6) / 40, (24 + 16 * 0.04) / 40]])


def test_rank_leaves_out_special_tokens_and_breaks_ties_by_token() -> None:
    assert rank(np.array([[9.0, 9.0, 9.0, 9.0, 0.1, 0.3, 0.3, 0.2]]), 3).tolist() == [[5, 6, 7]]


def test_rows_are_independent() -> None:
    rng = np.random.default_rng(0)
    q = np.sort(rng.random((20, 9)), axis=1)[:, ::-1]
    together = set_size(q, q.sum(1))
    assert together.tolist() == [int(set_size(row[None], np.array([row.sum()]))[0]) for row in q]
    assert together.min() >= 1 and together.max() == pytest.approx(together.max())
