"""Logs as streams of events: access logs, JSON lines, CSV and Parquet, as a site profile describes them.

One pass, bounded memory, plain or gzip, from a file, a directory of files or standard input (`-`). A line that cannot
be read comes out as a `BadLine` and is never fatal. An event without an id of its own gets `<file name>:<line number>`,
so that every replay of a log gives the same ids.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import lru_cache
from hashlib import blake2b
from importlib import resources
from pathlib import Path

from streams.lines import BadLine, LogCount, bad_line, log_files, read_lines
from streams.profiles import SiteProfile
from streams.rows import read_csv, read_json, read_parquet
from streams.timeorder import in_time_order
from streams.times import access_log_minute_ms
from streams.wire import Event

# Common Log Format, and Combined where referrer and agent follow. Apache and nginx escape quotes inside by a backslash
# or \x22; a request may lack its protocol (HTTP/0.9) and, in old logs, hold blanks.
ACCESS_LINE = re.compile(
    r"(\S+) \S+ (\S+) \[(\d\d/\w\w\w/\d{4}:\d\d:\d\d):(\d\d) ([+-]\d{4})\] "
    r'"([A-Z]+) ([^"\\ ]+|(?:[^"\\]|\\.)+?)(?: HTTP/[\d.]+)?" (\d{3}) (?:\d+|-)(?=\s|$)'
    r'(?: "[^"\\]*(?:\\.[^"\\]*)*" "([^"\\]*(?:\\.[^"\\]*)*)"|(?! "))'  # a line cut within them is damaged
)
NO_LOGIN = "-"

Reader = Callable[[Path | None, str, SiteProfile, LogCount], Iterator[Event | BadLine]]


def read_log(
    path: str | Path, profile: SiteProfile | None = None, count: LogCount | None = None
) -> Iterator[Event | BadLine]:
    """Every event of the log, and a `BadLine` for each line that is none; `count` is kept up to date on the way.

    path: a file, a directory of files, or `-` for standard input. Without a profile the format is told by the file's
    name or else its first line, and names stay as given. Raises `UsageError` when the log cannot be opened or does not
    have the profile's columns, never for a line.
    """
    count = LogCount() if count is None else count
    files = log_files(path)
    count.bytes_total = sum(file.stat().st_size for file in files if file) if files != [None] else None
    read = READERS[profile.log.format if profile else log_format(files[0])]
    profile = profile or SiteProfile()
    records = (record for file in files for record in read(file, _name(file), profile, count))
    counted = _counted(records, count)
    return in_time_order(counted) if profile.log.sort else counted


def log_format(file: Path | None) -> str:
    """The format of a log without a profile; standard input is taken for JSON lines."""
    suffix = "" if file is None else file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
    if file is None or suffix in (".json", ".jsonl", ".ndjson"):
        return "jsonl"
    if suffix in (".csv", ".parquet"):
        return suffix[1:]
    _, line = next(read_lines(file, LogCount()), (1, ""))
    return "jsonl" if isinstance(line, str) and line.lstrip().startswith("{") else "access-log"


def nasa_excerpt() -> AbstractContextManager[Path]:
    """A real access log for the demo, as a file while the context lasts; read it with the ready profile `nasa`.

    The first 9,999 lines, 1 July 1995 from 04:00 to 07:39 UTC, of the trace of NASA Kennedy Space Center's web server,
    unchanged and contiguous; gzip. Collected by Jim Dumoulin, from the Internet Traffic Archive; it may be freely
    redistributed.
    """
    return resources.as_file(resources.files("streams") / "resources" / "nasa_excerpt.log.gz")


def read_access_log(path: Path | None, name: str, profile: SiteProfile, count: LogCount) -> Iterator[Event | BadLine]:
    """Events of an access log, each line in Common or Combined Log Format."""
    log, resolve, match = profile.log, profile.resolve, ACCESS_LINE.match
    methods, worst = frozenset(log.methods), log.max_status
    no_visitor, visitor = _agent_filter(log.ignore_agents), _VISITORS[log.user]
    for number, line in read_lines(path, count):
        if isinstance(line, BadLine):
            yield line
            continue
        found = match(line)
        if found is None:
            if line and not line.isspace():
                yield bad_line(number, "is no line of the Common or Combined Log Format", line)
            continue
        host, login, minute, second, offset, method, url, status, agent = found.groups()
        if method not in methods or int(status) > worst or no_visitor(agent):
            count.skipped += 1
            continue
        named = resolve(url, None, None, "view")
        if named is None:
            count.skipped += 1
            continue
        try:
            ts = access_log_minute_ms(minute, offset) + int(second) * 1_000
        except ValueError as error:
            yield bad_line(number, str(error), line)
            continue
        page, item, category, kind = named
        yield Event(visitor(host, login, agent), ts, page, f"{name}:{number}", kind, item, None, category)


def _agent_filter(patterns: list[str]) -> Callable[[str | None], bool]:
    """Whether a user agent is none of a visitor."""
    if not patterns:
        return lambda agent: False
    search = re.compile("|".join(patterns), re.IGNORECASE).search
    return lru_cache(4_096)(lambda agent: agent is not None and search(agent) is not None)


@lru_cache(65_536)
def _host_and_agent(host: str, login: str, agent: str | None) -> str:
    return f"{host}-{blake2b((agent or '').encode(), digest_size=4).hexdigest()}"


_VISITORS: dict[str, Callable[[str, str, str | None], str]] = {
    "host": lambda host, login, agent: host,
    "host+agent": _host_and_agent,
    "login": lambda host, login, agent: host if login == NO_LOGIN else login,
}

READERS: dict[str, Reader] = {
    "access-log": read_access_log,
    "csv": read_csv,
    "jsonl": read_json,
    "parquet": read_parquet,
}


def _name(file: Path | None) -> str:
    return "stdin" if file is None else file.name


def _counted(records: Iterator[Event | BadLine], count: LogCount) -> Iterator[Event | BadLine]:
    for record in records:
        if isinstance(record, BadLine):
            count.bad += 1
        else:
            count.events += 1
        yield record
