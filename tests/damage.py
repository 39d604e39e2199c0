"""Ways in which a bundle goes bad on its way to a worker (fault F14), done to the directory of one."""

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

WEIGHTS = "predictors/0/model.safetensors"


def flip_a_byte(bundle: Path) -> None:
    content = bytearray((bundle / WEIGHTS).read_bytes())
    content[-3] ^= 1
    (bundle / WEIGHTS).write_bytes(content)


def truncate(bundle: Path) -> None:
    content = (bundle / WEIGHTS).read_bytes()
    (bundle / WEIGHTS).write_bytes(content[: len(content) // 2])


def swap_the_vocabulary(bundle: Path) -> None:
    """For another one of the same size, so that every shape still fits."""
    vocabulary = json.loads((bundle / "vocabulary.json").read_bytes())
    vocabulary["pages"].reverse()
    (bundle / "vocabulary.json").write_text(json.dumps(vocabulary))


def put_a_pickle_in(bundle: Path) -> None:
    (bundle / "extra.pkl").write_bytes(pickle.dumps(print))


def put_nan_in(bundle: Path) -> None:
    tensors = load_file(bundle / WEIGHTS)
    next(iter(tensors.values())).flat[0] = np.nan
    save_file(tensors, bundle / WEIGHTS, metadata={"format": "pt"})


def resign(bundle: Path) -> None:
    """Give all files right digests, so that only a look at what they hold can tell."""
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    for path in bundle.rglob("*"):
        name = path.relative_to(bundle).as_posix()
        if path.is_file() and name != "manifest.json":
            content = path.read_bytes()
            manifest["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


DAMAGES: list[Callable[[Path], None]] = [flip_a_byte, truncate, swap_the_vocabulary, put_a_pickle_in, put_nan_in]
