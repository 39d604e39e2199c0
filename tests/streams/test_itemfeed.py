"""What goes on among the items reaches the retriever; what is wrong with a record harms nothing."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from confluent_kafka import Producer
from structlog.testing import capture_logs

from models.encoder import WIDTH as WIDTH_OF_TEXT
from models.items import ItemTable
from models.retriever import Retriever
from models.visit import Interest
from streams import itemtopic, playing, tail, wire
from streams.clients import librdkafka
from streams.errors import UsageError, WrongTopics
from streams.events import MAX_NAME
from streams.itemfeed import ENCODED_AT_ONCE, ItemFeed
from streams.lines import BadLine
from streams.mock import MockCluster
from streams.settings import HOUR_MS, Settings
from streams.topics import specs
from tests.goods import goods

NOW = 1_790_000_000_000
INTEREST = Interest([("i1", 0, 1.0)])


class Message:
    """A record as `confluent_kafka` gives it."""

    def __init__(self, key: bytes | None, value: bytes | None) -> None:
        self._key, self._value = key, value

    def key(self) -> bytes | None:
        return self._key

    def value(self) -> bytes | None:
        return self._value

    def topic(self) -> str:
        return "items"

    def partition(self) -> int:
        return 0

    def offset(self) -> int:
        return 5


def item(item_id: str, **fields: Any) -> Message:
    return Message(item_id.encode(), json.dumps({"item_id": item_id, **fields}).encode())


def gone(item_id: str) -> Message:
    return Message(item_id.encode(), None)


class Writing:
    """An encoder for which a text is the name of an item: the new one lies where that lies. `gate` holds it up."""

    def __init__(self, table: ItemTable) -> None:
        inverse = np.linalg.pinv(table.tensors["text_map"])
        self._places = {item_id: vector @ inverse for item_id, vector in zip(table.ids, table.vectors, strict=True)}
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        self.batches.append(list(texts))
        assert self.gate.wait(30)
        if "unspeakable" in texts:
            raise ValueError
        return np.stack([self._places.get(text, np.zeros(WIDTH_OF_TEXT)) for text in texts])


class Scene:
    """A feed whose followers are not started: records are handed to it."""

    def __init__(self, text: bool = True, **chosen: Any) -> None:
        self.retriever = Retriever(ItemTable(*goods(prior=(0.0, 0.0), **chosen), "d"), 5)
        self.encode = Writing(self.retriever.table)
        self.feed = ItemFeed(Settings(), self.retriever, self.encode if text else None)
        self.thread = threading.Thread(target=self.feed._place, daemon=True)
        self.thread.start()

    def found(self) -> list[str]:
        return [ranked.item for ranked in self.retriever.rank([INTEREST])[0]]

    def settled(self) -> "Scene":
        until(lambda: not self.feed.figures().waiting)
        return self


def until(reached: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


@pytest.fixture
def scene() -> Iterator[Scene]:
    one = Scene()
    yield one
    one.encode.gate.set()
    one.feed.stop()
    one.thread.join(10)
    assert not one.thread.is_alive()


# ---------------------------------------------------------------- the topic `items`


def test_a_new_item_is_placed_by_its_text(scene: Scene) -> None:
    scene.feed.take_items([item("new", text="i1", price=3.5)])
    assert scene.settled().found()[0] == "new"
    assert scene.feed.figures().known == scene.feed.figures().available == 41


def test_its_category_belongs_to_its_text(scene: Scene) -> None:
    scene.feed.take_items([item("new", category="i1"), item("both", text="red", category="hats")])
    assert scene.settled().found()[0] == "new"
    assert {text for batch in scene.encode.batches for text in batch} == {"i1", "red hats"}


def test_unavailable_and_removed_items_are_out_of_the_lists_at_once(scene: Scene) -> None:
    """Those of the table, too; and they come back."""
    first = scene.found()[0]
    scene.feed.take_items([item("new", text="i1"), item(first, available=False)])
    assert first not in scene.settled().found()
    scene.feed.take_items([item(first), item("new", available=False, text="i1")])
    assert scene.found()[0] == first and "new" not in scene.found()
    scene.feed.take_items([item("new", text="i1"), gone(first)])
    assert scene.found()[0] == "new" and first not in scene.found()
    scene.feed.take_items([gone("new"), gone("never there"), item(first)])
    assert scene.found()[0] == first and "new" not in scene.found()
    assert scene.settled().retriever.counts().known == 40


def test_a_record_replaces_all_before(scene: Scene) -> None:
    """Another text is another place, and without a text there is none: so it is after a restart, too."""
    scene.feed.take_items([item("new", text="i30")])
    assert "new" not in scene.settled().found()
    scene.feed.take_items([item("new", text="i1")])
    assert scene.settled().found()[0] == "new"
    scene.feed.take_items([item("new")])
    assert "new" not in scene.settled().found()
    scene.retriever.click([("new", NOW)] * 100)
    assert scene.retriever.popular([INTEREST])[0][0].item == "new"


def test_the_same_text_is_encoded_once_and_the_newest_wins(scene: Scene) -> None:
    scene.encode.gate.clear()
    scene.feed.take_items([item("a", text="i30")])
    until(lambda: scene.encode.batches)
    scene.feed.take_items([item("a", text="i1"), item("b", text="i1"), gone("b"), item("b", text="i2")])
    scene.encode.gate.set()
    assert scene.settled().found()[0] == "a"
    told = sum(len(batch) for batch in scene.encode.batches)
    scene.feed.take_items([item("a", text="i1", price=9.0), item("b", text="i2", available=False)])
    assert sum(len(batch) for batch in scene.settled().encode.batches) == told == 3


def test_texts_are_encoded_a_few_at_a_time_while_lists_are_made(scene: Scene) -> None:
    scene.encode.gate.clear()
    scene.feed.take_items([item(f"n{number}", text="i1") for number in range(3 * ENCODED_AT_ONCE)])
    until(lambda: scene.encode.batches)
    assert len(scene.found()) == 5 and scene.feed.figures().waiting == 3 * ENCODED_AT_ONCE
    scene.encode.gate.set()
    assert set(scene.settled().found()) <= {f"n{number}" for number in range(3 * ENCODED_AT_ONCE)}
    assert max(map(len, scene.encode.batches)) == ENCODED_AT_ONCE


def test_what_was_published_last_is_placed_first(scene: Scene) -> None:
    """After a start all new items wait; one that is published again is among the last, too."""
    scene.encode.gate.clear()
    scene.feed.take_items([item("first", text="i9")])
    until(lambda: scene.encode.batches)
    scene.feed.take_items([item(f"n{number}", text=f"{number}") for number in range(3 * ENCODED_AT_ONCE)])
    scene.feed.take_items([item("n0", text="again"), item("last", text="i1")])
    scene.encode.gate.set()
    told = [text for batch in scene.settled().encode.batches[1:] for text in batch]
    assert told == ["i1", "again", *(f"{number}" for number in range(3 * ENCODED_AT_ONCE - 1, 0, -1))]


def test_a_text_that_cannot_be_encoded_leaves_its_item_without_a_place(scene: Scene) -> None:
    scene.feed.take_items([item("new", text="unspeakable")])
    scene.settled()
    scene.feed.take_items([item("other", text="i1")])
    assert scene.settled().found()[0] == "other" and "new" not in scene.found()


def test_items_of_the_table_keep_their_vectors(scene: Scene) -> None:
    scene.feed.take_items([item("i1", text="i30"), gone("i2"), item("i2", text="i30")])
    scene.settled()
    assert not scene.encode.batches
    np.testing.assert_array_equal(scene.retriever.catalogue.vectors[:40], scene.retriever.table.vectors)


def test_without_an_encoder_new_items_come_by_their_clicks() -> None:
    scene = Scene(text=False)
    scene.feed.take_items([item("new", text="i1")])
    assert scene.feed.figures().waiting == 0 and "new" not in scene.found()
    scene.feed.stop()


BAD: list[tuple[bytes | None, bytes]] = [
    (b"x", b""),
    (b"x", b"{"),
    (b"x", b"[]"),
    (b"x", b"null"),
    (b"x", b"{}"),
    (b"x", b'{"item_id": 3}'),
    (b"x", b'{"item_id": "x", "available": null}'),
    (b"x", b'{"item_id": "x", "price": NaN}'),
    (b"x", b'{"item_id": "x", "text": "\xff"}'),
    (b"x", b'{"item_id": "y"}'),
    (b"\xff", b'{"item_id": "x"}'),
    (b"", b'{"item_id": ""}'),
    (None, b'{"item_id": "x"}'),
    (b"z" * 3_000, json.dumps({"item_id": "z" * 3_000}).encode()),
    (b"x", b'{"item_id": "x", "text": ' + b"[" * 100_000),
]


@pytest.mark.parametrize(("key", "value"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_a_bad_record_is_logged_and_counted_and_changes_nothing(key: bytes | None, value: bytes, scene: Scene) -> None:
    before = scene.retriever.counts()
    with capture_logs() as logs:
        scene.feed.take_items([Message(key, value), item("new", text="i1")])
    assert scene.settled().found()[0] == "new"
    assert scene.feed.figures().rejected == 1
    assert scene.retriever.counts().known == before.known + 1
    assert [one["place"] for one in logs] == ["items/0@5"]


# ---------------------------------------------------------------- clicks


def session(items: list[str | None] | None, times: list[int]) -> bytes:
    context = wire.Context([], None, None, None)
    return msgspec.json.encode(
        wire.Session("s", "u", 1, times[0], times[-1], ["p"] * len(times), times, items, False, False, context)
    )


def test_clicks_of_closed_sessions_are_counted(scene: Scene) -> None:
    values = [
        session(["i5", None, "i6", "i5"], [NOW, NOW + 1, NOW + 2, NOW + 3]),
        session(None, [NOW]),
        session(["unknown", "i6"], [NOW, NOW + 7]),
    ]
    scene.feed.take_sessions([Message(b"u", value) for value in (*values, b"{", b"", b"null", None)])
    assert scene.feed.figures().clicks == 5
    assert scene.retriever.catalogue.window.counts == {"i5": 2, "i6": 2, "unknown": 1}


def test_clicks_may_be_read_before_their_item(scene: Scene) -> None:
    """The two topics are read beside each other, and an item may be published after its first clicks."""
    scene.feed.take_sessions([Message(b"u", session(["new"] * 100, [NOW] * 100))])
    scene.feed.take_items([item("new", text="i1")])
    assert scene.retriever.popular([INTEREST])[0][0].item == "new"


# ---------------------------------------------------------------- on a broker


@pytest.fixture
def on_mock() -> Iterator[Settings]:
    settings = Settings(topic_prefix="feed.", partitions=2)
    with MockCluster(dict.fromkeys(specs(settings), settings.partitions)) as cluster:
        yield settings.but(bootstrap_servers=cluster.bootstrap_servers)


def produce(settings: Settings, name: str, records: Sequence[tuple[str, bytes | None]]) -> None:
    producer = Producer(librdkafka(settings) | {"partitioner": "murmur2_random"})
    for key, value in records:
        producer.produce(settings.topic(name), value, key.encode())
    assert producer.flush(30) == 0


def started(settings: Settings, **chosen: Any) -> Scene:
    scene = Scene(**chosen)
    scene.feed = ItemFeed(settings, scene.retriever, scene.encode)
    scene.feed.start()
    assert scene.feed.wait(30)
    return scene


def test_what_is_there_is_read_first_and_then_what_comes(on_mock: Settings, tmp_path: Path) -> None:
    """Through the commands that publish and remove."""
    lines = [json.dumps({"item_id": name, "text": text}) for name, text in (("a", "i1"), ("b", "i2"), ("c", "i3"))]
    bad: list[BadLine] = []
    (tmp_path / "items.jsonl").write_text("\n".join([*lines, "", "{", '{"item_id": ""}', '{"item_id": 3}', "[]"]))
    assert itemtopic.publish(on_mock, tmp_path / "items.jsonl", bad.append) == 3
    assert [line.number for line in bad] == [5, 6, 7, 8]
    itemtopic.remove(on_mock, ["c", "i4"])
    produce(on_mock, wire.SESSIONS, [("u", session(["i5", "a"], [NOW, NOW + 1])), ("v", session(["i5"], [NOW]))])
    scene = started(on_mock)
    assert scene.retriever.counts().known == 42 and scene.retriever.counts().available == 41
    assert scene.settled().found()[0] == "a"
    assert scene.retriever.catalogue.window.counts == {"i5": 2, "a": 1}
    itemtopic.remove(on_mock, ["a"])
    produce(on_mock, wire.SESSIONS, [("u", session(["i6"], [NOW + 2]))])
    until(lambda: "a" not in scene.found() and scene.feed.figures().clicks == 4)
    scene.feed.stop()


def test_a_file_without_an_item_is_an_error(
    on_mock: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One with neither items nor bad lines is just empty."""
    (tmp_path / "items.jsonl").write_text('{"item_id": ""}\n\n{"id": "a"}')
    with pytest.raises(UsageError, match=r"items\.jsonl: none of its 2 lines is an item"):
        playing.publish_items(on_mock, str(tmp_path / "items.jsonl"))
    (tmp_path / "items.jsonl").write_text("\n")
    playing.publish_items(on_mock, str(tmp_path / "items.jsonl"))
    assert "published 0 items" in capsys.readouterr().out


