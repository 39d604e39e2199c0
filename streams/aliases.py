"""The topic `models`: which bundle each alias names, and the story of the decisions that brought it there.

An alias moves only together with the decision that moves it, in one transaction. All who write share one transactional
id, so whoever opens it fences all others; what is read after that stays true until it is written or another comes.
"""

import random
import time
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import structlog
from confluent_kafka import KafkaError, KafkaException, Producer

from streams import clients, tail, wire
from streams.errors import BrokerUnavailable, StateUnwritable, UsageError
from streams.settings import Settings

DECISION = "decision/"  # how the keys of decisions begin
TRANSACTION_S = 30.0
PATIENCE_S = 60.0  # how long a change is tried anew when others write, too
FIRST_PAUSE_S, LAST_PAUSE_S = 0.2, 5.0
FENCED = frozenset({KafkaError._FENCED, KafkaError.INVALID_PRODUCER_EPOCH, KafkaError.PRODUCER_FENCED})

log = structlog.get_logger(__name__)
_decode_alias = msgspec.json.Decoder(wire.ModelAlias).decode
_decode_decision = msgspec.json.Decoder(wire.ModelDecision).decode


@dataclass(slots=True)
class Story:
    """What the records of `models` tell together: what the aliases name now, and every decision, oldest first."""

    aliases: dict[str, wire.ModelAlias] = field(default_factory=dict)
    decisions: list[wire.ModelDecision] = field(default_factory=list)

    def take(self, key: bytes, value: bytes | None) -> None:
        """Apply one record of the topic. One that cannot be read is logged and changes nothing."""
        name = key.decode(errors="replace")
        try:
            if name.startswith(DECISION):
                self._take_decision(name.removeprefix(DECISION), value)
            elif value is None:
                self.aliases.pop(name, None)
            else:
                self.aliases[name] = _decode_alias(value)
        except msgspec.MsgspecError as error:
            log.warning("a record of the topic models cannot be read and is ignored", key=name, error=str(error))

    def records(self, decisions: Sequence[wire.ModelDecision]) -> dict[str, msgspec.Struct | None]:
        """Key -> value of what tells of the decisions: themselves, and each alias as the last of them leaves it.

        Raises UsageError when an alias would name a bundle whose place is told neither by them nor by this story.
        """
        known: list[wire.ModelAlias | wire.ModelDecision] = [*self.aliases.values(), *self.decisions, *decisions]
        places = {one.digest: (one.version, one.digest, one.uri) for one in known}
        records: dict[str, msgspec.Struct | None] = {}
        for decision in decisions:
            records[DECISION + decision.decision_id] = decision
            for alias, digest in decision.aliases.items():
                if digest is not None and digest not in places:
                    raise UsageError(f"{alias} cannot name {digest}: nothing in the topic models tells its place")
                records[alias] = None if digest is None else wire.ModelAlias(alias, *places[digest])
        return records

    def _take_decision(self, decision_id: str, value: bytes | None) -> None:
        decision = None if value is None else _decode_decision(value)
        self.decisions = [one for one in self.decisions if one.decision_id != decision_id]
        if decision is not None:
            insort(self.decisions, decision, key=lambda one: one.at_ms)


Decide = Callable[[Story], Sequence[wire.ModelDecision]]


class Aliases:
    """Reads the story, and changes it by compare-and-set."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._topic = settings.topic(wire.MODELS)

    def story(self) -> Story:
        """What is committed now. Raises BrokerUnavailable, and WrongTopics without the topic."""
        story = Story()
        for message in tail.until_end(self._settings, self._topic):
            story.take(message.key() or b"", message.value())
        return story

    def change(self, decide: Decide) -> list[wire.ModelDecision]:
        """Write what `decide` decides on the story as it is, and return it; nothing is written for an empty answer.

        When another trainer comes between, `decide` is asked again with the story as that one left it: it must only
        decide. Each decision moves its `aliases` to digests that are its own or known to the story (else UsageError),
        and is dated after all before it. Raises BrokerUnavailable, and StateUnwritable if no transaction comes through.
        """
        deadline, pause_s = time.monotonic() + PATIENCE_S, FIRST_PAUSE_S
        tried: list[wire.ModelDecision] = []
        while True:
            try:
                producer = self._open()
                story = self.story()
                if tried and tried[-1].decision_id in {one.decision_id for one in story.decisions}:
                    return tried  # it was committed; only the answer was lost
                tried = _dated(story, decide(story))
                if tried:
                    self._write(producer, story.records(tried))
                return tried
            except KafkaException as error:
                reason = str(error.args[0].str())
                if time.monotonic() > deadline:
                    raise StateUnwritable(f"{self._topic} was not changed ({reason}): try again") from error
                fenced = error.args[0].code() in FENCED
            log.info("the aliases are tried again", other_trainer=fenced, error=reason)
            time.sleep(pause_s * random.uniform(0.5, 1.5))
            pause_s = min(2 * pause_s, LAST_PAUSE_S)

    def _open(self) -> Any:
        """A producer that has fenced all others; a transaction that one of them left is ended."""
        config = clients.librdkafka(self._settings) | {
            "transactional.id": self._settings.application("models"),
            "transaction.timeout.ms": int(TRANSACTION_S * 1_000),
            "partitioner": "murmur2_random",
            "log_level": 0,
        }
        try:
            producer = Producer(config)
            producer.init_transactions(TRANSACTION_S)
        except KafkaException as error:
            if error.args[0].code() in FENCED:
                raise
            raise BrokerUnavailable(
                f"no transaction could be opened at {self._settings.bootstrap_servers} ({error.args[0].str()})"
            ) from error
        return producer

    def _write(self, producer: Any, records: dict[str, msgspec.Struct | None]) -> None:
        producer.begin_transaction()
        for key, record in records.items():
            value = None if record is None else msgspec.json.encode(record)
            producer.produce(self._topic, value, key.encode())
        producer.commit_transaction(TRANSACTION_S)


def _dated(story: Story, decisions: Sequence[wire.ModelDecision]) -> list[wire.ModelDecision]:
    """The decisions, each later than all before it, whatever the clocks of several trainers say."""
    last = story.decisions[-1].at_ms if story.decisions else 0
    dated = []
    for decision in decisions:
        last = max(decision.at_ms, last + 1)
        dated.append(msgspec.structs.replace(decision, at_ms=last))
    return dated
