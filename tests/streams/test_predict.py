"""The role `predict` with models that fail in every way, and one that is slow."""

import asyncio
import json
from collections.abc import Callable, Sequence

import msgspec
import pytest
from aiokafka import ConsumerRecord

from models.visit import Forecast, Interest, Visit
from streams import wire
from streams.forecasting import Answer, Answered, Forecasting, Loaded, Ranked
from streams.itemfigures import Figures
from streams.metrics import Metrics
from streams.predict import Predict, PredictShard
from streams.roles import Output
from streams.settings import Settings
from tests.streams.inprocess import InProcess

NOW = 1_790_000_000_000


class TooLarge(Exception):
    pass


class FakeModel:
    """Answers with the visit's seed as its path; `behave` may raise or change the answers."""

    version, digest = "v1", "sha256:" + "0" * 64
    router_digest = "sha256:" + "1" * 64

    def __init__(self, behave: Callable[[Sequence[Visit]], object] = lambda visits: None) -> None:
        self._behave = behave
        self.asked: list[int] = []
        self.parts: list[tuple[str, int]] = []

    def forecast(self, visits: Sequence[Visit]) -> list[Forecast]:
        self.asked.append(len(visits))
        self.parts.append((visits[0].seed, len(visits)))
        changed = self._behave(visits)
        return changed if isinstance(changed, list) else [self._of(visit, "model") for visit in visits]

    def fallback(self, visits: Sequence[Visit]) -> list[Forecast]:
        return [self._of(visit, "frequencies") for visit in visits]

    @staticmethod
    def _of(visit: Visit, maker: str) -> Forecast:
        return Forecast(1, [(page, 0.5) for page in visit.sessions[-1]], [visit.seed, maker], 0.25, 0.125)


def visits(count: int) -> list[Visit]:
    return [Visit(f"s{number}", [["home"]]) for number in range(count)]


def forecasting(model: FakeModel, retries: int = 1) -> Forecasting:
    return Forecasting(model, lambda error: isinstance(error, TooLarge), retries)


# ---------------------------------------------------------------- a model that fails


def test_answers_in_order() -> None:
    one = forecasting(FakeModel())
    assert [(a.forecast.path, a.fallback) for a in one.answer(visits(3)).answers] == [
        ([f"s{n}", "model"], None) for n in range(3)
    ]
    assert one.answer([]) == Answered([])


@pytest.mark.parametrize("fits", [1, 2, 3, 5])
def test_a_batch_too_large_is_split(fits: int) -> None:
    def behave(batch: Sequence[Visit]) -> None:
        if len(batch) > fits:
            raise TooLarge

    model = FakeModel(behave)
    one = forecasting(model)
    answered = one.answer(visits(11))
    assert [(a.forecast.path[0], a.fallback) for a in answered.answers] == [(f"s{n}", None) for n in range(11)]
    too_large = [asked for asked in model.asked if asked > fits]
    assert len(set(model.parts)) == len(model.parts)  # a retry would not help
    assert answered.failures == ({"memory": len(too_large)} if too_large else {})
    assert sum(asked for asked in model.asked if asked <= fits) == 11


def test_one_visit_too_large_falls_back_alone() -> None:
    def behave(batch: Sequence[Visit]) -> None:
        if any(visit.seed == "s5" for visit in batch):
            raise TooLarge

    one = forecasting(FakeModel(behave))
    answers = one.answer(visits(8)).answers
    assert [answer.forecast.path[0] for answer in answers] == [f"s{n}" for n in range(8)]
    assert [answer.fallback for answer in answers] == [None] * 5 + ["out_of_memory"] + [None] * 2
    assert answers[5].forecast.path[1] == "frequencies"


def test_a_failing_model_is_tried_again() -> None:
    attempts = iter([ValueError("first"), None, None])

    def behave(batch: Sequence[Visit]) -> None:
        error = next(attempts)
        if error is not None:
            raise error

    model = FakeModel(behave)
    one = forecasting(model)
    answered = one.answer(visits(2))
    assert [answer.fallback for answer in answered.answers] == [None, None]
    assert model.asked == [2, 2]
    assert answered.failures == {"error": 1}
    assert one.answer(visits(1)).failures == {}  # told once


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_a_model_that_goes_on_failing_is_replaced(retries: int) -> None:
    def behave(batch: Sequence[Visit]) -> None:
        raise ValueError("always")

    model = FakeModel(behave)
    one = forecasting(model, retries)
    answers = one.answer(visits(3)).answers
    assert [answer.fallback for answer in answers] == ["model_failed: ValueError"] * 3
    assert [answer.forecast.path for answer in answers] == [[f"s{n}", "frequencies"] for n in range(3)]
    assert model.asked == [3] * (retries + 1)


