"""Runs git in the repository around a folder, whichever one this process was started in."""

import os
import subprocess
from pathlib import Path

_OF_A_REPOSITORY = {
    *("GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_INDEX_FILE", "GIT_PREFIX"),
    *("GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_IMPLICIT_WORK_TREE"),
}
"""Of `git rev-parse --local-env-vars`, without those of the configuration."""


def run(
    folder: Path, *arguments: str, timeout_s: float | None = None
) -> subprocess.CompletedProcess[str]:
    """What git printed and its exit code. Raises OSError without git, TimeoutExpired.

    A hook has variables that name the repository and index of the commit under way. They outrank
    the folder, and a worktree made with them overwrites that index.
    """
    environment = {name: v for name, v in os.environ.items() if name not in _OF_A_REPOSITORY}
    return subprocess.run(
        ["git", "-C", folder, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=timeout_s,
    )
