"""Token windows for language-model training: a user's sessions in a row, in pieces that fit the context."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from models.vocabulary import BOS, EOS, UNK
from trainer.corpus import Corpus

POOL = 16  # batches are cut by length inside pools of so many batches, so that little is padded


def page_tokens(corpus: Corpus, tokens: dict[str, int]) -> np.ndarray:
    """Token of each page of the corpus: (names,)."""
    return np.array([tokens.get(name, UNK) for name in corpus.names], dtype=np.int64)


def windows(corpus: Corpus, users: Iterable[int], tokens: np.ndarray, context: int) -> list[np.ndarray]:
    """[BOS] pages [EOS] of all sessions of each user, cut between sessions where the context ends.

    `tokens` maps page indices to tokens. A session longer than the context keeps its newest pages.
    """
    pieces: list[np.ndarray] = []
    for user in users:
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


def batches(lengths: Sequence[int], size: int, seed: Sequence[int]) -> Iterator[np.ndarray]:
    """Rows of one epoch in batches of similar length, in an order that only `seed` decides."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
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
    pools, rest = divmod(rows, POOL * size)
    return pools * POOL + -(-rest // size)