@pytest.mark.parametrize("answers", [0, 1, 3])
def test_a_wrong_number_of_answers_is_a_failure(answers: int) -> None:
    one = forecasting(FakeModel(lambda batch: [Forecast(0, [], [], 0.5, 0.5)] * answers))
    assert [answer.fallback for answer in one.answer(visits(2)).answers] == ["model_failed: RuntimeError"] * 2


@pytest.mark.parametrize("wrong", [float("nan"), -0.1, 1.1, float("inf")])
def test_an_answer_that_is_no_probability_is_a_failure(wrong: float) -> None:
    """It would be published as null, and nobody could read the record."""
    for forecast in [
        Forecast(0, [], [], wrong, 0.5),
        Forecast(0, [], [], 0.5, wrong),
        Forecast(0, [("home", wrong)], [], 0.5, 0.5),
    ]:
        one = forecasting(FakeModel(lambda batch, forecast=forecast: [forecast] * len(batch)))  # type: ignore[misc]
        assert [answer.fallback for answer in one.answer(visits(1)).answers] == ["model_failed: ValueError"]


# ---------------------------------------------------------------- the role


def session(number: int, user: str = "u") -> wire.Session:
    context = wire.Context([["shoes"]], None, None, None)
    return wire.Session(
        f"s{number}", user, number, NOW, NOW + 9, ["home", "cart"], [NOW, NOW + 9], None, True, False, context
    )


def record(offset: int, value: bytes | None, user: str = "u") -> ConsumerRecord:
    return ConsumerRecord("shop.sessions", 2, offset, NOW, 0, user.encode(), value, None, 0, 0, ())


def role(model: FakeModel, batch_sessions: int = 64) -> Predict:
    return Predict(Settings(batch_sessions=batch_sessions), Metrics(), InProcess(model))


def encoded(number: int, user: str = "u") -> bytes:
    return msgspec.json.encode(session(number, user))


async def test_a_prediction_says_what_was_asked_and_answered() -> None:
    shard = PredictShard()
    await role(FakeModel()).work([(shard, wire.SESSIONS, [record(0, encoded(7))])])
    outputs, changes = shard.take()
    assert changes == []
    assert [(o.topic, o.key) for o in outputs] == [(wire.PREDICTIONS, b"u")]
    prediction = msgspec.json.decode(outputs[0].value or b"", type=wire.Prediction)
    assert (prediction.session_id, prediction.user_id, prediction.cluster) == ("s7", "u", 1)
    assert prediction.pages == [wire.PageProbability("home", 0.5), wire.PageProbability("cart", 0.5)]
    assert (prediction.path, prediction.cart, prediction.purchase) == (["s7", "model"], 0.25, 0.125)
    assert (prediction.model_version, prediction.model_digest, prediction.fallback) == ("v1", FakeModel.digest, None)
    assert prediction.session_end_ms == NOW + 9
    assert prediction.close_to_emit_ms >= 0
    assert set(json.loads(outputs[0].value or b"")) == set(wire.Prediction.__struct_fields__)


async def test_the_same_session_has_the_same_prediction_id() -> None:
    ids = []
    for _ in range(2):
        shard = PredictShard()
        await role(FakeModel()).work([(shard, wire.SESSIONS, [record(0, encoded(1)), record(1, encoded(2))])])
        ids.append([json.loads(o.value or b"")["prediction_id"] for o in shard.outputs])
    assert ids[0] == ids[1]
    assert ids[0][0] != ids[0][1]


async def test_forgotten_users_pass_through_and_wrong_records_are_refused() -> None:
    shard, other = PredictShard(), PredictShard()
    wrong = [b"", b"{", b"null", b'{"session_id": 1}', b"\xff"]
    records = [record(0, encoded(1)), record(1, None), *(record(2 + n, value) for n, value in enumerate(wrong))]
    batch = [(shard, wire.SESSIONS, [*records, record(9, encoded(2))]), (other, wire.SESSIONS, [record(0, None, "v")])]
    await role(FakeModel(), batch_sessions=2).work(batch)
    values = {
        topic: [o.value for o in shard.outputs if o.topic == topic] for topic in (wire.PREDICTIONS, wire.REJECTED)
    }
    assert [value and json.loads(value)["session_id"] for value in values[wire.PREDICTIONS]] == ["s1", None, "s2"]
    rejected = [msgspec.json.decode(value or b"", type=wire.Rejected) for value in values[wire.REJECTED]]
    assert [(one.stage, one.offset, one.partition) for one in rejected] == [
        ("predict", 2 + n, 2) for n in range(len(wrong))
    ]
    assert [(o.key, o.value) for o in other.outputs] == [(b"v", None)]


