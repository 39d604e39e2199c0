"""What goes on among the items, brought to a retriever: the topic `items`, and the clicks in closed sessions.

All of it happens in threads beside the model, in the model's process: neither the worker's event loop nor a prediction
waits for it. A record of an item replaces all that was said of it before.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import msgspec
import numpy as np
import structlog
from confluent_kafka import KafkaError, TopicPartition

from models.encoder import Encoder, EncoderMissing
from models.retriever import Retriever
from streams import itemtopic, tail, wire
from streams.follower import Follower, from_beginning
from streams.forecasting import Ranker
from streams.itemfigures import Figures
from streams.settings import HOUR_MS, Settings

CATCH_UP_S = 10.0  # the first prediction waits so long for what is known of the items
ENCODED_AT_ONCE = 16  # texts: a prediction waits for no more than one of these
TEXT_CHARACTERS = 4_096  # from the end, where the encoder reads
NICENESS = 10  # of the thread that encodes
LAST_RECORDS = (64, 4_096)  # looked at for the newest of a partition, before all are

Encode = Callable[[Sequence[str]], np.ndarray]

log = structlog.get_logger(__name__)


class _Clicked(msgspec.Struct):
    """What counts of a session."""

    page_ts_ms: list[int]
    items: list[str | None] | None


def feed_of(settings: Settings, retriever: Ranker) -> "ItemFeed":
    """A feed for a `Retriever`, started; it has read what is there, unless that takes too long."""
    assert isinstance(retriever, Retriever)
    encode = None
    if "text_map" in retriever.table.tensors:
        try:
            encode = Encoder().encode  # now, as loading it later would hold up predictions
        except EncoderMissing as error:
            log.warning("new items come by their clicks alone", error=str(error))
    feed = ItemFeed(settings, retriever, encode)
    feed.start()
    if not feed.wait(CATCH_UP_S):
        log.warning("predictions begin before all is read that is known of the items", waited_s=CATCH_UP_S)
    return feed


_decode_clicked = msgspec.json.Decoder(_Clicked).decode


class ItemFeed:
    """Keeps a retriever up to date."""

    def __init__(self, settings: Settings, retriever: Retriever, encode: Encode | None) -> None:
        """Nothing is read yet. `encode`: texts -> (n, 384); None: new items come by their clicks alone."""
        self._retriever, self._encode = retriever, encode
        self._window_ms = retriever.table.retriever.window_ms
        self._followers = (
            Follower(settings, wire.ITEMS, from_beginning, self.take_items),
            Follower(settings, wire.SESSIONS, self._window_begins, self.take_sessions),
        )
        self._texts: dict[str, str | None] = {}  # that wait, the newest at the end; None: the item has none any more
        self._encoded: dict[str, int] = {}  # hash of the text that an item was placed by
        self._arrived = threading.Condition()
        self._stopped = False
        self.rejected = 0

    def start(self) -> None:
        """Begin to read."""
        for follower in self._followers:
            follower.start()
        threading.Thread(target=self._place, daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Until all that is there has been read; False when it takes longer. Texts may still wait."""
        end = time.monotonic() + seconds
        return all(follower.at_end.wait(max(0.0, end - time.monotonic())) for follower in self._followers)

    def stop(self) -> None:
        """Read nothing more."""
        for follower in self._followers:
            follower.stop()
        with self._arrived:
            self._stopped = True
            self._arrived.notify()

    def figures(self) -> Figures:
        """As it stands."""
        return Figures(*self._retriever.counts(), self.rejected, len(self._texts))

    # ---------------------------------------------------------------- the topic `items`

    def take_items(self, messages: Sequence[Any]) -> None:
        """Apply records of `items`. One that cannot be read is logged and counted, and changes nothing."""
        for message in messages:
            if (read := itemtopic.readable(message)) is None:
                self.rejected += 1
            else:
                self._take_item(*read)

    def _take_item(self, item_id: str, item: wire.Item | None) -> None:
        if item is None:
            self._retriever.remove(item_id)
            self._wait_for(item_id, None)
            return
        self._retriever.put(item_id, item.available)
        self._wait_for(item_id, item.description[-TEXT_CHARACTERS:] or None)

    def _wait_for(self, item_id: str, text: str | None) -> None:
        if self._encode is None or self._retriever.table.row(item_id) is not None:  # the table knows better
            return
        with self._arrived:
            if text is None and item_id not in self._encoded and item_id not in self._texts:
                return
            if text is None or self._encoded.get(item_id) != hash(text) or item_id in self._texts:
                self._texts.pop(item_id, None)
                self._texts[item_id] = text
                self._arrived.notify()

    def _place(self) -> None:
        """In a thread: find new items their places by their texts, a few at a time.

        The newest first: after a start all of them wait, and what has just been published must not wait for them.
        """
        import torch

        torch.set_num_threads(1)  # of this thread
        if sys.platform == "linux":  # where each thread has a niceness of its own
            os.nice(NICENESS)
        while True:
            with self._arrived:
                while not self._texts and not self._stopped:
                    self._arrived.wait()
                if self._stopped:
                    return
                some = dict(islice(reversed(self._texts.items()), ENCODED_AT_ONCE))
            self._place_some(some)

    def _place_some(self, texts: dict[str, str | None]) -> None:
        table = self._retriever.table
        told = {item_id: text for item_id, text in texts.items() if text is not None}
        vectors = np.zeros((len(texts), table.vectors.shape[1]), dtype=np.float32)
        try:
            if told and self._encode is not None:
                placed = table.from_text(self._encode(list(told.values())))
                if placed is not None:
                    vectors[[text is not None for text in texts.values()]] = placed
        except Exception:
            log.exception("texts of items could not be encoded, they come by their clicks alone", items=len(told))
        with self._arrived:
            for item_id, text in texts.items():
                if self._texts.get(item_id) == text:  # else there is a newer one
                    del self._texts[item_id]
                self._encoded.pop(item_id, None)
                if text is not None:
                    self._encoded[item_id] = hash(text)
        self._retriever.place(list(texts), vectors)

    # ---------------------------------------------------------------- clicks in closed sessions

    def take_sessions(self, messages: Sequence[Any]) -> None:
        """Count the clicks of closed sessions; what cannot be read the role `predict` refuses and tells."""
        clicks: list[tuple[str, int]] = []
        for message in messages:
            value = message.value()
            if value is None:
                continue
            try:
                session = _decode_clicked(value)
            except msgspec.MsgspecError:
                continue
            pairs = zip(session.items or (), session.page_ts_ms, strict=False)
            clicks += [(item_id, ts_ms) for item_id, ts_ms in pairs if item_id is not None]
        self._retriever.click(clicks)

    def _window_begins(self, reader: Any, topic: str, partitions: Sequence[int]) -> dict[int, int]:
        """Where the sessions begin that may hold clicks of the window.

        Between two closings the wall clock runs on as far as event time or, in a replay or behind a lag, less far. So
        what was published within a window's length before the newest record, and an hour more, is enough.
        """
        limits = {
            number: reader.get_watermark_offsets(TopicPartition(topic, number), timeout=tail.METADATA_S)
            for number in partitions
        }
        newest = max(_newest_ms(reader, topic, number, *limit) for number, limit in limits.items())
        since = max(0, newest - self._window_ms - HOUR_MS)
        asked = [TopicPartition(topic, number, since) for number in partitions]
        found = reader.offsets_for_times(asked, timeout=tail.METADATA_S)
        # A partition without such a record says -1; if all do, this broker looks up no times, and everything is read.
        edge = 1 if any(one.offset >= 0 for one in found) else 0
        return {one.partition: one.offset if one.offset >= 0 else limits[one.partition][edge] for one in found}


def _newest_ms(reader: Any, topic: str, number: int, low: int, high: int) -> int:
    """When the newest record of a partition was published, epoch milliseconds; 0 without one.

    The last offsets may belong to transactions that were aborted, or to Kafka's own records.
    """
    newest = 0
    for back in (*LAST_RECORDS, high - low):
        if newest or high == low:
            break
        reader.assign([TopicPartition(topic, number, max(low, high - back))])
        heard = time.monotonic()
        while time.monotonic() - heard < tail.METADATA_S:
            message = reader.poll(tail.POLL_S)
            if message is None:
                continue
            heard = time.monotonic()
            if message.error() is None:
                newest = max(newest, message.timestamp()[1])
            elif message.error().code() == KafkaError._PARTITION_EOF:
                break
    return newest
