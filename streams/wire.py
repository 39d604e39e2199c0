"""What goes over the wire: every record of every topic as a type. Field names are the contract.

Times are epoch milliseconds, UTC. Unknown fields are ignored; a field may be added, never renamed.
"""

from typing import Any, NamedTuple

import msgspec

CLICKS = "clicks"
REJECTED = "clicks.rejected"
LATE = "clicks.late"
SESSIONS = "sessions"
PREDICTIONS = "predictions"
SCORES = "scores"
MODELS = "models"
ITEMS = "items"
TOPICS = (CLICKS, REJECTED, LATE, SESSIONS, PREDICTIONS, SCORES, MODELS, ITEMS)

# The aliases, which are keys of `models`; its other keys are `decision/<decision_id>`.
CHAMPION = "champion"
CHALLENGER = "challenger"


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


class Seed(msgspec.Struct):
    """A seed event: the newest item a visitor touched in a channel, and the channel's decayed weight at the close."""

    item_id: str
    channel: int  # the item's global cluster
    weight: float
    ts_ms: int


class Context(msgspec.Struct):
    """What a predictor needs besides the session itself."""

    history: list[list[str]]  # pages of the sessions before this one, oldest first, within the token budget
    previous_session_id: str | None
    previous_end_ms: int | None
    routing: Routing | None  # this session included
    seeds: list[Seed] | None = None  # heaviest channel first; null without a bundle that knows items
    recent_items: list[str] = []  # touched last, this session included, newest first, each once
    bought_items: list[str] = []  # the same of those bought in this session and the two before it


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


class RankedItem(msgspec.Struct):
    """An item to put before the visitor, and the seed event that brought it (None: popularity did)."""

    item_id: str
    score: float
    seed: str | None


class Shadow(msgspec.Struct):
    """What the challenger would have published in the champion's place."""

    prediction_id: str
    cluster: int | None
    pages: list[PageProbability]
    path: list[str]
    cart: float
    purchase: float
    model_version: str
    model_digest: str


class Prediction(msgspec.Struct):
    """What the next session should look like, made when `session_id` closed.

    `items` is null where the model knows no items; `shadow` where no challenger stands beside the champion, or the
    visitor is not in its share.
    """

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
    items: list[RankedItem] | None = None
    shadow: Shadow | None = None


class ShadowScore(msgspec.Struct):
    """How right the challenger would have been."""

    prediction_id: str
    hr: int
    ioa: float
    iop: float
    iou: float
    cart_p: float
    cart_log_loss: float
    purchase_p: float
    purchase_log_loss: float
    model_version: str
    model_digest: str


class Score(msgspec.Struct):
    """How right a prediction was; `session_id` is the session that came.

    `baselines` has the IoU that "the last session again" and "the pages this visitor sees most" would have had.
    """

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
    model_digest: str | None = None
    cluster: int | None = None
    fallback: str | None = None
    session_end_ms: int | None = None  # of the session that came
    baselines: dict[str, float] | None = None
    shadow: ShadowScore | None = None


class ModelAlias(msgspec.Struct):
    """Version, digest and place of the bundle that an alias names; a null value: it names none."""

    alias: str
    version: str
    digest: str
    uri: str


class ModelDecision(msgspec.Struct):
    """Something that happened to a model, and why: the other kind of record in `models`, under a key of its own.

    `decision` is published, promoted, retired, rolled_back, refused or pruned. `aliases` are those that moved with it
    in the same transaction, alias -> digest (null: it names none now). `alias` is null, so that nobody takes the
    record for an alias.
    """

    decision_id: str
    at_ms: int
    decision: str
    version: str
    digest: str
    uri: str
    reason: str
    by: str  # trainer, judge or user
    evidence: dict[str, Any]
    aliases: dict[str, str | None]
    alias: None = None


class Item(msgspec.Struct):
    """Something that can be put before a visitor. `text` is what it says of itself; unavailable items stay known.

    A record replaces all that was said of the item before.
    """

    item_id: str
    text: str | None = None
    category: str | None = None
    price: float | None = None
    available: bool = True

    @property
    def description(self) -> str:
        """What its place among the other items is read from: its text and its category; empty without both."""
        return " ".join(part for part in (self.text, self.category) if part)


class Record(NamedTuple):
    """One committed record of a topic, as a reader gets it; a null value forgets the user of the key."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    timestamp_ms: int


def session_schema() -> Any:
    """The columns of session files, those of `replay --sessions` and of the archive, as an Arrow schema."""
    import pyarrow as pa  # only those who read or write files need it

    return pa.schema(
        [
            pa.field("user_id", pa.string(), nullable=False),
            pa.field("session_id", pa.string(), nullable=False),
            pa.field("number", pa.int64(), nullable=False),
            pa.field("start_ms", pa.int64(), nullable=False),
            pa.field("end_ms", pa.int64(), nullable=False),
            pa.field("pages", pa.list_(pa.string()), nullable=False),
            pa.field("page_ts_ms", pa.list_(pa.int64()), nullable=False),
            pa.field("cart", pa.bool_(), nullable=False),
            pa.field("purchase", pa.bool_(), nullable=False),
            pa.field("items", pa.list_(pa.string())),  # null where no event had an item
        ]
    )
