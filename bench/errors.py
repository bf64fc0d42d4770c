"""What a user can mend: one sentence that says what was received, what is allowed, what to do."""

import difflib
import shlex
from collections.abc import Iterable

_ROOM = 60  # characters


class UsageError(Exception):
    """A request that cannot be carried out as given; the command line exits with 2."""


class NothingSelectedError(UsageError):
    """Axes that no cell has."""


class InvalidError(Exception):
    """What cannot be relied on: missing, damaged, or of another machine; exit code 3."""


def first_line(error: BaseException) -> str:
    """The class of an error, and the first line of what it says."""
    line = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {line}"


def command(*words: str) -> str:
    """A command of this program, to be copied into a shell."""
    return shlex.join(["resblock-bench", *words])


def shortened(received: str) -> str:
    """What a user gave, as far as a sentence has room for it."""
    return received if len(received) <= _ROOM else f"{received[:_ROOM]}…"


def unknown(kind: str, received: str, allowed: Iterable[str]) -> UsageError:
    """The error for a name outside a closed list, with the closest match if one is near."""
    names = list(allowed)
    close = difflib.get_close_matches(received, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    received = shortened(received)
    return UsageError(f"unknown {kind} {received!r}: it is one of {', '.join(names)}{hint}")
