"""A worker: a process that plays one or more roles until it is told to stop, or until going on would do harm."""

import asyncio
import fcntl
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import structlog
import uvloop

from streams import logs, topics
from streams.aside import in_daemon_thread
from streams.engine import Engine
from streams.errors import BrowsecastError, Stalled, StateUnusable, StateUnwritable, UsageError
from streams.health import Health
from streams.metrics import Metrics
from streams.profiles import SiteProfile, with_gap
from streams.roles import Role
from streams.serving import Loaded, Models
from streams.settings import Settings
from streams.transport import RoleApp, make_app

WATCH_SECONDS = 1.0
# The collector takes up to half of the time at its defaults, walking states that hold no cycles.
GC_THRESHOLD = (100_000, 20, 1_000)
# The consumers' threads wake for every fetch; at the default of 5 ms each waits that long for the interpreter's lock,
# several times on the way of a click.
SWITCH_S = 0.0005

log = structlog.get_logger()


def run(settings: Settings, roles: Sequence[str]) -> None:
    """Run until SIGTERM or SIGINT; raises the `BrowsecastError` that ended the worker."""
    logs.configure(settings.log_level)
    settings = with_gap(settings, SiteProfile.load(settings.profile))
    logging.getLogger("streams.transport").setLevel(logging.WARNING)  # the narration of Faust services
    gc.set_threshold(*GC_THRESHOLD)
    sys.setswitchinterval(SWITCH_S)
    try:
        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())  # for the threads of the consumers, too
        with asyncio.Runner() as runner:
            runner.run(Worker(settings, roles).run())
    finally:
        asyncio.set_event_loop_policy(None)
        gc.unfreeze()


