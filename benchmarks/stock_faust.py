"""Stock Faust doing the sessionizing job: a table written per event. Started by benchmarks/sessionize.py.

Same events, same size of state; it closes a session when the user's next event comes, which is less than our job: no
watermark, no late events, no duplicates, at least once.
"""

import os
from typing import Any

import faust
import msgspec

GAP_MS = int(os.environ["GAP_MS"])
PAST = [f"/product/{number:05d}" for number in range(int(os.environ["PAST_PAGES"]))]

app = faust.App(
    os.environ["GROUP"],
    broker=f"kafka://{os.environ['BOOTSTRAP_SERVERS']}",
    store="rocksdb://?driver=rocksdict",
    datadir=os.environ["STATE_DIR"],
    topic_partitions=int(os.environ["PARTITIONS"]),
    topic_replication_factor=1,
    topic_disable_leader=True,
    consumer_auto_offset_reset="earliest",
    stream_wait_empty=False,
    broker_commit_interval=1.0,
    key_serializer="raw",
    value_serializer="raw",
    web_enabled=False,
    worker_redirect_stdouts=False,
)
clicks = app.topic(os.environ["CLICKS"], key_type=bytes, value_type=bytes)
sessions = app.topic(os.environ["SESSIONS"], key_type=bytes, value_type=bytes)
users = app.Table("users", partitions=int(os.environ["PARTITIONS"]), key_type=bytes, value_type=bytes)
decode, decode_state = msgspec.json.decode, msgspec.msgpack.decode
encode, encode_state = msgspec.json.encode, msgspec.msgpack.encode


@app.agent(clicks)
async def sessionize(stream: Any) -> None:
    """One event, one read and one write of the user's state."""
    async for key, value in stream.items():
        event: Any = decode(value)
        record = users.get(key)
        state: dict[str, Any] = decode_state(record) if record else {"past": PAST, "open": []}
        visit = state["open"]
        if visit and event["ts"] - visit[-1][0] > GAP_MS:
            pages = [page for _, page in visit]
            closed = {"user_id": event["user_id"], "start_ms": visit[0][0], "end_ms": visit[-1][0], "pages": pages}
            await sessions.send(key=key, value=encode(closed))
            state["past"] = (state["past"] + pages)[-len(PAST) :]
            visit = state["open"] = []
        visit.append((event["ts"], event["page"]))
        users[key] = encode_state(state)


if __name__ == "__main__":
    faust.Worker(app, loglevel="WARN").execute_from_commandline()