def test_what_workers_reject_is_not_removed(on_mock: Settings) -> None:
    for wrong in ("", "z" * (MAX_NAME + 1), "\udcff"):
        with pytest.raises(UsageError, match="nothing was removed"):
            itemtopic.remove(on_mock, ["a", wrong])
    assert not list(tail.until_end(on_mock, on_mock.topic(wire.ITEMS)))


def test_without_the_topic_nothing_is_published(on_mock: Settings, tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text('{"item_id": "a"}')
    with pytest.raises(WrongTopics, match=r"other\.items"):
        itemtopic.publish(on_mock.but(topic_prefix="other."), tmp_path / "items.jsonl", print)


@pytest.mark.kafka
def test_only_the_rest_of_the_window_is_read_back(settings_for: Callable[..., Settings]) -> None:
    """By the time of publishing; behind an aborted transaction, with a partition that is empty and one that is old."""
    settings = settings_for(partitions=3)
    window = 6 * HOUR_MS
    now = int(time.time() * 1000)
    producer = Producer(librdkafka(settings) | {"transactional.id": "sessions"})
    producer.init_transactions(30)

    def write(partition: int, ages_h: Sequence[float], commit: bool = True) -> None:
        producer.begin_transaction()
        for age in ages_h:
            at = now - int(age * HOUR_MS)
            value = session([f"i{int(age)}"], [at])
            producer.produce(settings.topic(wire.SESSIONS), value, b"u", partition=partition, timestamp=at)
        if commit:
            producer.commit_transaction(30)
        else:
            producer.flush(30)
            producer.abort_transaction(30)

    write(0, [30, 20, 9, 5, 3])
    write(0, [0], commit=False)
    write(1, [39, 38])
    taken: list[int] = []

    class Counting(ItemFeed):
        def take_sessions(self, messages: Sequence[Any]) -> None:
            taken.append(len(messages))
            super().take_sessions(messages)

    retriever = Retriever(ItemTable(*goods(window_ms=window), "d"), 5)
    feed = Counting(settings, retriever, None)
    feed.start()
    assert feed.wait(60)
    feed.stop()
    assert sum(taken) == 3  # an hour more than the window, before the newest: 3 h ago
    assert set(retriever.catalogue.window.counts) == {"i5", "i3"}
