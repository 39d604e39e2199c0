"""The challenger predicts for its share, and whatever becomes of it, the champion's predictions are the same."""

import asyncio
from collections.abc import Sequence

import msgspec
import pytest

from models.visit import Forecast, Visit
from streams import shadowing, wire
from streams.errors import ModelLost
from streams.forecasting import Answer, Answered, Loaded
from streams.metrics import Metrics
from streams.predict import Predict, PredictShard
from streams.settings import Settings
from streams.shadowing import Challenger, in_share
from tests.streams.test_predict import record, session

EVERYBODY = Settings(shadow_share=1.0, shadow_wait_ms=2_000)


class Oracle:
    """Answers with its name when its gate is open; `fail` is raised instead, `fallback` is told as the reason."""

    def __init__(self, name: str) -> None:
        self.loaded = Loaded(name, f"sha256:{name}", f"router of {name}")
        self.gate, self.fail, self.fallback = asyncio.Event(), list[Exception](), list[str]()
        self.gate.set()
        self.asked: list[list[Visit]] = []
        self.closed = 0

    async def answer(self, visits: Sequence[Visit]) -> Answered:
        self.asked.append(list(visits))
        await self.gate.wait()
        if self.fail:
            raise self.fail[0]
        reason = self.fallback[0] if self.fallback else None
        forecast = Forecast(3, [("home", 0.5)], [self.loaded.version], 0.25, 0.125)
        return Answered([Answer(forecast, reason) for _ in visits])

    async def close(self) -> None:
        self.closed += 1


class Stage:
    """The role with a champion, a challenger and some sessions."""

    def __init__(self, settings: Settings = EVERYBODY) -> None:
        self.champion, self.model, self.metrics = Oracle("old"), Oracle("new"), Metrics()
        self.role = Predict(settings, self.metrics, self.champion)
        self.role.challenger = Challenger(settings, self.metrics, self.model)
        self.number = 0

    async def predict(self, *users: str) -> list[wire.Prediction]:
        shard, sessions = PredictShard(), []
        for user in users:
            self.number += 1
            sessions.append(session(self.number, user))
        records = [record(n, msgspec.json.encode(one), one.user_id) for n, one in enumerate(sessions)]
        await self.role.work([(shard, wire.SESSIONS, records)])
        made = [msgspec.json.decode(o.value or b"", type=wire.Prediction) for o in shard.outputs]
        assert [one.path for one in made] == [[self.champion.loaded.version]] * len(users)
        return made

    def count(self, outcome: str) -> float:
        labels = {"outcome": outcome}
        return self.metrics.registry.get_sample_value("browsecast_shadow_predictions_total", labels) or 0.0

    def counts(self) -> dict[str, float]:
        found = {outcome: self.count(outcome) for outcome in ("made", "late", "busy", "failed")}
        return {outcome: count for outcome, count in found.items() if count}


def test_the_share_is_one_of_users() -> None:
    users = [f"user-{number}" for number in range(10_000)]
    assert 0.19 < sum(in_share(user, 0.2) for user in users) / len(users) < 0.21
    assert not any(in_share(user, 0.0) for user in users) and all(in_share(user, 1.0) for user in users)
    assert all(in_share(user, 0.5) for user in users if in_share(user, 0.2))  # who is in it stays when it grows


async def test_only_the_share_has_shadows() -> None:
    stage = Stage(Settings(shadow_share=0.3, shadow_wait_ms=2_000))
    users = [f"u{number}" for number in range(40)]
    made = await stage.predict(*users)
    shadowed = [one.user_id for one in made if one.shadow is not None]
    assert shadowed == [user for user in users if in_share(user, 0.3)] and 5 < len(shadowed) < 20
    assert [len(visits) for visits in stage.model.asked] == [len(shadowed)]
    assert stage.counts() == {"made": len(shadowed)}


