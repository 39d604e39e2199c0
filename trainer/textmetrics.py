"""Sessions as text: BLEU over page tokens, and BERTScore with the frozen sentence encoder (HeTLM, section 1.7.5)."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from models.encoder import encoder_path

ORDER = 4
SEPARATOR = " - "  # the paper renders a session as its page names with this between
BATCH = 64

Pair = tuple[Sequence[str], Sequence[str]]  # pages that came, pages predicted


def bleu_counts(pairs: Sequence[Pair]) -> np.ndarray:
    """What corpus BLEU is summed from: n-gram matches, n-grams predicted (n = 1 to 4), both lengths: (N, 10)."""
    counts = np.zeros((len(pairs), 2 * ORDER + 2))
    for row, (came, predicted) in zip(counts, pairs, strict=True):
        for n in range(1, ORDER + 1):
            grams = _grams(predicted, n)
            row[n - 1] = (grams & _grams(came, n)).total()
            row[ORDER + n - 1] = grams.total()
        row[-2:] = len(came), len(predicted)
    return counts


def bleu(sums: np.ndarray) -> np.ndarray:
    """Corpus BLEU-4 of summed counts, (R, 10) -> (R,).

    Matches and n-grams are one more for n > 1 (Lin and Och 2004); a shorter prediction pays the brevity penalty
    exp(1 - came / predicted). 0 where no page matches.
    """
    smooth = np.array([0.0] + [1.0] * (ORDER - 1))
    matches, total = sums[:, :ORDER] + smooth, sums[:, ORDER : 2 * ORDER] + smooth
    found = matches[:, 0] > 0
    precision = np.where(found[:, None], matches, 1.0) / np.maximum(total, 1.0)
    penalty = np.exp(np.minimum(0.0, 1.0 - sums[:, -2] / np.maximum(sums[:, -1], 1.0)))
    score: np.ndarray = found * penalty * np.exp(np.log(precision).mean(axis=1))
    return score


def bert_scores(pairs: Sequence[Pair], encoder: Path | None = None, device: str = "cpu") -> np.ndarray:
    """BERTScore precision, recall and F1 of each pair, (N, 3); 0 where either side is empty.

    Each word piece of one text is matched with the most similar one of the other, by the cosine of the last layer of
    all-MiniLM-L6-v2; no weights by rarity, no rescaling (Zhang et al. 2020). The encoder sees 256 word pieces. About
    a hundred distinct sessions a second on a CPU core. Raises EncoderMissing.
    """
    texts = [(SEPARATOR.join(came), SEPARATOR.join(predicted)) for came, predicted in pairs]
    distinct = sorted({text for pair in texts for text in pair if text})
    vectors = dict(zip(distinct, _word_vectors(distinct, encoder, device), strict=True))
    known: dict[tuple[str, str], tuple[float, float, float]] = {}
    for came, predicted in dict.fromkeys(texts):
        known[came, predicted] = _match(vectors[came], vectors[predicted]) if came and predicted else (0.0, 0.0, 0.0)
    return np.array([known[pair] for pair in texts]).reshape(-1, 3)


def _match(came: np.ndarray, predicted: np.ndarray) -> tuple[float, float, float]:
    similar = predicted @ came.T
    precision, recall = float(similar.max(axis=1).mean()), float(similar.max(axis=0).mean())
    return precision, recall, 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _word_vectors(texts: Sequence[str], encoder: Path | None, device: str) -> list[np.ndarray]:
    """Unit vectors of the word pieces of each text, without [CLS] and [SEP]: (pieces, 384)."""
    if not texts:
        return []
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(encoder_path(encoder)), device=device, local_files_only=True)
    found = model.encode(list(texts), batch_size=BATCH, output_value="token_embeddings", show_progress_bar=False)
    # With the attention mask already applied, the first and last vectors are those of [CLS] and [SEP].
    pieces = [vectors.float().cpu().numpy()[1:-1] for vectors in found]
    return [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in pieces]


def _grams(pages: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(pages[i : i + n]) for i in range(len(pages) - n + 1))
