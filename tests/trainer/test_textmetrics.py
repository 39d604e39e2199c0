"""BLEU and BERTScore: by hand, and against slow code."""

import numpy as np
import pytest

from tests.trainer.invented import invented
from tests.trainer.plainfigures import bleu as plain_bleu
from trainer.textmetrics import bert_scores, bleu, bleu_counts

SHOES = ["home", "men's shoes", "basket"]


def test_bleu_by_hand() -> None:
    # 3 of 4 pages; 2 of 3 pairs, 1 of 2 triples and 0 of 1 fours, each with one more.
    counts = bleu_counts([(["a", "b", "c", "e"], ["a", "b", "c", "d"])])
    assert counts.tolist() == [[3, 2, 1, 0, 4, 3, 2, 1, 4, 4]]
    assert bleu(counts)[0] == pytest.approx((3 / 4 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_bleu_counts_a_page_as_often_as_it_came_and_pays_for_brevity() -> None:
    counts = bleu_counts([(["a", "b", "c"], ["a", "a"])])
    assert counts[0, 0] == 1
    assert bleu(counts)[0] == pytest.approx(np.exp(1 - 3 / 2) * (1 / 2 * 1 / 2) ** 0.25)


def test_bleu_of_a_corpus_sums_before_it_divides() -> None:
    rows = invented(60)["bundle"]
    sums = bleu_counts([(row["target"], row["path"]) for row in rows]).sum(axis=0, keepdims=True)
    assert bleu(sums)[0] == pytest.approx(plain_bleu(rows))


@pytest.mark.parametrize(("came", "predicted", "score"), [(SHOES, SHOES, 1.0), (SHOES, ["x"], 0.0), (SHOES, [], 0.0)])
def test_bleu_at_its_ends(came: list[str], predicted: list[str], score: float) -> None:
    assert bleu(bleu_counts([(came, predicted)]))[0] == pytest.approx(score)


def test_bert_scores() -> None:
    near, far = ["home", "women's shoes", "basket"], ["guitar strings"]
    scores = bert_scores([(SHOES, SHOES), (SHOES, near), (SHOES, far), (near, SHOES), (SHOES, []), ([], SHOES)])
    assert scores.shape == (6, 3)
    assert scores[0] == pytest.approx(1.0, abs=1e-5)
    assert (scores[0] > scores[1]).all() and (scores[1] > scores[2]).all() and (scores[2] > 0).all()
    assert scores[3, :2] == pytest.approx(scores[1, 1::-1], abs=1e-5)  # precision one way is recall the other
    assert scores[:4, 2] == pytest.approx(2 * scores[:4, 0] * scores[:4, 1] / scores[:4, :2].sum(axis=1))
    assert not scores[4:].any()
