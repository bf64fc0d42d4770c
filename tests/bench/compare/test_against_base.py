"""A revision of a repository against its working tree, each with its own packages."""

import dataclasses
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from msgspec.structs import replace
from rich.console import Console
from support.comparing import FAST, UNDISTURBED, checked, plan_of
from support.sweeps import TINY

from resblock_bench.bench.compare import compare, comparison
from resblock_bench.bench.compare.source_tree import (
    checked_out,
    python_paths,
    repository_around,
    resolve,
)
from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.findings.findings import exit_code
from resblock_bench.bench.gate import check
from resblock_bench.bench.lockstep.testbed import Side
from resblock_bench.bench.machine import process
from resblock_bench.bench.machine.scratch import SUFFIX
from resblock_bench.bench.measure.origin import Origin

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]

# Appended to the fused block of one side: what it does depends on the batch.
SPOILED = """
import os as _os
import time as _time

_forward = ResBlock.forward


def _spoiled(self, x, emb):
    if len(x) == {slow}:
        _time.sleep(0.03)
    if len(x) == {crashing}:
        _os._exit(1)
    out = _forward(self, x, emb)
    return out * 1.01 if len(x) == {wrong} else out


ResBlock.forward = _spoiled
"""
SAME, HEAD_SLOW, HEAD_WRONG, HEAD_CRASHING, BASE_SLOW, BASE_WRONG, NEVER = range(2, 9)


def git(folder, *arguments):
    identity = ["-c", "user.name=T", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", "-C", folder, *identity, *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A repository with this project's packages. Its base is slow and wrong for some batches, its
    working tree for others; the branch `broken` cannot be imported, `lacking` lacks a module."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("reference", "kernels", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    blocks = folder / "kernels" / "blocks.py"
    source = blocks.read_text() + UNDISTURBED
    git(folder, "init", "--quiet", "--initial-branch=broken")
    for branch, text in (
        ("broken", source + "\n)\n"),
        ("lacking", source),
        ("base", source + SPOILED.format(slow=BASE_SLOW, wrong=BASE_WRONG, crashing=NEVER)),
    ):
        git(folder, "checkout", "--quiet", "-B", branch)
        blocks.write_text(text)
        if branch == "lacking":
            (folder / "kernels" / "tuned.py").rename(folder / "tuned.txt")
        elif branch == "base":
            (folder / "tuned.txt").rename(folder / "kernels" / "tuned.py")
        git(folder, "add", "-A")
        git(folder, "commit", "--quiet", "-m", branch)
    blocks.write_text(
        source + SPOILED.format(slow=HEAD_SLOW, wrong=HEAD_WRONG, crashing=HEAD_CRASHING)
    )
    return folder


def against(project, revision, batches=range(SAME, NEVER)):
    """Compare the working tree, as `check --timing --base` does."""
    return compare.BaseRequest(
        base=revision,
        plan=plan_of(*({"impl": "fused", "batch": batch} for batch in batches)),
        start=project / "kernels",
        timeout_s=120.0,
        rule=FAST,
    )


@pytest.fixture(scope="module")
def outcome(project):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "STAGES", (3,))
        return compare.against_base(against(project, "base"), Console(quiet=True))


@pytest.fixture(scope="module")
def items(outcome):
    return {item.cell.batch: item for item in outcome.items}


def level_of(outcome, batch):
    """The finding about a cell and the exit code that it means alone."""
    (item,) = [item for item in outcome.items if item.cell.batch == batch]
    findings = compare.findings_of(dataclasses.replace(outcome, items=[item]), "compare")
    return (findings[0].level if findings else None), exit_code(findings), findings


def test_a_slower_working_tree_is_a_regression(outcome, items):
    item = items[HEAD_SLOW]
    assert (item.verdict.word, item.confirmed) == ("SLOW", True)
    assert item.head > item.base
    assert level_of(outcome, HEAD_SLOW)[:2] == ("regression", 1)


