"""From bytes to an event: every reason why not, and that nothing else can happen."""

import base64
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiokafka import ConsumerRecord
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streams.events import MAX_BYTES, MAX_DEPTH, MAX_NAME, OLDEST_MS, BadEvent, EventDecoder, check_key, check_time
from streams.profiles import SiteProfile
from streams.roles import refused
from streams.sessions import CART, PURCHASE
from streams.wire import Event, Rejected
from tests.streams.test_envelopes import GA4, SEGMENT

NOW = 1_790_000_000_123
HOUR = 3_600_000
DECODER = EventDecoder(SiteProfile(), HOUR)
CLICK: dict[str, Any] = {"event_id": "e", "user_id": "u", "ts": NOW, "page": "/p", "type": "view"}


def decode(value: bytes | dict[str, Any], key: bytes = b"u", timestamp_ms: int = NOW) -> Event:
    return DECODER.decode(key, value if isinstance(value, bytes) else json.dumps(value).encode(), timestamp_ms)[0]


def refusal(value: bytes | dict[str, Any], key: bytes = b"u", timestamp_ms: int = NOW) -> tuple[str, str]:
    with pytest.raises(BadEvent) as caught:
        decode(value, key, timestamp_ms)
    assert str(caught.value)
    return caught.value.reason, caught.value.stage


def text(**changes: Any) -> bytes:
    return json.dumps(CLICK | changes).encode()


def nested(depth: int) -> bytes:
    """A click whose unknown field is nested so deep that the whole value is `depth` deep."""
    return json.dumps(CLICK)[:-1].encode() + b', "deep": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


BROKEN: list[tuple[str, str, bytes]] = [
    ("invalid_json", "decode", b""),
    ("invalid_json", "decode", b"{"),
    ("invalid_json", "decode", b"user_id=u"),
    ("invalid_json", "decode", text() + b" x"),
    ("invalid_json", "decode", b"\xef\xbb\xbf" + text()),
    ("invalid_json", "decode", text(page="\ud800")),
    ("invalid_json", "decode", json.dumps({**SEGMENT, "userId": "u\ud800"}).encode()),
    ("invalid_json", "decode", json.dumps({**SEGMENT, "properties": {"path": "/\udfff"}}).encode()),
    ("invalid_utf8", "decode", b"\xff"),
    ("invalid_utf8", "decode", text(page="PAGE").replace(b"PAGE", b"\xc3\x28")),
    ("invalid_utf8", "decode", text(unknown="X").replace(b'"X"', b'"\xed\xa0\x80"')),
    ("not_a_number", "decode", text(price="X").replace(b'"X"', b"NaN")),
    ("not_a_number", "decode", text(price="X").replace(b'"X"', b"-Infinity")),
    ("not_a_number", "decode", text(price="X").replace(b'"X"', b"1e999")),
    ("not_a_number", "decode", text(attributes={"a": ["X"]}).replace(b'"X"', b"NaN")),
    ("not_a_number", "decode", text(unknown="X").replace(b'"X"', b"NaN")),
    ("wrong_type", "decode", b"[]"),
    ("wrong_type", "decode", b"null"),
    ("wrong_type", "decode", b'"u"'),
    ("wrong_type", "decode", text(ts=None)),
    ("wrong_type", "decode", text(ts=1.5)),
    ("wrong_type", "decode", text(ts=True)),
    ("wrong_type", "decode", text(user_id=7)),
    ("wrong_type", "decode", text(page=None)),
    ("wrong_type", "decode", text(type=3)),
    ("wrong_type", "decode", text(price="59.9")),
    ("wrong_type", "decode", text(price=True)),
    ("wrong_type", "decode", text(item_id=42)),
    ("wrong_type", "decode", text(attributes=[])),
    ("wrong_type", "decode", json.dumps({**SEGMENT, "properties": {"price": "NaN"}}).encode()),
    ("wrong_type", "decode", json.dumps({**SEGMENT, "properties": {"price": "1e999"}}).encode()),
    ("wrong_type", "check", text(attributes={"n": 2**64})),
    ("wrong_type", "check", text(attributes={"n": [-(2**63) - 1]})),
    ("missing_field", "decode", b"{}"),
    *(("missing_field", "decode", json.dumps({k: v for k, v in CLICK.items() if k != name}).encode())
      for name in ("user_id", "ts", "page")),
    ("missing_field", "check", text(user_id="")),
    ("missing_field", "check", text(page="")),
    ("too_large", "check", text(page="p" * (MAX_NAME + 1))),
    ("too_large", "decode", text(x="y" * MAX_BYTES)),
    ("too_deep", "decode", nested(MAX_DEPTH + 1)),
    ("too_deep", "decode", b"[" * 100_000),
    ("key_mismatch", "check", text(user_id="v")),
    ("before_1990", "check", text(ts=OLDEST_MS - 1)),
    ("before_1990", "check", text(ts=-1)),
    ("before_1990", "check", text(ts="1970-01-01T00:00:00Z")),
    ("in_the_future", "check", text(ts=NOW + HOUR + 1)),
    ("in_the_future", "check", text(ts="2100-01-01T00:00:00Z")),
    ("in_the_future", "check", text(ts=10**30)),
    ("invalid_timestamp", "check", text(ts="2026-01-31T12:00:00")),
    ("invalid_timestamp", "check", text(ts="2026-01-31")),
    ("invalid_timestamp", "check", text(ts="yesterday")),
    ("invalid_timestamp", "check", text(ts="")),
    ("invalid_timestamp", "check", text(ts=str(NOW))),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "stage", "value"), BROKEN, ids=lambda part: str(part)[:50])
