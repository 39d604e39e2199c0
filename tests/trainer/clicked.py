"""Made-up clicks on items: visitors who stay with the items of one kind, with times and without."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from models.items import unit
from trainer.interactions import Cases, Interactions, Snapshot, Task
from trainer.items import Space
from trainer.protocols import DAY_MS, HOUR_MS, Histories, LastItems, LaterDays

ITEMS = [f"i{place}" for place in range(40)]
KINDS = 4


def histories(users: int = 120, seed: int = 0, labels: int = 2) -> Histories:
    """Items of one kind mostly; an item leads to the next of its kind."""
    rng = np.random.default_rng(seed)
    rows = []
    for _user in range(users):
        row = [int(rng.integers(len(ITEMS)))]
        for _ in range(int(rng.integers(4, 14))):
            step = KINDS if rng.random() < 0.7 else int(rng.integers(1, len(ITEMS)))
            row.append((row[-1] + step) % len(ITEMS))
        rows.append([ITEMS[item] for item in row])
    return Histories(
        [f"u{user}" for user in range(users)], [row[:-labels] for row in rows], [row[-labels:] for row in rows]
    )


def by_place(users: int = 120, seed: int = 0) -> Task:
    """Each visitor's last two items are the labels."""
    return LastItems(validation=30, test=60).task("made-up", histories(users, seed), None, ITEMS)


def clicks(users: int = 150, days: int = 6, seed: int = 0) -> Interactions:
    """A log with times: sessions of a few clicks, a minute apart."""
    rng = np.random.default_rng(seed)
    item, ts, session, sizes = [], [], [], []
    for _ in range(users):
        rows = []
        for number, start in enumerate(np.sort(rng.integers(0, days * DAY_MS, int(rng.integers(1, 6)))).tolist()):
            clicked = int(rng.integers(len(ITEMS)))
            for place in range(int(rng.integers(1, 5))):
                rows.append((start + place * 60_000, (clicked + place * KINDS) % len(ITEMS), number))
        rows.sort()
        sizes.append(len(rows))
        ts += [row[0] for row in rows]
        item += [row[1] for row in rows]
        session += [row[2] for row in rows]
    return Interactions(
        users=[f"u{user}" for user in range(users)],
        items=ITEMS,
        first=np.concatenate([[0], np.cumsum(sizes)]),
        item=np.array(item, dtype=np.int32),
        ts=np.array(ts, dtype=np.int64) + 1_500_000_000_000,
        session=np.array(session, dtype=np.int32),
    )


def sessions(log: Interactions, directory: Path) -> Path:
    """The log as session files, some of whose events have no item."""
    rows = []
    for user, name in enumerate(log.users):
        events = range(int(log.first[user]), int(log.first[user + 1]))
        for number in sorted({int(log.session[event]) for event in events}):
            inside = [event for event in events if log.session[event] == number]
            times = [int(log.ts[event]) for event in inside]
            rows.append({
                "user_id": name, "session_id": f"{name}-{number}", "number": number + 1, "start_ms": times[0] - 5,
                "end_ms": times[-1], "pages": ["home", *["item"] * len(inside)], "page_ts_ms": [times[0] - 5, *times],
                "cart": False, "purchase": False, "items": [None, *(log.items[log.item[event]] for event in inside)],
            })  # fmt: skip
    directory.mkdir(exist_ok=True)
    for place, part in enumerate((rows[: len(rows) // 2], rows[len(rows) // 2 :])):
        pq.write_table(pa.Table.from_pylist(part), directory / f"{place}.parquet")
    return directory


DAYS = LaterDays((2, 4), (4, 5), (5, 6), train=80, validation=40, test=40, index_clicks=8)
SPAN = 24 * HOUR_MS


def by_days(users: int = 150, seed: int = 0) -> Task:
    """The days after those of the training hold the labels."""
    return DAYS.task("made-up news", clicks(users, seed=seed))


def turned(kinds: int, width: int = 16, users: int = 400, items: int = 100) -> tuple[Task, Space]:
    """Visitors of some kinds: what each clicks next lies near its last click, turned by a rotation of its kind.

    The first of a visitor's clicks tells the kind.
    """
    rng = np.random.default_rng(1)
    vectors = unit(rng.normal(size=(items, width)))
    rotations = [np.linalg.qr(rng.normal(size=(width, width)))[0] for _ in range(kinds)]
    kind = rng.integers(kinds, size=users)
    last = rng.integers(kinds, items, size=users)
    near = np.stack([vectors @ (rotations[k] @ vectors[item]) for k, item in zip(kind, last, strict=True)])
    near[np.arange(users), last] = -9
    near[:, :kinds] = -9
    clicked = np.stack([kind, last, near.argmax(axis=1)], axis=1)
    log = Interactions(
        [f"u{user}" for user in range(users)], [f"i{item}" for item in range(items)], 3 * np.arange(users + 1),
        clicked.ravel().astype(np.int32), np.tile([-3, -2, -1], users), np.zeros(3 * users, dtype=np.int32),
    )  # fmt: skip

    def cases(chosen: np.ndarray) -> Cases:
        size = len(chosen)
        return Cases(
            log, chosen, 3 * chosen + 2, np.full(size, -1), np.zeros(size, dtype=int), np.zeros(size, dtype=bool),
            np.arange(size + 1), clicked[chosen, 2].astype(np.int32),
        )  # fmt: skip

    space = Space(np.arange(items, dtype=np.int32), vectors)
    train, validation, test = (cases(part) for part in np.split(np.arange(users), [users // 2, 3 * users // 4]))
    return Task("turned", log, (Snapshot(-1, space.items),), train, validation, test, {}), space