def test_what_is_the_same_is_not_called_slow(outcome, items):
    assert items[SAME].verdict.word in ("SAME", "AMBIGUOUS")
    assert level_of(outcome, SAME)[1] in (0, 4)


def test_a_wrong_working_tree_is_wrong(outcome, items):
    assert items[HEAD_WRONG].failed[0] == "wrong"
    assert level_of(outcome, HEAD_WRONG)[:2] == ("wrong", 5)
    assert exit_code(compare.report_of(outcome).findings) == 5


def test_a_wrong_base_leaves_nothing_to_compare(outcome, items):
    assert items[BASE_WRONG].at_base
    assert "by the float64 result of the installed reference" in items[BASE_WRONG].failed[1]
    assert level_of(outcome, BASE_WRONG)[:2] == ("invalid", 3)


def test_a_working_tree_that_crashes_is_invalid(outcome, items):
    status, reason = items[HEAD_CRASHING].failed
    assert (status, reason) == (
        "crashed",
        "the working tree: its process ended with code 1, in its phase 'check'",
    )
    assert level_of(outcome, HEAD_CRASHING)[:2] == ("invalid", 3)


def test_several_times_as_fast_is_to_be_explained(outcome):
    level, code, findings = level_of(outcome, BASE_SLOW)
    assert (level, code) == ("invalid", 3)
    assert "find out what it no longer does" in findings[0].text


def test_the_sides_are_named_and_differ(outcome, project):
    commit = git(project, "rev-parse", "base").strip()
    assert outcome.title == f"the working tree against base ({commit[:9]})"
    assert outcome.notes == []
    assert any("was never calibrated" in note for note in outcome.uncalibrated)


@pytest.mark.parametrize(
    ("revision", "text"),
    [
        ("broken", r"broken .* cannot be imported.*SyntaxError"),
        # What it lacks is not to come from the package that is installed.
        ("lacking", r"lacking .*(cannot be imported|not from .*: this side lacks it)"),
    ],
)
def test_a_base_that_does_not_build(project, revision, text, monkeypatch):
    if revision == "broken":  # what the working tree is forked from would be ended at once
        start = Side.start
        monkeypatch.setattr(Side, "start", lambda side: side.name == compare.HEAD or start(side))
    found = checked(against(project, revision, [SAME]))
    assert {finding.level for finding in found.findings} >= {"invalid"}
    assert re.search(text, found.findings[0].text)
    assert exit_code(found.findings) == 3


def test_the_worktree_is_gone_afterwards(project):
    with checked_out(project, resolve(project, "base")) as tree:
        assert (tree / "kernels" / "blocks.py").is_file()
    assert not tree.exists()
    assert len(git(project, "worktree", "list").splitlines()) == 1