async def test_a_shadow_says_what_the_challenger_answered() -> None:
    stage = Stage()
    (made,) = await stage.predict("u")
    shadow = made.shadow
    assert shadow is not None and shadow.prediction_id != made.prediction_id
    assert (shadow.path, shadow.pages, shadow.cluster) == (["new"], [wire.PageProbability("home", 0.5)], 3)
    assert (shadow.cart, shadow.purchase) == (0.25, 0.125)
    assert (shadow.model_version, shadow.model_digest) == ("new", "sha256:new")
    assert (made.model_version, made.model_digest) == ("old", "sha256:old")


async def test_both_are_asked_at_the_same_time() -> None:
    stage = Stage()
    stage.champion.gate.clear()
    predicting = asyncio.create_task(stage.predict("u"))
    while not stage.model.asked:
        await asyncio.sleep(0)
    assert len(stage.champion.asked) == 1 and not predicting.done()
    stage.champion.gate.set()
    assert (await predicting)[0].shadow is not None


async def test_who_is_late_is_left_out_and_asked_again_when_done() -> None:
    stage = Stage(Settings(shadow_share=1.0, shadow_wait_ms=1))
    stage.model.gate.clear()
    assert [one.shadow for one in await stage.predict("u", "v")] == [None, None]
    assert [one.shadow for one in await stage.predict("u")] == [None]
    assert stage.counts() == {"late": 2, "busy": 1} and len(stage.model.asked) == 1
    stage.model.gate.set()
    await asyncio.sleep(0.01)
    assert (await stage.predict("u"))[0].shadow is not None
    assert stage.counts() == {"late": 2, "busy": 1, "made": 1}


@pytest.mark.parametrize("hangs", [False, True])
async def test_who_fails_is_given_up(hangs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shadowing, "GIVE_UP_S", 0.02)
    stage = Stage()
    if hangs:
        stage.model.gate.clear()
    else:
        stage.model.fail.append(ModelLost("it died again and again"))
    for _ in range(2):
        assert [one.shadow for one in await stage.predict("u", "v")] == [None, None]
    assert stage.counts() == {"failed": 4} and len(stage.model.asked) == 1
    assert stage.model.closed == 1
    refused = stage.metrics.registry.get_sample_value("browsecast_models_refused_total", {"alias": "challenger"})
    assert refused == 1
    labels = {"model": "new", "digest": "sha256:new"}
    assert stage.metrics.registry.get_sample_value("browsecast_challenger_loaded", labels) is None


async def test_what_is_not_its_own_is_no_shadow() -> None:
    stage = Stage()
    stage.model.fallback.append("model_failed: ValueError")
    assert [one.shadow for one in await stage.predict("u")] == [None]
    assert stage.counts() == {"failed": 1} and not stage.model.closed


async def test_nobody_is_his_own_shadow() -> None:
    """For a moment both aliases name the same bundle: it was promoted."""
    stage = Stage()
    stage.champion.loaded = stage.model.loaded
    assert [one.shadow for one in await stage.predict("u")] == [None]
    assert not stage.model.asked and not stage.counts()


async def test_taken_away_while_it_is_asked() -> None:
    stage = Stage()
    stage.model.gate.clear()
    predicting = asyncio.create_task(stage.predict("u"))
    while not stage.model.asked:
        await asyncio.sleep(0)
    challenger, stage.role.challenger = stage.role.challenger, None
    assert challenger is not None
    await challenger.close()
    assert [one.shadow for one in await predicting] == [None]
    assert stage.model.closed == 1 and stage.counts() == {"failed": 1}


async def test_a_challenger_has_its_own_routing() -> None:
    """Sums of the champion's router mean nothing to it."""
    stage, shard = Stage(), PredictShard()
    one = session(1)
    one.context.routing = wire.Routing("router of old", [1.0, 2.0], 3)
    await stage.role.work([(shard, wire.SESSIONS, [record(0, msgspec.json.encode(one))])])
    assert [visits[0].routing for visits in stage.champion.asked] == [[1.0, 2.0]]
    assert [visits[0].routing for visits in stage.model.asked] == [None]
