"""A shop is rebuilt while everything runs: what its visitors' predictions are worth with and without a trainer.

`python -m benchmarks.changing` trains a bundle on the past of the made-up shop, starts two deployments with it on one
broker, a trainer beside one of them, and plays the same visitors to both. Half-way the shop gives its pages other
names, and every visitor takes to other habits. Nobody touches anything after the start. It draws docs/changing.svg.
"""

import dataclasses
import heapq
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.broker import broker, deployment, parser
from benchmarks.changing_picture import Moment, draw
from benchmarks.load import scratch
from streams import replay
from streams.aliases import Aliases
from streams.settings import DAY_MS, HOUR_MS, Settings
from streams.shop import shop_events
from streams.wire import CHALLENGER, CHAMPION, Event
from tests.changing import Deployment, Live, by_day, mean_iou, refreshing
from tests.play import metric
from tests.swapping import digest
from tests.traffic import Sent
from tests.workers import Fleet, Trainer, Worker
from trainer.decisions import by_hand, publish
from trainer.drift import LIMITS
from trainer.fit import train
from trainer.options import TrainOptions
from trainer.registry import Registry

START_MS = 1_760_000_400_000
PAST_DAYS, CALM_DAYS, MOST_DAYS = 14, 4, 90
SPREAD_DAYS = 30  # visitors come for the first time within 0.3 of their log; of this much nothing is played
CHANGE_MS = START_MS + (PAST_DAYS + CALM_DAYS) * DAY_MS
AFTER_DAYS = 6  # with the new model, at the end
SPAN_MS = 12 * HOUR_MS  # of a point in the picture
REBUILT = {
    "home": "for you", "search": "assistant", "sale": "outlet", "new arrivals": "stories", "reviews": "videos",
    "wish list": "saved", "account": "me", "orders": "parcels", "checkout": "express pay",
}  # fmt: skip
TRAINING: dict[str, Any] = {
    "hidden_size": 48, "layers": 2, "heads": 4, "epochs": 20, "fine_tune_epochs": 0, "batch": 32, "min_page_count": 2,
    "device": "cpu",
}  # fmt: skip
PATIENCE_S = 3_600.0
MOST_LAG = 200  # records that a worker may be behind before the log goes slower


def visits(visitors: int) -> Iterator[Event]:
    """Clicks from START_MS on; from CHANGE_MS on other habits and other names, of the same visitors."""
    early_ms = SPREAD_DAYS * DAY_MS
    before = shop_events(visitors, SPREAD_DAYS + PAST_DAYS + CALM_DAYS, 1, START_MS - early_ms)
    after = shop_events(visitors, SPREAD_DAYS + MOST_DAYS, 2, CHANGE_MS - early_ms)
    yield from (event for event in before if event.ts >= START_MS)
    for event in after:
        if event.ts >= CHANGE_MS:
            user = event.user_id.replace("visitor-2-", "visitor-1-")
            yield msgspec.structs.replace(event, user_id=user, page=REBUILT.get(event.page, event.page))


def sent(event: Event) -> Sent:
    """As `replay` writes it: the record has the event's own time."""
    return Sent(event.user_id.encode(), msgspec.json.encode(event), event.ts)


@dataclasses.dataclass
class Watch:
    """Sees the moments as they come, in the log's time."""

    settings: Settings
    worker: Worker
    trainer: Trainer
    moments: list[Moment] = dataclasses.field(default_factory=list)
    named: tuple[str | None, str | None] = (None, None)

    def look(self, now_ms: int) -> None:
        aliases = Aliases(self.settings).story().aliases
        named = tuple(aliases[name].digest if name in aliases else None for name in (CHAMPION, CHALLENGER))
        champion, challenger = named
        if self.named[0] not in (None, champion):
            self.moments.append(Moment("promotion", now_ms))
        elif challenger not in (None, self.named[1]):
            self.moments.append(Moment("publication", now_ms))
        self.named = (champion, challenger)
        if now_ms > CHANGE_MS and not self.at("drift") and self._drifts():
            self.moments.append(Moment("drift", now_ms))

    def at(self, what: str) -> list[int]:
        return [moment.at_ms for moment in self.moments if moment.what == what and moment.at_ms > CHANGE_MS]

    def _drifts(self) -> bool:
        return any(metric(self.trainer, "browsecast_drift", kind=kind) > limit for kind, limit in LIMITS.items())


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--visitors", type=int, default=900)
    arguments.add_argument("--picture", type=Path, default=Path("docs/changing.svg"))
    arguments.add_argument("--day-seconds", type=float, default=4.0, help="how long a day of the log takes")
    given = arguments.parse_args()
    with broker(given.bootstrap_servers) as servers, scratch() as place:
        result = run(servers, Path(place), given.visitors, DAY_MS / given.day_seconds, given.picture)
    print(json.dumps(result))


