"""The models of one worker: what serves, what is loaded beside it, what is in shadow.

A champion takes over between two micro-batches, once it is loaded, verified and warm; the one before is kept until
then. A bundle that is refused changes nothing; it is tried again, now and then, while it is named.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import structlog

from streams import wire
from streams.aside import in_daemon_thread
from streams.bundles import local
from streams.channels import to_put_right
from streams.following import CHALLENGER, CHAMPION, Following, Named
from streams.metrics import Metrics
from streams.modelprocess import ModelProcess
from streams.modelserver import Pace
from streams.nursery import Nursery
from streams.settings import Settings
from streams.shadowing import Challenger

if TYPE_CHECKING:  # a worker without these roles does not load what they need
    from models.items import ItemClusters
    from models.routing import Router
    from streams.predict import Predict
    from streams.sessionize import Sessionize

FIRST_PAUSE_S, LAST_PAUSE_S = 30.0, 3_600.0  # after a refusal: its storage may have been away
LOAD_S = 300.0  # a model that is not loaded then is not waited for

log = structlog.get_logger(__name__)

Wanted = wire.ModelAlias | Path  # what an alias names, or BUNDLE


class Loaded(NamedTuple):
    """What the roles of this worker take from one bundle; None for roles that it does not play, or without a bundle."""

    model: ModelProcess | None = None
    router: "Router | None" = None
    items: "ItemClusters | None" = None


class Lane:
    """One alias: what it names is taken up in a task of its own, which ends when it names another."""

    def __init__(self, alias: str, metrics: Metrics, take_up: Callable[[Wanted | None], Awaitable[None]]) -> None:
        self._alias, self._metrics, self._take_up = alias, metrics, take_up
        self._task: asyncio.Task[None] | None = None
        self.wanted: Wanted | None = None

    def want(self, wanted: Wanted | None) -> None:
        """Take this up instead of what was wanted before."""
        if wanted != self.wanted:
            self.wanted = wanted
            if self._task is not None:
                self._task.cancel()
            self._task = asyncio.create_task(self._try(wanted))

    async def stop(self) -> None:
        """Leave what is under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _try(self, wanted: Wanted | None) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                async with asyncio.timeout(LOAD_S):
                    return await self._take_up(wanted)
            except Exception as error:
                _tell(self._alias, wanted, error, self._metrics)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_PAUSE_S)


