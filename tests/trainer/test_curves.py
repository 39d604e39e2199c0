"""The step log as a picture."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from trainer.curves import draw, smoothed


def log(path: Path) -> Path:
    """Two phases of two epochs, and a phase that had ended before its first step."""
    lines: list[dict[str, Any]] = []
    for phase in ("pretrain", "cluster-0"):
        for step in range(20):
            lines.append({"phase": phase, "epoch": step // 10, "step": step, "loss": 3.0 - step / 20, "lr": 1e-3})
            if step % 10 == 9:
                lines.append({"phase": phase, "epoch": step // 10, "step": step + 1, "validation_loss": 2.5})
    lines.append({"phase": "cluster-1", "epoch": 0, "step": 0, "validation_loss": 2.5})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_png_is_drawn(tmp_path: Path) -> None:
    draw(log(tmp_path / "steps.jsonl"), tmp_path / "curves.png")
    pixels = imread(tmp_path / "curves.png")
    assert pixels.shape[:2] == (825, 1350)
    colours = {tuple(np.round(255 * pixel[:3]).astype(int)) for pixel in pixels.reshape(-1, pixels.shape[2])}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # one a phase


def test_an_svg_is_drawn_the_same_twice(tmp_path: Path) -> None:
    steps = log(tmp_path / "steps.jsonl")
    for name in ("one.svg", "two.svg"):
        draw(steps, tmp_path / name)
    text = (tmp_path / "one.svg").read_text()
    assert ET.fromstring(text).tag.endswith("svg")
    assert ">pretrain<" in text and ">cluster-0<" in text and "cluster-1" not in text
    assert text == (tmp_path / "two.svg").read_text()


def test_a_log_without_a_step_gives_no_picture(tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").touch()
    draw(tmp_path / "steps.jsonl", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_smoothing_is_a_weighted_mean_of_the_past() -> None:
    values = [4.0, 1.0, 3.0, 8.0]
    for i, found in enumerate(smoothed(values, 0.5), 1):
        weights = [0.5 ** (i - j) for j in range(1, i + 1)]
        assert found == pytest.approx(np.average(values[:i], weights=weights))
    assert smoothed([2.0] * 5) == pytest.approx([2.0] * 5)
