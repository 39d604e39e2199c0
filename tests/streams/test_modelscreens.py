"""`models show` tells who decided what, why, and on what figures, in lines that a person can read."""

import io
from typing import Any

from rich.console import Console

from streams.aliases import Story
from streams.modelscreens import story_screen
from streams.wire import ModelAlias, ModelDecision

A, B = (f"sha256:{letter * 64}" for letter in "ab")


def decision(kind: str, digest: str, reason: str, evidence: dict[str, Any], **moves: str | None) -> ModelDecision:
    return ModelDecision(
        f"{kind}-{digest[7]}", 1_000, kind, f"v-{digest[7]}", digest, "file:///b", reason, "judge", evidence, moves
    )


def shown(*decisions: ModelDecision, **aliases: ModelAlias) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(story_screen(Story(aliases, list(decisions))))
    return out.getvalue()


def test_nothing_published_says_how_to_begin() -> None:
    assert "browsecast models publish BUNDLE" in shown()


def test_a_refresh_is_told_with_its_reasons_and_the_figures_of_all() -> None:
    figure = {"mean": 0.38284, "low": 0.359, "high": 0.4079}
    comparison = {
        "accepted": True, "reasons": ["iou is better"], "users": 269, "margin": 0.05,
        "figures": {"bundle": {"iou": figure, "nll_per_token": None}, "popularity": {"iou": figure}},
        "differences": {"popularity": {"iou": figure}},
    }  # fmt: skip
    evidence = {"window_ms": [0, 86_400_000], "champion": A, "start": None, "comparison": comparison}
    told = shown(decision("published", B, "iou is better; cart is better", evidence, challenger=B)).splitlines()
    lines = [line.strip() for line in told if line.strip()]
    assert lines[2:] == [
        "1970-01-01 00:00:01 UTC  published v-b by judge, now challenger",
        "iou is better",
        "cart is better",
        "bundle: iou 0.383 [0.359, 0.408]",
        "popularity: iou 0.383 [0.359, 0.408]",
        f"window 1970-01-01 00:00:00 to 1970-01-02 00:00:00  champion {A}  visitors 269",
    ]


def test_a_rollback_is_told_with_the_champion_that_came_back() -> None:
    evidence = {"sessions": 300, "iou": 0.25, "baselines": {"last_session": {"iou": 0.5}}, "left_out": {}}
    told = shown(
        decision("published", A, "first", {}, champion=A),
        decision("rolled_back", B, "below", evidence, champion=A, challenger=None),
        champion=ModelAlias("champion", "v-a", A, "file:///b"),
    )
    assert "rolled back v-b by judge, now champion: v-a, challenger: none" in told
    assert "baselines last session: iou 0.5" in told and "sessions 300  iou 0.25" in told and "left out" not in told
