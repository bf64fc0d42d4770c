"""A temporary folder that goes with the process that made it, however that ends."""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

# In the background, so that it is nobody's child: what ends a process's children leaves it alone.
_JANITOR = 'exec 3<&0; (read -r _ <&3; rm -rf "$0") >/dev/null 2>&1 &'


SUFFIX = "-resblock-bench"
"""Of the names of these folders."""


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder for what can be computed again, such as truths, which may take gigabytes.

    It is removed at the end, and if this process is killed before, by one that notices.
    """
    folder = Path(tempfile.mkdtemp(SUFFIX))
    # It waits for the end of its input, whose other end only this process holds.
    janitor = subprocess.Popen(
        ["/bin/sh", "-c", _JANITOR, folder], stdin=subprocess.PIPE, start_new_session=True
    )
    assert janitor.stdin is not None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        janitor.stdin.close()
        janitor.wait()
