import copy
import json
from typing import Any

import pyarrow
import pytest

from streams.envelopes import envelopes, lookup, unwrap
from streams.events import EventDecoder
from streams.profiles import SiteProfile

# From Segment's documentation of its common fields and of its ecommerce events, shortened.
SEGMENT: dict[str, Any] = {
    "anonymousId": "507f191e810c19729de860ea",
    "context": {
        "device": {"type": "mobile"},
        "page": {"path": "/academy/", "url": "https://shop.example/academy/?a=1"},
    },
    "event": "Product Added",
    "messageId": "022bb90c",
    "originalTimestamp": "2024-02-23T22:28:55.387Z",
    "properties": {"product_id": 42, "price": "18.99", "category": "Games", "query": None},
    "receivedAt": "2024-02-23T22:28:58.000Z",
    "sentAt": "2024-02-23T22:28:55.500Z",
    "timestamp": "2024-02-23T22:28:57.887Z",
    "type": "track",
    "userId": "97980cfea0067",
    "version": 2,
}
# A row of the sample export (bigquery-public-data.ga4_obfuscated_sample_ecommerce) in its schema, shortened.
GA4: dict[str, Any] = {
    "event_date": "20210131",
    "event_timestamp": "1612069510766593",
    "event_name": "add_to_cart",
    "event_params": [
        {"key": "ga_session_id", "value": {"string_value": None, "int_value": "661084800", "float_value": None}},
        {
            "key": "page_location",
            "value": {"string_value": "https://shop.example/hats?x=1", "int_value": None, "float_value": None},
        },
        {"key": "search_term", "value": {"string_value": None, "int_value": 7}},
    ],
    "user_id": None,
    "user_pseudo_id": "1026454.4271112504",
    "device": {"category": "desktop", "language": "en-us"},
    "items": [{"item_id": "9195830", "item_category": "Hats", "price": 16.0}],
}


def without(document: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name not in names}


def test_segment_track() -> None:
    assert unwrap(SEGMENT) == {
        "event_id": "022bb90c",
        "user_id": "97980cfea0067",
        "ts": "2024-02-23T22:28:57.887Z",
        "page": "/academy/",
        "type": "cart",
        "item_id": "42",
        "price": 18.99,
        "category": "Games",
        "device": "mobile",
    }


def test_segment_page_and_screen() -> None:
    page = {
        "type": "page",
        "name": "Home",
        "anonymousId": "a",
        "messageId": "m",
        "timestamp": "2024-02-23T22:28:57Z",
        "properties": {"path": "/", "url": "https://shop.example/"},
    }
    expected = {"event_id": "m", "user_id": "a", "ts": "2024-02-23T22:28:57Z", "page": "/", "type": "view"}
    assert unwrap(page) == expected
    assert unwrap({**page, "type": "screen", "properties": {}}) == {**expected, "page": "Home"}


@pytest.mark.parametrize(
    ("name", "ours"),
    [("Product Viewed", "view"), ("Order Completed", "purchase"), ("Coupon Applied", "Coupon Applied")],
)
def test_segment_event_names(name: str, ours: str) -> None:
    event = unwrap({**SEGMENT, "event": name})
    assert event is not None
    assert event["type"] == ours


def test_order_takes_its_first_product() -> None:
    products = [{"product_id": "1", "price": 2.5, "category": "c"}, {"product_id": "2"}]
    event = unwrap({**SEGMENT, "event": "Order Completed", "properties": {"products": products}})
    assert event is not None
    assert (event["item_id"], event["price"], event["category"]) == ("1", 2.5, "c")


def test_segment_time_is_put_right_by_the_servers_clock() -> None:
    event = unwrap(without(SEGMENT, "timestamp"))
    assert event is not None
    assert event["ts"] == 1_708_727_337_887  # 22:28:55.387 + (58.000 - 55.500)


