import gzip
import io
import json
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams import lines
from streams.errors import UsageError
from streams.lines import BadLine, LogCount
from streams.profilefile import Columns, LogFormat, Pages, ProfileFile, Skip
from streams.profiles import SiteProfile
from streams.readers import nasa_excerpt, read_log
from streams.timeorder import in_time_order
from streams.times import access_log_minute_ms, time_parser
from streams.wire import Event
from tests.streams.logs_for_tests import real_log

COMMON = '10.0.0.1 - - [01/Jul/1995:04:00:01 +0000] "GET /a HTTP/1.0" 200 6245'
AGENT = '"Mozilla/5.0 (X11; \\"Linux\\")"'
COMBINED = f'::1 - anna [17/May/2015:10:05:03 +0200] "GET /b?x=1 HTTP/1.1" 304 - "http://other.example/" {AGENT}'
COLUMNS = Columns(user="who", time="when", page="url")


def read(path: Path, log: LogFormat, pages: Pages | None = None) -> tuple[list[Event], list[BadLine], LogCount]:
    count = LogCount()
    records = list(read_log(path, SiteProfile(ProfileFile(log=log, pages=pages or Pages())), count))
    events = [record for record in records if isinstance(record, Event)]
    bad = [record for record in records if isinstance(record, BadLine)]
    assert (count.events, count.bad) == (len(events), len(bad))
    return events, bad, count


def written(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# ---------------------------------------------------------------- access logs


def test_access_log_in_both_formats(tmp_path: Path) -> None:
    path = written(tmp_path, "access.log", f"{COMMON}\n{COMBINED}\r\n\n")
    events, bad, count = read(path, LogFormat(format="access-log"))
    assert not bad
    assert events == [
        Event("10.0.0.1", 804_571_201_000, "/a", "access.log:1"),
        Event("::1", 1_431_849_903_000, "/b?x=1", "access.log:2"),
    ]
    assert count.bytes_read == count.bytes_total == path.stat().st_size


@pytest.mark.parametrize(
    ("line", "page"),
    [
        ('h - - [01/Jul/1995:04:00:01 +0000] "GET /old" 200 1', "/old"),
        ('h - - [01/Jul/1995:04:00:01 +0000] "GET /a b.html HTTP/1.0" 200 1', "/a b.html"),
        ('h - - [01/Jul/1995:04:00:01 +0000] "GET /q\\"x HTTP/1.0" 200 1', '/q\\"x'),
        ('h - - [01/Jul/1995:04:00:01 +0000] "GET /t HTTP/2.0" 200 1 "-" "-" 0.123 "x"', "/t"),
    ],
)
def test_access_log_with_odd_requests(tmp_path: Path, line: str, page: str) -> None:
    events, bad, _ = read(written(tmp_path, "a.log", line), LogFormat(format="access-log"))
    assert ([event.page for event in events], bad) == ([page], [])


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        COMMON.replace("/Jul/", "/Jux/"),
        COMMON.replace("01/Jul", "31/Feb"),
        COMMON.replace(" 200 6245", ""),
        COMBINED[:-5],
    ],
)
def test_bad_access_line_is_reported_with_its_number(tmp_path: Path, line: str) -> None:
    path = written(tmp_path, "a.log", f"{COMMON}\n{line}\n{COMMON}\n")
    events, bad, _ = read(path, LogFormat(format="access-log"))
    assert [event.event_id for event in events] == ["a.log:1", "a.log:3"]
    assert [(b.number, b.text) for b in bad] == [(2, line)]
    assert str(bad[0]).startswith("line 2: ")


def test_what_is_no_click_is_skipped_and_counted(tmp_path: Path) -> None:
    text = "\n".join(
        [
            COMMON.replace("GET", "POST"),
            COMMON.replace(" 200 ", " 404 "),
            COMMON.replace("/a ", "/a.gif "),
            COMBINED.replace("Mozilla", "Somebot"),
            COMBINED,
        ]
    )
    log = LogFormat(format="access-log", ignore_agents=["bot"])
    events, bad, count = read(written(tmp_path, "a.log", text), log, Pages(ignore=[r"\.gif$"]))
    assert (len(events), bad, count.skipped) == (1, [], 4)


