"""The model in a process of its own: in the worker's, its many small operations fight with the event loop for the
interpreter's lock.

Frames over the child's standard input and output, a length of four bytes and msgpack: `Setup` and then `Batch`es go
in, `Loaded` or `Refusal` and then `Answered`s come out, one for each batch. The child ends when its input ends, so it
never outlives the worker, whatever ends that.
"""

import asyncio
import contextlib
import gc
import os
import queue
import signal
import struct
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec
import structlog

from models.visit import Visit
from streams import logs
from streams.errors import BrowsecastError, ModelLost, ModelRefused
from streams.forecasting import Answered, Forecasting, Loaded
from streams.settings import Settings

MODULE = "streams.modelprocess"  # what the child runs
DEATHS = 5  # of the process in a row, without a forecast between: then the worker ends
EXIT_S = 2.0  # from the end of its output to its own
LOST = "model_lost"
CHANGED_CODE = 5  # as a refused bundle
NICENESS = 10  # of what must not slow down the model at work
_LENGTH = struct.Struct("<I")

log = structlog.get_logger()


# full: nobody else is at work; beside: it loads while another model is; shadow: another one is, always
Pace = Literal["full", "beside", "shadow"]


class Setup(msgspec.Struct):
    """What the child works with; `settings` are all of the worker's."""

    bundle: str
    pace: Pace
    device: str
    threads: int
    retries: int
    log_level: str
    settings: dict[str, Any] = {}


class Batch(msgspec.Struct, array_like=True):
    """Visits to forecast; with `lost` the model, which died of them twice, is left out."""

    visits: Sequence[Visit]
    lost: bool = False


class Refusal(msgspec.Struct, tag=True):
    """The bundle could not be loaded."""

    message: str
    exit_code: int


_encode = msgspec.msgpack.Encoder().encode
_decode_answered = msgspec.msgpack.Decoder(Answered).decode


class _Died(Exception):
    """The child is gone; the message says how."""


class ModelProcess:
    """The worker's side: asks the child, and starts another when it died."""

    def __init__(self, settings: Settings, bundle: Path, digest: str | None = None, pace: Pace = "full") -> None:
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
        self._process: asyncio.subprocess.Process | None = None
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
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _start(self) -> Loaded:
        self._process = process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", MODULE),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},  # it finds what we find
        )
        try:
            frame = await self._exchange(process, _encode(self._setup))
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
        return _decode_answered(await self._exchange(self._process, _encode(batch)))

    async def _exchange(self, process: asyncio.subprocess.Process, frame: bytes) -> bytes:
        assert process.stdin is not None and process.stdout is not None
        try:
            if process.stdin.is_closing():
                raise BrokenPipeError
            process.stdin.writelines((_LENGTH.pack(len(frame)), frame))
            (size,) = _LENGTH.unpack(await process.stdout.readexactly(_LENGTH.size))
            return await process.stdout.readexactly(size)
        except (asyncio.IncompleteReadError, OSError):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), EXIT_S)
            await self.close()
            raise _Died(f"ended with {process.returncode}") from None


# ---------------------------------------------------------------- the child


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Load what `Setup` says, then answer batches until the input ends."""
    frame = _read(requests)
    if frame is None:
        return
    setup = msgspec.msgpack.decode(frame, type=Setup)
    logs.configure(setup.log_level)
    asked: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_on, args=(requests, asked), daemon=True).start()
    try:
        forecasting = load_at_pace(setup)
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            log.exception("the bundle could not be loaded", bundle=setup.bundle)
        message = str(error) if code is not None else f"{setup.bundle} could not be loaded: {error!r}"
        _write(answers, _encode(Refusal(message, code or BrowsecastError.exit_code)))
        return
    model, feed = forecasting.model, None
    if forecasting.ranker is not None:
        from streams.itemfeed import feed_of

        feed = feed_of(Settings(**setup.settings), forecasting.ranker)
    _write(answers, _encode(Loaded(model.version, model.digest, model.router_digest)))
    decode = msgspec.msgpack.Decoder(Batch).decode
    while True:
        batch = decode(asked.get())
        answered = forecasting.frequencies(batch.visits, LOST) if batch.lost else forecasting.answer(batch.visits)
        answered.figures = None if feed is None else feed.figures()
        _write(answers, _encode(answered))


def load_at_pace(setup: Setup) -> Forecasting:
    """Load; at a low priority if another model is at work."""
    if setup.pace == "shadow":
        os.nice(NICENESS)
    if setup.pace != "beside" or sys.platform != "linux":
        return load(setup)
    # Only root may take a niceness back, but on Linux each thread has its own. The one that answers keeps the full
    # priority, and so do the threads that OpenMP gives it: each thread that computes has a team of its own.
    with ThreadPoolExecutor(1, initializer=os.nice, initargs=(NICENESS,)) as loader:
        return loader.submit(load, setup).result()


def load(setup: Setup) -> Forecasting:
    """The bundle, verified and warm. Raises models.bundle.BundleRefused and DeviceUnavailable."""
    from models.bundle import is_out_of_memory, load_bundle, use_threads

    use_threads(setup.threads)
    model = load_bundle(Path(setup.bundle), setup.device)  # type: ignore[arg-type]
    # Nobody is shown the items of a challenger.
    ranker = None
    if model.items is not None and setup.pace != "shadow":
        from streams.itemfeed import retriever_of

        ranker = retriever_of(Settings(**setup.settings), model.items)
    forecasting = Forecasting(model, is_out_of_memory, setup.retries, ranker)
    forecasting.answer([Visit("warm-up", [["/"]])])  # the first forecast sets up what all later ones use
    gc.collect()
    gc.freeze()
    log.info("bundle loaded", version=model.version, digest=model.digest)
    return forecasting


def _read_on(requests: BinaryIO, asked: "queue.SimpleQueue[bytes]") -> None:
    """In a thread, so that the end of the worker ends a forecast under way, too."""
    while (frame := _read(requests)) is not None:
        asked.put(frame)
    os._exit(0)


def _read(file: BinaryIO) -> bytes | None:
    head = file.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (size,) = _LENGTH.unpack(head)
    frame = file.read(size)
    return frame if len(frame) == size else None


def _write(file: BinaryIO, frame: bytes) -> None:
    file.write(_LENGTH.pack(len(frame)))
    file.write(frame)
    file.flush()


def main() -> None:
    """The child's entry: the worker decides when it ends, not the terminal nor the service manager."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not land between the frames
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
