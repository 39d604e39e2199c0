"""Recipes: what they may say, and how they divide the sessions of a log."""

import json
from dataclasses import replace
from math import log
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.bundle import load_bundle
from tests.trainer.conftest import TINY
from trainer.corpus import read_corpus, training_parts
from trainer.errors import TrainingError
from trainer.fit import train
from trainer.paper import PaperOptions
from trainer.recipes import Recipe, SessionRules, divide, read_recipe
from trainer.retrieval_options import XPertOptions

READY = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_every_ready_recipe_is_whole(path: Path) -> None:
    recipe = read_recipe(path)
    assert isinstance(recipe, Recipe)
    assert f"--recipe recipes/{path.name}" in path.read_text(), "it says how it is used"
    needs_log = "--log" in path.read_text()
    assert (recipe.sessions.profile is not None) == needs_log


PAPER = [READY[0].with_name(f"{name}.toml") for name in ("google-analytics", "kechinov")]


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_with_a_pretrained_model_the_papers_recipes_have_the_papers_tables(path: Path) -> None:
    recipe = read_recipe(path, pretrained=Path("opt-350m"))
    options, paper = recipe.options, recipe.options.paper
    assert (options.lr, options.weight_decay, options.batch, options.accumulate) == (1e-5, 0.01, 32, 4)
    assert (options.epochs, options.validation_share, options.context_tokens) == (100, 0.05, 512)
    assert (options.patience, options.max_pages) == (100, 64)
    assert paper == PaperOptions(alpha=5.0, beta=9.0), "Table 15"
    assert recipe.told == [
        "mode paper, learning rates: 1e-05 (pretraining), 1e-05 (predictors), 5e-05 (selector), as published"
    ]


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_without_one_they_take_rates_at_which_a_new_model_learns(path: Path) -> None:
    recipe = read_recipe(path)
    options, paper = recipe.options, recipe.options.paper
    assert (options.lr, paper.predictor_lr, paper.selector_lr) == (3e-4, 1.5e-4, 1e-3)
    with_one = read_recipe(path, pretrained=Path("opt-350m")).options
    same = replace(with_one, pretrained=None, lr=options.lr, fine_tune_lr=options.fine_tune_lr, paper=paper)
    assert same == options, "all else is as published"
    assert "0.0003 (pretraining)" in recipe.told[0] and "published, for pretrained models: 1e-05" in recipe.told[0]


def test_a_rate_that_is_given_stays(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("[train]\nmode = 'paper'\nhidden_size = 32\nlr = 1e-5\n[paper]\npredictor_lr = 1e-5\n")
    recipe = read_recipe(path)
    options = recipe.options
    assert (options.lr, options.paper.predictor_lr, options.paper.selector_lr) == (1e-5, 1e-5, 1e-3)
    path.write_text(path.read_text() + "selector_lr = 5e-5\n")
    assert read_recipe(path).told[0].endswith("as published, at which a new model hardly learns")
    assert read_recipe(None, mode="behaviour").told == []


def test_mode_paper_learns_without_a_pretrained_model(sessions: Path, tmp_path: Path) -> None:
    """With the published rates the loss stays that of pages drawn at random."""
    told = {name: value for name, value in TINY.items() if name not in ("fine_tune_epochs", "epochs")}
    options = read_recipe(None, mode="paper", **told, epochs=12, accumulate=1).options
    paper = replace(options.paper, embedding="pages", epochs=2)
    train(sessions, tmp_path / "b", replace(options, paper=paper))
    lines = [json.loads(line) for line in (tmp_path / "b.steps.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    pages = len(load_bundle(tmp_path / "b", "cpu").vocabulary.pages)
    assert losses[-1] < 0.8 * log(pages)
    card = (tmp_path / "b" / "README.md").read_text()
    assert "learning rates: 0.0068 (pretraining), 0.0034 (predictors), 0.001 (selector); published" in card


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[train]\npretrained = 'opt'\ndropout = 0.1", "dropout does nothing, for the pretrained model has its own."),
        ("[train]\npretrained = 'opt'\narchitecture = 'opt'", "architecture does nothing, for the pretrained model"),
        ("[train]\nmode = 'paper'\nfine_tune_epochs = 2", "fine_tune_epochs does nothing, for mode 'paper' fine-tunes"),
        ("[train]\nadapter_rank = 8", "adapter_rank does nothing, for backend 'token' has no adapters."),
        ("[train]\nmode = 'kmeans'\nfreeze_trunk = true", "freeze_trunk does nothing, for backend 'separate'"),
        ("[paper]\nalpha = 1.0", "[paper] does nothing in mode 'behaviour'."),
    ],
)
def test_what_does_nothing_is_told(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    (line,) = read_recipe(tmp_path / "recipe.toml").idle
    assert line.startswith(says)
    assert read_recipe(tmp_path / "recipe.toml").told[-1] == line


def test_retrieval_as_published_starts_from_the_papers_settings(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("[retrieval]\nmode = 'paper'\nepochs = 3\n")
    retrieval = read_recipe(path).options.retrieval
    assert (retrieval.seeds, retrieval.history, retrieval.lr, retrieval.epochs) == (10, 30, 5e-4, 3)
    path.write_text("[retrieval]\nepochs = 3\n")
    assert read_recipe(path).options.retrieval == XPertOptions(epochs=3)


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
        ("[train]\npretrained = 'opt'\nlarge = 'llama'", "[train]: large is llama, but there is no config.json"),
        ("[train]\nlarge = 'llama'", "[train]: large is llama, but it only stands beside pretrained models"),
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
    assert read_recipe(PAPER[0], pretrained=tmp_path).options.pretrained == tmp_path


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
