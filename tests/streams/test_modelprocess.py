"""The model's process: it answers as in one process, dies, comes back, and ends with its worker."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

from models.bundle import load_bundle
from models.visit import Visit
from streams import nursery
from streams.errors import ModelLost, ModelRefused
from streams.modelprocess import DEATHS, ModelProcess
from streams.nursery import Nursery
from streams.settings import Settings
from tests.workers import ROOT, alive, children

PARENT = """
import asyncio, sys, time
from pathlib import Path
from models.visit import Visit
from streams import nursery
from streams.modelprocess import ModelProcess
from streams.settings import Settings

async def main():
    nursery.MODULE = "tests.mortalmodel"
    model = ModelProcess(Settings(), Path(sys.argv[1]), nursery.Nursery())
    await model.start()
    asking = asyncio.create_task(model.answer([Visit(sys.argv[2], [["home"]])]))
    await asyncio.sleep(0 if sys.argv[3] == "deaf" else 0.2)
    print(model.pid, flush=True)
    time.sleep(60)

asyncio.run(main())
"""


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a mortal model in the place of a bundle."""
    monkeypatch.setattr(nursery, "MODULE", "tests.mortalmodel")
    (tmp_path / "version").write_text("v1")
    return tmp_path


@asynccontextmanager
async def started(bundle: Path, settings: Settings | None = None) -> AsyncIterator[ModelProcess]:
    """A model's process that ends with the test."""
    home = Nursery()
    model = ModelProcess(settings or Settings(), bundle, home)
    try:
        await model.start()
        yield model
    finally:
        await model.close()
        await home.close()


def visits(*seeds: str) -> list[Visit]:
    return [Visit(seed, [["home", "shoes"]]) for seed in seeds]


async def fallbacks(model: ModelProcess, *seeds: str) -> tuple[list[str | None], dict[str, int]]:
    answered = await model.answer(visits(*seeds))
    return [answer.fallback for answer in answered.answers], answered.failures


def gone(pid: int, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


@pytest.mark.slow
async def test_it_answers_as_in_one_process(tiny_bundle: Path) -> None:
    bundle, asked = load_bundle(tiny_bundle, "cpu"), [Visit(f"s{n}", [["home"] * n, ["cart"]]) for n in range(5)]
    settings = Settings(device="cpu", model_threads=torch.get_num_threads())  # so that sums run in the same order
    async with started(tiny_bundle, settings) as model:
        answered = await model.answer(asked)
        loaded = (model.loaded.version, model.loaded.digest, model.loaded.router_digest)
    assert loaded == (bundle.version, bundle.digest, bundle.router_digest)
    assert [answer.forecast for answer in answered.answers] == bundle.forecast(asked)
    assert [answer.fallback for answer in answered.answers] == [None] * 5
    assert answered.failures == {}


@pytest.mark.parametrize(("device", "code", "words"), [("cpu", 5, "manifest.json"), ("cuda", 2, "CUDA")])
async def test_a_refusal_comes_through_with_its_exit_code(
    device: str, code: int, words: str, tiny_bundle: Path, tmp_path: Path
) -> None:
    settings, bundle = Settings(device=device), tiny_bundle if device == "cuda" else tmp_path
    before = children(os.getpid())  # the broker of other tests may be among them
    with pytest.raises(ModelRefused, match=words) as refused:
        async with started(bundle, settings):
            pass
    assert refused.value.exit_code == code
    assert children(os.getpid()) == before


async def test_it_dies_and_another_answers(notes: Path) -> None:
    async with started(notes) as model:
        first = (await model.answer(visits("a"))).answers[0].forecast.path
        assert await fallbacks(model, "b", "once") == ([None, None], {"died": 1})
        assert (await model.answer(visits("a"))).answers[0].forecast.path not in (first, [])


async def test_killed_between_two_batches(notes: Path) -> None:
    async with started(notes) as model:
        os.kill(model.pid or 0, signal.SIGKILL)
        assert await fallbacks(model, "a") == ([None], {"died": 1})


async def test_what_kills_it_twice_is_answered_by_frequencies(notes: Path) -> None:
    async with started(notes) as model:
        for _ in range(DEATHS):  # a forecast between, so they do not add up
            assert await fallbacks(model, "poison", "b") == (["model_lost"] * 2, {"died": 2})
            assert await fallbacks(model, "b") == ([None], {})


@pytest.mark.parametrize("seeds", [["deadly"], ["poison1", "poison2", "poison3"]], ids=["one batch", "batch by batch"])
async def test_when_nothing_helps_the_worker_ends(notes: Path, seeds: list[str]) -> None:
    async with started(notes) as model:
        with pytest.raises(ModelLost, match=f"died {DEATHS} times"):
            for seed in seeds:
                await model.answer(visits(seed))


async def test_an_ordinary_failure_is_tried_again_in_the_child(notes: Path) -> None:
    async with started(notes, Settings(model_retries=2)) as model:
        pid = model.pid
        assert await fallbacks(model, "raise") == (["model_failed: ValueError"], {"error": 2})
        assert model.pid == pid


async def test_another_bundle_in_its_place_is_refused(notes: Path) -> None:
    async with started(notes) as model:
        (notes / "version").write_text("v2")
        with pytest.raises(ModelRefused, match="not the bundle that was asked for") as refused:
            await model.answer(visits("once"))
        assert refused.value.exit_code == 5


async def test_a_child_that_cannot_even_start(notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nursery, "MODULE", "tests.no_such_module")
    with pytest.raises(ModelLost, match="ended with 1 while it loaded"):
        async with started(notes):
            pass


async def test_the_terminals_signals_do_not_end_it(notes: Path) -> None:
    async with started(notes) as model:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(model.pid or 0, number)
        assert await fallbacks(model, "a") == ([None], {})


async def test_the_event_loop_runs_on_while_the_model_works(notes: Path) -> None:
    async with started(notes) as model:
        asking = asyncio.create_task(model.answer(visits("slow")))
        while not (notes / "asked-slow").exists():
            await asyncio.sleep(0.01)
        assert not asking.done()
        asking.cancel()
        await asyncio.wait([asking])


@pytest.mark.parametrize(("seed", "how"), [("a", "idle"), ("slow", "at work"), ("a", "deaf")])
def test_it_ends_with_its_worker(notes: Path, seed: str, how: str) -> None:
    """Also with one that is killed before it has read the last answer: then its end is an error to the model."""
    command = [sys.executable, "-c", PARENT, str(notes), seed, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as parent:
        try:
            assert parent.stdout is not None
            pid = int(parent.stdout.readline())
            assert alive(pid)
            time.sleep(0.5)  # for the answer that nobody reads
        finally:
            parent.kill()
    assert gone(pid)


async def test_close_ends_it(notes: Path) -> None:
    before = set(children(os.getpid()))  # the broker of other tests may be among them
    home = Nursery()
    model = ModelProcess(Settings(), notes, home)
    await model.start()
    (nursery_pid,), pid = set(children(os.getpid())) - before, model.pid or 0
    await model.close()
    assert gone(pid) and model.pid is None
    await model.close()
    await home.close()
    assert gone(nursery_pid)
    await home.close()
