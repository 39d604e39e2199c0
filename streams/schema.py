"""The published JSON Schema of every topic, made from the types in `streams.wire` and the rules that hold beside them.

Nothing is kept in a file, so the schema cannot differ from the code. The schema of what is read (`clicks`, `items`)
says what is accepted, that of what is written says what comes: all fields present, null where there is nothing. Unknown
fields are ignored everywhere.
"""

from typing import Any

import msgspec

from streams import wire
from streams.events import MAX_NAME, OLDEST_MS

DIALECT = "https://json-schema.org/draft/2020-12/schema"
TYPES: dict[str, type[msgspec.Struct]] = {
    wire.CLICKS: wire.Event,
    wire.REJECTED: wire.Rejected,
    wire.LATE: wire.Late,
    wire.SESSIONS: wire.Session,
    wire.PREDICTIONS: wire.Prediction,
    wire.SCORES: wire.Score,
    wire.MODELS: wire.ModelAlias,
    wire.ITEMS: wire.Item,
}
MORE = {wire.MODELS: (wire.ModelDecision,)}  # what a topic holds besides
READ = {wire.CLICKS, wire.ITEMS}
KEYS = {
    wire.REJECTED: "the key as received",
    wire.MODELS: "the alias, or decision/ and the decision's id",
    wire.ITEMS: "the item id",
}
TOMBSTONES = {
    wire.CLICKS: " A record with a null value instead forgets the user of its key, everywhere."
    " The envelopes of Segment and of GA4's export to BigQuery are accepted as they are, besides this form.",
    wire.SESSIONS: " A record with a null value says that the user of its key was forgotten.",
    wire.MODELS: " A record with a null value says that the alias of its key names no bundle now.",
    wire.ITEMS: " A record with a null value removes the item of its key.",
}
UNIT = {"minimum": 0, "maximum": 1}
COUNT = {"minimum": 0}
NAME = {"minLength": 1, "maxLength": MAX_NAME}
DIGEST = {"pattern": "^sha256:[0-9a-f]{64}$"}
BASE64 = {"contentEncoding": "base64"}
TS: dict[str, Any] = {
    "description": "epoch milliseconds, or ISO 8601 with an offset",
    "anyOf": [{"type": "integer", "minimum": OLDEST_MS}, {"type": "string", "format": "date-time"}],
}
# What the types cannot say: type -> field -> keywords put beside the generated ones.
RULES: dict[str, dict[str, dict[str, Any]]] = {
    "Event": {"user_id": NAME, "page": NAME, "ts": {"minimum": OLDEST_MS}},
    "Rejected": {"original": BASE64, "original_key": BASE64, "partition": COUNT, "offset": COUNT},
    "Late": {"late_by_ms": {"exclusiveMinimum": 0}},
    "Session": {"number": {"minimum": 1}, "pages": {"minItems": 1}, "page_ts_ms": {"minItems": 1}},
    "PageProbability": {"p": UNIT},
    "Prediction": {"cart": UNIT, "purchase": UNIT, "model_digest": DIGEST, "close_to_emit_ms": COUNT},
    "Score": {
        "hr": UNIT,
        "ioa": UNIT,
        "iop": UNIT,
        "iou": UNIT,
        "cart_p": UNIT,
        "cart_log_loss": COUNT,
        "purchase_p": UNIT,
        "purchase_log_loss": COUNT,
    },
    "ModelAlias": {"digest": DIGEST},
    "ModelDecision": {
        "digest": DIGEST,
        "at_ms": COUNT,
        "decision": {"enum": ["published", "refused", "promoted", "retired", "rolled_back", "pruned"]},
        "by": {"enum": ["trainer", "judge", "user"]},
        "aliases": {"additionalProperties": {"anyOf": [{"type": "string", **DIGEST}, {"type": "null"}]}},
    },
    "Item": {"item_id": NAME},
}


def schemas() -> dict[str, dict[str, Any]]:
    """Topic (without prefix) -> JSON Schema, draft 2020-12, of its values."""
    return {topic: schema(topic) for topic in TYPES}


def schema(topic: str) -> dict[str, Any]:
    """The JSON Schema of one topic's values. Raises `KeyError` for a topic that is none of ours."""
    kinds = (TYPES[topic], *MORE.get(topic, ()))
    references, found = msgspec.json.schema_components(kinds, ref_template="#/$defs/{name}")
    definitions: dict[str, dict[str, Any]] = found
    for name, definition in definitions.items():
        _complete(name, definition, written=topic not in READ)
    if topic == wire.CLICKS:
        definitions["Event"]["properties"]["ts"] = TS
    root = definitions.pop(kinds[0].__name__) if len(kinds) == 1 else {"anyOf": list(references)}
    about = f"Key: {KEYS.get(topic, 'the user id')}. {root.get('description', '')}{TOMBSTONES.get(topic, '')}"
    return {"$schema": DIALECT, **root, "title": topic, "description": about} | (
        {"$defs": definitions} if definitions else {}
    )


def _complete(name: str, definition: dict[str, Any], *, written: bool) -> None:
    """Put our rules into a generated definition, in place."""
    for field, keywords in RULES.get(name, {}).items():
        definition["properties"][field].update(keywords)
    if written:
        definition["required"] = list(definition["properties"])
