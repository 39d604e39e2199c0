"""Recipes: what they may say, and how they divide the sessions of a log."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer.corpus import read_corpus, training_parts
from trainer.errors import TrainingError
from trainer.recipes import Recipe, SessionRules, divide, read_recipe

READY = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_every_ready_recipe_is_whole(path: Path) -> None:
    recipe = read_recipe(path)
    assert isinstance(recipe, Recipe)
    assert f"--recipe recipes/{path.name}" in path.read_text(), "it says how it is used"
    needs_log = "--log" in path.read_text()
    assert (recipe.sessions.profile is not None) == needs_log


def test_the_papers_recipes_have_the_papers_tables() -> None:
    options = read_recipe(READY[0].with_name("google-analytics.toml")).options
    assert (options.lr, options.weight_decay, options.batch, options.accumulate) == (1e-5, 0.01, 32, 4)
    assert (options.epochs, options.validation_share, options.context_tokens) == (100, 0.05, 512)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[train]\nepoch = 3", "[train]: there is no 'epoch'. Did you mean epochs?"),
        ("[train]\nepochs = 'many'", "Expected `int`"),
        ("[train]\nmode = 'magic'", "Invalid enum value 'magic'"),
        ("[train]\nepochs = 0", "[train]: epochs is 0, but must be at least 1."),
        ("[paper]\nalhpa = 1", "[paper]: there is no 'alhpa'"),
        ("[sessions]\nlongest = 0.0", "[sessions]: longest is 0.0"),
        ("[model]\nlayers = 2", "there is no table [model]"),
        ("[train\n", "cannot be read"),
        ("[train]\nmode = 'paper'\nbackend = 'lora'", "backend 'lora' has no place in it"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(TrainingError) as caught:
        read_recipe(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_changes_go_before_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("[train]\nepochs = 3\nseed = 4\npretrained = 'weights'\n[sessions]\nprofile = 'shop.toml'\n")
    recipe = read_recipe(path, epochs=5)
    assert (recipe.options.epochs, recipe.options.seed) == (5, 4)
    assert recipe.options.pretrained == Path("weights")
    assert recipe.sessions.profile == str(tmp_path / "shop.toml")


def test_the_command_line_gives_paths(tmp_path: Path) -> None:
    assert read_recipe(None, pretrained=tmp_path, encoder=tmp_path).options.pretrained == tmp_path
    assert read_recipe(READY[0], pretrained=tmp_path).options.pretrained == tmp_path


def test_sessions_are_kept_and_divided_by_the_rules(tmp_path: Path) -> None:
    rows = [(f"u{user}", n, ["a", "b", "c"][: 1 + (user + n) % 3]) for user in range(60) for n in range(1, 4)]
    rows += [("long", 1, ["x"] * 90), ("long", 2, ["x"] * 3), ("once", 1, ["a", "b"])]
    write(tmp_path / "cut", rows)
    told = divide(tmp_path / "cut", tmp_path, SessionRules(min_pages=2, longest=0.99, users=50, test_share=0.2))
    assert told == {"train": 40, "test": 10}
    assert training_parts(tmp_path) == (tmp_path / "train", None)
    train, test = read_corpus(tmp_path / "train"), read_corpus(tmp_path / "test")
    assert (len(train.users), len(test.users)) == (40, 10)
    assert not set(train.users) & set(test.users)
    assert not {"long", "once"} & {*train.users, *test.users}
    assert min(len(train.page_ids(s)) for s in range(len(train.session_ids))) == 2
    again = divide(
        tmp_path / "cut", tmp_path / "again", SessionRules(min_pages=2, longest=0.99, users=50, test_share=0.2)
    )
    assert again == told
    assert read_corpus(tmp_path / "again" / "test").users == test.users


def test_rules_that_leave_nobody_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "cut", [("u", 1, ["a"]), ("v", 1, ["a"])])
    with pytest.raises(TrainingError, match="0 users have 2 sessions of 5 to"):
        divide(tmp_path / "cut", tmp_path, SessionRules(min_pages=5))


def write(directory: Path, rows: list[tuple[str, int, list[str]]]) -> None:
    directory.mkdir()
    columns = {
        "user_id": [user for user, _, _ in rows],
        "session_id": [f"{user}-{number}" for user, number, _ in rows],
        "number": [number for _, number, _ in rows],
        "start_ms": [number * 1_000 for _, number, _ in rows],
        "end_ms": [number * 1_000 + 1 for _, number, _ in rows],
        "pages": [pages for _, _, pages in rows],
        "cart": [False] * len(rows),
        "purchase": [False] * len(rows),
    }
    pq.write_table(pa.table(columns), directory / "sessions.parquet")
