"""Structured logs on standard error: JSON lines for machines, colours on a terminal. Standard output is for data."""

import logging
import sys
import time
from collections.abc import Callable

import structlog
from structlog.typing import EventDict, Processor

LIBRARIES = ("faust", "mode", "aiokafka", "kafka", "aiohttp", "transformers", "sentence_transformers", "httpx")
LIBRARY_LEVEL = logging.WARNING


def configure(level: str = "info", *, json: bool | None = None) -> None:
    """Set up logging once, at the start of a process; `json` None means: unless standard error is a terminal.

    The libraries' own loggers go the same way, from warnings up.
    """
    lines = json if json is not None else not sys.stderr.isatty()
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    final: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    final += (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
        if lines
        else [structlog.dev.ConsoleRenderer(colors=True)]
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=[*shared, _library_line], processors=final)
    )
    handler.addFilter(_only_for(LIBRARIES, Seldom()))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in LIBRARIES:
        library = logging.getLogger(name)
        library.handlers = []
        library.propagate = True
        library.setLevel(max(LIBRARY_LEVEL, root.level))
    logging.captureWarnings(True)


def _only_for(libraries: tuple[str, ...], inner: logging.Filter) -> Callable[[logging.LogRecord], bool]:
    return lambda record: record.name.split(".")[0] not in libraries or bool(inner.filter(record))


class Seldom(logging.Filter):
    """Lets the same line of a library through once in SECONDS: clients repeat theirs while a broker is away."""

    SECONDS = 5.0

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record's text was not logged lately."""
        now, place = time.monotonic(), (record.name, str(record.msg))
        if now - self._last.get(place, -self.SECONDS) < self.SECONDS:
            return False
        if len(self._last) > 1_000:
            self._last.clear()
        self._last[place] = now
        return True


def _library_line(_: object, __: str, event: EventDict) -> EventDict:
    """Some libraries log blocks of text; a log line stays one line."""
    event["event"] = " ".join(str(event["event"]).split())
    return event
