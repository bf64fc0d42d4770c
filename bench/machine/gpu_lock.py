"""A GPU is measured on by one run of this suite at a time."""

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from resblock_bench.bench.errors import UsageError

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
"""A folder that others write to may hold a link, or a pipe that nobody writes to."""


@contextmanager
def only_user(gpu: str) -> Iterator[None]:
    """Holds the lock of a GPU, named by its UUID; it goes with the process, however that ends.

    Raises UsageError where another run of this suite holds it.
    """
    name = re.sub(r"[^A-Za-z0-9-]", "-", re.sub("^(GPU|MIG)-", "", gpu))
    path = Path(tempfile.gettempdir()) / f"resblock-bench-{name}.lock"
    try:
        # Opened before it is created: what somebody else made there may refuse O_CREAT.
        file = os.open(path, _FLAGS) if path.exists() else _created(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(file)
            raise
    except BlockingIOError:
        raise UsageError(
            f"another run of this suite measures on {gpu}: wait for it, or name another GPU "
            "with --devices or CUDA_VISIBLE_DEVICES"
        ) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be locked ({error.strerror}): remove it") from None
    try:
        yield
    finally:
        os.close(file)


def _created(path: Path) -> int:
    file = os.open(path, _FLAGS | os.O_CREAT, 0o644)
    os.fchmod(file, 0o644)  # whatever the umask: other users must be able to lock it
    return file
