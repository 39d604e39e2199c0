"""The registry: immutable bundles below one address, a directory or whatever fsspec reaches.

A bundle's directory is named `<version>.<digest>`. Its manifest is written last and removed first, and only a directory
whose manifest has the digest of its name is a bundle: so a publication or removal that ends half way shows nothing, on
any storage, without a rename.
"""

import re
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import fsspec.core
from fsspec.implementations.local import LocalFileSystem

from models.config import CONFIG, decode_config, version_of
from models.manifest import MANIFEST, BundleRefused, Verified, decode_manifest, digest_of, receive, sync, verify
from models.references import ModelRef
from streams.wire import ModelAlias, ModelDecision
from trainer.errors import TrainingError

NAME = re.compile(r"([\w-]+)\.([0-9a-f]{64})")


class Story(Protocol):
    """What the topic `models` tells: what the aliases name now, and every decision, oldest first."""

    @property
    def aliases(self) -> Mapping[str, ModelAlias]:
        """Alias -> version, digest and place of the bundle."""

    @property
    def decisions(self) -> Sequence[ModelDecision]:
        """Oldest first."""


class Aliases(Protocol):
    """Reads the story, and changes it by compare-and-set (`streams.aliases`)."""

    def story(self) -> Story:
        """What is committed now."""

    def change(self, decide: Callable[[Story], Sequence[ModelDecision]]) -> Sequence[ModelDecision]:
        """Write what `decide` decides on the story as it is; it is asked again when another trainer came between."""


