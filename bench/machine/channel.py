"""A process's talk with who started it: bytes in, bytes out, each message whole."""

import time
from collections.abc import Callable
from multiprocessing.connection import Connection

PHASE, MESSAGE, REPLY = b"P", b"M", b"R"
"""How a message from a process begins."""


class Channel:
    """The end that the process holds; `file` is the number of its socket.

    What it waits for raises EOFError once nobody holds the other end. `waited_s` is how long it
    has waited for messages.
    """

    def __init__(self, file: int) -> None:
        self._socket: Connection = Connection(file)
        self.waited_s = 0.0

    def announce(self, phase: str) -> None:
        """Tell which phase begins; a process that ends is said to have ended in it."""
        self._send(PHASE + phase.encode())

    def send(self, message: bytes) -> None:
        self._send(MESSAGE + message)

    def receive(self) -> bytes:
        """The next message."""
        began = time.monotonic()
        try:
            return self._socket.recv_bytes()
        except OSError:
            raise EOFError from None
        finally:
            self.waited_s += time.monotonic() - began

    def reply(self, message: bytes) -> None:
        """The last message of all: what the process was started for."""
        self._send(REPLY + message)

    def _send(self, message: bytes) -> None:
        try:
            self._socket.send_bytes(message)
        except OSError:
            raise EOFError from None


Function = Callable[[bytes, Channel], bytes]
"""What a process is started for: from a message to the reply."""
