"""The whole demo, small: training, the in-process broker, a worker of its own, and the contest."""

import re
from pathlib import Path
from typing import Any

import pytest

from streams import demo
from streams.errors import UsageError
from streams.settings import Settings
from trainer.fit import train
from trainer.options import TrainOptions

TINY: dict[str, Any] = {
    "hidden_size": 8,
    "heads": 2,
    "layers": 1,
    "clusters": 2,
    "epochs": 1,
    "fine_tune_epochs": 0,
    "rollouts": 4,
}


def train_tiny(sessions: Path, bundle: Path, progress: Any) -> None:
    train(sessions, bundle, TrainOptions(**TINY), progress)


def test_it_refuses_a_directory_that_holds_other_files(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="--directory"):
        demo.run(Settings(), demo.Options(tmp_path, 20, own_broker=True), train_tiny)
    assert (tmp_path / "mine.txt").read_text() == "precious"


@pytest.mark.slow
def test_it_runs_to_its_end_and_says_what_to_type_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.run(Settings(), demo.Options(tmp_path / "demo", 20, own_broker=True), train_tiny)
    output = capsys.readouterr().out
    (scored,) = re.findall(r"sessions, ([\d,]+) predictions scored", " ".join(output.split()))
    assert int(scored.replace(",", "")) > 50
    assert output.count("the last session again") == 2
    for words in ("replay access.log", "train --sessions", "topics create", "worker --bundle", "watch"):
        assert words in output
    assert '"worker left"' in (tmp_path / "demo" / "worker.log").read_text()
