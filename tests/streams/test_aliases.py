"""Aliases move by compare-and-set, each with the decision that moves it."""

import json
import multiprocessing
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest
from confluent_kafka import KafkaError, KafkaException, Producer

from streams import aliases, tail, wire
from streams.aliases import DECISION, Aliases, Story
from streams.errors import BrokerUnavailable, StateUnwritable, UsageError, WrongTopics
from streams.mock import MockCluster
from streams.settings import Settings

A, B = ("sha256:" + letter * 64 for letter in "ab")
forkserver = multiprocessing.get_context("forkserver")


def decision(kind: str = "published", digest: str = A, at_ms: int = 0, **moves: str | None) -> wire.ModelDecision:
    version, uri = f"v-{digest[7:11]}", f"file:///registry/{digest[7:11]}"
    return wire.ModelDecision(uuid.uuid4().hex, at_ms, kind, version, digest, uri, "a reason", "user", {}, moves)


@pytest.fixture
def settings() -> Iterator[Settings]:
    with MockCluster({"t.models": 3}) as cluster:
        yield Settings(bootstrap_servers=cluster.bootstrap_servers, topic_prefix="t.")


def records(settings: Settings) -> list[tuple[str, Any]]:
    """What lies in the topic, by key."""
    found = tail.until_end(settings, settings.topic(wire.MODELS))
    return [(one.key().decode(), one.value() and json.loads(one.value())) for one in found]


def told(*decisions: wire.ModelDecision) -> Story:
    story = Story()
    for one in decisions:
        for key, record in story.records([one]).items():
            story.take(key.encode(), None if record is None else msgspec.json.encode(record))
    return story


def test_a_story_is_told_in_the_order_of_time_whatever_the_order_of_the_records() -> None:
    late, early = decision("promoted", A, 7, champion=A, challenger=None), decision("published", A, 5, challenger=A)
    story = Story()
    for one in (late, early):
        story.take(f"{DECISION}{one.decision_id}".encode(), msgspec.json.encode(one))
    assert story.decisions == [early, late] and story.aliases == {}
    alias = wire.ModelAlias("champion", "v", A, "file:///b")
    story.take(b"champion", msgspec.json.encode(alias))
    story.take(f"{DECISION}{late.decision_id}".encode(), msgspec.json.encode(late))
    assert story.decisions == [early, late] and story.aliases == {"champion": alias}
    story.take(b"champion", None)
    story.take(f"{DECISION}{early.decision_id}".encode(), None)
    assert story.decisions == [late] and story.aliases == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"champion", b"{"),
        (b"champion", msgspec.json.encode(decision())),  # a decision is never taken for an alias
        (b"decision/1", msgspec.json.encode(wire.ModelAlias("champion", "v", A, "file:///b"))),
        (b"\xff", b"null"),
    ],
)
def test_a_record_that_cannot_be_read_changes_nothing(key: bytes, value: bytes) -> None:
    story = told(decision(champion=A))
    before = Story(dict(story.aliases), list(story.decisions))
    story.take(key, value)
    assert story == before


def test_aliases_and_decision_are_written_together(settings: Settings) -> None:
    first, second = decision(champion=A), decision("published", B, challenger=B)
    models = Aliases(settings)
    (written,) = models.change(lambda story: [first])
    assert models.change(lambda story: [second] if story.aliases["champion"].digest == A else [])
    assert written.at_ms == 1
    found = dict(records(settings))
    assert found["champion"] == {"alias": "champion", "version": "v-aaaa", "digest": A, "uri": "file:///registry/aaaa"}
    assert found[DECISION + first.decision_id] == msgspec.to_builtins(written) | {"alias": None}
    (promoted,) = models.change(lambda story: [decision("promoted", B, champion=B, challenger=None)])
    assert [key for key, value in records(settings) if value is None] == ["challenger"]
    story = models.story()
    assert story.decisions[-1] == promoted and len(story.decisions) == 3
    assert {alias: named.digest for alias, named in story.aliases.items()} == {"champion": B}


def test_an_alias_may_go_back_to_a_bundle_that_the_story_knows(settings: Settings) -> None:
    models = Aliases(settings)
    models.change(lambda story: [decision(champion=A), decision("promoted", B, champion=B)])
    models.change(lambda story: [decision("rolled_back", B, champion=A)])
    assert models.story().aliases["champion"] == wire.ModelAlias("champion", "v-aaaa", A, "file:///registry/aaaa")


def test_each_decision_is_dated_after_all_before_it(settings: Settings) -> None:
    """Two trainers whose clocks differ still tell their story in the order in which it happened."""
    models = Aliases(settings)
    models.change(lambda story: [decision(at_ms=9_000, champion=A), decision(at_ms=9_000)])
    models.change(lambda story: [decision(at_ms=5)])
    models.change(lambda story: [decision(at_ms=20_000)])
    assert [one.at_ms for one in models.story().decisions] == [9_000, 9_001, 9_002, 20_000]


