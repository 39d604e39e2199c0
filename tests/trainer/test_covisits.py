"""Co-visits are what a slow walk over the log counts."""

from collections import Counter
from itertools import pairwise

import numpy as np

from tests.trainer.clicked import ITEMS, clicks
from trainer.covisits import CoVisits, users_by_items
from trainer.interactions import NONE, Interactions


def walks(log: Interactions) -> list[list[int]]:
    return [log.item[log.first[user] : log.first[user + 1]].tolist() for user in range(len(log.users))]


def test_follow_counts_the_next_click_of_the_same_user() -> None:
    log = clicks()
    wanted = Counter(pair for walk in walks(log) for pair in pairwise(walk))
    found = CoVisits.follow(log)
    for before in range(len(ITEMS)):
        assert found.clicks[before] == sum(count for pair, count in wanted.items() if pair[0] == before)
        for after in range(len(ITEMS)):
            assert found.counts[before, after] == (0 if before == after else wanted[before, after])


def test_beside_counts_users_who_clicked_both() -> None:
    log = clicks()
    found, sets = CoVisits.beside(log), [set(walk) for walk in walks(log)]
    for one in range(len(ITEMS)):
        assert found.clicks[one] == sum(one in clicked for clicked in sets)
        for other in range(len(ITEMS)):
            both = sum({one, other} <= clicked for clicked in sets)
            assert found.counts[one, other] == (0 if one == other else both)
    assert users_by_items(log).toarray().tolist() == [
        [item in clicked for item in range(len(ITEMS))] for clicked in sets
    ]


def test_scores_are_weighted_counts_of_each_seed() -> None:
    visits = CoVisits.follow(clicks())
    recent = np.array([[3, 7, NONE], [NONE, NONE, NONE], [0, 1, 2]], dtype=np.int32)
    weights, items = np.array([1.0, 0.5, 0.25]), np.array([2, 3, 11, 30])
    found = visits.scores(recent, weights, 0.5, items)
    for case in range(3):
        for rank, seed in enumerate(recent[case].tolist()):
            for place, item in enumerate(items.tolist()):
                wanted = 0.0
                if seed != NONE:
                    wanted = weights[rank] * visits.counts[seed, item] / max(visits.clicks[seed], 1) ** 0.5
                np.testing.assert_allclose(found[case, rank, place], wanted, rtol=1e-6)
