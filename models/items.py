"""The items a bundle knows: their vectors and global clusters. numpy only: sessionizing workers import it."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from models.config import write_json
from models.manifest import BundleRefused, File, Verified, open_manifest

ITEMS = "items.json"
TENSORS = "items.safetensors"
WIDTH = 64
WEIGHTS = "xpert."  # how the names of the operator's tensors begin

Ranker = Literal["popularity", "counts", "nearest", "shared", "residual", "personal"]
Activation = Literal["relu", "identity"]


class SeedRule(msgspec.Struct, frozen=True):
    """The seed events that a retriever was trained with. The defaults are those of the settings BROWSECAST_SEED..."""

    policy: Literal["channels", "recency"] = "channels"
    most: int = 5
    gamma: float = 0.923  # with each event a channel's weight falls to so much of it
    protect: bool = True  # the channel of the newest event stays, however heavy the others are


class RetrieverConfig(msgspec.Struct, frozen=True):
    """Which retriever validation chose, and its numbers. Scores are cosines + `seed_bias` + `prior` * log(1 + clicks).

    `ranker`: `nearest` asks with the seeds as they are, `shared` with one matrix for all visitors, `residual` and
    `personal` with an operator of the visitor's own; the last three have their prior and bias among their weights.
    `fused`: its list and the counts' by reciprocal ranks.
    """

    ranker: Ranker = "nearest"
    seeding: SeedRule = SeedRule()
    fused: bool = False
    fusion: int = 60  # constant of the reciprocal ranks (Cormack et al. 2009)
    prior: tuple[float, float] = (0.0, 0.0)  # of `nearest`: within a session; for its first click
    seed_bias: tuple[float, ...] = ()  # of `nearest`: by rank of the seed, heaviest first; the last one holds beyond
    counts_seeds: int = 5  # newest items that the counts look at
    counts_fade: float = 0.5  # what each of them weighs of the one after it
    counts_power: float = 0.5  # their counts are divided by their clicks to this power
    window_ms: int = 6 * 3_600_000  # of the clicks that popularity counts
    clicks_until_ms: int | None = None  # event time up to which the table's `clicks` are counted; None: not known
    history: int = 16  # events that the visitor's vector is made of
    heads: int = 1  # of the morph
    activation: Activation = "identity"  # of the morph


class ItemsFile(msgspec.Struct, frozen=True):
    """items.json: a row's id by its number in the tensors, and the retriever."""

    ids: list[str]
    retriever: RetrieverConfig


class ItemTable:
    """Items by row: unit `vectors` (N, D), `clusters` (N,), `clicks` (N,) when the table was made; `centroids` (K, D).

    `digest` names the table: clusters and vectors of different digests do not go together. `tensors` are all tensors
    of the file: `text_map` (384, D), if new items can be placed by their texts; the state of `models.xpert.XPert` under
    names that begin with `xpert.`, if the ranker needs one; co-visits as a CSR matrix (N, N), if it counts:
    `covisits_indptr` (N + 1,), `covisits_indices` and `covisits_values` (nonzeros,), and `covisits_clicks` (N,) where
    they are not divided by `clicks`.
    """

    def __init__(self, file: ItemsFile, tensors: Mapping[str, np.ndarray], digest: str) -> None:
        self.ids, self.retriever, self.tensors, self.digest = file.ids, file.retriever, tensors, digest
        self.vectors, self.centroids = tensors["vectors"], tensors["centroids"]
        self.clusters, self.clicks = tensors["clusters"], tensors["clicks"]
        self._rows = {item_id: row for row, item_id in enumerate(file.ids)}

    def __len__(self) -> int:
        return len(self.ids)

    def cluster(self, item_id: str) -> int | None:
        """The item's global cluster; None for an item that the table does not know."""
        row = self._rows.get(item_id)
        return None if row is None else int(self.clusters[row])

    def row(self, item_id: str) -> int | None:
        """The item's row; None for an item that the table does not know."""
        return self._rows.get(item_id)

    def rows(self, item_ids: Sequence[str]) -> list[int]:
        """Rows of those items that the table knows, in the order given."""
        return [self._rows[item_id] for item_id in item_ids if item_id in self._rows]

    def nearest(self, vector: np.ndarray) -> int:
        """The global cluster of an item that is not in the table, by its vector (D,)."""
        return int(nearest_clusters(vector[None, :], self.centroids)[0])

    def from_text(self, embeddings: np.ndarray) -> np.ndarray | None:
        """Unit vectors of new items from their texts' embeddings, (n, 384) -> (n, D); None if the table has no map."""
        if "text_map" not in self.tensors:
            return None
        return unit(embeddings @ self.tensors["text_map"])


class ItemClusters:
    """The global clusters of a table's items: all that sessionizing needs of it, and all that it keeps in memory."""

    def __init__(self, table: ItemTable) -> None:
        self._clusters = dict(zip(table.ids, table.clusters.tolist(), strict=True))

    def cluster(self, item_id: str) -> int | None:
        """The item's global cluster; None for an item that the table does not know."""
        return self._clusters.get(item_id)


def load_items(bundle_path: Path) -> ItemTable | None:
    """The items of a bundle, None if it knows none; only the two files it reads are verified. Raises BundleRefused."""
    verified = open_manifest(bundle_path)
    return read_items(verified) if ITEMS in verified.manifest.files else None


