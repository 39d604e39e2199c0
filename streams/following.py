"""What the aliases in the topic `models` name, as it changes."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import structlog
from confluent_kafka import KafkaError, TopicPartition

from streams import tail, wire
from streams.aliases import Story
from streams.errors import BrokerUnavailable, BrowsecastError
from streams.settings import Settings

CHAMPION, CHALLENGER = "champion", "challenger"
AGAIN_S = 5.0  # after the topic could not be read

log = structlog.get_logger(__name__)


class Named(NamedTuple):
    """The bundles that the aliases name; None: none."""

    champion: wire.ModelAlias | None = None
    challenger: wire.ModelAlias | None = None


def names(settings: Settings, stopped: threading.Event) -> Iterator[Named]:
    """What is named at the present end of the topic, then again whenever it has changed; blocks until `stopped`.

    Raises BrokerUnavailable, and WrongTopics without the topic.
    """
    topic, story, told = settings.topic(wire.MODELS), Story(), None
    with tail.consumer(settings, enable_partition_eof=True) as reader:
        unread = set(tail.partitions_of(reader, topic, settings))
        reader.assign([TopicPartition(topic, number, tail.BEGINNING) for number in unread])
        while not stopped.is_set():
            message = reader.poll(tail.POLL_S)
            if message is None:
                continue
            error = message.error()
            if error is None:
                story.take(message.key() or b"", message.value())
                unread.add(message.partition())  # its end is told again behind what came
            elif error.code() == KafkaError._PARTITION_EOF:
                unread.discard(message.partition())
            else:
                raise BrokerUnavailable(f"reading {topic} failed: {error.str()}")
            named = Named(story.aliases.get(CHAMPION), story.aliases.get(CHALLENGER))
            if not unread and named != told:
                told = named
                yield named


class Following:
    """Reads the topic in a thread; the event loop hears of every change."""

    def __init__(self, settings: Settings, hear: Callable[[Named], None]) -> None:
        self._settings, self._hear = settings, hear
        self._stopped = threading.Event()

    async def start(self) -> Named:
        """What is named now; `hear` is told of it and of what comes after. Raises BrokerUnavailable, WrongTopics."""
        loop = asyncio.get_running_loop()
        first: asyncio.Future[Named] = loop.create_future()

        def tell(named: Named) -> None:
            if not first.done():
                first.set_result(named)
            self._hear(named)

        def fail(error: BrowsecastError) -> None:
            if not first.done():
                first.set_exception(error)

        def read() -> None:
            while not self._stopped.is_set():
                try:
                    for named in names(self._settings, self._stopped):
                        loop.call_soon_threadsafe(tell, named)
                except RuntimeError:  # the loop is gone
                    return
                except BrowsecastError as error:
                    log.warning("the topic models cannot be read; what serves goes on", error=str(error))
                    loop.call_soon_threadsafe(fail, error)
                    self._stopped.wait(AGAIN_S)

        threading.Thread(target=read, daemon=True).start()
        return await first

    def stop(self) -> None:
        """Hear no more."""
        self._stopped.set()