def test_reason(reason: str, stage: str, value: bytes) -> None:
    assert refusal(value) == (reason, stage)


@pytest.mark.parametrize("value", [value for _, _, value in BROKEN] + [None], ids=range(len(BROKEN) + 1))
def test_the_original_is_kept_whole(value: bytes | None) -> None:
    for key in (None, b"\xff\x00", b"u"):
        record = ConsumerRecord("shop.clicks", 3, 17, NOW, 0, key, value, None, 0, 0, ())
        output = refused(record, "decode", "why", "invalid_json")
        assert output.key == key
        rejected = msgspec.json.decode(output.value or b"", type=Rejected)
        assert (rejected.topic, rejected.partition, rejected.offset) == ("shop.clicks", 3, 17)
        assert (rejected.reason, rejected.stage, rejected.message) == ("invalid_json", "decode", "why")
        originals = [
            None if one is None else base64.b64decode(one) for one in (rejected.original, rejected.original_key)
        ]
        assert originals == [value, key]


def test_keys() -> None:
    for key, reason in [
        (None, "null_key"),
        (b"", "invalid_key"),
        (b"\xff", "invalid_key"),
        (b"\0clock", "invalid_key"),
    ]:
        with pytest.raises(BadEvent) as caught:
            check_key(key)
        assert (caught.value.reason, caught.value.stage) == (reason, "key")
    assert check_key("ü".encode()) == "ü".encode()
    assert decode(CLICK | {"user_id": "ü"}, "ü".encode()).user_id == "ü"
    assert refusal(CLICK, b"\xff")[0] == "key_mismatch"


@pytest.mark.parametrize(
    ("ts", "ms"),
    [
        (NOW, NOW),
        (OLDEST_MS, OLDEST_MS),
        ("2026-01-31T12:00:00+00:00", 1_769_860_800_000),
        ("2026-01-31T12:00:00Z", 1_769_860_800_000),
        ("2026-01-31T12:00:00.123Z", 1_769_860_800_123),
        ("2026-01-31T12:00:00.123999Z", 1_769_860_800_123),
        ("2026-01-31T14:30:00+02:30", 1_769_860_800_000),
        ("2026-01-31T01:00:00-11:00", 1_769_860_800_000),
        ("20260131T120000Z", 1_769_860_800_000),
    ],
)
def test_times(ts: int | str, ms: int) -> None:
    assert decode(CLICK | {"ts": ts}).ts == ms


def test_the_future_is_measured_from_the_records_own_timestamp() -> None:
    assert decode(CLICK | {"ts": NOW + HOUR}).ts == NOW + HOUR
    assert decode(CLICK, timestamp_ms=NOW - HOUR).ts == NOW
    assert refusal(CLICK, timestamp_ms=NOW - HOUR - 1)[0] == "in_the_future"
    check_time(NOW, -1, HOUR)  # a record without a timestamp says nothing about the time


def test_what_is_taken_as_it_is() -> None:
    full = CLICK | {
        "item_id": "42", "price": 59, "category": "shoes", "query": "red", "device": "mobile",
        "attributes": {"a": [1, {}]},
    }  # fmt: skip
    assert decode(full | {"unknown": {"x": 1}, "Page": 3}) == Event(
        "u", NOW, "/p", "e", "view", "42", 59.0, "shoes", "red", "mobile", {"a": [1, {}]}
    )
    bare = {"user_id": "u", "ts": NOW, "page": "/p"}
    assert decode(bare) == decode(bare | dict.fromkeys(["event_id", "type", "item_id", "price", "attributes"]))
    assert decode(bare) == Event("u", NOW, "/p")
    assert decode(CLICK | {"event_id": "", "type": ""}) == Event("u", NOW, "/p")
    assert decode(CLICK | {"attributes": {"n": 2**64 - 1}}).attributes == {"n": 2**64 - 1}