class Registry:
    """The bundles below one address. Storage that fails raises TrainingError, a damaged bundle BundleRefused."""

    def __init__(self, address: str) -> None:
        try:
            self._storage, root = fsspec.core.url_to_fs(address)
        except (ImportError, ValueError) as error:
            raise TrainingError(
                f"registry {address}: {error}. Name a directory, or an address whose fsspec package is installed"
            ) from error
        self._root = root.rstrip("/")
        self.address = address

    def bundles(self) -> list[ModelRef]:
        """All that are published, oldest first."""
        found = (self._ref(name) for name in self._names())
        return [ref for ref in found if ref is not None]

    def find(self, name: str) -> ModelRef:
        """The one bundle whose version or digest begins with `name`. TrainingError if there is none, or several."""
        start = name.removeprefix("sha256:")
        found = [ref for ref in self.bundles() if ref.version.startswith(start) or ref.digest[7:].startswith(start)]
        if not start or len(found) != 1:
            raise TrainingError(
                f"{len(found)} bundles in registry {self.address} have a version or digest that begins with {name!r}. "
                "browsecast models list names them all"
            )
        return found[0]

    def publish(self, bundle: Path) -> ModelRef:
        """Copy a bundle here, in one step for whoever looks. It is opened first: what cannot be used is refused.

        A bundle that is here already stays as it is; if its copy here is damaged, it is written again.
        """
        verified = verify(bundle)
        open_once(bundle)
        name = _directory(reference(verified))
        if not NAME.fullmatch(name):
            raise BundleRefused(bundle, CONFIG, f"`created` makes {name!r}, which cannot name a directory")
        there = self._ref(name)
        if there is None or not self._is_whole(there):
            self._upload(verified, name)
        ref = self._ref(name)
        if ref is None:
            raise TrainingError(f"registry {self.address}: {name} was written, but it is not there. Publish again")
        return ref

    def fetch(self, ref: ModelRef, path: Path) -> Path:
        """Copy a bundle to the new directory `path`, every byte checked; returns `path`."""
        place = self._place(ref)
        receive(ref.uri, ref.digest, path, lambda name: self._read(ref.uri, place, name))
        return path

    def verify(self, ref: ModelRef) -> None:
        """Check every byte, that nothing else lies beside it, and that it opens. Raises BundleRefused."""
        with tempfile.TemporaryDirectory() as scratch:
            copy = self.fetch(ref, Path(scratch) / "bundle")
            self._refuse_extras(ref, copy)
            try:
                open_once(copy)
            except BundleRefused as error:
                raise BundleRefused(ref.uri, error.name, error.what, error.remedy) from None

    def remove(self, ref: ModelRef) -> None:
        """Remove a bundle; from the first step on nobody sees it."""
        with self._reached():
            self._remove(self._place(ref))

    def sweep(self, older_than_s: float, keep: Collection[str]) -> list[str]:
        """Remove what publications and removals left half done so long ago; returns the names of the directories.

        `keep`: digests that are left alone.
        """
        with self._reached():
            swept = [name for name in self._names() if f"sha256:{name.rpartition('.')[2]}" not in keep]
            swept = [name for name in swept if self._ref(name) is None and self._age_s(name) > older_than_s]
            for name in swept:
                self._remove(f"{self._root}/{name}")
        return swept

    def _names(self) -> list[str]:
        with self._reached():
            self._storage.invalidate_cache()
            try:
                entries = self._storage.ls(self._root, detail=False)
            except FileNotFoundError:
                return []
        return sorted(
            name for name in (entry.rstrip("/").rpartition("/")[2] for entry in entries) if NAME.fullmatch(name)
        )

    def _ref(self, name: str) -> ModelRef | None:
        """The bundle of a directory's name; None unless its manifest is there, whole."""
        version, _, digest = name.rpartition(".")
        place = f"{self._root}/{name}"
        with self._reached():
            try:
                content: bytes = self._storage.cat_file(f"{place}/{MANIFEST}")
            except FileNotFoundError:
                return None
        if digest_of(content) != f"sha256:{digest}":
            return None
        uri = self._storage.unstrip_protocol(place)
        size = sum(file.bytes for file in decode_manifest(uri, content).files.values())
        return ModelRef(version, f"sha256:{digest}", uri, size)

    def _place(self, ref: ModelRef) -> str:
        return f"{self._root}/{_directory(ref)}"

    def _is_whole(self, ref: ModelRef) -> bool:
        try:
            self.verify(ref)
        except BundleRefused:
            return False
        return True

    def _upload(self, verified: Verified, name: str) -> None:
        """Write every file, the manifest last; what else lies there goes first."""
        place = f"{self._root}/{name}"
        with self._reached():
            for path in self._storage.find(place):
                if path.removeprefix(f"{place}/") not in (*verified.manifest.files, MANIFEST):
                    self._storage.rm_file(path)
            for file in verified.manifest.files:
                self._put(f"{place}/{file}", verified.read(file))
            self._put(f"{place}/{MANIFEST}", (verified.root / MANIFEST).read_bytes())

    def _put(self, path: str, content: bytes) -> None:
        """Write a file and read it again: storage may refuse half way, and not every kind says so."""
        self._storage.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._storage.pipe_file(path, content)
        if isinstance(self._storage, LocalFileSystem):  # other storage has it safe when it says so
            sync([Path(path), Path(path).parent, Path(path).parent.parent])
        if self._storage.cat_file(path) != content:
            raise OSError(f"{path} does not hold what was written to it")

    def _read(self, uri: str, place: str, name: str) -> bytes:
        with self._reached():
            try:
                content: bytes = self._storage.cat_file(f"{place}/{name}")
            except FileNotFoundError:
                raise BundleRefused(uri, name, "not there") from None
        return content

    def _refuse_extras(self, ref: ModelRef, copy: Path) -> None:
        place = self._place(ref)
        with self._reached():
            stored = self._storage.find(place)
        for name in (path.removeprefix(f"{place}/") for path in stored):
            if not (copy / name).is_file():
                raise BundleRefused(ref.uri, name, "not in the manifest", "Remove it, or publish the bundle again.")

    def _remove(self, place: str) -> None:
        with suppress(FileNotFoundError):  # of another trainer that removes the same, here and below
            self._storage.rm_file(f"{place}/{MANIFEST}")
        with suppress(FileNotFoundError):
            self._storage.rm(place, recursive=True)

    def _age_s(self, name: str) -> float:
        """Since the last write below a directory; an empty one has none under way."""
        try:
            written = [self._storage.modified(path).timestamp() for path in self._storage.find(f"{self._root}/{name}")]
        except FileNotFoundError:  # another trainer is at it
            return 0.0
        return time.time() - max(written, default=0.0)

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"registry {self.address}: {error}. Nothing half written is ever used; mend the storage and try again"
            ) from error


def open_once(bundle: Path) -> None:
    """Open a bundle as a worker would, on the CPU. Raises BundleRefused for whatever digests cannot tell."""
    from models.bundle import load_bundle  # torch takes seconds, and most commands open nothing

    load_bundle(bundle, "cpu")


def reference(verified: Verified) -> ModelRef:
    """What names a bundle where it lies, published or not."""
    version = version_of(decode_config(verified), verified.digest)
    size = sum(file.bytes for file in verified.manifest.files.values())
    return ModelRef(version, verified.digest, verified.root.as_uri(), size)


def _directory(ref: ModelRef) -> str:
    return f"{ref.version}.{ref.digest.removeprefix('sha256:')}"
