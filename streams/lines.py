"""Lines of a log, however large it is: from a file, gzip or standard input, in bounded memory."""

import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from streams.errors import UsageError

STANDARD_INPUT = "-"
BLOCK_BYTES = 1 << 20
MAX_LINE_BYTES = 256 * 1024  # what no event may exceed either
SHOWN_CHARACTERS = 200
GZIP_MAGIC = b"\x1f\x8b"


class BadLine(msgspec.Struct, frozen=True):
    """A line (or row) that could not be read: its number from 1, why, and the start of it."""

    number: int
    reason: str
    text: str

    def __str__(self) -> str:
        """One line for a person."""
        return f"line {self.number}: {self.reason}: {self.text}" if self.text else f"line {self.number}: {self.reason}"


class LogCount(msgspec.Struct):
    """How far a reading has come. `skipped` lines are no clicks by the profile: images, other methods, markers."""

    events: int = 0
    bad: int = 0
    skipped: int = 0
    bytes_read: int = 0
    bytes_total: int | None = None  # None: standard input


def bad_line(number: int, reason: str, text: str | bytes) -> BadLine:
    """A `BadLine` with the first characters of the line."""
    start = text[: 4 * SHOWN_CHARACTERS]
    shown = start.decode("utf-8", "backslashreplace") if isinstance(start, bytes) else start
    return BadLine(number, reason, shown.rstrip("\r\n")[:SHOWN_CHARACTERS])


def log_files(path: str | Path) -> list[Path | None]:
    """The files that `path` stands for: itself, those of a directory by name, or None for standard input."""
    if str(path) == STANDARD_INPUT:
        return [None]
    path = Path(path)
    files = sorted(p for p in path.iterdir() if p.is_file() and p.name[0] not in "._") if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UsageError(f"{path}: there is no such file, or the directory is empty")
    return list(files)


def read_lines(path: Path | None, count: LogCount) -> Iterator[tuple[int, str | BadLine]]:
    """Every line with its number from 1, without its end; a `BadLine` where it is not UTF-8 or too long.

    Raises `UsageError` if the file cannot be opened.
    """
    number, rest, too_long = 0, b"", False
    for block in _blocks(path, count):
        if isinstance(block, str):
            yield number + 1, bad_line(number + 1, block, rest)
            return
        *lines, rest = (rest + block).split(b"\n")
        if too_long and lines:
            del lines[0]  # the end of a line already reported
            too_long = False
        yield from _decoded(lines, number)
        number += len(lines)
        if len(rest) > MAX_LINE_BYTES:
            if not too_long:
                number += 1
                yield number, bad_line(number, f"is longer than {MAX_LINE_BYTES} bytes", rest)
            too_long, rest = True, b""
    if rest and not too_long:
        yield from _decoded([rest], number)


def _decoded(lines: list[bytes], before: int) -> Iterator[tuple[int, str | BadLine]]:
    for number, line in enumerate(lines, before + 1):
        if len(line) > MAX_LINE_BYTES:
            yield number, bad_line(number, f"is longer than {MAX_LINE_BYTES} bytes", line)
            continue
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            yield number, bad_line(number, f"is not UTF-8 ({error.reason} at byte {error.start})", line)


def _blocks(path: Path | None, count: LogCount) -> Iterator[bytes | str]:
    """The log's bytes; a text in the end says that the compressed data are damaged from there on."""
    with _opened(path) as raw:
        zipped = raw.peek(2)[:2] == GZIP_MAGIC
        # read1: the lines of a pipe come as they are written
        read = gzip.GzipFile(fileobj=raw).read if zipped else raw.read1
        before = count.bytes_read
        while True:
            try:
                block = read(BLOCK_BYTES)
            except (EOFError, OSError, zlib.error) as error:
                yield f"the rest cannot be read ({error})"
                return
            if not block:
                return
            count.bytes_read = before + raw.tell() if path is not None else count.bytes_read + len(block)
            yield block


def _opened(path: Path | None) -> io.BufferedReader:
    if path is None:
        source: Any = sys.stdin.buffer
        return io.BufferedReader(getattr(source, "raw", source))
    try:
        return path.open("rb")
    except OSError as error:
        raise UsageError(f"{path}: cannot be opened ({error.strerror})") from error
