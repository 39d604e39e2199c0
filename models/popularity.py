"""Clicks on items in a window of event time that moves with the stream, in bounded memory."""

from collections import Counter
from collections.abc import Iterable

BUCKETS = 64  # the window moves by so many steps: what it holds is right to 1/64 of its length


class ClickWindow:
    """Counts by item of the clicks in the last `window_ms` before the newest one.

    A click at `ts` is in the window while `ts // step` is among the last BUCKETS values, the newest's included. A
    bucket holds each item at most once, so memory is bounded by the items that are counted.
    """

    def __init__(self, window_ms: int, since_ms: int | None = None) -> None:
        """Clicks up to `since_ms` are not counted: a table has them already."""
        self.window_ms, self._since_ms = window_ms, since_ms
        self._step_ms = max(1, window_ms // BUCKETS)
        self._buckets: dict[int, Counter[str]] = {}
        self.counts: Counter[str] = Counter()
        self.newest_ms: int | None = None
        self.events = 0  # in the window

    def add(self, clicks: Iterable[tuple[str, int]]) -> set[str]:
        """Count clicks, (item, event time) each, in any order; the items whose counts have changed."""
        changed = set()
        for item_id, ts_ms in clicks:
            if self.newest_ms is None or ts_ms > self.newest_ms:
                self.newest_ms = ts_ms
            if self._since_ms is not None and ts_ms <= self._since_ms:
                continue
            bucket = ts_ms // self._step_ms
            if bucket <= self.newest_ms // self._step_ms - BUCKETS:
                continue
            self._buckets.setdefault(bucket, Counter())[item_id] += 1
            self.counts[item_id] += 1
            self.events += 1
            changed.add(item_id)
        return changed | self._expire()

    def _expire(self) -> set[str]:
        changed: set[str] = set()
        if self.newest_ms is None:
            return changed
        oldest = self.newest_ms // self._step_ms - BUCKETS
        for number in [number for number in self._buckets if number <= oldest]:
            for item_id, clicks in self._buckets.pop(number).items():
                self.counts[item_id] -= clicks
                self.events -= clicks
                if not self.counts[item_id]:
                    del self.counts[item_id]
                changed.add(item_id)
        return changed
