"""The nursery: what it gives birth to begins at once, and no end of anybody leaves somebody behind or waiting."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from models.visit import Visit
from streams import nursery
from streams.modelprocess import ModelProcess
from streams.nursery import GONE, Nursery, Stillborn
from streams.settings import Settings
from tests.workers import alive, children


@pytest.fixture
async def home(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Nursery]:
    monkeypatch.setattr(nursery, "MODULE", "tests.mortalmodel")
    home = Nursery()
    yield home
    await home.close()


async def nursery_of(home: Nursery) -> int:
    """Its pid, from one of its children."""
    child = await home.birth()
    status = Path(f"/proc/{child.pid}/status").read_text()
    await child.kill()
    return int(status.split("PPid:")[1].split()[0])


async def test_each_end_is_told_to_whom_it_concerns(home: Nursery) -> None:
    killed, left = await home.birth(), await home.birth()
    os.kill(killed.pid, signal.SIGSEGV)
    assert await killed.ended == -signal.SIGSEGV
    left.writer.close()  # its input ends, and so does it
    assert await asyncio.wait_for(left.ended, 10) == 0
    await killed.kill()


async def test_one_that_ends_as_soon_as_it_is_born_is_told_too(home: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    connect, ended = asyncio.open_connection, asyncio.Event()

    async def slow(**given: Any) -> Any:
        os.kill(children(home_pid)[0], signal.SIGKILL)
        await ended.wait()
        return await connect(**given)

    home_pid = await nursery_of(home)
    monkeypatch.setattr(asyncio, "open_connection", slow)
    asyncio.get_running_loop().call_later(0.5, ended.set)
    child = await home.birth()
    assert child.ended.done() and await child.ended == -signal.SIGKILL
    await child.kill()


async def test_many_at_once_are_born_and_end(home: Nursery) -> None:
    born = await asyncio.gather(*(home.birth() for _ in range(20)))
    assert len({child.pid for child in born}) == 20
    await asyncio.gather(*(child.kill() for child in born))
    assert not any(alive(child.pid) for child in born)
    assert not children(await nursery_of(home))


async def test_who_no_longer_wants_a_child_leaves_none_behind(home: Nursery) -> None:
    await nursery_of(home)
    for _ in range(10):
        wanted = asyncio.create_task(home.birth())
        await asyncio.sleep(0)
        wanted.cancel()
        await asyncio.wait([wanted])
    parent = await nursery_of(home)  # a birth after all others
    deadline = asyncio.get_running_loop().time() + 10
    while children(parent) and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.05)
    assert not children(parent)


async def test_without_the_nursery_its_children_work_on_and_the_next_birth_starts_another(
    home: Nursery, tmp_path: Path
) -> None:
    (tmp_path / "version").write_text("v1")
    model = ModelProcess(Settings(), tmp_path, home)
    await model.start()
    child, asked = await home.birth(), [Visit("a", [["home"]])]
    os.kill(await nursery_of(home), signal.SIGKILL)
    assert await child.ended == GONE
    assert (await model.answer(asked)).failures == {}
    os.kill(model.pid or 0, signal.SIGKILL)
    assert (await model.answer(asked)).failures == {"died": 1}
    await model.close()
    await child.kill()


async def test_a_nursery_that_ends_before_a_birth_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nursery, "MODULE", "tests.no_such_module")
    home = Nursery()
    for _ in range(2):
        with pytest.raises(Stillborn, match="ended with 1"):
            await home.birth()
    await home.close()