def test_sizes_at_the_limits() -> None:
    assert len(decode(CLICK | {"page": "ü" * MAX_NAME}).page) == MAX_NAME
    assert decode(CLICK | {"user_id": "v" * MAX_NAME}, b"v" * MAX_NAME).page == "/p"
    full = json.dumps(CLICK).encode() + b" " * (MAX_BYTES - len(json.dumps(CLICK)))
    assert decode(full) == decode(CLICK)
    assert refusal(full + b" ")[0] == "too_large"
    assert decode(nested(MAX_DEPTH)) == decode(CLICK)


def test_brackets_in_strings_are_not_depth() -> None:
    assert decode(CLICK | {"query": '\\"[{' * 100}).query == '\\"[{' * 100
    assert decode(CLICK | {"unknown": [[]] * 100}) == decode(CLICK)


def test_types_that_mean_an_outcome() -> None:
    for kind, mark in [("view", 0), ("cart", CART), ("purchase", PURCHASE), ("anything", 0), (None, 0)]:
        assert DECODER.decode(b"u", text(type=kind), NOW)[1] == mark


def test_a_site_profile_names_pages_and_outcomes(tmp_path: Path) -> None:
    profile = tmp_path / "shop.toml"
    profile.write_text(
        '[pages]\nstrip_query = true\nignore = ["\\\\.png$"]\ncart = ["^/basket"]\npurchase = ["^/paid"]\n'
    )
    decoder = EventDecoder(SiteProfile.load(profile), HOUR)
    event, mark = decoder.decode(b"u", text(page="/basket?x=1"), NOW)
    assert (event.page, mark) == ("/basket", CART)
    assert decoder.decode(b"u", text(page="/paid", type="cart"), NOW)[1] == CART | PURCHASE
    with pytest.raises(BadEvent) as caught:
        decoder.decode(b"u", text(page="/logo.png"), NOW)
    assert (caught.value.reason, caught.value.stage) == ("ignored_page", "profile")


def test_segment_and_ga4_as_they_are() -> None:
    segment = decode(SEGMENT, b"97980cfea0067")
    assert (segment.event_id, segment.ts, segment.page, segment.item_id) == (
        "022bb90c",
        1_708_727_337_887,
        "/academy/",
        "42",
    )
    event, mark = DECODER.decode(b"1026454.4271112504", json.dumps(GA4).encode(), NOW)
    assert (event.ts, event.page, event.type, mark) == (
        1_612_069_510_766,
        "https://shop.example/hats?x=1",
        "cart",
        CART,
    )
    assert refusal(SEGMENT, b"someone else")[0] == "key_mismatch"
    assert refusal({**SEGMENT, "timestamp": "2024-02-23 22:28:57"}, b"97980cfea0067")[0] == "invalid_timestamp"
    assert refusal({**GA4, "event_timestamp": "soon"}, b"1026454.4271112504")[0] == "invalid_timestamp"


def only_bad_event(key: bytes, value: bytes) -> None:
    """What comes out of the decoder can be kept, published, and held."""
    try:
        event, mark = DECODER.decode(check_key(key), value, NOW)
    except BadEvent as error:
        assert error.reason.replace("_", "").isalnum()
        json.dumps(str(error)).encode()
        return
    assert mark in range(4)
    assert OLDEST_MS <= event.ts <= NOW + HOUR
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(event), type=Event) == event
    assert msgspec.json.decode(msgspec.json.encode(event), type=Event) == event


values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["NaN", "\ud800", 2**64, "u"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=60), st.binary(max_size=200))
@example(b"u", b"{")
def test_arbitrary_bytes(key: bytes, value: bytes) -> None:
    only_bad_event(key, value)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([CLICK, SEGMENT, GA4]), st.data())
def test_mutated_json(document: dict[str, Any], data: st.DataObject) -> None:
    for name in data.draw(st.lists(st.sampled_from(sorted(document)), max_size=3)):
        document = {**document, name: data.draw(values)}
    value = json.dumps(document).encode()
    for place, byte in data.draw(
        st.lists(st.tuples(st.integers(0, len(value) - 1), st.binary(max_size=2)), max_size=2)
    ):
        value = value[:place] + byte + value[place + 1 :]
    for key in (b"u", b"97980cfea0067", b"1026454.4271112504"):
        only_bad_event(key, value)
