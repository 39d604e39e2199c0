"""The registry on a directory and on S3-like storage: whole bundles or none, whatever ends or refuses half way."""

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from models.bundle import load_bundle
from models.manifest import BundleRefused, open_manifest
from models.references import ModelRef
from streams import bundles
from tests import damage
from tests.swapping import variant
from trainer.errors import TrainingError
from trainer.registry import Registry

# Who signs it again can still not make it whole: these are seen in what the files hold.
SEEN_INSIDE = (damage.truncate, damage.put_a_pickle_in, damage.put_nan_in)


class Bucket(MemoryFileSystem):
    """Storage without renames or directories of its own, like S3; `room` is how many writes it takes, None: all."""

    protocol = "bucket"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    room: int | None = None
    is_silent = False  # keeps half of what it has no room for, and says nothing

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        if Bucket.room is not None:
            Bucket.room -= 1
            if Bucket.room < 0 and not Bucket.is_silent:
                raise OSError(errno.ENOSPC, "the bucket is full")
            if Bucket.room < 0:
                value = value[: len(value) // 2]
        super().pipe_file(path, value, mode, **options)

    def mv(self, *_: Any, **__: Any) -> None:
        raise AssertionError("nothing may rest on a rename")


fsspec.register_implementation("bucket", Bucket, clobber=True)


@pytest.fixture
def bucket() -> Iterator[str]:
    """The address of an empty one."""
    yield "bucket://models"
    Bucket.room, Bucket.is_silent = None, False
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]


@pytest.fixture(params=["directory", "bucket"])
def registry(request: pytest.FixtureRequest, tmp_path: Path, bucket: str) -> Registry:
    return Registry(str(tmp_path / "registry") if request.param == "directory" else bucket)


@pytest.fixture
def versions(tiny_bundle: Path, tmp_path: Path) -> list[Path]:
    """Two bundles."""
    return [variant(tiny_bundle, tmp_path / f"bundle{number}", f"card {number}") for number in range(2)]


def test_what_is_published_is_listed_found_checked_and_fetched(
    registry: Registry, versions: list[Path], tmp_path: Path
) -> None:
    assert registry.bundles() == []
    refs = [registry.publish(bundle) for bundle in versions]
    assert digests(registry) == {ref.digest for ref in refs} and len(refs) == 2
    assert registry.publish(versions[0]) == refs[0] and len(registry.bundles()) == 2
    for ref, bundle in zip(refs, versions, strict=True):
        registry.verify(ref)
        assert registry.find(ref.digest[:20]) == ref
        assert ref.digest == open_manifest(bundle).digest == load_bundle(bundles_path(ref, tmp_path), "cpu").digest
    for name in ("", "2999", refs[0].version[:4]):  # nothing, none, both
        with pytest.raises(TrainingError, match="browsecast models list"):
            registry.find(name)
    registry.remove(refs[0])
    assert registry.bundles() == [refs[1]]


def bundles_path(ref: ModelRef, tmp_path: Path) -> Path:
    """Where a worker has the bundle: in its place, or a copy; the second time no byte comes from the storage."""
    first = bundles.local(ref.uri, ref.digest, tmp_path / "cache")
    assert bundles.local(ref.uri, ref.digest, tmp_path / "cache") == first
    return first


@pytest.mark.parametrize("encoded", [True, False])
def test_an_address_may_have_blanks_and_accents_in_it(encoded: bool, versions: list[Path], tmp_path: Path) -> None:
    place = tmp_path / "the shop's café"
    ref = Registry(str(place)).publish(versions[0])
    (bundle,) = (path for path in place.iterdir() if path.is_dir())
    uri = bundle.as_uri() if encoded else ref.uri
    assert ("%20" in uri) == encoded
    assert bundles.local(uri, ref.digest, tmp_path / "cache") == bundle


def test_a_worker_s_copy_that_went_bad_is_fetched_again(bucket: str, versions: list[Path], tmp_path: Path) -> None:
    ref = Registry(bucket).publish(versions[0])
    copy = bundles_path(ref, tmp_path)
    damage.flip_a_byte(copy)
    assert load_bundle(bundles_path(ref, tmp_path), "cpu").digest == ref.digest
    damage.flip_a_byte(copy)
    Registry(bucket).remove(ref)
    with pytest.raises(BundleRefused, match="cannot be read"):
        bundles.local(ref.uri, ref.digest, tmp_path / "cache")