class Worker:
    """The roles' engines and Faust apps, the HTTP port, the watchdog and the signals of one process."""

    def __init__(self, settings: Settings, roles: Sequence[str]) -> None:
        self.settings, self.metrics = settings, Metrics()
        self._roles = list(roles)
        self._apps: list[RoleApp] = []
        self._engines: list[Engine] = []
        self._ended = asyncio.Event()
        self._error: BaseException | None = None
        self._progress: dict[str, tuple[int, float]] = {}
        self._waiting_for: str | None = "the broker"
        self._locks: list[IO[str]] = []  # held until the process ends
        self._models = Models(settings, self.metrics, roles)

    async def run(self) -> None:
        """Start, work, and leave; the first error is raised when all is put away."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        health = Health(self.settings, self.metrics, self._not_ready, self._not_alive)
        port = await health.start()
        log.info("worker starting", roles=self._roles, port=port, bootstrap_servers=self.settings.bootstrap_servers)
        tasks: list[asyncio.Task[None]] = []
        try:
            if await self._prepared():
                tasks = await self._start()
            await self._ended.wait()
        finally:
            await self._leave(tasks)
            await self._models.close()
            await health.stop()
        if self._error is not None:
            raise self._error
        log.info("worker left")

    async def _prepared(self) -> bool:
        """Wait for the broker, check the topics, load the models; False when it was told to stop meanwhile."""
        preparing = asyncio.create_task(self._prepare())
        ended = asyncio.create_task(self._ended.wait())
        await asyncio.wait([preparing, ended], return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if not preparing.done():
            preparing.cancel()
            return False
        await preparing
        return not self._ended.is_set()

    async def _prepare(self) -> None:
        await in_daemon_thread(topics.wait_for_broker, self.settings, None)
        self._waiting_for = "the topics"
        await in_daemon_thread(topics.require, self.settings, self._roles)
        self._waiting_for = "the models"
        self._locks = [_lock_state(self.settings.state_dir, self.settings.application(role)) for role in self._roles]
        loaded = await self._models.begin()
        for role in self._make_roles(loaded):
            engine = Engine(self.settings, role, self.metrics, self.fail)
            engine.app = make_app(engine, engine.group, list(engine.topics))
            self._engines.append(engine)
            self._apps.append(engine.app)
        self._waiting_for = None

    def _make_roles(self, loaded: Loaded) -> list[Role]:
        sessionize = predict = score = None
        if "sessionize" in self._roles:
            from streams.sessionize import Sessionize

            sessionize = Sessionize(self.settings, self.metrics, loaded.router, loaded.items)
        if "predict" in self._roles:
            from streams.predict import Predict

            if loaded.model is None:
                raise UsageError(
                    "the role predict needs a model bundle: set BROWSECAST_BUNDLE or --bundle (see `browsecast train`),"
                    " or promote one (see `browsecast models`), or leave the role out: "
                    "browsecast worker --role sessionize --role score"
                )
            predict = Predict(self.settings, self.metrics, loaded.model)
        if "score" in self._roles:
            from streams.score import Scoring

            score = Scoring(self.settings, self.metrics)
        self._models.follow(sessionize, predict)
        return [role for role in (sessionize, predict, score) if role is not None]

    async def _start(self) -> list[asyncio.Task[None]]:
        gc.collect()
        gc.freeze()
        for app in self._apps:
            app.finalize()
        await asyncio.gather(*(app.maybe_start() for app in self._apps))
        tasks = [asyncio.create_task(engine.run()) for engine in self._engines]
        tasks.append(asyncio.create_task(self._watch()))
        for task in tasks:
            task.add_done_callback(self._done)
        return tasks

    def _done(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """End the worker for what it cannot mend itself; the first reason counts."""
        if self._error is None:
            self._error = error
            log.error("worker ends", error=str(error), kind=type(error).__name__, exc_info=_traced(error))
        self._ended.set()

    def _stop(self, number: int) -> None:
        log.info("worker draining", signal=signal.Signals(number).name)
        self._ended.set()

    async def _leave(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        """Finish what is under way and leave; give up after `drain_ms`: the next start repeats what is missing."""
        self._waiting_for = "its end"
        try:
            async with asyncio.timeout(self.settings.drain_ms / 1000):
                if self._error is None:
                    await asyncio.gather(*(engine.close() for engine in self._engines))
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await asyncio.gather(*(app.stop() for app in self._apps))
        except TimeoutError:
            log.error(
                "could not finish in time; the next start repeats from the last commit", ms=self.settings.drain_ms
            )
            os._exit(getattr(self._error, "exit_code", StateUnwritable.exit_code))  # a reader's thread may never end

    # ------------------------------------------------------------ health

    async def _watch(self) -> None:
        """End the worker when a Faust app has crashed, or when there is lag and nothing moves."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for engine in self._engines:
                if engine.app.crash_reason is not None:
                    raise StateUnwritable(f"{engine.role.name}: reading failed ({engine.app.crash_reason!r})")
                self._check_progress(engine)

    def _check_progress(self, engine: Engine) -> None:
        name, now = engine.role.name, time.monotonic()
        processed, since = self._progress.get(name, (-1, now))
        if engine.processed != processed or not engine.recovered or engine.lag() == 0:
            self._progress[name] = (engine.processed, now)
            since = now
        self.metrics.stalled_seconds.labels(name).set(now - since)
        if (now - since) * 1000 > self.settings.watchdog_ms:
            raise Stalled(
                f"{name} has lag and made no progress for {self.settings.watchdog_ms} ms; start the worker again"
            )

    def _not_ready(self) -> dict[str, str]:
        reasons = {} if self._waiting_for is None else {"worker": f"waits for {self._waiting_for}"}
        return reasons | {
            engine.role.name: "has not taken over its partitions yet"
            for engine in self._engines
            if not engine.recovered
        }

    def _not_alive(self) -> str | None:
        return None if self._error is None else str(self._error)


def _lock_state(directory: Path, name: str) -> IO[str]:
    """One worker a role and state directory: two would write into the same databases."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / f"{name}.lock").open("w")
    except OSError as error:
        raise StateUnusable(
            f"state directory {directory}: {error.strerror}; set BROWSECAST_STATE_DIR to one you may write"
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise StateUnusable(
            f"{directory} is in use by another worker: give each its own with --state-dir or BROWSECAST_STATE_DIR"
        ) from None
    return lock


def _traced(error: BaseException) -> BaseException | None:
    """A known error says it all; an unknown one is shown with its place."""
    return None if isinstance(error, BrowsecastError) else error
