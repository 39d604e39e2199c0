"""Token windows for language-model training: a user's sessions in a row, in pieces that fit the context."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from models.vocabulary import BOS, EOS, PAD, UNK
from trainer.corpus import Corpus

POOL = 16  # batches are cut by length inside pools of so many batches, so that little is padded


class Layout(NamedTuple):
    """Windows side by side. A label is the next token of the same window; PAD stands where nothing is predicted.

    Where windows share a row, `positions` count from 0 in each and `segments` number them from 1 (0 is padding).
    """

    inputs: np.ndarray  # (B, T)
    labels: np.ndarray  # (B, T)
    positions: np.ndarray | None = None  # (B, T)
    segments: np.ndarray | None = None  # (B, T)


def page_tokens(corpus: Corpus, tokens: dict[str, int]) -> np.ndarray:
    """Token of each page of the corpus: (names,)."""
    return np.array([tokens.get(name, UNK) for name in corpus.names], dtype=np.int64)


def windows(corpus: Corpus, users: Iterable[int], tokens: np.ndarray, context: int) -> list[np.ndarray]:
    """The windows of all these users, in their order; see `windows_of`."""
    return [window for user in users for window in windows_of(corpus, user, tokens, context)]


def windows_of(corpus: Corpus, user: int, tokens: np.ndarray, context: int) -> list[np.ndarray]:
    """[BOS] pages [EOS] of all sessions of the user, cut between sessions where the context ends.

    `tokens` maps page indices to tokens. A session longer than the context keeps its newest pages.
    """
    pieces: list[np.ndarray] = []
    piece: list[np.ndarray] = []
    length = 0
    for session in corpus.sessions(user):
        pages = tokens[corpus.page_ids(session)][-(context - 2) :]
        if length + len(pages) + 2 > context:
            pieces.append(np.concatenate(piece))
            piece, length = [], 0
        piece.append(np.concatenate([[BOS], pages, [EOS]]))
        length += len(pages) + 2
    pieces.append(np.concatenate(piece))
    return pieces


def batches(lengths: Sequence[int], size: int, seed: Sequence[int], by_length: bool = True) -> Iterator[np.ndarray]:
    """Rows of one epoch in batches, in an order that only `seed` decides; `by_length`: of similar length each."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    if not by_length:
        yield from (order[start : start + size] for start in range(0, len(order), size))
        return
    measured = np.asarray(lengths)
    cut: list[np.ndarray] = []
    for start in range(0, len(order), POOL * size):
        pool = order[start : start + POOL * size]
        pool = pool[np.argsort(measured[pool], kind="stable")]
        cut += [pool[i : i + size] for i in range(0, len(pool), size)]
    for i in rng.permutation(len(cut)):
        yield cut[i]


def batch_count(rows: int, size: int) -> int:
    """Batches of an epoch."""
    return -(-rows // size)


def draw_clusters(posterior: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """A cluster for each row, drawn from its posterior: (rows, K) -> (rows,). One-hot rows leave no choice."""
    draws = np.random.default_rng(seed).random(len(posterior))
    cumulative = posterior.cumsum(axis=1)
    chosen: np.ndarray = (draws[:, None] * cumulative[:, -1:] >= cumulative).sum(axis=1)
    return chosen


def pack(
    lengths: Sequence[int], kinds: Sequence[int] | np.ndarray | None = None, room: int | None = None
) -> list[list[int]]:
    """Windows that share rows of `room` tokens, by best fit decreasing; for each row their places in `lengths`.

    Without `room` a row is as long as the longest window: in longer ones attention, which looks at all pairs of a row,
    would cost more, and hardly less would be padded. With `kinds` only windows of the same kind share a row.
    """
    kind = kinds if kinds is not None else [0] * len(lengths)
    room = max([room or 0, *lengths])
    rows: list[list[int]] = []
    spare: dict[tuple[int, int], list[int]] = {}  # rows by their kind and the room that is left
    rooms: dict[int, int] = {}  # by kind, bit r: a row has room for r tokens
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        k, length = int(kind[i]), lengths[i]
        fits = rooms.get(k, 0) >> length
        if fits:
            left = length + (fits & -fits).bit_length() - 1  # the tightest
            row = spare[k, left].pop()
            rooms[k] ^= (not spare[k, left]) << left
            rows[row].append(i)
        else:
            row, left = len(rows), room
            rows.append([i])
        spare.setdefault((k, left - length), []).append(row)
        rooms[k] = rooms.get(k, 0) | 1 << (left - length)
    return rows


def lay_out(windows: Sequence[np.ndarray], rows: Sequence[Sequence[int]]) -> Layout:
    """The windows in rows of one or several each (see `pack`), padded on the right."""
    longest = max(sum(len(windows[i]) - 1 for i in row) for row in rows)
    inputs, labels, positions, segments = np.zeros((4, len(rows), longest), dtype=np.int64)
    for r, row in enumerate(rows):
        start = 0
        for number, i in enumerate(row, 1):
            end = start + len(windows[i]) - 1
            inputs[r, start:end], labels[r, start:end] = windows[i][:-1], windows[i][1:]
            positions[r, start:end], segments[r, start:end] = np.arange(end - start), number
            start = end
    labels[labels == BOS] = PAD  # after [EOS] comes [BOS] for sure
    if all(len(row) == 1 for row in rows):
        return Layout(inputs, labels)
    return Layout(inputs, labels, positions, segments)
