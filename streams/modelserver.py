"""The model's own process: it loads a bundle, then answers batches of visits until its input ends.

Frames, a length of four bytes and msgpack: `Setup` and then `Batch`es come in, `Loaded` or `Refusal` and then
`Answered`s go out, one for each batch.
"""

import gc
import os
import queue
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
from streams.errors import BrowsecastError
from streams.forecasting import Forecasting, Loaded
from streams.nursery import nurse
from streams.settings import Settings

IMPORTS = ("models.bundle",)  # what takes its time
LOST = "model_lost"
NICENESS = 10  # of what must not slow down the model at work
LENGTH = struct.Struct("<I")

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


encode = msgspec.msgpack.Encoder().encode


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
        _write(answers, encode(Refusal(message, code or BrowsecastError.exit_code)))
        return
    model, feed = forecasting.model, None
    if forecasting.ranker is not None:
        from streams.itemfeed import feed_of

        feed = feed_of(Settings(**setup.settings), forecasting.ranker)
    _write(answers, encode(Loaded(model.version, model.digest, model.router_digest)))
    decode = msgspec.msgpack.Decoder(Batch).decode
    while True:
        batch = decode(asked.get())
        answered = forecasting.frequencies(batch.visits, LOST) if batch.lost else forecasting.answer(batch.visits)
        answered.figures = None if feed is None else feed.figures()
        _write(answers, encode(answered))


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
        from models.retriever import Retriever

        ranker = Retriever(model.items, Settings(**setup.settings).ranked_items)
    forecasting = Forecasting(model, is_out_of_memory, setup.retries, ranker)
    forecasting.answer([Visit("warm-up", [["/"]])])  # the first forecast sets up what all later ones use
    gc.collect()
    gc.freeze()
    log.info("bundle loaded", version=model.version, digest=model.digest)
    return forecasting


def _read_on(requests: BinaryIO, asked: "queue.SimpleQueue[bytes]") -> None:
    """In a thread, so that the end of the worker ends a forecast under way, too."""
    try:
        while (frame := _read(requests)) is not None:
            asked.put(frame)
    finally:
        os._exit(0)


def _read(file: BinaryIO) -> bytes | None:
    """The next frame; None at the end, which a worker that was killed before it had read all makes an error."""
    try:
        head = file.read(LENGTH.size)
        if len(head) < LENGTH.size:
            return None
        (size,) = LENGTH.unpack(head)
        frame = file.read(size)
    except ConnectionError:
        return None
    return frame if len(frame) == size else None


def _write(file: BinaryIO, frame: bytes) -> None:
    file.write(LENGTH.pack(len(frame)))
    file.write(frame)
    file.flush()


if __name__ == "__main__":
    nurse(IMPORTS, serve)
