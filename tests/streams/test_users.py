"""What `browsecast user show` says of a visitor's record."""

import json

import msgspec

from streams.sessions import User
from streams.users import UserState


def test_the_state_as_plain_values() -> None:
    user = User(last_ms=9, number=2, closed_id="s", closed_end_ms=7)
    assert UserState("u", 1, 5, user).lines()["channels"] == []
    user.seeds = msgspec.Raw(msgspec.msgpack.encode([["42", 6, 1.5, 0]]))
    user.items = msgspec.Raw(msgspec.msgpack.encode([["42", "7"], [["7", 2]]]))
    lines = UserState("u", 1, 5, user).lines()
    assert lines["channels"] == [{"item_id": "42", "ts_ms": 6, "weight": 1.5, "events_since": 0}]
    assert (lines["recent_items"], lines["bought_items"]) == (["42", "7"], ["7"])
    assert json.loads(msgspec.json.encode(lines)) == lines
