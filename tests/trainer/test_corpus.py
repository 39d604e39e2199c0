"""Session files in, an ordered corpus out; examples never see their target."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.routing import CentroidRouter
from models.visit import recent
from models.vocabulary import BOS, EOS
from tests.trainer.conftest import shop, write
from trainer.corpus import read_corpus, split, training_parts
from trainer.errors import TrainingError
from trainer.examples import examples
from trainer.windows import batch_count, batches, page_tokens, windows


def test_the_corpus_is_the_files_in_order(sessions: Path) -> None:
    corpus = read_corpus(sessions)
    rows = sorted(shop(120), key=lambda row: (row["user_id"], row["start_ms"]))
    assert corpus.session_ids == [row["session_id"] for row in rows]
    assert corpus.users == sorted({row["user_id"] for row in rows})
    found = [
        (corpus.users[u], corpus.page_names(s), bool(corpus.cart[s]), bool(corpus.purchase[s]))
        for u in range(len(corpus.users))
        for s in corpus.sessions(u)
    ]
    assert found == [(row["user_id"], row["pages"], row["cart"], row["purchase"]) for row in rows]


def test_sessions_without_a_page_are_left_out(tmp_path: Path) -> None:
    rows = shop(10)
    rows[3]["pages"] = []
    assert rows[3]["session_id"] not in read_corpus(write(rows, tmp_path)).session_ids


def test_an_example_is_the_past_only(sessions: Path) -> None:
    corpus = read_corpus(sessions)
    rng = np.random.default_rng(0)
    router = CentroidRouter(corpus.names, np.round(rng.normal(size=(len(corpus.names), 3)), 3), "")
    for user in corpus.returning():
        history = [corpus.page_names(s) for s in corpus.sessions(user)]
        (example,) = examples(corpus, [user], router)
        last = corpus.sessions(user)[-1]
        assert example.target == history[-1] and example.session_id == corpus.session_ids[last]
        assert example.visit.sessions == recent(history[:-1])
        assert example.visit.seed == corpus.session_ids[last - 1]
        assert example.visit.routing == router.route(history[:-1])
        assert len(example.cart_flags) == len(history) - 1
        assert [e.target for e in examples(corpus, [user], router, 2)] == history[1:][-2:]


def test_validation_users_return_and_do_not_depend_on_the_others(sessions: Path) -> None:
    corpus = read_corpus(sessions)
    training, held = split(corpus, 0.2, 0)
    assert set(held) <= set(corpus.returning()) and not set(held) & set(training)
    assert len(training) + len(held) == len(corpus.users)
    assert not np.array_equal(held, split(corpus, 0.2, 1)[1])


def test_windows_hold_every_session_once(sessions: Path) -> None:
    corpus = read_corpus(sessions)
    tokens = page_tokens(corpus, {name: i + 4 for i, name in enumerate(corpus.names)})
    pieces = windows(corpus, range(len(corpus.users)), tokens, 24)
    assert max(len(piece) for piece in pieces) <= 24
    flat = np.concatenate(pieces)
    expected = np.concatenate([[BOS, *(corpus.page_ids(s) + 4), EOS] for s in range(len(corpus.session_ids))])
    assert np.array_equal(flat, expected)
    assert all(piece[0] == BOS and piece[-1] == EOS for piece in pieces)
    assert max(len(piece) for piece in windows(corpus, range(len(corpus.users)), tokens, 5)) == 5


def test_an_epoch_has_each_row_once_in_an_order_of_its_own() -> None:
    lengths = np.random.default_rng(0).integers(3, 50, size=517).tolist()
    first, again, other = (list(batches(lengths, 7, (1, 2, epoch))) for epoch in (0, 0, 1))
    assert sorted(np.concatenate(first)) == list(range(517))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])
    assert len(first) == batch_count(517, 7)


def bad_schema(path: Path) -> None:
    pq.write_table(pa.table({"user_id": ["u"], "pages": [["a"]]}), path / "x.parquet")


def bad_type(path: Path) -> None:
    row = {**shop(1)[0], "pages": 3}
    pq.write_table(pa.Table.from_pylist([row]), path / "x.parquet")


def null_user(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([*shop(3), {**shop(1)[0], "user_id": None}]), path / "x.parquet")


def garbage(path: Path) -> None:
    (path / "x.parquet").write_bytes(b"PAR1 not really")


def no_pages(path: Path) -> None:
    schema = pa.Table.from_pylist(shop(2)).schema
    pq.write_table(pa.Table.from_pylist([{**row, "pages": []} for row in shop(2)], schema=schema), path / "x.parquet")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: None, "no Parquet file"),
        (lambda path: path.rmdir(), "does not exist"),
        (bad_schema, r"x\.parquet lacks the columns session_id, number"),
        (bad_type, r"x\.parquet cannot be read as sessions"),
        (null_user, "null"),
        (garbage, r"x\.parquet cannot be read as sessions"),
        (no_pages, "no session with a page"),
    ],
)
def test_files_that_are_no_sessions_are_named(tmp_path: Path, spoil: object, words: str) -> None:
    directory = tmp_path / "sessions"
    directory.mkdir()
    spoil(directory)  # type: ignore[operator]
    with pytest.raises(TrainingError, match=words) as failed:
        read_corpus(directory)
    assert failed.value.exit_code == 2


def test_parts_that_share_users_or_leave_nobody_are_refused(tmp_path: Path) -> None:
    rows = shop(40)
    half = [row for row in rows if row["user_id"] < "u0020"]
    train, validation = write(rows, tmp_path / "train"), write(half, tmp_path / "validation")
    with pytest.raises(TrainingError, match=r"20 users, 'u0000' among them, are in more than one of"):
        read_corpus(train, validation)
    corpus = read_corpus(train)
    for held, side in (({"u0000-none"}, "train"), (set(corpus.users), "validation")):
        with pytest.raises(TrainingError, match=rf"users with two sessions or more are in the part {side}"):
            split(corpus, 0.1, 0, held)


def test_a_directory_with_a_test_but_no_training_is_refused(tmp_path: Path) -> None:
    write(shop(10), tmp_path / "test")
    with pytest.raises(TrainingError, match="has a part for test, test, but none for train"):
        training_parts(tmp_path)


def test_the_digest_tells_pages_and_parts(tmp_path: Path) -> None:
    rows = shop(20)
    one, two = ([row for row in rows if (row["user_id"] < "u0010") == low] for low in (True, False))
    whole = read_corpus(write(rows, tmp_path / "a")).digest
    renamed = [{**row, "pages": [f"{page}!" for page in row["pages"]]} for row in rows]
    assert read_corpus(write(renamed, tmp_path / "b")).digest != whole
    parts = [write(part, tmp_path / name) for part, name in ((one, "c"), (two, "d"))]
    assert read_corpus(*parts).digest != whole
    assert read_corpus(write(list(reversed(rows)), tmp_path / "e", files=3)).digest == whole


def test_nobody_returning_is_an_error(tmp_path: Path) -> None:
    rows = [row for row in shop(30) if row["number"] == 1]
    with pytest.raises(TrainingError, match="0 of 30 users have two sessions"):
        split(read_corpus(write(rows, tmp_path)), 0.1, 0)


def test_a_session_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    rows = shop(20)
    write([*rows, rows[3]], tmp_path / "sessions")
    with pytest.raises(TrainingError, match="1 sessions are there more than once"):
        read_corpus(tmp_path / "sessions")
