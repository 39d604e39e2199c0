"""Recipes of retrieval: what they say, and what is wrong with one is named before anything is fitted."""

from pathlib import Path

import pytest

from trainer.errors import TrainingError
from trainer.protocols import LastItems, LaterDays
from trainer.retrieval_recipes import CONTENDERS, ItemsRecipe, read_items_recipe

RECIPES = Path(__file__).parents[2] / "recipes" / "items"
SEQUENCES, CLICKS = '[log]\nformat = "sequences"\n', '[log]\nformat = "clicks"\n'


def read(directory: Path, text: str) -> ItemsRecipe:
    (directory / "recipe.toml").write_text(text)
    return read_items_recipe(directory / "recipe.toml")


def test_the_recipes_that_come_with_browsecast_can_be_read() -> None:
    found = {path.stem: read_items_recipe(path) for path in RECIPES.glob("*.toml")}
    assert {"beauty", "globo", "amazon-reviews", "sessions"} <= set(found)
    assert found["amazon-reviews"].paper.feedforward == 1_024 and found["beauty"].paper.feedforward == 512
    assert isinstance(found["globo"].protocol, LaterDays) and isinstance(found["beauty"].protocol, LastItems)
    for one in found.values():
        assert {name for name in CONTENDERS if name.startswith("XPert as published")} <= set(one.baselines)
        assert one.paper.policy == "channels"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            SEQUENCES + "[baselines]\nnames = ['EAZE']",
            r"\[baselines\]: there is no baseline 'EAZE'. There are popularity",
        ),
        (SEQUENCES + "[train]\ngamma = 1.5", "gamma is 1.5"),
        (SEQUENCES + "[train]\nclusters = 0", "clusters is 0, but must be at least 1"),
        (SEQUENCES + "[train]\nclusters = -1", "clusters is -1"),
        (SEQUENCES + "[train]\nlr = 0.0", r"\[train\]: lr is 0.0, but must lie above 0"),
        (CLICKS + "[train]\nspace_ms = 0", "space_ms is 0, but must be at least 1"),
        (SEQUENCES + "[train]\nspace_ms = 1000", "space_ms is a window of time, but .last_items. goes by the order"),
        (SEQUENCES + "[train]\npopularity_ms = 1000", "popularity_ms is a window of time"),
        (SEQUENCES + "[paper]\nheads = 0", r"\[paper\]: heads is 0, but must be at least 1"),
        (SEQUENCES + "[paper]\nfeedforward = 0", "feedforward is 0"),
        (SEQUENCES + "[last_items]\nvalidation = 0", "validation is 0, but must be at least 1"),
        (SEQUENCES + "[last_items]\ntest = 0", "test is 0"),
        (CLICKS + "[later_days]\nsnapshot_hours = 0", "snapshot_hours is 0"),
        (CLICKS + "[later_days]\ntrain_days = [2, 4]\nvalidation_days = [1, 2]", r"\[later_days\]: validation_days is"),
        (CLICKS + "attributes = 'a.json'", r"\[log\]: attributes are read for sequences, not for a log of clicks"),
        (SEQUENCES + "[later_days]", r"divided by \[last_items\], not by \[later_days\]"),
        (
            '[log]\nformat = "sessions"\n[later_days]\n[last_items]',
            r"\[later_days\] and \[last_items\] cannot both divide",
        ),
        (SEQUENCES + "[days]", r"there is no table \[days\]"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(TrainingError, match=says):
        read(tmp_path, text)