async def test_micro_batches_cross_partitions_and_keep_each_ones_order() -> None:
    model, shards = FakeModel(), [PredictShard() for _ in range(3)]
    batch = [
        (shard, wire.SESSIONS, [record(n, encoded(10 * p + n), f"u{p}") for n in range(5)])
        for p, shard in enumerate(shards)
    ]
    await role(model, batch_sessions=4).work(batch)
    assert model.asked == [4, 4, 4, 3]
    for p, shard in enumerate(shards):
        assert [session_of(output) for output in shard.outputs] == [f"s{10 * p + n}" for n in range(5)]
        assert {output.key for output in shard.outputs} == {f"u{p}".encode()}


def session_of(output: Output) -> str:
    name: str = json.loads(output.value or b"")["session_id"]
    return name


async def test_failures_are_counted_and_nobody_is_asked_for_nothing() -> None:
    def behave(batch: Sequence[Visit]) -> None:
        raise ValueError

    model, metrics, shard = FakeModel(behave), Metrics(), PredictShard()
    one = Predict(Settings(), metrics, InProcess(model))
    await one.work([(shard, wire.SESSIONS, [record(0, None)])])
    assert model.asked == []
    await one.work([(shard, wire.SESSIONS, [record(0, encoded(1))])])
    assert metrics.registry.get_sample_value("browsecast_model_failures_total", {"kind": "error"}) == 1
    labels = {"model": "v1", "fallback": "model_failed"}
    assert metrics.registry.get_sample_value("browsecast_predictions_total", labels) == 1


@pytest.mark.parametrize(("digest", "sums"), [(FakeModel.router_digest, [1.0, 2.0]), ("another router's", None)])
async def test_sessions_carry_their_routing_to_the_model(digest: str, sums: list[float] | None) -> None:
    """Sums of another router mean nothing to this bundle: it computes its own from the pages."""
    seen: list[Visit] = []
    one = session(1)
    one.context.routing = wire.Routing(digest, [1.0, 2.0], 3)
    shard = PredictShard()
    await role(FakeModel(seen.extend)).work([(shard, wire.SESSIONS, [record(0, msgspec.json.encode(one))])])
    assert seen == [Visit("s1", [["shoes"], ["home", "cart"]], sums)]


# ---------------------------------------------------------------- items


class FakeRanker:
    """Ranks the visitor's own items; `behave` may raise or change the lists."""

    def __init__(self, behave: Callable[[str], object] = lambda kind: None) -> None:
        self._behave = behave
        self.asked: list[tuple[str, int]] = []

    def rank(self, interests: Sequence[Interest]) -> list[list[Ranked]]:
        return self._lists("rank", interests)

    def popular(self, interests: Sequence[Interest]) -> list[list[Ranked]]:
        return self._lists("popular", interests)

    def _lists(self, kind: str, interests: Sequence[Interest]) -> list[list[Ranked]]:
        self.asked.append((kind, len(interests)))
        changed = self._behave(kind)
        return changed if isinstance(changed, list) else [[(f"{kind} {i.recent}", 0.5, None)] for i in interests]


def with_interest(count: int) -> list[Visit]:
    return [Visit(f"s{number}", [["home"]], None, Interest(recent=[f"i{number}"])) for number in range(count)]


def items_of(answered: Answered) -> list[str]:
    return [answer.items[0][0] if answer.items else "" for answer in answered.answers]


def test_every_answer_has_its_items() -> None:
    one = Forecasting(FakeModel(), lambda error: False, 1, FakeRanker())
    assert items_of(one.answer(with_interest(3))) == [f"rank ['i{n}']" for n in range(3)]
    assert [answer.items for answer in forecasting(FakeModel()).answer(with_interest(2)).answers] == [None, None]


def test_fallbacks_carry_what_is_popular() -> None:
    def behave(batch: Sequence[Visit]) -> None:
        if any(visit.seed == "s1" for visit in batch):
            raise TooLarge

    ranker = FakeRanker()
    one = Forecasting(FakeModel(behave), lambda error: isinstance(error, TooLarge), 1, ranker)
    answered = one.answer(with_interest(3))
    assert items_of(answered) == ["rank ['i0']", "popular ['i1']", "rank ['i2']"]
    assert [answer.fallback for answer in answered.answers] == [None, "out_of_memory", None]
    assert ranker.asked == [("rank", 2), ("popular", 1)]
    assert items_of(one.frequencies(with_interest(2), "model_lost")) == ["popular ['i0']", "popular ['i1']"]


