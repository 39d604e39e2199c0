"""Events as other tools wrap them, unwrapped: Segment's calls and rows of GA4's export to BigQuery.

What is where in an envelope is data: a TOML file each in `resources/envelopes`, read by the one interpreter below.

    times = "iso" | "us"         how its times are written: ISO 8601, or microseconds of the epoch (number or text)
    [detect] required = [...]    paths that must be there (`a|b`: either); absent = [...]: paths that must not
    [detect.equals] path = [...] values that a path must have
    [fields] page = [...]        wire field -> paths; the first that holds something counts
    [skew]                       original, sent, received: the time by the server's clock when `ts` is absent
    [types] view = [...]         our event type -> their names for it; other names stay as they are

A path goes down by dots. In a list a number is a place (`items.0.price`), a name finds the element with that `key` and
goes on in its `value`, of which the one filled `..._value` counts (`event_params.page_location`).
"""

import math
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from importlib import resources
from typing import Any, Literal

import msgspec

TEXT_FIELDS = frozenset({"event_id", "user_id", "page", "type", "item_id", "category", "query", "device"})


class Detect(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the envelope is told from others."""

    required: list[str]
    absent: list[str] = []
    equals: dict[str, list[str]] = {}


class Skew(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Paths of the client's time of the event, the client's time of sending, and the server's time of receipt."""

    original: str
    sent: str
    received: str


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One mapping table."""

    times: Literal["iso", "us"]
    detect: Detect
    fields: dict[str, list[str]]
    skew: Skew | None = None
    types: dict[str, list[str]] = {}


def unwrap(document: dict[str, Any]) -> dict[str, Any] | None:
    """The flat event of the wire in `document`, or None when no envelope fits.

    `ts` comes out as epoch milliseconds or as the ISO text it was; what the envelope lacks is left out, and nothing is
    judged: a wrong value stays for whoever checks the event.
    """
    if "ts" in document and "page" in document:
        return None  # our own event already: the common case costs nothing more
    for envelope in envelopes().values():
        if _fits(envelope.detect, document):
            return _event(envelope, document)
    return None


@cache
def envelopes() -> dict[str, Envelope]:
    """The mapping tables by name."""
    folder = resources.files("streams") / "resources" / "envelopes"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return {f.name.removesuffix(".toml"): msgspec.toml.decode(f.read_bytes(), type=Envelope) for f in files}


def lookup(document: Any, path: str) -> Any:
    """What `path` leads to in a decoded JSON document; None where it leads nowhere."""
    value = document
    for part in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, list):
            value = _element(value, part)
        else:
            return None
    return value


def _element(values: list[Any], part: str) -> Any:
    if part.isdecimal():
        return values[int(part)] if int(part) < len(values) else None
    for element in values:
        if isinstance(element, Mapping) and element.get("key") == part:
            return _filled(element.get("value"))
    return None


def _filled(value: Any) -> Any:
    """BigQuery writes a parameter as a record with one field for each type, all but one empty."""
    if not isinstance(value, Mapping):
        return value
    return next((v for name, v in value.items() if name.endswith("_value") and v is not None), None)


def _fits(detect: Detect, document: dict[str, Any]) -> bool:
    return (
        all(any(_present(document, path) for path in paths.split("|")) for paths in detect.required)
        and not any(_present(document, path) for path in detect.absent)
        and all(lookup(document, path) in values for path, values in detect.equals.items())
    )


def _present(document: dict[str, Any], path: str) -> bool:
    return lookup(document, path) not in (None, "")


def _event(envelope: Envelope, document: dict[str, Any]) -> dict[str, Any]:
    event: dict[str, Any] = {}
    for field, paths in envelope.fields.items():
        value = next((v for v in (lookup(document, path) for path in paths) if v not in (None, "")), None)
        if value is not None:
            event[field] = _converted(field, value)
    if "ts" not in event and envelope.skew is not None:
        corrected = _by_servers_clock(envelope.skew, document)
        if corrected is not None:
            event["ts"] = corrected
    elif "ts" in event and envelope.times == "us":
        event["ts"] = _milliseconds(event["ts"])
    if isinstance(event.get("type"), str):
        ours = (name for name, theirs in envelope.types.items() if event["type"] in theirs)
        event["type"] = next(ours, event["type"])
    return event


def _converted(field: str, value: Any) -> Any:
    """Numbers that are names become text (an item 42), and prices in text become numbers."""
    if field in TEXT_FIELDS and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if field == "price" and isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        return number if math.isfinite(number) else value
    return value


def _milliseconds(value: Any) -> Any:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    return value // 1_000 if isinstance(value, int) and not isinstance(value, bool) else value


def _by_servers_clock(skew: Skew, document: dict[str, Any]) -> Any:
    """original + (received - sent), in epoch ms: right even where the visitor's clock is wrong.

    Without these three the original as it is, and without that the time of receipt.

    Source: Segment, "Spec: Common Fields", section on timestamps.
    """
    times = [lookup(document, path) for path in (skew.original, skew.sent, skew.received)]
    original, sent, received = (_epoch_ms(time) for time in times)
    if original is None or sent is None or received is None:
        return times[0] or times[2]
    return original + (received - sent)


def _epoch_ms(text: Any) -> int | None:
    try:
        time = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return None
    return None if time.tzinfo is None else round(time.timestamp() * 1_000)