def digests(registry: Registry) -> set[str]:
    """Of all bundles that are published."""
    return {ref.digest for ref in registry.bundles()}


def half_ways(versions: list[Path]) -> range:
    """After how many writes a publication may end."""
    return range(len(open_manifest(versions[1]).manifest.files) + 1)


def test_storage_that_refuses_half_way_shows_nothing_and_the_next_publication_goes_through(
    bucket: str, versions: list[Path]
) -> None:
    registry = Registry(bucket)
    before = registry.publish(versions[0])
    for room in half_ways(versions):
        Bucket.room = room
        with pytest.raises(TrainingError, match=r"the bucket is full.*Nothing half written is ever used"):
            registry.publish(versions[1])
        assert registry.bundles() == [before]
    Bucket.room = None
    after = registry.publish(versions[1])
    registry.verify(after)
    assert digests(registry) == {before.digest, after.digest}


def test_storage_that_loses_half_of_a_file_and_says_nothing_is_found_out(bucket: str, versions: list[Path]) -> None:
    registry = Registry(bucket)
    Bucket.is_silent = True
    for room in half_ways(versions):
        Bucket.room = room
        with pytest.raises(TrainingError, match="does not hold what was written to it"):
            registry.publish(versions[1])
        assert registry.bundles() == []


def test_a_full_disk_leaves_the_champion_alone(versions: list[Path], tmp_path: Path) -> None:
    """A real limit of the operating system: files of this process may not grow beyond it."""
    registry = Registry(str(tmp_path / "registry"))
    before = registry.publish(versions[0])
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            import resource
            import signal

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
            registry.publish(versions[1])
        except TrainingError as error:
            code = 42 if "File too large" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
    assert registry.bundles() == [before]
    registry.publish(versions[1])
    assert len(registry.bundles()) == 2


def test_what_was_left_half_done_is_swept_once_it_is_old(bucket: str, versions: list[Path]) -> None:
    registry = Registry(bucket)
    before = registry.publish(versions[0])
    Bucket.room = 3
    with pytest.raises(TrainingError):
        registry.publish(versions[1])
    Bucket.room = None
    digest = open_manifest(versions[1]).digest
    assert registry.sweep(3_600.0, set()) == []  # it may be under way
    time.sleep(0.01)
    assert registry.sweep(0.0, {digest}) == []  # somebody names it
    (swept,) = registry.sweep(0.0, set())
    assert swept.endswith(digest.removeprefix("sha256:"))
    assert registry.bundles() == [before] and registry.sweep(0.0, set()) == []


@pytest.mark.parametrize("harm", damage.DAMAGES, ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("signed", [False, True])
def test_a_damaged_bundle_is_refused_at_the_door_and_inside(
    harm: Callable[[Path], None], signed: bool, tiny_bundle: Path, tmp_path: Path
) -> None:
    """`signed`: somebody gave the damaged files right digests; then it is another bundle, seen through where it can be.

    What lies in the registry keeps its name, which is its digest, so there a new signature is the first thing seen.
    """
    registry = Registry(str(tmp_path / "registry"))
    ref = registry.publish(tiny_bundle)
    outside = tmp_path / "outside"
    shutil.copytree(tiny_bundle, outside)
    for place in (outside, Path(ref.uri.removeprefix("file://"))):
        harm(place)
        if signed:
            damage.resign(place)
    if not signed or harm in SEEN_INSIDE:
        with pytest.raises(BundleRefused):
            registry.publish(outside)
    with pytest.raises(BundleRefused):
        registry.verify(ref)
    with pytest.raises(BundleRefused):
        bundles.local(ref.uri, ref.digest, tmp_path / "cache")
    if signed:
        assert registry.bundles() == []
    registry.verify(registry.publish(tiny_bundle))  # a whole one mends it


def test_what_is_wrong_with_an_address_is_said() -> None:
    for address in ("nosuch://bucket", "s3://bucket"):
        try:
            Registry(address)
        except TrainingError as error:
            assert "fsspec" in str(error) and address in str(error)