def test_nothing_decided_or_a_bundle_without_a_place_writes_nothing(settings: Settings) -> None:
    models = Aliases(settings)
    assert models.change(lambda story: []) == []
    with pytest.raises(UsageError, match="champion cannot name"):
        models.change(lambda story: [decision("rolled_back", A, champion=B)])
    assert records(settings) == []


def test_a_commit_whose_answer_is_lost_is_not_repeated(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    written = Aliases._write

    def loses_the_answer(self: Aliases, producer: Any, records: Any) -> None:
        written(self, producer, records)
        monkeypatch.setattr(Aliases, "_write", written)
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT))

    monkeypatch.setattr(Aliases, "_write", loses_the_answer)
    monkeypatch.setattr(aliases, "FIRST_PAUSE_S", 0.0)
    (made,) = Aliases(settings).change(lambda story: [decision(champion=A)])
    assert Aliases(settings).story().decisions == [made]


def test_a_broker_that_refuses_again_and_again_is_an_error(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: Aliases, producer: Any, records: Any) -> None:
        raise KafkaException(KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED))

    monkeypatch.setattr(Aliases, "_write", refuses)
    monkeypatch.setattr(aliases, "PATIENCE_S", 0.0)
    with pytest.raises(StateUnwritable, match=r"t\.models was not changed"):
        Aliases(settings).change(lambda story: [decision(champion=A)])


def test_without_broker_or_topic_it_says_so(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WrongTopics, match=r"other\.models is not there"):
        Aliases(settings.but(topic_prefix="other.")).story()
    monkeypatch.setattr(aliases, "TRANSACTION_S", 1.0)
    with pytest.raises(BrokerUnavailable, match="no transaction"):
        Aliases(Settings(bootstrap_servers="127.0.0.1:1")).change(lambda story: [])


def chained(name: str) -> Callable[[Story], Sequence[wire.ModelDecision]]:
    """Decides to name A or B, whichever is not named, and says what it saw."""

    def decide(story: Story) -> list[wire.ModelDecision]:
        seen = story.decisions[-1].decision_id if story.decisions else None
        named = story.aliases["champion"].digest if story.aliases else None
        made = decision("promoted", B if named == A else A, champion=B if named == A else A)
        return [msgspec.structs.replace(made, evidence={"seen": seen, "named": named}, reason=name)]

    return decide


def _race(settings: Settings, name: str, changes: int) -> None:
    for _ in range(changes):
        Aliases(settings).change(chained(name))


@pytest.mark.kafka
@pytest.mark.slow
def test_two_trainers_racing_win_one_change_each(settings_for: Callable[..., Settings]) -> None:
    """Each decision was made on the story as the one before it left it: none is lost, none rests on old news."""
    settings = settings_for(partitions=3)
    racers = [forkserver.Process(target=_race, args=(settings, name, 6)) for name in ("one", "two")]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(150)
    assert [racer.exitcode for racer in racers] == [0, 0]
    story = Aliases(settings).story()
    assert sorted(one.reason for one in story.decisions) == ["one"] * 6 + ["two"] * 6
    seen, named = None, None
    for one in story.decisions:
        assert one.evidence == {"seen": seen, "named": named}
        seen, named = one.decision_id, one.digest
    assert story.aliases["champion"].digest == named


def _die_at(settings: Settings, step: int) -> None:
    """Change the champion to B in a process that ends without a word at the given step of it."""
    steps = iter(range(1_000))

    def reach() -> None:
        if next(steps) == step:
            os._exit(9)

    class Mortal(Producer):
        def init_transactions(self, *args: Any) -> None:
            reach()
            super().init_transactions(*args)
            reach()

        def begin_transaction(self) -> None:
            reach()
            super().begin_transaction()

        def produce(self, *args: Any) -> None:
            super().produce(*args)
            self.flush(10)  # it is at the broker, and not committed
            reach()

        def commit_transaction(self, *args: Any) -> None:
            super().commit_transaction(*args)
            reach()

    vars(aliases)["Producer"] = Mortal
    Aliases(settings).change(lambda story: [decision("promoted", B, champion=B, challenger=None)])


@pytest.mark.kafka
@pytest.mark.slow
def test_a_trainer_killed_at_each_step_leaves_the_old_champion_or_the_new(
    settings_for: Callable[..., Settings],
) -> None:
    settings = settings_for(partitions=3)
    models = Aliases(settings)
    champions = []
    for step in range(100):
        models.change(lambda story: [decision("published", A, champion=A), decision("published", B, challenger=B)])
        before = models.story()
        child = forkserver.Process(target=_die_at, args=(settings, step))
        child.start()
        child.join(60)
        after = models.story()
        champions.append(after.aliases["champion"].digest)
        if champions[-1] == A:
            assert after == before
        else:
            assert "challenger" not in after.aliases and len(after.decisions) == len(before.decisions) + 1
        if child.exitcode == 0:
            break
        assert child.exitcode == 9
    assert champions == [A] * (len(champions) - 2) + [B, B] and len(champions) == 8
