"""Windows in rows: nothing is lost, nothing is added, and a label never comes from a neighbour."""

import numpy as np
import pytest

from models.vocabulary import BOS, EOS, PAD
from tests.trainer.phases import rows
from trainer.windows import batches, draw_clusters, lay_out, pack


def test_a_label_is_the_next_token_of_the_same_window() -> None:
    a, b = np.array([BOS, 5, 6, EOS, BOS, 7, EOS]), np.array([BOS, 8, EOS])
    layout = lay_out([a, b], [[1, 0]])
    assert layout.inputs.tolist() == [[BOS, 8, BOS, 5, 6, EOS, BOS, 7]]
    assert layout.labels.tolist() == [[8, EOS, 5, 6, EOS, PAD, 7, EOS]]  # [BOS] after [EOS] is sure
    assert layout.positions is not None and layout.positions.tolist() == [[0, 1, 0, 1, 2, 3, 4, 5]]
    assert layout.segments is not None and layout.segments.tolist() == [[1, 1, 2, 2, 2, 2, 2, 2]]


def test_a_row_for_each_window_needs_no_mask() -> None:
    a, b = np.array([BOS, 5, 6, EOS]), np.array([BOS, 8, EOS])
    layout = lay_out([a, b], [[0], [1]])
    assert layout.inputs.tolist() == [[BOS, 5, 6], [BOS, 8, PAD]]
    assert layout.labels.tolist() == [[5, 6, EOS], [8, EOS, PAD]]
    assert layout.positions is None and layout.segments is None


def test_rows_are_full_and_hold_every_window_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 61, size=500).tolist()
    packed = pack(lengths)
    assert sorted(i for row in packed for i in row) == list(range(500))
    assert max(sum(lengths[i] for i in row) for row in packed) == 60
    assert len(packed) <= 11 / 9 * sum(lengths) / 60 + 1  # the bound of first fit decreasing


def test_rows_of_a_given_length_are_filled_whatever_the_longest_window() -> None:
    lengths = np.random.default_rng(0).integers(1, 31, size=500).tolist()
    packed = pack(lengths, room=512)
    assert sorted(i for row in packed for i in row) == list(range(500))
    assert max(sum(lengths[i] for i in row) for row in packed) <= 512
    assert len(packed) == -(-sum(lengths) // 512)  # the last one alone is not full


def test_kinds_do_not_share_a_row() -> None:
    kinds = [i % 3 for i in range(60)]
    packed = pack([40] * 3 + [7] * 57, kinds)
    assert sorted(i for row in packed for i in row) == list(range(60)) and len(packed) == 15
    assert all(len({kinds[i] for i in row}) == 1 for row in packed)


def test_batches_of_any_length_hold_every_row_once() -> None:
    lengths = [len(row) for row in rows(517)[0]]
    mixed, again = (list(batches(lengths, 20, (1, 2), by_length=False)) for _ in range(2))
    assert sorted(np.concatenate(mixed).tolist()) == list(range(517))
    assert all(np.array_equal(a, b) for a, b in zip(mixed, again, strict=True))
    spread = {by: np.mean([np.std([lengths[i] for i in batch]) for batch in batches(lengths, 20, (1, 2), by)])
              for by in (True, False)}  # fmt: skip
    assert spread[True] < 0.3 * spread[False]


def test_a_sure_cluster_is_kept_and_an_unsure_one_is_drawn_in_proportion() -> None:
    posterior = np.tile([0.5, 0.0, 0.3, 0.2], (20_000, 1))
    posterior[:3] = np.eye(4)[[3, 0, 1]]
    drawn = draw_clusters(posterior, (1, 2, 3))
    assert drawn[:3].tolist() == [3, 0, 1]
    assert np.bincount(drawn, minlength=4) / 20_000 == pytest.approx([0.5, 0.0, 0.3, 0.2], abs=0.015)
    assert (drawn == draw_clusters(posterior, (1, 2, 3))).all()
    assert (drawn != draw_clusters(posterior, (1, 2, 4))).any()
