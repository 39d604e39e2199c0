"""The whole demo, small: training, the in-process broker, a worker and a trainer of its own, the swap, the contest."""

import re
from pathlib import Path
from typing import Any

import pytest

from streams import demo, demologs
from streams.aliases import Aliases
from streams.errors import UsageError
from streams.settings import Settings
from trainer import decisions
from trainer.fit import train
from trainer.options import TrainOptions
from trainer.registry import Registry
from trainer.retrieval_options import XPertOptions

TINY: dict[str, Any] = {
    "hidden_size": 16, "heads": 2, "layers": 1, "clusters": 2, "epochs": 4, "fine_tune_epochs": 0, "batch": 16,
    "rollouts": 12, "max_pages": 8, "seed": 1,
}  # fmt: skip


def train_tiny(sessions: Path, bundle: Path, progress: Any) -> None:
    train(sessions, bundle, TrainOptions(**TINY), progress)


def publish(settings: Settings, bundle: Path) -> None:
    decisions.publish(Registry(settings.registry), Aliases(settings), bundle, decisions.by_hand("trained on the past"))


def train_as_the_demo_does(sessions: Path, bundle: Path, progress: Any) -> None:
    train(sessions, bundle, TrainOptions(**demo.TRAINING, retrieval=XPertOptions(**demo.RETRIEVAL)), progress)


MODELS = demo.Models(train_tiny, publish)


def test_it_refuses_a_directory_that_holds_other_files(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="--directory"):
        demo.run(Settings(), demo.Options(tmp_path, 20, own_broker=True), MODELS)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_the_shop_moves_its_catalogue_and_its_checkout_and_nothing_else() -> None:
    (shop,) = (log for log in demologs.logs(20) if log.name == demologs.SHOP)
    moment = demologs.at_day(demologs.MOVED)
    before = {event.page for event in (*shop.past, *shop.rest) if event.ts < moment}
    after = {event.page for event in shop.rest if event.ts >= moment}
    assert not any(page.startswith("shop/") for page in before)
    assert {page for page in after if not page.startswith("shop/")} <= before
    assert {"shop/cart", "shop/checkout", "shop/purchase/complete"} <= after
    assert not {"cart", "books", "books 1"} & after
    assert all(event.ts < demologs.at_day(demologs.PAST) for event in shop.past)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_too_few_visitors_for_a_refresh_is_said_and_all_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.run(Settings(), demo.Options(tmp_path / "demo", 20, own_broker=True), MODELS)
    output = " ".join(capsys.readouterr().out.split())
    assert "could make no candidate" in output
    assert "another champion serves" not in output
    (scored,) = re.findall(r"sessions, ([\d,]+) predictions scored", output)
    assert int(scored.replace(",", "")) > 50


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_another_champion_serves_before_it_ends_and_it_says_what_to_type_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = demo.Models(train_as_the_demo_does, publish)
    demo.run(Settings(), demo.Options(tmp_path / "demo", 300, own_broker=True), models)
    said = capsys.readouterr().out
    print(said)  # so that a failure shows it
    output = " ".join(said.split())
    (scored,) = re.findall(r"sessions, ([\d,]+) predictions scored", output)
    assert int(scored.replace(",", "")) > 500
    assert output.count("the last session again") == 2
    swap = (
        r"another champion serves: (\S+) predicts since the session that ended .*?; IoU \S+ -> \S+ on the ([\d,]+) sess"
    )
    ((version, compared),) = re.findall(swap, output)
    assert int(compared.replace(",", "")) > 30
    assert output.index(f"published {version} as challenger") < output.index(f"promoted {version} as champion")
    for words in ("replay access.log", "train --sessions", "topics create", "models publish", "worker --", "watch"):
        assert words in output
    assert '"another champion serves"' in (tmp_path / "demo" / "worker.log").read_text()
    assert '"worker left"' in (tmp_path / "demo" / "worker.log").read_text()
    assert '"trainer left"' in (tmp_path / "demo" / "trainer.log").read_text()
