"""Blocking work beside the event loop, in a thread that nobody waits for when the process ends."""

import asyncio
import contextlib
import threading
from typing import Any


async def in_daemon_thread(function: Any, *arguments: Any) -> Any:
    """Run a blocking function without holding up the process's end, as the default executor would."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def call() -> None:
        try:
            result, error = function(*arguments), None
        except BaseException as failure:
            result, error = None, failure
        with contextlib.suppress(RuntimeError):  # the loop is gone
            loop.call_soon_threadsafe(_settle, future, result, error)

    threading.Thread(target=call, daemon=True).start()
    return await future


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
