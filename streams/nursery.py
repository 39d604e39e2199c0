"""Processes that begin at once: each is a fork of one that has imported what they need.

A model's libraries take seconds of a core to import; a fork of a process that has them takes milliseconds, and shares
its memory. The nursery is a child of the worker. Through its standard input, a socket, it gets one end of a connection
for each process that is wanted; it tells the pid of each that is born, and how each has ended. The nursery ends when
the worker does, and each process is meant to when its connection ends.
"""

import asyncio
import contextlib
import gc
import os
import signal
import socket
import struct
import sys
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from importlib import import_module
from select import select
from typing import BinaryIO, NamedTuple

MODULE = "streams.modelserver"  # what it runs, which must call `nurse`
GONE = 256  # no exit code: the nursery went first, so nobody knows
EXIT_S = 2.0  # from the end of the nursery's connection to its own
_BORN = 257
_TOLD = struct.Struct("<ii")  # a pid, and its exit code or _BORN

_Birth = tuple[int, asyncio.Future[int]]  # a pid, and what gets its exit code
Run = Callable[[BinaryIO, BinaryIO], object]  # a process's whole life: its input and its output


class Stillborn(Exception):
    """The nursery ended instead; the message says how."""


class Child(NamedTuple):
    """A process, seen from the worker. `ended` gets its exit code, as `subprocess` has them, or GONE."""

    pid: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    ended: asyncio.Future[int]

    async def kill(self) -> None:
        """End it, if it has not ended yet, and wait until it has."""
        if not self.ended.done():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self.writer.close()
        await asyncio.shield(self.ended)


class Nursery:
    """The worker's side."""

    def __init__(self) -> None:
        """Nothing is started yet."""
        self._process: asyncio.subprocess.Process | None = None
        self._control: socket.socket | None = None
        self._life: asyncio.Task[None] | None = None
        self._asking = asyncio.Lock()
        self._births: deque[asyncio.Future[_Birth]] = deque()  # in the order in which they were asked for
        self._ends: dict[int, asyncio.Future[int]] = {}  # of those that live

    async def birth(self) -> Child:
        """Another process; the first one has to wait for the imports. Raises Stillborn."""
        async with self._asking:
            ours, theirs = socket.socketpair()
            try:
                control = await self._running()
                born: asyncio.Future[_Birth] = asyncio.get_running_loop().create_future()
                self._births.append(born)
                with contextlib.suppress(OSError):  # it is on its way out, and what it ended with is told below
                    socket.send_fds(control, [b"\0"], [theirs.fileno()])
                pid, ended = await born
                reader, writer = await asyncio.open_connection(sock=ours)
            except BaseException:
                ours.close()
                raise
            finally:
                theirs.close()
            return Child(pid, reader, writer, ended)

    async def close(self) -> None:
        """End it. Its children must have been ended before."""
        if self._process is not None and self._life is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()  # it may be in the middle of its imports
            await asyncio.wait([self._life])

    async def _running(self) -> socket.socket:
        if self._control is None or self._life is None or self._life.done():
            self._control, theirs = socket.socketpair()
            self._control.setblocking(False)
            with theirs:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-P", "-m", MODULE),
                    stdin=theirs.fileno(),
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},  # it finds what we find
                )
            self._life = asyncio.create_task(self._hear(self._control, self._process))
        return self._control

    async def _hear(self, control: socket.socket, process: asyncio.subprocess.Process) -> None:
        """All that it tells, to its end."""
        told, loop = bytearray(), asyncio.get_running_loop()
        with control, contextlib.suppress(OSError):
            while some := await loop.sock_recv(control, 1024):
                told += some
                while len(told) >= _TOLD.size:
                    self._take(*_TOLD.unpack_from(told))
                    del told[: _TOLD.size]
        try:
            code = await asyncio.wait_for(process.wait(), EXIT_S)
        except TimeoutError:
            process.kill()
            code = await process.wait()
        for ended in self._ends.values():
            ended.set_result(GONE)
        self._ends = {}
        for born in self._births:
            if not born.done():
                born.set_exception(Stillborn(f"ended with {code}"))
        self._births.clear()

    def _take(self, pid: int, code: int) -> None:
        if code == _BORN:
            self._ends[pid] = asyncio.get_running_loop().create_future()
            if not (born := self._births.popleft()).done():  # else nobody wants it any more, and it hears so
                born.set_result((pid, self._ends[pid]))
        else:
            self._ends.pop(pid).set_result(code)


# ---------------------------------------------------------------- the nursery's side


def nurse(imports: Sequence[str], run: Run) -> None:
    """Import, then fork whenever the worker asks, until it ends. Only the worker decides when any of them end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    control = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # standard output is for data, not for what a library prints
    for name in imports:
        with contextlib.suppress(Exception):  # whoever needs it will say so
            import_module(name)
    gc.collect()
    gc.freeze()
    ended, ends = socket.socketpair()  # a byte for each end, for a signal alone may come just before the wait
    ends.setblocking(False)
    signal.set_wakeup_fd(ends.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with contextlib.suppress(ConnectionError):
        while True:
            ready, _, _ = select([control, ended], [], [])
            if ended in ready:
                ended.recv(4096)
                _bury(control)
            if control in ready:
                asked, descriptors, _, _ = socket.recv_fds(control, 1, 1)
                if not asked:
                    return
                _fork(control, descriptors[0], run)


def _fork(control: socket.socket, descriptor: int, run: Run) -> None:
    pid = os.fork()
    if pid == 0:
        control.close()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _live(descriptor, run)
    os.close(descriptor)
    control.send(_TOLD.pack(pid, _BORN))


def _live(descriptor: int, run: Run) -> None:
    """The child: it must never come back to what the nursery was doing."""
    code = 1
    try:
        link = socket.socket(fileno=descriptor)  # nobody closes it: that would wait for a thread that still reads
        run(link.makefile("rb"), link.makefile("wb"))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _bury(control: socket.socket) -> None:
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            control.send(_TOLD.pack(found[0], os.waitstatus_to_exitcode(found[1])))