@pytest.mark.parametrize(
    "wrong",
    [ValueError(), [[("x", float("nan"), None)], []], [[]], [[], [], []]],
    ids=["raises", "NaN", "too few", "too many"],
)
def test_while_the_ranker_fails_everybody_has_what_is_popular(wrong: object) -> None:
    def behave(kind: str) -> object:
        if kind == "rank" and isinstance(wrong, Exception):
            raise wrong
        return wrong if kind == "rank" else None

    answered = Forecasting(FakeModel(), lambda error: False, 1, FakeRanker(behave)).answer(with_interest(2))
    assert items_of(answered) == ["popular ['i0']", "popular ['i1']"]
    assert [answer.fallback for answer in answered.answers] == [None, None]
    assert answered.failures == {"items": 1}


def test_when_nothing_can_be_ranked_the_lists_are_empty() -> None:
    def behave(kind: str) -> None:
        raise ValueError

    answered = Forecasting(FakeModel(), lambda error: False, 1, FakeRanker(behave)).answer(with_interest(2))
    assert [answer.items for answer in answered.answers] == [(), ()]
    assert answered.failures == {"items": 2}


async def test_a_session_carries_its_interest_and_the_prediction_its_items() -> None:
    seen: list[Visit] = []
    one = session(1)
    one.items = ["a", None, "b", "a"]
    one.context.seeds = [wire.Seed("b", 7, 1.5, NOW), wire.Seed("c", 2, 0.5, NOW)]
    one.context.recent_items, one.context.bought_items = ["b", "a", "c"], ["c"]
    shard, metrics = PredictShard(), Metrics()
    answers = [Answer(Forecast(0, [], [], 0.5, 0.5), None, [("x", 0.75, "b"), ("y", 0.5, None)])]

    class Fixed(InProcess):
        async def answer(self, visits: Sequence[Visit]) -> Answered:
            seen.extend(visits)
            return Answered(answers, {}, Figures(known=5, available=3, clicks=9, rejected=2, waiting=1))

    role = Predict(Settings(), metrics, Fixed(FakeModel()))
    await role.work([(shard, wire.SESSIONS, [record(0, msgspec.json.encode(one))])])
    assert seen[0].interest == Interest([("b", 7, 1.5), ("c", 2, 0.5)], ["b", "a", "c"], ["a", "b"], ["c"])
    prediction = msgspec.json.decode(shard.outputs[0].value or b"", type=wire.Prediction)
    assert prediction.items == [wire.RankedItem("x", 0.75, "b"), wire.RankedItem("y", 0.5, None)]
    shown = {
        name: metrics.registry.get_sample_value(f"browsecast_{name}")
        for name in ("popularity_clicks", "rejected_item_records", "waiting_item_texts")
    }
    assert shown == {"popularity_clicks": 9, "rejected_item_records": 2, "waiting_item_texts": 1}
    for state, count in {"available": 3, "unavailable": 2}.items():
        assert metrics.registry.get_sample_value("browsecast_catalogue_items", {"state": state}) == count


# ---------------------------------------------------------------- another champion


class Gated(InProcess):
    """Answers with its digest as the path, once it may."""

    def __init__(self, digest: str) -> None:
        self.loaded, self.asked, self.may = Loaded("v", digest, "r"), asyncio.Event(), asyncio.Event()

    async def answer(self, visits: Sequence[Visit]) -> Answered:
        self.asked.set()
        await self.may.wait()
        return Answered([Answer(Forecast(0, [], [self.loaded.digest], 0.5, 0.5), None) for _ in visits])


async def test_a_micro_batch_is_never_a_mixture() -> None:
    """Another champion is adopted while one is at work: it has the next micro-batch, the first keeps its own."""
    old, new, metrics, shard = Gated("old"), Gated("new"), Metrics(), PredictShard()
    one = Predict(Settings(batch_sessions=3), metrics, old)
    records = [record(n, encoded(n)) for n in range(6)]
    working = asyncio.create_task(one.work([(shard, wire.SESSIONS, records)]))
    await old.asked.wait()
    one.adopt(new)
    assert not new.asked.is_set()
    old.may.set()
    await new.asked.wait()
    assert len(shard.outputs) == 3
    new.may.set()
    await working
    made = [msgspec.json.decode(output.value or b"", type=wire.Prediction) for output in shard.outputs]
    assert [one.model_digest for one in made] == ["old"] * 3 + ["new"] * 3
    assert all(one.path == [one.model_digest] for one in made)
    assert len({one.prediction_id for one in made}) == 6
    loaded = [sample.labels["digest"] for family in metrics.model_loaded.collect() for sample in family.samples]
    assert loaded == ["new"]
