"""What is kept of a prediction and of the session that came, until both are there, and the score that they make.

Both are records of the changelog: a field may be added at the end, with a default for the records of older workers.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from models import baselines
from models.metrics import hr, ioa, iop, iou, log_loss
from models.visit import Forecast, Visit
from streams import wire

BASELINES: dict[str, Callable[[Visit], Forecast]] = {
    "last_session": baselines.last_session,
    "own_frequencies": baselines.own_frequencies,
}


class ShadowGuess(msgspec.Struct, array_like=True, gc=False):
    """What is kept of the challenger's prediction."""

    prediction_id: str
    pages: list[str]
    cart: float
    purchase: float
    model_version: str
    model_digest: str


class Guess(msgspec.Struct, array_like=True, gc=False):
    """What is kept of a prediction until its session comes."""

    session_id: str  # the session that closed when it was made
    prediction_id: str
    pages: list[str]
    cart: float
    purchase: float
    model_version: str
    session_end_ms: int
    era: int
    model_digest: str | None = None
    cluster: int | None = None
    fallback: str | None = None
    shadow: ShadowGuess | None = None


class Outcome(msgspec.Struct, array_like=True, gc=False):
    """What is kept of a session until the prediction made for it comes."""

    previous_session_id: str
    previous_end_ms: int
    session_id: str
    user_id: str
    pages: list[str]
    cart: bool
    purchase: bool
    era: int
    session_end_ms: int | None = None
    baselines: dict[str, float] | None = None


def score(guess: Guess, outcome: Outcome) -> wire.Score:
    """How right the prediction was, by sets of pages and log losses clipped at 1e-7 (HeTLM, section 1.7)."""
    return wire.Score(
        **_figures(guess, outcome),
        session_id=outcome.session_id,
        user_id=outcome.user_id,
        cart=outcome.cart,
        purchase=outcome.purchase,
        cluster=guess.cluster,
        fallback=guess.fallback,
        session_end_ms=outcome.session_end_ms,
        baselines=outcome.baselines,
        shadow=None if guess.shadow is None else wire.ShadowScore(**_figures(guess.shadow, outcome)),
    )


def _figures(guess: Guess | ShadowGuess, outcome: Outcome) -> dict[str, Any]:
    """What a score tells of either model."""
    actual, predicted = outcome.pages, guess.pages
    return {
        "prediction_id": guess.prediction_id,
        "hr": hr(actual, predicted),
        "ioa": ioa(actual, predicted),
        "iop": iop(actual, predicted),
        "iou": iou(actual, predicted),
        "cart_p": guess.cart,
        "cart_log_loss": log_loss(guess.cart, outcome.cart),
        "purchase_p": guess.purchase,
        "purchase_log_loss": log_loss(guess.purchase, outcome.purchase),
        "model_version": guess.model_version,
        "model_digest": guess.model_digest,
    }


def guess_of(prediction: wire.Prediction, era: int) -> Guess:
    """What to keep of a prediction."""
    shadow = prediction.shadow
    kept = None
    if shadow is not None:
        kept = ShadowGuess(
            shadow.prediction_id, _names(shadow.pages), shadow.cart, shadow.purchase, shadow.model_version,
            shadow.model_digest,
        )  # fmt: skip
    return Guess(
        prediction.session_id, prediction.prediction_id, _names(prediction.pages), prediction.cart, prediction.purchase,
        prediction.model_version, prediction.session_end_ms, era, prediction.model_digest, prediction.cluster,
        prediction.fallback, kept,
    )  # fmt: skip


def outcome_of(session: wire.Session, previous: str, previous_end_ms: int, era: int) -> Outcome:
    """What to keep of a session, and how right the baselines would have been about it."""
    return Outcome(
        previous, previous_end_ms, session.session_id, session.user_id, session.pages, session.cart, session.purchase,
        era, session.end_ms, _baselines(session),
    )  # fmt: skip


def _names(pages: list[wire.PageProbability]) -> list[str]:
    return [page.page for page in pages]


def _baselines(session: wire.Session) -> dict[str, float] | None:
    """IoU that each baseline would have had with the session, from the sessions before it; None without any."""
    if not session.context.history:
        return None
    visit = Visit(session.session_id, session.context.history)
    return {name: iou(session.pages, [page for page, _ in predict(visit).pages]) for name, predict in BASELINES.items()}