def test_segment_time_without_the_server() -> None:
    event = unwrap(without(SEGMENT, "timestamp", "receivedAt"))
    assert event is not None
    assert event["ts"] == SEGMENT["originalTimestamp"]
    event = unwrap(without(SEGMENT, "timestamp", "originalTimestamp"))
    assert event is not None
    assert event["ts"] == SEGMENT["receivedAt"]


def test_ga4_row() -> None:
    assert unwrap(GA4) == {
        "user_id": "1026454.4271112504",
        "ts": 1_612_069_510_766,
        "page": "https://shop.example/hats?x=1",
        "type": "cart",
        "item_id": "9195830",
        "price": 16.0,
        "category": "Hats",
        "query": "7",
        "device": "desktop",
    }


@pytest.mark.parametrize(
    ("name", "ours"), [("page_view", "view"), ("purchase", "purchase"), ("scroll", "scroll"), ("view_item", "view")]
)
def test_ga4_event_names(name: str, ours: str) -> None:
    event = unwrap({**GA4, "event_name": name, "event_timestamp": 1_612_069_510_766_593, "user_id": "u"})
    assert event is not None
    assert (event["type"], event["ts"], event["user_id"]) == (ours, 1_612_069_510_766, "u")


def test_ga4_row_out_of_parquet_is_the_same() -> None:
    row = copy.deepcopy(GA4)
    row["event_params"][0]["value"]["int_value"] = 661_084_800
    table = pyarrow.Table.from_pylist([{**row, "event_timestamp": 1_612_069_510_766_593}])
    assert unwrap(table.to_pylist()[0]) == unwrap(GA4)


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"user_id": "u", "ts": 1, "page": "p"},
        {"user_id": "u", "ts": 1, "page": "p", "type": "track", "userId": "u", "timestamp": "x"},
        {"user_id": "u", "ts": 1},
        {"type": "identify", "userId": "u", "timestamp": "2024-02-23T22:28:57Z"},
        {"type": "track", "timestamp": "2024-02-23T22:28:57Z"},
        {"event_name": "x", "event_timestamp": 1},
        {"type": ["track"], "userId": "u", "timestamp": "2024-02-23T22:28:57Z"},
    ],
)
def test_what_is_no_envelope(document: dict[str, Any]) -> None:
    assert unwrap(document) is None


@pytest.mark.parametrize(
    "change",
    [
        {"properties": None, "context": []},
        {"properties": {"price": "cheap"}},
        {"timestamp": "", "sentAt": 5, "receivedAt": "soon"},
        {"event": 3},
        {"event": {"a": 1}},
        {"context": {"page": {"path": ["x"]}}},
    ],
)
def test_wrong_values_are_left_to_the_check(change: dict[str, Any]) -> None:
    assert unwrap({**SEGMENT, **change}) is not None
    assert unwrap({**GA4, "event_params": [1, {"key": "page_location", "value": 3}], "items": {}}) is not None


def test_path_into_lists() -> None:
    document = {"a": [{"b": 1}, {"key": "c", "value": {"d": {"string_value": "x"}}}]}
    assert lookup(document, "a.0.b") == 1
    assert lookup(document, "a.5.b") is None
    assert lookup(document, "a.nothing") is None
    assert lookup(document, "a.0.b.c") is None


def test_tables_name_only_fields_of_the_wire() -> None:
    known = {"event_id", "user_id", "ts", "page", "type", "item_id", "price", "category", "query", "device"}
    assert set(envelopes()) == {"ga4", "segment"}
    assert all(set(envelope.fields) <= known for envelope in envelopes().values())


@pytest.mark.parametrize("document", [SEGMENT, GA4])
def test_the_worker_takes_them(document: dict[str, Any]) -> None:
    decoder, flat = EventDecoder(SiteProfile(), 3_600_000), unwrap(document)
    assert flat is not None
    event, _ = decoder.decode(flat["user_id"].encode(), json.dumps(document).encode(), 1_800_000_000_000)
    assert (event.user_id, event.page, event.item_id) == (flat["user_id"], flat["page"], flat["item_id"])
