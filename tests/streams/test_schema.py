from typing import Any

import jsonschema
import msgspec
import pytest

from streams import wire
from streams.schema import schema, schemas

EVENT: dict[str, Any] = {"user_id": "u", "ts": 1_790_000_000_123, "page": "p"}
DIGEST = "sha256:" + "0" * 64
SESSION = wire.Session("s", "u", 1, 5, 6, ["a"], [5], None, True, False, wire.Context([], None, None, None))
SCORE = wire.Score("p", "s", "u", 1, 0.5, 0.4, 0.3, True, 0.3, 1.2, False, 0.1, 0.1, "v")
PREDICTION = wire.Prediction(
    "p", "s", "u", None, [wire.PageProbability("a", 0.5)], ["a"], 0.3, 0.1, "v", DIGEST, None, 4.5, 6
)
RECORDS: dict[str, msgspec.Struct] = {
    wire.CLICKS: wire.Event("u", 1_790_000_000_123, "p"),
    wire.REJECTED: wire.Rejected("invalid_json", "decode", "m", "e30=", None, "clicks", 0, 17),
    wire.LATE: wire.Late(wire.Event("u", 1_790_000_000_123, "p"), 412_000),
    wire.SESSIONS: SESSION,
    wire.PREDICTIONS: PREDICTION,
    wire.SCORES: SCORE,
    wire.MODELS: wire.ModelAlias("champion", "1", DIGEST, "file:///b"),
    wire.ITEMS: wire.Item("42", "a red shoe", "shoes", 59.9),
}


def is_valid(topic: str, document: object) -> bool:
    return jsonschema.Draft202012Validator(schema(topic)).is_valid(document)


def test_every_topic_has_a_schema() -> None:
    assert set(schemas()) == set(wire.TOPICS)
    for topic, found in schemas().items():
        jsonschema.Draft202012Validator.check_schema(found)
        assert found["title"] == topic


@pytest.mark.parametrize("topic", wire.TOPICS)
def test_what_we_write_is_valid_and_each_field_is_required(topic: str) -> None:
    record = msgspec.to_builtins(RECORDS[topic])
    assert is_valid(topic, record)
    assert is_valid(topic, {**record, "new field": 1})
    required = {wire.CLICKS: {"user_id", "ts", "page"}, wire.ITEMS: {"item_id"}}.get(topic, set(record))
    absent = {name for name in record if not is_valid(topic, {n: v for n, v in record.items() if n != name})}
    assert absent == required


@pytest.mark.parametrize("ts", [1_790_000_000_123, "2026-01-31T12:00:00+00:00"])
def test_forms_of_a_clicks_time(ts: object) -> None:
    assert is_valid(wire.CLICKS, {**EVENT, "ts": ts})


@pytest.mark.parametrize(
    "change", [{"ts": 12}, {"ts": None}, {"ts": 1.5}, {"user_id": ""}, {"page": 3}, {"price": "9"}, {"type": None}]
)
def test_wrong_clicks(change: dict[str, Any]) -> None:
    assert not is_valid(wire.CLICKS, {**EVENT, **change})


@pytest.mark.parametrize("change", [{"cart": 1.2}, {"model_digest": "sha256:12"}, {"pages": [{"page": "a", "p": 2}]}])
def test_wrong_predictions(change: dict[str, Any]) -> None:
    assert not is_valid(wire.PREDICTIONS, {**msgspec.to_builtins(PREDICTION), **change})


@pytest.mark.parametrize("change", [{"item_id": ""}, {"item_id": 42}, {"price": "9"}, {"available": None}])
def test_wrong_items(change: dict[str, Any]) -> None:
    assert not is_valid(wire.ITEMS, {"item_id": "42", **change})


DECISION = wire.ModelDecision(
    "1", 5, "promoted", "v", DIGEST, "file:///b", "better", "judge", {"e": 31.0}, {"champion": DIGEST}
)


@pytest.mark.parametrize(
    ("change", "valid"),
    [
        ({}, True),
        ({"aliases": {"champion": None}}, True),
        ({"aliases": {"champion": "a"}}, False),
        ({"decision": "eaten"}, False),
        ({"alias": 3}, False),
    ],
)
def test_decisions_about_models(change: dict[str, Any], valid: bool) -> None:
    assert is_valid(wire.MODELS, {**msgspec.to_builtins(DECISION), **change}) == valid


@pytest.mark.parametrize("topic", [wire.CLICKS, wire.SESSIONS, wire.MODELS, wire.ITEMS])
def test_what_a_null_value_means_is_mentioned(topic: str) -> None:
    assert "null value" in schema(topic)["description"]
