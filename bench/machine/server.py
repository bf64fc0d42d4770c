"""The interpreter that processes are forked from: it has imported what they need, and nothing else.

    python -c CODE JSON

JSON holds `Setup`. Requests come over a socket, with three files each: the channel over which
the process talks with who started it, the pipe that takes what it prints, and the pipe that tells
how it fares: its number first, its exit code at the end. A process is forked for every request, so
it starts in milliseconds and yet clean. Functions are named, arguments are bytes: nothing is
unpickled. The server ends when the other end of its socket is closed.
"""

import contextlib
import faulthandler
import importlib
import os
import selectors
import signal
import socket
import sys
from types import FrameType
from typing import NoReturn

import msgspec

from .channel import Channel
from .parent import adopt_orphans, die_with_parent, end_descendants

COUNT = 8
"""Bytes of a number on the pipe that tells how a process fares."""


class Setup(msgspec.Struct):
    """socket    the number of its file
    path      what the Python path begins with
    preload   the module that imports what processes need
    """

    socket: int
    path: list[str]
    preload: str


class Request(msgspec.Struct):
    """`function` as module:name, called with the first message and the channel; `variables` are
    set before it is imported."""

    function: str
    variables: dict[str, str]


def main(setup: Setup) -> None:
    """Import, say so, and fork whenever asked to.

    The kernel's signal at a parent's death would come at the end of the thread that started this:
    the end of the socket does as well.
    """
    importlib.import_module(setup.preload)
    with socket.socket(fileno=setup.socket) as asked:
        wake, woken = os.pipe()
        os.set_blocking(woken, False)
        signal.signal(signal.SIGCHLD, _ignore)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        # A terminal sends Ctrl-C to all its processes: who waits for this one ends it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        asked.sendall(b"\0")
        ends: dict[int, int] = {}
        with selectors.DefaultSelector() as selector:
            selector.register(asked, selectors.EVENT_READ)
            selector.register(wake, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is asked and not _fork(asked, [wake, woken], ends):
                        return
                    if key.fileobj == wake:
                        os.read(wake, 65536)
                        _reap(ends)


def _ignore(number: int, frame: FrameType | None) -> None:
    """A signal without a handler would not wake the server."""


def _fork(asked: socket.socket, own: list[int], ends: dict[int, int]) -> bool:
    """Serve a request; False where nobody is left to make one."""
    head, files, _, _ = socket.recv_fds(asked, COUNT, 3)
    if not head:
        return False
    length = int.from_bytes(_rest(asked, head, COUNT), "little")
    request = msgspec.json.decode(_rest(asked, b"", length), type=Request)
    channel, output, end = files
    server = os.getpid()
    pid = os.fork()
    if pid == 0:
        for number in (asked.fileno(), *own, end, *ends.values()):
            os.close(number)
        _live(request, channel, output, server)
    os.close(channel)
    os.close(output)
    ends[pid] = end
    _tell(end, pid)
    return True


def _rest(asked: socket.socket, data: bytes, length: int) -> bytes:
    while len(data) < length:
        more = asked.recv(length - len(data))
        if not more:
            raise EOFError("the request was cut off")
        data += more
    return data


def _reap(ends: dict[int, int]) -> None:
    """Tell of every process that has ended."""
    while ends:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        end = ends.pop(pid, None)
        if end is not None:
            _tell(end, os.waitstatus_to_exitcode(status))
            os.close(end)


def _tell(end: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody waits for it any more
        os.write(end, number.to_bytes(COUNT, "little", signed=True))


def _live(request: Request, channel: int, output: int, server: int) -> NoReturn:
    """The life of a process: its own group, its output in the pipe, one reply."""
    code = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        die_with_parent(server)
        adopt_orphans()
        for stream in (1, 2):
            os.dup2(output, stream)
        os.close(output)
        faulthandler.enable(file=2)
        os.environ.update(request.variables)
        module, _, name = request.function.partition(":")
        function = getattr(importlib.import_module(module), name)
        talk = Channel(channel)
        talk.reply(function(talk.receive(), talk))
        code = 0
    except EOFError:
        code = 0  # whoever waited for this has gone
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for printed in (sys.stdout, sys.stderr):
            try:
                printed.flush()
            except OSError:
                code = code or 1
        end_descendants(os.getpid())
        os._exit(code & 0xFF)