def test_who_the_visitor_is(tmp_path: Path) -> None:
    path = written(tmp_path, "a.log", f"{COMMON}\n{COMBINED}\n{COMBINED.replace('X11', 'Mac')}\n")
    logins, _, _ = read(path, LogFormat(format="access-log", user="login"))
    assert [event.user_id for event in logins] == ["10.0.0.1", "anna", "anna"]
    agents, _, _ = read(path, LogFormat(format="access-log", user="host+agent"))
    assert len({event.user_id for event in agents}) == 3
    assert agents[1].user_id.startswith("::1-")


@given(st.datetimes(datetime(1990, 1, 1), datetime(2100, 1, 1)), st.integers(-14 * 60, 14 * 60))
def test_access_log_time_is_that_of_strptime(time: datetime, offset: int) -> None:
    sign = "-" if offset < 0 else "+"
    zone = f"{sign}{abs(offset) // 60:02}{abs(offset) % 60:02}"
    expected = datetime.strptime(f"{time:%d/%b/%Y:%H:%M} {zone}", "%d/%b/%Y:%H:%M %z")
    assert access_log_minute_ms(f"{time:%d/%b/%Y:%H:%M}", zone) == round(expected.timestamp() * 1_000)


# ---------------------------------------------------------------- lines


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("block", [3, 64, 1 << 20])
def test_lines_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool, block: int) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", block)
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 20)
    text = b"one\nb\xe4d\n" + b"x" * 100 + b"\n" + b"y" * 100 + b"\nfive\n\nlast"
    path = written(tmp_path, "log", gzip.compress(text) if packed else text)
    found = list(lines.read_lines(path, LogCount()))
    assert [(n, line) for n, line in found if isinstance(line, str)] == [(1, "one"), (5, "five"), (6, ""), (7, "last")]
    bad = [line for _, line in found if isinstance(line, BadLine)]
    assert [(b.number, b.reason.split(" (")[0]) for b in bad] == [
        (2, "is not UTF-8"),
        (3, "is longer than 20 bytes"),
        (4, "is longer than 20 bytes"),
    ]


