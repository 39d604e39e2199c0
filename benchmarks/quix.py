"""Quix Streams doing the sessionizing job, with its state or its session window. Started by benchmarks/sessionize.py.

It runs in a virtual environment of its own (benchmarks/requirements.lock) and knows nothing of this project. The state
form closes a session when the user's next event comes, with the same size of state as ours; the window form is its
documented session window with a collection of pages.
"""

import os
from typing import Any

from quixstreams import Application
from quixstreams.dataframe.windows import Collect, Count

GAP_MS, GRACE_MS = int(os.environ["GAP_MS"]), int(os.environ["GRACE_MS"])
PAST = [f"/product/{number:05d}" for number in range(int(os.environ["PAST_PAGES"]))]

app = Application(
    broker_address=os.environ["BOOTSTRAP_SERVERS"],
    consumer_group=os.environ["GROUP"],
    auto_offset_reset="earliest",
    state_dir=os.environ["STATE_DIR"],
    commit_interval=1.0,
    processing_guarantee=os.environ.get("GUARANTEE", "at-least-once"),
    loglevel="WARNING",
)


def event_time(value: Any, headers: Any, timestamp: float, kind: Any) -> int:
    """The event's own time."""
    return int(value["ts"])


def sessionize(event: Any, state: Any) -> Any:
    """One event, one read and one write of the user's state; the closed session, if there is one."""
    user = state.get("user") or {"past": PAST, "open": []}
    visit, closed = user["open"], None
    if visit and event["ts"] - visit[-1][0] > GAP_MS:
        pages = [page for _, page in visit]
        closed = {"user_id": event["user_id"], "start_ms": visit[0][0], "end_ms": visit[-1][0], "pages": pages}
        user["past"] = (user["past"] + pages)[-len(PAST) :]
        visit = user["open"] = []
    visit.append((event["ts"], event["page"]))
    state.set("user", user)
    return closed


def main() -> None:
    """Run until killed."""
    clicks = app.topic(
        os.environ["CLICKS"], value_deserializer="json", key_deserializer="bytes", timestamp_extractor=event_time
    )
    sessions = app.topic(os.environ["SESSIONS"], value_serializer="json", key_serializer="bytes")
    frame = app.dataframe(clicks)
    if os.environ["FORM"] == "state":
        frame = frame.apply(sessionize, stateful=True).filter(lambda closed: closed is not None)
    else:
        window = frame.session_window(GAP_MS, grace_ms=GRACE_MS).agg(count=Count(), pages=Collect("page"))
        frame = window.final(closing_strategy="partition")
    frame.to_topic(sessions)
    app.run()


if __name__ == "__main__":
    main()
