"""Bundles that an alias names, brought to where a model can be loaded from, and verified."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import fsspec.core
from fsspec.implementations.local import LocalFileSystem

from models.manifest import MANIFEST, BundleRefused, receive, verify


def local(uri: str, digest: str, cache: Path) -> Path:
    """The verified directory of the bundle at `uri` with this digest: itself if it is on a disk here, else a copy.

    Copies are kept below `cache`, which several workers may share. Raises BundleRefused when the bundle is not there,
    cannot be reached, is damaged or is another one.
    """
    try:
        storage, place = fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError) as error:
        raise BundleRefused(uri, MANIFEST, str(error), "Install the fsspec package of that storage.") from None
    if isinstance(storage, LocalFileSystem):
        return _checked(Path(place if Path(place).exists() else unquote(place)), digest)
    copy = cache / digest.removeprefix("sha256:")
    if copy.is_dir():
        try:
            return _checked(copy, digest)
        except BundleRefused:  # damaged since; the storage may still have it whole
            shutil.rmtree(copy, ignore_errors=True)
    return _copied(uri, digest, copy, lambda name: _read(uri, name, lambda: storage.cat_file(f"{place}/{name}")))


def _checked(path: Path, digest: str) -> Path:
    found = verify(path).digest
    if found != digest:
        raise BundleRefused(path, MANIFEST, f"its digest is {found}, but the alias names {digest}")
    return path


def _copied(uri: str, digest: str, copy: Path, read: Callable[[str], bytes]) -> Path:
    copy.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=copy.parent) as scratch:
        received = Path(scratch) / "bundle"
        receive(uri, digest, received, read)
        try:
            received.rename(copy)
        except OSError:  # another worker has brought it meanwhile
            return _checked(copy, digest)
    return copy


def _read(uri: str, name: str, read: Callable[[], bytes]) -> bytes:
    try:
        return read()
    except OSError as error:
        raise BundleRefused(uri, name, f"cannot be read ({error})", "Check the registry's storage.") from error