class Models:
    """Loads what the roles need: at the start in `begin`, and after `follow` whenever an alias names something else."""

    def __init__(self, settings: Settings, metrics: Metrics, roles: Sequence[str]) -> None:
        self._settings, self._metrics = settings, metrics
        self._predicts, self._sessionizes = "predict" in roles, "sessionize" in roles
        self._following = Following(settings, self._hear)
        self._named = Named()
        self._follows = False
        self._champion = Lane(CHAMPION, metrics, self._take_up_champion)
        self._challenger = Lane(CHALLENGER, metrics, self._take_up_challenger)
        self._sessionize: Sessionize | None = None
        self._predict: Predict | None = None
        self._model: ModelProcess | None = None  # that serves
        self._retiring: set[asyncio.Task[None]] = set()
        self._nursery = Nursery()

    async def begin(self) -> Loaded:
        """The champion, or BUNDLE while none is named or it cannot serve; empty without either.

        Raises what is wrong with the last of the two; BrokerUnavailable and WrongTopics.
        """
        if not (self._predicts or self._sessionizes):
            return Loaded()
        if self._settings.follow_models:
            await self._following.start()
        candidates = [wanted for wanted in (self._named.champion, self._settings.bundle) if wanted is not None]
        for wanted in candidates:
            try:
                loaded = await self._load(wanted, "full")
            except Exception as error:
                if wanted is candidates[-1]:
                    raise
                _tell(CHAMPION, wanted, error, self._metrics)
                continue
            self._champion.wanted, self._model = wanted, loaded.model
            return loaded
        return Loaded()

    def follow(self, sessionize: "Sessionize | None", predict: "Predict | None") -> None:
        """These roles take what is named from here on."""
        self._sessionize, self._predict, self._follows = sessionize, predict, True
        self._hear(self._named)

    async def close(self) -> None:
        """End all models."""
        self._following.stop()
        for lane in (self._champion, self._challenger):
            await lane.stop()
        if self._retiring:
            await asyncio.wait(self._retiring)
        await self._drop_challenger()
        if self._model is not None:
            await self._model.close()
        await self._nursery.close()

    def _hear(self, named: Named) -> None:
        self._named = named
        if not self._follows:
            return
        champion, challenger = named.champion or self._settings.bundle, named.challenger
        if champion is not None:  # else what serves goes on
            self._champion.want(champion)
        if challenger is not None and named.champion is not None and challenger.digest == named.champion.digest:
            challenger = None  # it was promoted just now
        if self._predict is not None and self._settings.shadow_share > 0:
            self._challenger.want(challenger)

    # ------------------------------------------------------------ taking up

    async def _take_up_champion(self, wanted: Wanted | None) -> None:
        assert wanted is not None
        started = time.monotonic()
        loaded = await self._load(wanted, "beside")
        if self._sessionize is not None:
            self._sessionize.adopt(loaded.router, loaded.items)
        if self._predict is not None and loaded.model is not None and self._model is not None:
            self._predict.adopt(loaded.model)
            retiring = asyncio.create_task(self._model.retire())
            self._retiring.add(retiring)
            retiring.add_done_callback(self._retiring.discard)
            self._model = loaded.model
        seconds = time.monotonic() - started
        self._metrics.model_swaps.inc()
        self._metrics.model_swap_seconds.observe(seconds)
        log.info("another champion serves", **_words(wanted), seconds=round(seconds, 2))

    async def _take_up_challenger(self, wanted: Wanted | None) -> None:
        await self._drop_challenger()
        if wanted is None or self._predict is None:
            return
        model = await self._start(*await self._place(wanted), "shadow")
        self._predict.challenger = Challenger(self._settings, self._metrics, model)
        log.info("the challenger stands in shadow", **_words(wanted))

    async def _drop_challenger(self) -> None:
        if self._predict is not None and self._predict.challenger is not None:
            challenger, self._predict.challenger = self._predict.challenger, None
            await challenger.close()

    async def _load(self, wanted: Wanted, pace: Pace) -> Loaded:
        path, digest = await self._place(wanted)
        router = items = model = None
        if self._sessionizes:
            router, items = await in_daemon_thread(_load_tables, path, self._settings)
        if self._predicts:  # last: nothing can go wrong any more while it runs
            model = await self._start(path, digest, pace)
        return Loaded(model, router, items)

    async def _place(self, wanted: Wanted) -> tuple[Path, str | None]:
        """Where the bundle lies, verified if an alias names it, and the digest that it must have."""
        if isinstance(wanted, Path):
            return wanted, None
        cache = self._settings.state_dir / "bundles"
        return await in_daemon_thread(local, wanted.uri, wanted.digest, cache), wanted.digest

    async def _start(self, path: Path, digest: str | None, pace: Pace) -> ModelProcess:
        model = ModelProcess(self._settings, path, self._nursery, digest, pace)
        await model.start()
        return model


def _load_tables(bundle: Path, settings: Settings) -> "tuple[Router, ItemClusters | None]":
    from models.items import ItemClusters, load_items
    from models.routing import load_router

    table = load_items(bundle)
    if table is not None and (right := to_put_right(settings, table.retriever)):
        log.warning(
            "this bundle was trained with other seed events than sessions get here: its items will be worse. "
            "Give the workers that sessionize these settings and start them again",
            bundle=str(bundle),
            settings=" ".join(right),
        )
    return load_router(bundle), None if table is None else ItemClusters(table)


def _tell(alias: str, wanted: Wanted | None, error: Exception, metrics: Metrics) -> None:
    metrics.models_refused.labels(alias).inc()
    log.error("a model is refused, what serves goes on", alias=alias, **_words(wanted), error=str(error) or repr(error))


def _words(wanted: Wanted | None) -> dict[str, str]:
    if isinstance(wanted, wire.ModelAlias):
        return {"version": wanted.version, "digest": wanted.digest, "bundle": wanted.uri}
    return {"bundle": str(wanted)}
