"""What goes over the wire: every record of every topic as a type. Field names are the contract.

Times are epoch milliseconds, UTC. Unknown fields are ignored; a field may be added, never renamed.
"""

from typing import Any

import msgspec

CLICKS = "clicks"
REJECTED = "clicks.rejected"
LATE = "clicks.late"
SESSIONS = "sessions"
PREDICTIONS = "predictions"
SCORES = "scores"
MODELS = "models"
TOPICS = (CLICKS, REJECTED, LATE, SESSIONS, PREDICTIONS, SCORES, MODELS)


class Event(msgspec.Struct, gc=False):
    """One click. `ts` is epoch milliseconds after decoding, whatever form it came in."""

    user_id: str
    ts: int
    page: str
    event_id: str | None = None
    type: str = "view"
    item_id: str | None = None
    price: float | None = None
    category: str | None = None
    query: str | None = None
    device: str | None = None
    attributes: dict[str, Any] | None = None


class Rejected(msgspec.Struct):
    """An event that cannot be used: why, and all of it. `original` and `original_key` are base64."""

    reason: str
    stage: str
    message: str
    original: str | None
    original_key: str | None
    topic: str
    partition: int
    offset: int


class Late(msgspec.Struct):
    """An event behind the watermark that no open session could take."""

    event: Event
    late_by_ms: int


class Routing(msgspec.Struct):
    """The running sum a router keeps of a visitor, and the digest of the router that it belongs to."""

    digest: str
    sums: list[float]
    count: int


class Context(msgspec.Struct):
    """What a predictor needs besides the session itself."""

    history: list[list[str]]  # pages of the sessions before this one, oldest first, within the token budget
    previous_session_id: str | None
    previous_end_ms: int | None
    routing: Routing | None  # this session included
    seeds: list[Any] | None = None  # room for the seed events with their channels


class Session(msgspec.Struct):
    """A closed session; `number` counts this user's sessions from 1. `items` is null where no event had one."""

    session_id: str
    user_id: str
    number: int
    start_ms: int
    end_ms: int
    pages: list[str]
    page_ts_ms: list[int]
    items: list[str | None] | None
    cart: bool
    purchase: bool
    context: Context


class PageProbability(msgspec.Struct):
    """A page of the expected set, and the probability that the next session holds it."""

    page: str
    p: float


class Prediction(msgspec.Struct):
    """What the next session should look like, made when `session_id` closed."""

    prediction_id: str
    session_id: str
    user_id: str
    cluster: int | None
    pages: list[PageProbability]
    path: list[str]
    cart: float
    purchase: float
    model_version: str
    model_digest: str
    fallback: str | None
    close_to_emit_ms: float
    session_end_ms: int


class Score(msgspec.Struct):
    """How right a prediction was; `session_id` is the session that came."""

    prediction_id: str
    session_id: str
    user_id: str
    hr: int
    ioa: float
    iop: float
    iou: float
    cart: bool
    cart_p: float
    cart_log_loss: float
    purchase: bool
    purchase_p: float
    purchase_log_loss: float
    model_version: str


class ModelAlias(msgspec.Struct):
    """Version, digest and place of the bundle that an alias names."""

    alias: str
    version: str
    digest: str
    uri: str