def read_items(verified: Verified) -> ItemTable:
    """The items of a bundle that has them. Raises BundleRefused."""
    try:
        file = msgspec.json.decode(verified.read(ITEMS), type=ItemsFile)
    except msgspec.DecodeError as error:
        raise BundleRefused(verified.root, ITEMS, f"not a table of items ({error})") from None
    try:
        tensors = load(verified.read(TENSORS))
    except SafetensorError as error:
        raise BundleRefused(verified.root, TENSORS, f"not a safetensors file ({error})") from None
    if what := _wrong(file, tensors):
        raise BundleRefused(verified.root, TENSORS, what)
    return ItemTable(file, tensors, _digest(verified.manifest.files))


def write_items(directory: Path, file: ItemsFile, tensors: Mapping[str, np.ndarray]) -> None:
    """Write the two files, as `fill` of `write_bundle` does. Raises ValueError for what `load_items` would refuse."""
    if what := _wrong(file, tensors):
        raise ValueError(f"{what}.")
    write_json(directory / ITEMS, file)
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, directory / TENSORS)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; a row of zeros stays one."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    rows: np.ndarray = (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)
    return rows


def indexed(vectors: np.ndarray, log_clicks: np.ndarray) -> np.ndarray:
    """What queries are multiplied with: [vector, log(1 + clicks), 1], (N, D), (N,) -> (N, D + 2) float32."""
    columns = [vectors, log_clicks[:, None], np.ones((len(vectors), 1))]
    return np.concatenate(columns, axis=1, dtype=np.float32)


def nearest_clusters(vectors: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The closest centroid of each vector by Euclidean distance, (N, D), (K, D) -> (N,) int32; ties: the lowest."""
    costs = (centroids.astype(np.float64) ** 2).sum(1) / 2
    parts = [part @ centroids.T - costs for part in np.array_split(vectors, len(vectors) // 4096 + 1)]
    return np.concatenate([part.argmax(axis=1) for part in parts]).astype(np.int32)


def _wrong(file: ItemsFile, tensors: Mapping[str, np.ndarray]) -> str | None:
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            return f"tensor {name} holds NaN or infinite numbers"
    return _wrong_table(file.ids, tensors) or _wrong_retriever(file.retriever, len(file.ids), tensors)


def _wrong_table(ids: Sequence[str], tensors: Mapping[str, np.ndarray]) -> str | None:
    if missing := {"vectors", "clusters", "clicks", "centroids"} - set(tensors):
        return f"holds no `{min(missing)}`"
    if len(set(ids)) != len(ids):
        return f"{ITEMS} names an item twice"
    vectors, centroids, clusters = tensors["vectors"], tensors["centroids"], tensors["clusters"]
    if vectors.ndim != 2 or len(vectors) != len(ids):
        return f"`vectors` is {vectors.shape}, but {ITEMS} has {len(ids)} items"
    if centroids.ndim != 2 or centroids.shape[1] != vectors.shape[1] or not len(centroids):
        return f"`centroids` is {centroids.shape}, but vectors have {vectors.shape[1]} numbers"
    for name in ("clusters", "clicks"):
        if tensors[name].shape != (len(ids),):
            return f"`{name}` is not one number for each of the {len(ids)} items"
    if len(clusters) and not (clusters.min() >= 0 and clusters.max() < len(centroids)):
        return f"`clusters` names a cluster that is none of the {len(centroids)}"
    lengths = np.linalg.norm(vectors, axis=1)
    if not (np.isclose(lengths, 1.0, atol=1e-3) | (lengths == 0)).all():
        return "`vectors` are not all of length 1"
    return "`clicks` are fewer than none" if (tensors["clicks"] < 0).any() else None


def _wrong_retriever(chosen: RetrieverConfig, items: int, tensors: Mapping[str, np.ndarray]) -> str | None:
    width, text_map = tensors["vectors"].shape[1], tensors.get("text_map")
    if text_map is not None and (text_map.ndim != 2 or text_map.shape[1] != width):
        return f"`text_map` is {text_map.shape}, but vectors have {width} numbers"
    learned = any(name.startswith(WEIGHTS) for name in tensors)
    if chosen.ranker in ("shared", "residual", "personal") and not learned:
        return f"holds no weights `{WEIGHTS}...`, which the ranker {chosen.ranker!r} needs"
    counted = [name for name in tensors if name.startswith("covisits_")]
    if not counted:
        needed = chosen.fused or chosen.ranker == "counts"
        return "holds no `covisits_...`, which the retriever needs" if needed else None
    return _wrong_counts(items, tensors)


def _wrong_counts(items: int, tensors: Mapping[str, np.ndarray]) -> str | None:
    if missing := {f"covisits_{part}" for part in ("indptr", "indices", "values")} - set(tensors):
        return f"holds no `{min(missing)}`"
    starts, columns, values = (tensors[f"covisits_{part}"] for part in ("indptr", "indices", "values"))
    if starts.shape != (items + 1,) or columns.shape != values.shape or columns.ndim != 1:
        return f"`covisits_...` are no sparse matrix of {items} items"
    if starts[0] != 0 or starts[-1] != len(columns) or (np.diff(starts) < 0).any():
        return "`covisits_indptr` does not divide the other two"
    if len(columns) and not (columns.min() >= 0 and columns.max() < items):
        return f"`covisits_indices` names an item that is none of the {items}"
    clicks = tensors.get("covisits_clicks", tensors["clicks"])
    return None if clicks.shape == (items,) else f"`covisits_clicks` is not one number for each of the {items} items"


def _digest(files: Mapping[str, File]) -> str:
    both = files[ITEMS].sha256 + files[TENSORS].sha256
    return f"sha256:{hashlib.sha256(both.encode()).hexdigest()}"
