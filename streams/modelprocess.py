"""The model in a process of its own: in the worker's, its many small operations fight with the event loop for the
interpreter's lock.

The process begins in the nursery and ends when its connection does, so it never outlives the worker.
"""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
import structlog

from models.visit import Visit
from streams.errors import ModelLost, ModelRefused
from streams.forecasting import Answered, Loaded
from streams.modelserver import LENGTH, Batch, Pace, Refusal, Setup, encode
from streams.nursery import GONE, Child, Nursery, Stillborn
from streams.settings import Settings

DEATHS = 5  # of the process in a row, without a forecast between: then the worker ends
EXIT_S = 2.0  # from the end of its connection to its own
CHANGED_CODE = 5  # as a refused bundle

log = structlog.get_logger()

_decode_answered = msgspec.msgpack.Decoder(Answered).decode


class _Died(Exception):
    """The child is gone; the message says how."""


class ModelProcess:
    """The worker's side: asks the child, and starts another when it died."""

    def __init__(
        self, settings: Settings, bundle: Path, nursery: Nursery, digest: str | None = None, pace: Pace = "full"
    ) -> None:
        """Nothing is started yet. `bundle` is the bundle's directory, `digest` what it must have (None: anything)."""
        threads = settings.model_threads or max(1, (os.cpu_count() or 1) - 1)
        self._setup = Setup(
            str(bundle),
            pace,
            settings.device,
            threads,
            settings.model_retries,
            settings.log_level,
            settings.carried(),
        )
        self._digest = digest
        self._nursery = nursery
        self._process: Child | None = None
        self._asking = asyncio.Lock()
        self._loaded: Loaded | None = None
        self._deaths = 0

    @property
    def loaded(self) -> Loaded:
        """Which bundle the child has."""
        assert self._loaded is not None, "the model's process was not started"
        return self._loaded

    @property
    def pid(self) -> int | None:
        """Of the child."""
        return None if self._process is None else self._process.pid

    async def start(self) -> Loaded:
        """Start the child and wait until it has loaded the bundle. Raises ModelRefused and ModelLost."""
        try:
            return await self._start()
        except _Died as death:
            raise ModelLost(f"the model's process {death} while it loaded {self._setup.bundle}; see the log") from None

    async def answer(self, visits: Sequence[Visit]) -> Answered:
        """One answer for each visit. Visits of which the child dies twice are answered by frequencies.

        Raises ModelLost when nothing helps, and ModelRefused when the bundle has changed meanwhile.
        """
        async with self._asking:
            return await self._answer(visits)

    async def _answer(self, visits: Sequence[Visit]) -> Answered:
        died = 0
        while True:
            try:
                if self._process is None:
                    await self._start()
                answered = await self._ask(Batch(visits, lost=died > 1))
            except _Died as death:
                died += 1
                self._deaths += 1
                log.error("the model's process died", how=str(death), deaths=self._deaths, sessions=len(visits))
                if self._deaths >= DEATHS:
                    raise ModelLost(
                        f"the model's process died {self._deaths} times without a forecast, the last time it {death}; "
                        "is there enough memory?"
                    ) from None
                continue
            if died < 2:
                self._deaths = 0
            if died:
                answered.failures["died"] = died
            return answered

    async def retire(self) -> None:
        """Let the answer under way come out, then end the child; nobody may ask any more."""
        async with self._asking:
            await self.close()

    async def close(self) -> None:
        """End the child."""
        process, self._process = self._process, None
        if process is not None:
            await process.kill()

    async def _start(self) -> Loaded:
        try:
            self._process = process = await self._nursery.birth()
        except Stillborn as error:
            raise _Died(str(error)) from None
        try:
            frame = await self._exchange(process, encode(self._setup))
        except asyncio.CancelledError:  # the worker is told to leave
            await self.close()
            raise
        first = msgspec.msgpack.decode(frame, type=Loaded | Refusal)
        if isinstance(first, Refusal):
            await self.close()
            raise ModelRefused(first.message, first.exit_code)
        if self._digest not in (None, first.digest):
            await self.close()
            raise ModelRefused(
                f"{self._setup.bundle} is not the bundle that was asked for ({first.digest} instead of "
                f"{self._digest}); start the worker again, or name the bundle that is there",
                CHANGED_CODE,
            )
        self._loaded, self._digest = first, first.digest  # another child must have the same bundle
        if self._setup.pace == "beside":
            self._setup.pace = "full"  # a child that replaces this one is waited for
        return first

    async def _ask(self, batch: Batch) -> Answered:
        assert self._process is not None
        return _decode_answered(await self._exchange(self._process, encode(batch)))

    async def _exchange(self, process: Child, frame: bytes) -> bytes:
        try:
            if process.writer.is_closing():
                raise BrokenPipeError
            process.writer.writelines((LENGTH.pack(len(frame)), frame))
            (size,) = LENGTH.unpack(await process.reader.readexactly(LENGTH.size))
            return await process.reader.readexactly(size)
        except (asyncio.IncompleteReadError, OSError):
            await asyncio.wait([process.ended], timeout=EXIT_S)
            await self.close()
            raise _Died(_told(process.ended.result())) from None


def _told(code: int) -> str:
    return "ended as its parent did" if code == GONE else f"ended with {code}"
