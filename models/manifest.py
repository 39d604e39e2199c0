"""The manifest of a bundle: what files it has, and their digests. Verified before anything else is read."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import msgspec

MANIFEST = "manifest.json"
FORMAT = 1
PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth"})
PICKLE_HEADS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")


class BundleRefused(Exception):
    """A bundle is damaged, incomplete or of an unknown kind; the message names the file and what to do."""

    exit_code = 5

    def __init__(
        self, bundle: Path | str, name: str, what: str, remedy: str = "Copy or train the bundle again."
    ) -> None:
        super().__init__(f"Bundle {bundle} refused: {name}: {what}. {remedy}")
        self.name, self.what, self.remedy = name, what, remedy


class File(msgspec.Struct, frozen=True):
    """Digest (hex) and size of one file."""

    sha256: str
    bytes: int


class Manifest(msgspec.Struct, frozen=True):
    """All files of a bundle but the manifest itself, by their place below the bundle's directory."""

    files: dict[str, File]
    format: int = FORMAT


class Verified:
    """A bundle's files as the manifest lists them; `digest` is `sha256:` and the hex digest of the manifest."""

    def __init__(self, root: Path, manifest: Manifest, digest: str) -> None:
        self.root = root
        self.manifest = manifest
        self.digest = digest

    def read(self, name: str) -> bytes:
        """The bytes of a file, checked against its digest; a pickle is none. Raises BundleRefused."""
        listed = self.manifest.files.get(name)
        if listed is None:
            raise BundleRefused(self.root, name, "not in the manifest, and needed")
        path = self.root / name
        _check_place(self.root, path, name)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BundleRefused(self.root, name, f"in the manifest but cannot be read ({error.strerror})") from None
        _check_content(self.root, name, listed, content)
        return content


def open_manifest(path: Path) -> Verified:
    """Read the manifest only; `Verified.read` then checks each file that is read. Raises BundleRefused."""
    root = path.resolve()
    try:
        content = (root / MANIFEST).read_bytes()
    except OSError as error:
        raise BundleRefused(
            path, MANIFEST, f"cannot be read ({error.strerror})", "Give the directory that `train --bundle` wrote."
        ) from None
    _check_place(root, root / MANIFEST, MANIFEST)
    return Verified(root, decode_manifest(path, content), digest_of(content))


def decode_manifest(bundle: Path | str, content: bytes) -> Manifest:
    """The manifest of the bundle at a path or address. Raises BundleRefused, also for a file outside the bundle."""
    try:
        manifest = msgspec.json.decode(content, type=Manifest)
    except msgspec.DecodeError as error:
        raise BundleRefused(bundle, MANIFEST, f"not a manifest ({error})") from None
    if manifest.format != FORMAT:
        what = f"format {manifest.format}; this version reads {FORMAT}"
        raise BundleRefused(bundle, MANIFEST, what, "Update Browsecast or train anew.")
    for name in manifest.files:
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or str(place) != name or name in (".", MANIFEST):
            raise BundleRefused(bundle, MANIFEST, f"lists {name!r}, which is no place inside a bundle")
    return manifest


def digest_of(manifest: bytes) -> str:
    """The digest of a bundle: `sha256:` and the hex digest of its manifest, which holds those of all other files."""
    return f"sha256:{hashlib.sha256(manifest).hexdigest()}"


def verify(path: Path) -> Verified:
    """Check every file: none missing, none extra, none changed, no link, no pickle. Raises BundleRefused."""
    verified = open_manifest(path)
    found = set(_walk(verified.root))
    listed = set(verified.manifest.files)
    for name in sorted(found - listed):
        raise BundleRefused(path, name, "not in the manifest", "Remove it, or copy the bundle again.")
    for name in sorted(listed - found):
        raise BundleRefused(path, name, "in the manifest but missing")
    for name in sorted(listed):
        verified.read(name)
    return verified


def receive(bundle: str, digest: str, path: Path, read: Callable[[str], bytes]) -> Verified:
    """Copy the bundle at address `bundle`, whose digest is known, to the new directory `path`, in one step.

    `read(name)` gives a file's bytes; only what the manifest lists is read. BundleRefused leaves no `path`.
    """
    content = read(MANIFEST)
    if digest_of(content) != digest:
        raise BundleRefused(bundle, MANIFEST, f"its digest is {digest_of(content)}, not {digest}")
    manifest = decode_manifest(bundle, content)
    with _one_step(path) as work:
        for name, listed in manifest.files.items():
            received = read(name)
            _check_content(bundle, name, listed, received)
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_bytes(received)
        (work / MANIFEST).write_bytes(content)
    return Verified(path.resolve(), manifest, digest)


def write_bundle(path: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write the files into a directory beside `path`, add the manifest and move it there in one step.

    Whoever opens `path` sees the old bundle, none for an instant, or the new one; never a half.
    """
    with _one_step(path) as work:
        fill(work)
        files = {}
        for name in sorted(_walk(work)):
            content = (work / name).read_bytes()
            files[name] = File(hashlib.sha256(content).hexdigest(), len(content))
        (work / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(Manifest(files)), indent=1))


@contextmanager
def _one_step(path: Path) -> Iterator[Path]:
    """A directory to be filled, which then takes the place of `path`; nothing stays of it after an error."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        work.chmod(0o755)
        yield work
        files = [work / name for name in (*_walk(work), MANIFEST)]
        sync(files + sorted({file.parent for file in files}))
        old = work.with_name(work.name + ".old")
        if path.exists():
            path.rename(old)
        work.rename(path)
        sync([path.parent])
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def sync(paths: Iterable[Path]) -> None:
    """Wait until files and directories would survive a power cut."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _walk(root: Path) -> Iterable[str]:
    for directory, below, names in os.walk(root):
        for name in (*names, *below):
            path = Path(directory, name)
            place = path.relative_to(root).as_posix()
            _check_place(root, path, place)
            if path.is_file() and place != MANIFEST:
                yield place


def _check_place(root: Path, path: Path, name: str) -> None:
    if path.is_symlink() or not path.resolve().is_relative_to(root):
        raise BundleRefused(root, name, "a link or a place outside the bundle", "Put the file itself there.")


def _check_content(bundle: Path | str, name: str, listed: File, content: bytes) -> None:
    if len(content) != listed.bytes or hashlib.sha256(content).hexdigest() != listed.sha256:
        raise BundleRefused(bundle, name, f"its {len(content)} bytes do not match the manifest's digest")
    if PurePosixPath(name).suffix in PICKLE_SUFFIXES or content.startswith(PICKLE_HEADS):
        what = "a pickle or an archive, which can run code when opened"
        raise BundleRefused(bundle, name, what, "Save weights as safetensors.")