def run(servers: str, directory: Path, visitors: int, speed: float, picture: Path) -> dict[str, Any]:
    clicks = visits(visitors)
    past: list[Event] = []
    first = next(event for event in clicks if not _add(past, event, START_MS + PAST_DAYS * DAY_MS))
    bundle = _train(past, directory)
    options: dict[str, Any] = {
        "partitions": 4, "bundle": bundle, "flush_ms": 100, "shadow_share": 1.0, "shadow_wait_ms": 5_000,
        "registry": str(directory / "registry"), "archive_flush_ms": 1_000, "refresh_sessions": 900,
        "window_days": 6, "refresh_margin": 0.1, "model_threads": 1,
    }  # fmt: skip
    still, followed = (deployment(servers, directory / name, **options) for name in ("still", "followed"))
    alone, worker = Worker(still, directory / "still"), Worker(followed, directory / "followed")
    trainer = Trainer(followed, directory / "trainer")
    publish(Registry(followed.registry), Aliases(followed), bundle, by_hand("trained on the past"))
    watch = Watch(followed, worker, trainer)
    with Fleet([alone]) as one, Fleet([worker, trainer]) as other:
        one.start()
        other.start()
        for process in (alone, worker, trainer):
            process.wait_ready()
        stream = heapq.merge([sent(first)], (sent(event) for event in clicks), key=lambda record: record.timestamp_ms)
        sides = [Deployment(still, one), Deployment(followed, other)]

        def is_behind() -> bool:
            lags = (metric(process, "browsecast_lag_records") for process in (alone, worker))
            return refreshing(trainer.settings.trainer_dir) or max(lags) > MOST_LAG

        live = Live(sides, stream, speed, is_behind)

        def is_over() -> bool:
            watch.look(live.now_ms)
            learned = watch.at("publication")  # after the change
            promoted = [at_ms for at_ms in watch.at("promotion") if learned and at_ms > learned[0]]
            return bool(promoted) and live.now_ms > promoted[0] + AFTER_DAYS * DAY_MS

        live.play(is_over, PATIENCE_S)
        refresh_s = metric(trainer, "browsecast_refresh_seconds")
        swap_s = metric(worker, "browsecast_model_swap_seconds_sum") / metric(worker, "browsecast_model_swaps_total")
        outcomes = live.finish()
    faults = [fault for outcome in outcomes for fault in outcome.faults]
    assert not faults, faults[:5]
    watch.moments += swaps(outcomes[1].ledger.predictions, digest(bundle))
    scores = {name: outcome.ledger.scores for name, outcome in zip(("without", "with"), outcomes, strict=True)}
    begin_ms = START_MS + PAST_DAYS * DAY_MS + DAY_MS
    lines = {name: by_day(of, begin_ms, live.now_ms, SPAN_MS) for name, of in scores.items()}
    picture.parent.mkdir(exist_ok=True)
    picture.write_text(draw(lines, CHANGE_MS, [moment for moment in watch.moments if moment.at_ms > CHANGE_MS]))
    return _figures(scores, watch, live.now_ms) | {
        "refresh_s": round(refresh_s, 1), "swap_s": round(swap_s, 1), "visitors": visitors,
        "sessions": len(outcomes[1].ledger.sessions), "faults": len(faults),
    }  # fmt: skip


def swaps(predictions: list[dict[str, Any]], first: str) -> list[Moment]:
    """When each model but the first made its first prediction."""
    began: dict[str, int] = {}
    for one in predictions:
        began[one["model_digest"]] = min(one["session_end_ms"], began.get(one["model_digest"], one["session_end_ms"]))
    return [Moment("swap", at_ms) for model, at_ms in began.items() if model != first]


def _add(past: list[Event], event: Event, until_ms: int) -> bool:
    if event.ts < until_ms:
        past.append(event)
    return event.ts < until_ms


def _train(past: list[Event], directory: Path) -> Path:
    began = time.monotonic()
    replay.cut(past, Settings(), directory / "past")
    bundle = train(directory / "past", directory / "bundle", TrainOptions(**TRAINING))
    print(f"trained on {len(past):,} clicks of the past in {time.monotonic() - began:.0f} s")
    return bundle


def _figures(scores: dict[str, list[dict[str, Any]]], watch: Watch, end_ms: int) -> dict[str, Any]:
    """Mean IoU before the change, in its first day, and at the end; days from the change to each moment."""
    spans = {
        "before": (CHANGE_MS - 3 * DAY_MS, CHANGE_MS),
        "first_day": (CHANGE_MS, CHANGE_MS + DAY_MS),
        "at_the_end": (end_ms - 3 * DAY_MS, end_ms),
    }
    found: dict[str, Any] = {}
    for side, of in scores.items():
        found |= {f"iou_{name}_{side}": round(mean_iou(of, *span), 4) for name, span in spans.items()}
    for what in ("drift", "publication", "promotion", "swap"):
        found[f"{what}_after_days"] = [round((at_ms - CHANGE_MS) / DAY_MS, 2) for at_ms in watch.at(what)]
    for name, value in found.items():
        print(f"{name:28} {value}")
    return found


if __name__ == "__main__":
    main()
