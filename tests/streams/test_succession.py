"""Who predicts since when: what is told, and what is counted for whom."""

from typing import Any

import msgspec

from streams.succession import Succession
from streams.wire import CHAMPION, ModelAlias, ModelDecision, PageProbability, Prediction, Score

OLD, NEW = "sha256:old", "sha256:new"
IOU = {"champion": 0.25, "challenger": 0.375, "difference": 0.125, "low": 0.1, "high": 0.15}


def prediction(digest: str, end_ms: int, **more: Any) -> Prediction:
    plain: dict[str, Any] = {
        "prediction_id": "p", "session_id": "s", "user_id": "u", "cluster": 0, "pages": [PageProbability("home", 0.5)],
        "path": ["home"], "cart": 0.1, "purchase": 0.1, "model_version": digest[7:], "model_digest": digest,
        "fallback": None, "close_to_emit_ms": 1.0, "session_end_ms": end_ms,
    }  # fmt: skip
    return Prediction(**(plain | more))


def score(digest: str, iou: float, own: float, **more: Any) -> Score:
    baselines = {"last_session": 0.0, "own_frequencies": own}
    return Score("p", "s", "u", 1, 0.5, 0.5, iou, False, 0.1, 0.1, False, 0.1, 0.1, digest[7:], digest,
                 baselines=baselines, **more)  # fmt: skip


def decide(kind: str, digest: str, by: str, evidence: dict[str, Any], **aliases: str | None) -> tuple[bytes, bytes]:
    made = ModelDecision(f"{kind}-{digest}", 1, kind, digest[7:], digest, "", "because", by, evidence, dict(aliases))
    return f"decision/{made.decision_id}".encode(), msgspec.json.encode(made)


def test_a_swap_is_told_in_one_line_with_its_moment_and_the_judges_figures() -> None:
    told: list[str] = []
    seen = Succession(told.append)
    seen.predicted(prediction(OLD, 60_000))
    assert told == []
    seen.record(*decide("published", NEW, "trainer", {"comparison": {}}, challenger=NEW))
    assert (seen.on_trial, seen.promoted, seen.decided_by("trainer")) == (True, False, True)
    seen.record(*decide("promoted", NEW, "judge", {"iou": IOU, "sessions": 1234}, champion=NEW, challenger=None))
    assert (seen.on_trial, seen.promoted) == (False, True)
    seen.predicted(prediction(OLD, 120_000))
    seen.predicted(prediction(NEW, 86_400_000))
    seen.predicted(prediction(OLD, 180_000))
    seen.predicted(prediction(NEW, 86_340_000))
    assert told == [
        "the trainer: published new as challenger: because",
        "the judge: promoted new as champion: because",
        "another champion serves: new predicts since the session that ended 02 Jan, 00:00; "
        "IoU 0.250 -> 0.375 on the 1,234 sessions that both predicted",
    ]
    assert [reign.first_ms for reign in seen.reigns.values()] == [60_000, 86_340_000]


def test_a_prediction_read_before_its_models_promotion_waits_for_the_judges_figures() -> None:
    told: list[str] = []
    seen = Succession(told.append)
    seen.predicted(prediction(OLD, 0))
    seen.record(*decide("published", NEW, "trainer", {}, challenger=NEW))
    seen.predicted(prediction(NEW, 0))
    assert len(told) == 1
    seen.record(*decide("promoted", NEW, "judge", {"iou": IOU, "sessions": 9}, champion=NEW, challenger=None))
    assert told[-1].endswith("IoU 0.250 -> 0.375 on the 9 sessions that both predicted")
    seen.predicted(prediction(NEW, 1))
    assert len(told) == 3


def test_one_that_nobody_compared_is_told_without_figures() -> None:
    told: list[str] = []
    seen = Succession(told.append)
    seen.record(*decide("promoted", NEW, "user", {}, champion=NEW))
    seen.record(CHAMPION.encode(), msgspec.json.encode(ModelAlias(CHAMPION, "new", NEW, "")))
    seen.predicted(prediction(OLD, 0))
    seen.predicted(prediction(NEW, 0))
    assert told[-1].endswith("00:00; nobody has compared it yet")


def test_scores_count_for_the_model_that_predicted_and_fallbacks_for_nobody() -> None:
    seen = Succession(lambda line: None)
    for digest in (OLD, NEW):
        seen.predicted(prediction(digest, 0))
    seen.predicted(prediction("sha256:other", 0, fallback="timeout"))
    for one in (score(OLD, 0.5, 0.2), score(NEW, 0.25, 0.5), score(NEW, 0.75, 0.0), score(NEW, 1.0, 1.0, fallback="x")):
        seen.scored(one)
    seen.scored(score("sha256:unseen", 1.0, 1.0))
    assert [(reign.scores, reign.iou, reign.baseline_iou) for reign in seen.reigns.values()] == [
        (1, 0.5, 0.2),
        (2, 1.0, 0.5),
    ]
