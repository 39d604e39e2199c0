"""Looks from time to time how far today's visitors are from those that the champion was trained on."""

import time
from collections.abc import Callable
from pathlib import Path

import structlog

from models.manifest import BundleRefused
from streams.wire import CHAMPION, ModelAlias
from trainer.archive import DAY_MS, Archive
from trainer.drift import LIMITS, Reference, Window, alarms, figures
from trainer.registry import Aliases
from trainer.trainermetrics import TrainerMetrics

LOOK_S = 60.0
RECENT_MS = DAY_MS  # of the sessions that are looked at, by their ends

log = structlog.get_logger(__name__)


class DriftWatch:
    """Shows the figures of drift as metrics, and says what is beyond its limit."""

    def __init__(
        self,
        archive: Archive,
        aliases: Aliases,
        fetch: Callable[[ModelAlias], Path],
        window: Callable[[], Window | None],
        metrics: TrainerMetrics,
    ) -> None:
        """`fetch` gives the directory of a bundle that an alias names; `window` the champion's last scores."""
        self._archive, self._aliases, self._fetch = archive, aliases, fetch
        self._window, self._metrics = window, metrics
        self._reference: tuple[str, Reference] | None = None  # by the champion's digest
        self._next_look, self._said = 0.0, None  # type: float, str | None

    def look(self) -> str | None:
        """What has drifted, in words, or None; looks anew at most once a minute."""
        if time.monotonic() >= self._next_look:
            self._said = self._look()
            self._next_look = time.monotonic() + LOOK_S
        return self._said

    def _look(self) -> str | None:
        reference = self._champion()
        if reference is None:
            return None
        newest_ms = self._archive.manifest().newest_ms
        sessions = self._archive.read_window(newest_ms - RECENT_MS, newest_ms + 1)
        found = figures(reference, sessions, self._window())
        self._metrics.show_drift(found, LIMITS)
        told = [f"{kind.replace('_', ' ')} drifted by {found[kind]:.2f}" for kind in alarms(found)]
        if told:
            log.warning("drift", **{kind: round(figure, 4) for kind, figure in found.items()})
        return ", ".join(told) or None

    def _champion(self) -> Reference | None:
        """What the champion's bundle tells of its training; None without one that can be read."""
        champion = self._aliases.story().aliases.get(CHAMPION)
        if champion is None:
            return None
        if self._reference is None or self._reference[0] != champion.digest:
            try:
                self._reference = champion.digest, Reference.of(self._fetch(champion))
            except BundleRefused as error:
                log.error("drift is not watched: the champion cannot be read", error=str(error))
                return None
        return self._reference[1]