def test_the_commit_under_way_in_a_hook_is_left_alone(tmp_path, monkeypatch):
    """git names its index to a hook, and would make the worktree's in its place."""
    root = tmp_path / "repository"
    (root / "src").mkdir(parents=True)
    git(root, "init", "--quiet")
    for text in ("one", "two", "three"):
        (root / "src" / "file").write_text(text)
        git(root, "add", "-A")
        if text != "three":
            git(root, "commit", "--quiet", "-m", text)
    staged = git(root, "ls-files", "--stage")
    monkeypatch.setenv("GIT_DIR", str(root / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(root / ".git" / "index"))
    assert repository_around(root / "src") == root
    with checked_out(root, resolve(root, "HEAD~1")) as tree:
        assert (tree / "src" / "file").read_text() == "one"
    monkeypatch.undo()
    assert git(root, "ls-files", "--stage") == staged


def test_of_worktrees_that_are_gone_only_those_of_killed_comparisons_are_forgotten(
    project, tmp_path
):
    killed, own = tmp_path / f"tmp1{SUFFIX}" / "tree", tmp_path / "own" / "tree"
    for tree in (killed, own):
        git(project, "worktree", "add", "--detach", tree, "base")
        shutil.rmtree(tree)
    with checked_out(project, resolve(project, "base")):
        pass
    listed = git(project, "worktree", "list")
    git(project, "worktree", "prune")
    assert str(own) in listed
    assert str(killed) not in listed


def test_revisions_and_folders_that_are_not_there(project, tmp_path):
    with pytest.raises(UsageError, match=r"--base 'nowhere' is no revision of"):
        resolve(project, "nowhere")
    with pytest.raises(UsageError, match=r"is in no git repository"):
        repository_around(tmp_path)
    (project / "outside").symlink_to(tmp_path)
    for source in ("src", tmp_path, "..", "outside"):
        with pytest.raises(UsageError, match=rf"--source {source} is no folder within base: name"):
            python_paths("base", project, [Path(source)], tmp_path)
    (project / "outside").unlink()
    with pytest.raises(
        UsageError, match=r"^base is not a checkout of resblock-bench.*--source src"
    ):
        python_paths("base", tmp_path, [], tmp_path)


def test_a_revision_that_is_not_there_is_found_before_anything_is_measured(
    run_cli, project, monkeypatch
):
    monkeypatch.chdir(project)
    monkeypatch.setattr(check, "check", lambda *arguments: pytest.fail("it was measured"))
    done = run_cli("check", "--base", "nowhere")
    assert done.code == 2
    assert "--base 'nowhere' is no revision of" in done.err


def test_another_repository_names_its_sources(project, tmp_path):
    assert python_paths("base", project, [Path("kernels")], tmp_path) == [project / "kernels"]


def test_modules_of_the_repository_come_from_the_folders_that_were_named(tmp_path, monkeypatch):
    def imported(name, file):
        module = types.ModuleType(name)
        module.__file__ = str(tmp_path / file)
        monkeypatch.setitem(sys.modules, name, module)

    before = set(sys.modules)
    src = tmp_path / "src"
    src.mkdir()
    (src / "my_gate.py").touch()
    origin = Origin([str(src)], str(tmp_path), time.time() + 60)
    imported("my_gate", "src/my_gate.py")
    imported("dependency", "venv/site-packages/dependency.py")
    origin.hold(["my_gate"], before)
    imported("my_kernels", "lib/my_kernels.py")
    with pytest.raises(RuntimeError, match=r"my_kernels was imported from .*lib"):
        origin.hold(["my_gate"], before)
    with pytest.raises(RuntimeError, match=r"my_gate was imported from .*, not from other"):
        replace(origin, folders=["other"]).hold(["my_gate"], sys.modules)


def test_what_every_round_imports_must_not_change(tmp_path, monkeypatch):
    (tmp_path / "my_gate.py").touch()
    module = types.ModuleType("my_gate")
    module.__file__ = str(tmp_path / "my_gate.py")
    before = set(sys.modules)
    monkeypatch.setitem(sys.modules, "my_gate", module)
    changed = (tmp_path / "my_gate.py").stat().st_mtime
    Origin([str(tmp_path)], "", changed).hold(["my_gate"], before)
    with pytest.raises(RuntimeError, match=r"my_gate\.py changed meanwhile"):
        Origin([str(tmp_path)], "", changed - 1).hold(["my_gate"], before)


def test_a_working_tree_that_cannot_be_imported_is_no_regression(run_cli, tmp_path, monkeypatch):
    packages = tmp_path / "path" / "resblock_bench"
    packages.mkdir(parents=True)
    for name in ("reference", "bench"):
        (packages / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "kernels", packages / "kernels")
    with (packages / "kernels" / "blocks.py").open("a") as file:
        file.write("\n)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process, "_own", process.Server([tmp_path / "path"]))
    done = run_cli("calibrate", *TINY, "-a", "impl=fused")
    assert done.code == 3
    assert "SyntaxError" in done.err
    assert "cannot be imported" in done.err
