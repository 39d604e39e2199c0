"""From the bytes of a record to an event, or to the reason why not: nothing but `BadEvent` ever comes out."""

import json
import math
from datetime import datetime
from typing import Any, NoReturn

import msgspec

from streams.envelopes import unwrap
from streams.profiles import SiteProfile
from streams.sessions import CART, PURCHASE
from streams.times import epoch_ms
from streams.wire import Event

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_NAME = 2_048  # characters of a page or a user id: they are kept in the state
OLDEST_MS = 631_152_000_000  # 1990-01-01
CACHED_MARKS = 65_536
NEWEST_MS = 253_402_300_799_999  # 9999-12-31


class BadEvent(Exception):
    """Goes to `clicks.rejected`: `reason` is a stable code, `stage` the step that refused it, the text for people."""

    def __init__(self, reason: str, stage: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.stage = reason, stage


class _Raw(msgspec.Struct, gc=False):
    """An event as it may come: `ts` in any of its forms."""

    user_id: str
    ts: int | str
    page: str
    event_id: str | None = None
    type: str | None = None
    item_id: str | None = None
    price: float | None = None
    category: str | None = None
    query: str | None = None
    device: str | None = None
    attributes: dict[str, Any] | None = None


_decode = msgspec.json.Decoder(_Raw).decode


class EventDecoder:
    """Decodes, checks and names events; `profile` names pages and says what means cart and purchase."""

    def __init__(self, profile: SiteProfile, ahead_ms: int) -> None:
        self._profile, self._ahead_ms, self._names_pages = profile, ahead_ms, profile.names_pages
        self._marks: dict[tuple[str | None, str], int] = {}

    def decode(self, key: bytes, value: bytes, timestamp_ms: int) -> tuple[Event, int]:
        """The event and its outcome bits. `timestamp_ms`: the record's Kafka timestamp. Raises `BadEvent`."""
        raw = self._parse(value)
        user_id, ts, page = raw.user_id, raw.ts, raw.page
        if not isinstance(ts, int):
            ts = _from_iso(ts)
        if not user_id or not page or len(user_id) > MAX_NAME or len(page) > MAX_NAME:
            _refuse_name(user_id, page)
        if user_id.encode() != key:
            raise BadEvent("key_mismatch", "check", f"the record's key {_text(key)} differs from user_id {user_id!r}")
        if not OLDEST_MS <= ts <= timestamp_ms:
            check_time(ts, timestamp_ms, self._ahead_ms)
        if raw.attributes is not None:
            _check_attributes(raw.attributes)
        event_type, item_id, category = raw.type or "view", raw.item_id, raw.category
        if self._names_pages:
            named = self._profile.resolve(page, item_id, category, event_type)
            if named is None:
                raise BadEvent("ignored_page", "profile", f"the site profile says that page {page!r} is no click")
            page, item_id, category, _ = named
        event = Event(
            user_id, ts, page, raw.event_id or None, event_type, item_id, raw.price,
            category, raw.query, raw.device, raw.attributes,
        )  # fmt: skip
        return event, self._mark(page, event_type)

    def _mark(self, page: str, event_type: str) -> int:
        """CART and PURCHASE bits; a profile without patterns decides by the type alone."""
        place = (page if self._names_pages else None, event_type)
        mark = self._marks.get(place)
        if mark is None:
            cart, purchase = self._profile.outcome(page, event_type)
            mark = cart * CART | purchase * PURCHASE
            if len(self._marks) < CACHED_MARKS:
                self._marks[place] = mark
        return mark

    def _parse(self, value: bytes) -> _Raw:
        if len(value) > MAX_BYTES:
            raise BadEvent("too_large", "decode", f"the value has {len(value)} bytes, at most {MAX_BYTES} are taken")
        if value.count(b"[") + value.count(b"{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
            raise BadEvent("too_deep", "decode", f"the value is nested deeper than {MAX_DEPTH}")
        try:
            value.decode()
            return _decode(value)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return _second_look(value, error)


def check_key(key: bytes | None) -> bytes:
    """The key, if it can name a user. Raises `BadEvent`."""
    if key is None:
        raise BadEvent("null_key", "key", "the record has no key; it must be the user id")
    try:
        key.decode()
    except UnicodeDecodeError as error:
        raise BadEvent("invalid_key", "key", f"the key is not UTF-8: {error}") from None
    if not key or key.startswith(b"\0"):
        raise BadEvent("invalid_key", "key", "the key is empty or begins with a null character; it must be the user id")
    return key


def _refuse_name(user_id: str, page: str) -> None:
    for name, value in (("user_id", user_id), ("page", page)):
        if not value:
            raise BadEvent("missing_field", "check", f"{name} is empty")
        if len(value) > MAX_NAME:
            raise BadEvent("too_large", "check", f"{name} has {len(value)} characters, at most {MAX_NAME} are taken")


def check_time(ts: int, timestamp_ms: int, ahead_ms: int) -> None:
    """An event may not be from before 1990, nor far ahead of its own Kafka timestamp. Raises `BadEvent`."""
    if ts < OLDEST_MS:
        raise BadEvent("before_1990", "check", f"ts {ts} is before 1990-01-01; it must be epoch milliseconds")
    if ts > NEWEST_MS or 0 <= timestamp_ms < ts - ahead_ms:
        raise BadEvent(
            "in_the_future",
            "check",
            f"ts {ts} is {ts - timestamp_ms} ms ahead of the record's own timestamp {timestamp_ms}",
        )


def _check_attributes(attributes: dict[str, Any]) -> None:
    """A held event is kept as MessagePack, which knows no integers beyond 64 bits."""
    try:
        msgspec.msgpack.encode(attributes)
    except OverflowError:
        raise BadEvent("wrong_type", "check", "attributes holds an integer beyond 64 bits; write it as text") from None


def _second_look(value: bytes, error: Exception) -> _Raw:
    """Slower, for what the quick way refused: another envelope, or the reason in words."""
    document = _document(value)
    try:
        flat = unwrap(document)
    except (ValueError, TypeError) as wrong:
        raise BadEvent("invalid_envelope", "envelope", str(wrong)) from None
    if flat is None:
        _refuse(error)
    try:
        return _decode(msgspec.json.encode(flat))
    except UnicodeEncodeError as wrong:
        raise BadEvent("invalid_json", "decode", f"the value holds half a character: {wrong}") from None
    except msgspec.ValidationError as wrong:
        _refuse(wrong)


def _document(value: bytes) -> dict[str, Any]:
    try:
        document = json.loads(value.decode(), parse_constant=_no_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise BadEvent("invalid_utf8", "decode", f"the value is not UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        raise BadEvent("invalid_json", "decode", f"the value is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise BadEvent("wrong_type", "decode", f"the value is a JSON {type(document).__name__}, an event is an object")
    return document


def _no_constant(name: str) -> NoReturn:
    raise BadEvent("not_a_number", "decode", f"the value holds {name}, which is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise BadEvent("not_a_number", "decode", f"the number {text} is too large")
    return number


def _refuse(error: Exception) -> NoReturn:
    message = str(error)
    if isinstance(error, msgspec.ValidationError):
        reason = "missing_field" if "missing required field" in message else "wrong_type"
        raise BadEvent(reason, "decode", message) from None
    if isinstance(error, UnicodeDecodeError):
        raise BadEvent("invalid_utf8", "decode", message) from None
    raise BadEvent("invalid_json", "decode", message) from None


def _from_iso(text: str) -> int:
    try:
        time = datetime.fromisoformat(text)
        if time.tzinfo is None:
            raise BadEvent(
                "invalid_timestamp", "check", f"ts {text!r} has no offset; write e.g. 2026-01-31T12:00:00+00:00"
            )
        return epoch_ms(time)
    except (ValueError, OverflowError):
        raise BadEvent(
            "invalid_timestamp", "check", f"ts {text[:64]!r} is neither epoch milliseconds nor ISO 8601"
        ) from None


def _depth(value: bytes) -> int:
    """How deep JSON text is nested; brackets in strings do not count."""
    deepest = depth = 0
    in_string = escaped = False
    for byte in value:
        if in_string:
            in_string, escaped = escaped or byte != 0x22, not escaped and byte == 0x5C
        elif byte == 0x22:
            in_string = True
        elif byte in b"{[":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"}]":
            depth -= 1
    return deepest


def _text(key: bytes) -> str:
    return repr(key.decode(errors="replace")[:64])
