"""The code of another revision, checked out beside the working tree, and how a process imports it.

Of this project only `reference/` and `kernels/` are taken from the revision: the suite that
measures is the same on both sides, so that nothing but what is measured differs.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from resblock_bench.bench.checkout import git, is_checkout, package_folder, run_git
from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.machine.scratch import SUFFIX, scratch_folder

_MEASURED = ("reference", "kernels")
_TREE = "tree"


def repository_around(start: Path) -> Path:
    """The root of the git repository that holds `start`. Raises UsageError where there is none."""
    try:
        done = run_git(start, "rev-parse", "--show-toplevel")
    except OSError:
        raise UsageError("--base needs git, which is not installed") from None
    if done.returncode:
        raise UsageError(
            f"{start} is in no git repository that can be used ({done.stderr.strip()}), and --base "
            "names a revision of one: run it in a checkout, or compare two run folders"
        )
    return Path(done.stdout.strip())


def resolve(repository: Path, revision: str) -> str:
    """The commit that a revision names. Raises UsageError where it names none."""
    commit = git(repository, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if commit is None:
        raise UsageError(
            f"--base {revision!r} is no revision of {repository}: name a branch, tag or commit "
            "that 'git log' knows (a shallow clone lacks older ones: git fetch --unshallow)"
        )
    return commit


@contextlib.contextmanager
def checked_out(repository: Path, commit: str) -> Iterator[Path]:
    """A worktree of the commit, removed afterwards."""
    with scratch_folder() as folder:
        tree = folder / _TREE
        try:
            done = run_git(repository, "worktree", "add", "--detach", "--quiet", str(tree), commit)
            if done.returncode:
                raise UsageError(f"git cannot check {commit} out: {done.stderr.strip()}")
            yield tree
        finally:
            # Twice: one that git was interrupted in making is locked.
            git(repository, "worktree", "remove", "--force", "--force", str(tree))
            _forget_killed(repository)


def _forget_killed(repository: Path) -> None:
    """Remove the entries of comparisons that were killed, whose folders are gone, and no others."""
    for line in (git(repository, "worktree", "list", "--porcelain") or "").splitlines():
        tree = Path(line.removeprefix("worktree "))
        if tree.name == _TREE and tree.parent.name.endswith(SUFFIX) and not tree.exists():
            git(repository, "worktree", "remove", "--force", str(tree))


def python_paths(name: str, tree: Path, sources: Sequence[Path], scratch: Path) -> list[Path]:
    """What the Python path of a process begins with so that it imports the code of a tree.

    name      how people call the tree: a revision, or "the working tree"
    sources   folders within the tree that packages are imported from; empty for this project,
              whose packages are put together in `scratch`, an empty folder

    Raises UsageError for a folder that the tree lacks, and where no folder was named and the tree
    is not this project's.
    """
    if sources:
        require_sources(name, tree, sources)
        return [tree / source for source in sources]
    if not is_checkout(tree):
        raise UsageError(
            f"{name} is not a checkout of resblock-bench: name the folder that your packages are "
            "imported from with --source, such as --source src"
        )
    namespace = scratch / "resblock_bench"
    namespace.mkdir()
    for package in _MEASURED:
        (namespace / package).symlink_to(tree / package)
    (namespace / "bench").symlink_to(package_folder("bench"))
    return [scratch]


def require_sources(name: str, tree: Path, sources: Sequence[Path]) -> None:
    """Raises UsageError for a folder that the tree lacks, or that lies outside of it: both sides
    would import the same."""
    for source in sources:
        folder = tree / source
        if not folder.is_dir() or not folder.resolve().is_relative_to(tree.resolve()):
            raise UsageError(
                f"--source {source} is no folder within {name}: name the folder that your packages "
                "are imported from, relative to the repository and in both revisions"
            )
