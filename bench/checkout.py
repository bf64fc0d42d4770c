"""Which checkout this is, at which commit, and whose code runs."""

import importlib.util
import os
import subprocess
from pathlib import Path

from . import files
from .errors import InvalidError

_OF_A_REPOSITORY = {
    *("GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_INDEX_FILE", "GIT_PREFIX"),
    *("GIT_OBJECT_DIRECTORY", "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_IMPLICIT_WORK_TREE"),
}
"""Of `git rev-parse --local-env-vars`, without those of the configuration."""


def checkout_around(start: Path) -> Path:
    """The root of the project checkout that holds `start`; `start` where there is none."""
    return next((folder for folder in (start, *start.parents) if is_checkout(folder)), start)


def repository_root(start: Path) -> Path:
    """The root of this project's checkout or of another repository around `start`, else `start`."""
    roots = (f for f in (start, *start.parents) if is_checkout(f) or (f / ".git").exists())
    return next(roots, start)


def is_checkout(folder: Path) -> bool:
    """Whether the folder is the root of a checkout of this project."""
    try:
        return b'name = "resblock-bench"' in files.read(folder / "pyproject.toml")
    except OSError:
        return False


def in_checkout(start: Path) -> bool:
    """Whether `start` is in a checkout of this project."""
    return is_checkout(repository_root(start))


def package_folder(package: str) -> Path:
    """Where this program's own package of that name is; does not import it."""
    found = importlib.util.find_spec(f"resblock_bench.{package}")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).resolve().parent


def require_own_code(start: Path) -> None:
    """Raises InvalidError in a checkout of this project that is not the one whose code runs."""
    root, running = repository_root(start), package_folder("kernels").parent
    if is_checkout(root) and root.resolve() != running:
        raise InvalidError(
            f"{root} is a checkout of resblock-bench, and this command would measure the code of "
            f"{running}: run the one of the checkout's own environment"
        )


def source_state(folder: Path) -> tuple[str | None, bool | None]:
    """Commit of the checkout that tracks `folder`, and whether tracked files differ from it.

    (None, None) for an installed package, also when it lies inside somebody else's checkout.
    """
    if not git(folder, "ls-files", ".", timeout_s=10):
        return None, None
    commit = git(folder, "rev-parse", "HEAD", timeout_s=10)
    changes = git(folder, "status", "--porcelain", "--untracked-files=no", ":/", timeout_s=10)
    return commit, None if commit is None else bool(changes)


def git(folder: Path, *arguments: str, timeout_s: float | None = None) -> str | None:
    """What git prints; None where it fails or is not installed."""
    try:
        done = run_git(folder, *arguments, timeout_s=timeout_s)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def run_git(
    folder: Path, *arguments: str, timeout_s: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run git in the repository around a folder, whichever one this process was started in.

    A hook has variables that name the repository and index of the commit under way. They outrank
    the folder, and a worktree made with them overwrites that index. Raises OSError without git,
    TimeoutExpired.
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