def test_damaged_gzip_is_reported_not_fatal(tmp_path: Path) -> None:
    packed = gzip.compress(b"".join(f"{COMMON}{n}\n".encode() for n in range(5_000)))
    events, bad, _ = read(written(tmp_path, "a.log.gz", packed[: len(packed) // 2]), LogFormat(format="access-log"))
    assert len(bad) == 1
    assert "the rest cannot be read" in bad[0].reason
    assert len(events) < 5_000


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"user_id": "u", "ts": 5, "page": "p"}\n')))
    assert list(read_log("-")) == [Event("u", 5, "p", "stdin:1")]


def test_directory_is_read_file_by_file(tmp_path: Path) -> None:
    for name in ("b", "a"):
        written(tmp_path, name, COMMON)
    assert [event.event_id for event in read(tmp_path, LogFormat(format="access-log"))[0]] == ["a:1", "b:1"]


def test_missing_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        list(read_log(tmp_path / "none"))


# ---------------------------------------------------------------- CSV


def test_csv_with_quotes_times_and_skipped_rows(tmp_path: Path) -> None:
    text = (
        "\ufeffwho;day;hour;url;kind;cost;code;id\r\n"
        'anna;2024-03-01;10:00:00;"/a;b ""c""";view;;;\r\n'
        'bert;2024-03-01;10:00:01;"/two\nlines";add;1.5;;x-1\r\n'
        "cleo;2024-03-01;10:00:02;start;view;;hats;\r\n"
        "dora;2024-03-01;10:00:03;/d;view;;;\r\n"
    )
    columns = Columns(
        user="who",
        time=["day", "hour"],
        page="url",
        type="kind",
        price="cost",
        category=["code", "kind"],
        event_id="id",
    )
    skip = [Skip(column="url", values=["start"])]
    log = LogFormat(format="csv", delimiter=";", columns=columns, skip=skip, timezone="Europe/Berlin")
    events, bad, count = read(written(tmp_path, "s.csv", text), log)
    start = 1_709_283_600_000  # 2024-03-01 09:00 UTC
    assert not bad
    assert count.skipped == 1
    assert events == [
        Event("anna", start, '/a;b "c"', "s.csv:2", category="view"),
        Event("bert", start + 1_000, "/two\nlines", "x-1", "add", price=1.5, category="add"),
        Event("dora", start + 3_000, "/d", "s.csv:6", category="view"),
    ]


def test_bad_csv_rows_are_reported_and_the_next_are_read(tmp_path: Path) -> None:
    text = "who,when,url,cost\na,1000,/a,\nb,1000,/b\nc,soon,/c,\n,1000,/d,\ne,1000,,\nf,1000,/f,cheap\ng,1000,/g,nan\n"
    log = LogFormat(format="csv", time_format="ms", columns=Columns(user="who", time="when", page="url", price="cost"))
    events, bad, _ = read(written(tmp_path, "s.csv", text), log)
    assert [event.user_id for event in events] == ["a", "g"]
    assert [b.number for b in bad] == [3, 4, 5, 6, 7]
    reasons = ["has 3 columns instead of 4", "time 'soon'", "has no user (who)", "has no page (url)", "price 'cheap'"]
    assert all(b.reason.startswith(reason) for b, reason in zip(bad, reasons, strict=True))


def test_a_quote_that_never_closes_costs_one_line(tmp_path: Path) -> None:
    rows = "".join(f'u{n},{n},"/{n}"\n' for n in range(20_000))
    text = f'who,when,url\na,1,/a\nb,2,"/b\n{rows}'
    events, bad, _ = read(written(tmp_path, "s.csv", text), LogFormat(format="csv", time_format="ms", columns=COLUMNS))
    assert [b.number for b in bad] == [3]
    assert [event.event_id for event in events] == ["s.csv:2", *(f"s.csv:{n + 4}" for n in range(20_000))]


def test_a_quote_open_at_the_end_costs_one_line(tmp_path: Path) -> None:
    text = 'who,when,url\na,1,"/a\nb,2,/b\nc,3,/c\n'
    events, bad, _ = read(written(tmp_path, "s.csv", text), LogFormat(format="csv", time_format="ms", columns=COLUMNS))
    assert ([b.number for b in bad], [event.user_id for event in events]) == ([2], ["b", "c"])


def test_csv_without_header_or_quotes(tmp_path: Path) -> None:
    log = LogFormat(format="csv", quote="", header=["who", "when", "url"], time_format="s", columns=COLUMNS)
    events, bad, _ = read(written(tmp_path, "s.csv", 'a,1.5,"/a\n'), log)
    assert (events, bad) == ([Event("a", 1_500, '"/a', "s.csv:1")], [])


def test_missing_column_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "s.csv", "who,when\na,1\n")
    with pytest.raises(UsageError, match=r"no column 'url'.*it has who, when"):
        read(path, LogFormat(format="csv", columns=COLUMNS))


# ---------------------------------------------------------------- JSON lines and Parquet


def test_json_lines_of_events_and_envelopes(tmp_path: Path) -> None:
    event = {"user_id": "u", "ts": "2024-03-01T10:00:00+01:00", "page": "p", "attributes": {"a": 1}, "new": 1}
    segment = {
        "type": "track",
        "event": "Product Added",
        "userId": 7,
        "messageId": "m",
        "timestamp": "2024-03-01T09:00:01Z",
        "context": {"page": {"path": "/x"}},
    }
    broken = ['{"ts": 1', "[]", '{"ts": 1, "page": "p"}', '{"user_id": "u", "page": "p"}', "{" * 100_000]
    text = "\n".join([json.dumps(event), json.dumps(segment), *broken, ""])
    events, bad, _ = read(written(tmp_path, "e.jsonl", text), LogFormat())
    start = 1_709_283_600_000
    assert events == [
        Event("u", start, "p", "e.jsonl:1", attributes={"a": 1}),
        Event("7", start + 1_000, "/x", "m", "cart"),
    ]
    assert [b.number for b in bad] == [3, 4, 5, 6, 7]


def test_json_lines_by_dotted_columns(tmp_path: Path) -> None:
    columns = Columns(user="visitor.id", time="at", page="page.path")
    text = json.dumps({"visitor": {"id": 4}, "at": 1_700_000_000, "page": {"path": "/a"}})
    events, _, _ = read(written(tmp_path, "e.jsonl", text), LogFormat(columns=columns, time_format="s"))
    assert events == [Event("4", 1_700_000_000_000, "/a", "e.jsonl:1")]


GA_HIT = {"type": "PAGE", "time": "0", "page": {"pagePath": "/home?utm=x"}}
GA_SESSION = {
    "fullVisitorId": "7131",
    "visitStartTime": "1501583974",
    "device": {"deviceCategory": "mobile"},
    "hits": [
        GA_HIT,
        {"type": "EVENT", "time": "900", "page": {"pagePath": "/home"}},
        {"type": "PAGE", "time": "12500", "page": {"pagePath": "/google+redesign/apparel/men++s/quickview"}},
        {"type": "PAGE", "time": "30000", "page": {"pagePath": "/basket.html"}},
        {"type": "PAGE", "time": "90000", "page": {"pagePath": "/ordercompleted.html?vid=1"}},
    ],
}


def test_google_analytics_export_gives_a_click_for_each_page_view(tmp_path: Path) -> None:
    later = {**GA_SESSION, "visitStartTime": "1501583000", "hits": [GA_HIT]}
    text = "\n".join(json.dumps(session) for session in (GA_SESSION, later, {"fullVisitorId": "1", "hits": None}))
    profile = SiteProfile.load("google-analytics")
    count = LogCount()
    records = list(read_log(written(tmp_path, "ga.jsonl", text), profile, count))
    events = [record for record in records if isinstance(record, Event)]
    assert [(e.ts, e.page, e.type, e.event_id) for e in events] == [
        (1_501_583_000_000, "/home", "view", "ga.jsonl:2.1"),
        (1_501_583_974_000, "/home", "view", "ga.jsonl:1.1"),
        (1_501_583_986_500, "/apparel/men s", "view", "ga.jsonl:1.3"),
        (1_501_584_004_000, "/basket", "cart", "ga.jsonl:1.4"),
        (1_501_584_064_000, "/ordercompleted", "purchase", "ga.jsonl:1.5"),
    ]
    assert {(e.user_id, e.device) for e in events} == {("7131", "mobile")}
    assert [r.reason for r in records if isinstance(r, BadLine)] == ["has no list 'hits'"]
    assert count.skipped == 1


def test_parquet_with_typed_columns(tmp_path: Path) -> None:
    table = pyarrow.table(
        {
            "who": pyarrow.array([1.0, None, 3.0]),
            "when": pyarrow.array([datetime(2024, 3, 1, tzinfo=UTC) + timedelta(seconds=n) for n in range(3)]),
            "url": ["/a", "/b", "/c"],
            "other": [[1], [2], [3]],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "e.parquet")
    events, bad, count = read(tmp_path / "e.parquet", LogFormat(format="parquet", columns=COLUMNS))
    start = 1_709_251_200_000
    assert events == [Event("1", start, "/a", "e.parquet:1"), Event("3", start + 2_000, "/c", "e.parquet:3")]
    assert [(b.number, b.reason) for b in bad] == [(2, "has no user (who)")]
    assert count.bytes_read == count.bytes_total


def test_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no Parquet file"):
        read(written(tmp_path, "e.parquet", "PAR1 no"), LogFormat(format="parquet"))


def test_format_is_told_without_a_profile(tmp_path: Path) -> None:
    event = '{"user_id": "u", "ts": 5, "page": "p"}'
    (tmp_path / "gz").mkdir()
    paths = [
        written(tmp_path, "a.txt", event),
        written(tmp_path, "a.log", COMMON),
        written(tmp_path, "a.csv", "user_id,ts,page\nu,1970-01-01T00:00:01Z,p\n"),
        written(tmp_path, "a.jsonl.gz", gzip.compress(event.encode())),
    ]
    assert [[e.page for e in read_log(path) if isinstance(e, Event)] for path in paths] == [["p"], ["/a"], ["p"], ["p"]]


# ---------------------------------------------------------------- times and order


@pytest.mark.parametrize(
    ("form", "value", "ms"),
    [
        ("iso", "2019-10-01 00:00:00 UTC", 1_569_888_000_000),
        ("iso", "2019-10-01T02:00:00.1234+02:00", 1_569_888_000_123),
        ("iso", "2019-10-01", 1_569_888_000_000),
        ("iso", 1_569_888_000_000, 1_569_888_000_000),
        ("ms", "1569888000000", 1_569_888_000_000),
        ("ms", 1_569_888_000_000.0, 1_569_888_000_000),
        ("s", "1569888000.5", 1_569_888_000_500),
        ("us", 1_569_888_000_000_999, 1_569_888_000_000),
        ("%d.%m.%Y %H:%M", "01.10.2019 00:00", 1_569_888_000_000),
        ("ms", datetime(2019, 10, 1, tzinfo=UTC), 1_569_888_000_000),
    ],
)
def test_forms_of_times(form: str, value: object, ms: int) -> None:
    assert time_parser(form, UTC)(value) == ms


@pytest.mark.parametrize(
    ("form", "value"),
    [
        ("iso", "yesterday"),
        ("iso", None),
        ("iso", True),
        ("ms", "1e400"),
        ("ms", float("nan")),
        ("s", 1_569_888_000_000),
        ("ms", ""),
        ("%Y", "20 19"),
    ],
)
def test_what_is_no_time(form: str, value: object) -> None:
    with pytest.raises(ValueError, match="time"):
        time_parser(form, UTC)(value)


@given(st.lists(st.integers(0, 5), max_size=40), st.integers(1, 7))
def test_sorting_with_runs_on_disk_is_sorting(times: list[int], run: int) -> None:
    events = [Event("u", ts, str(place)) for place, ts in enumerate(times)]
    assert list(in_time_order(iter(events), run)) == sorted(events, key=lambda event: event.ts)


# ---------------------------------------------------------------- real logs


@pytest.mark.parametrize(
    ("name", "events", "bad", "skipped", "users", "outcomes"),
    [
        ("apache", 2_174, [8_899], 7_825, 1_033, {"view"}),
        ("eshop", 17_262, [], 1_984, 992, {"view", "cart", "purchase"}),
        ("kechinov", 17_434, [17_436], 0, 4_504, {"view", "cart", "purchase"}),
        ("nasa", 4_135, [], 5_864, 908, {"view"}),
    ],
)
def test_ready_profile_reads_its_log(
    name: str, events: int, bad: list[int], skipped: int, users: int, outcomes: set[str]
) -> None:
    profile, count = SiteProfile.load(name), LogCount()
    records = list(read_log(real_log(name), profile, count))
    found = [record for record in records if isinstance(record, Event)]
    assert (len(found), count.skipped, len({event.user_id for event in found})) == (events, skipped, users)
    assert [record.number for record in records if isinstance(record, BadLine)] == bad
    assert {event.type for event in found} == outcomes
    pages = {event.page for event in found}
    assert {profile.page(page) for page in pages} == pages
    if profile.log.sort:
        assert [event.ts for event in found] == sorted(event.ts for event in found)


def test_globo_reads_in_a_stream() -> None:
    log = read_log(real_log("globo"), SiteProfile.load("globo"))
    first = next(log)
    assert first == Event(
        "59", 1_506_826_800_026, "article/234853", "globo_clicks.parquet:1", item_id="234853", device="3"
    )


def test_nasa_excerpt_is_the_log_unchanged() -> None:
    with nasa_excerpt() as path:
        assert path.stat().st_size <= 300_000
        excerpt = gzip.decompress(path.read_bytes())
        assert sum(isinstance(event, Event) for event in read_log(path, SiteProfile.load("nasa"))) == 4_135
    assert real_log("nasa").read_bytes().find(excerpt) >= 0
