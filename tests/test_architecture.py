"""The arrow reference <- kernels <- bench, read from the imports themselves."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("reference", "kernels", "bench")
NAMESPACE = "resblock_bench"


def imported_modules(source, package):
    """Full dotted names of all that `source`, a module of `package`, imports, wherever it does.

    ``from a import b`` counts as a.b, since b may be a module; a relative import is resolved
    against the package; importlib.import_module and __import__ count where the name is a literal.
    """
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            names += [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called in ("importlib.import_module", "import_module", "__import__"):
                names.append(str(node.args[0].value))
    return names


def is_or_in(name, package):
    return name == package or name.startswith(package + ".")


def imports_of(folder):
    """(file, imported name) of every module in a folder."""
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        package = f"{NAMESPACE}.{folder}"
        for name in imported_modules(path.read_text(encoding="utf-8"), package):
            found.append((str(path.relative_to(ROOT)), name))
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import a.b as c, d", ["a.b", "d"]),
        ("from a import b, c", ["a.b", "a.c"]),
        ("from . import x", ["resblock_bench.kernels.x"]),
        ("from .x import y", ["resblock_bench.kernels.x.y"]),
        ("from ..bench import z", ["resblock_bench.bench.z"]),
        ("def f():\n    if 1:\n        import late", ["late"]),
        ("import_module('a.b'); __import__('c')", ["a.b", "c"]),
        ("f('not.an.import'); import_module(name)", []),
    ],
    ids=["import", "from", "dot", "dot module", "two dots", "inside", "by call", "other calls"],
)
def test_the_reader_of_imports_finds_them(source, expected):
    assert imported_modules(source, "resblock_bench.kernels") == expected


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [("reference", "kernels"), ("reference", "bench"), ("kernels", "bench")],
)
def test_the_arrow_points_one_way(folder, forbidden):
    found = imports_of(folder)
    assert found, f"nothing to read in {folder}/"
    wrong = [pair for pair in found if is_or_in(pair[1], f"{NAMESPACE}.{forbidden}")]
    assert not wrong, f"{folder} must not import {forbidden}"


@pytest.mark.parametrize("folder", [*FOLDERS, "tests"])
def test_nobody_imports_the_bare_names(folder):
    """From the repository root they resolve too, to a second copy of every function."""
    wrong = [pair for pair in imports_of(folder) for bare in FOLDERS if is_or_in(pair[1], bare)]
    assert not wrong, f"import {NAMESPACE}.{wrong[0][1]} instead: {wrong}"


def test_reference_imports_torch_and_the_standard_library_only():
    found = imports_of("reference")
    roots = {name.split(".")[0] for _, name in found}
    assert "torch" in roots
    allowed = {"torch", NAMESPACE, *sys.stdlib_module_names}
    wrong = [pair for pair in found if pair[1].split(".")[0] not in allowed]
    assert not wrong
    wrong = [
        pair
        for pair in found
        if is_or_in(pair[1], NAMESPACE) and not is_or_in(pair[1], f"{NAMESPACE}.reference")
    ]
    assert not wrong


def test_importing_the_reference_loads_no_kernels():
    """What the imports say, seen from outside: in a fresh interpreter."""
    code = (
        "import sys, resblock_bench.reference\n"
        "print([m for m in sys.modules if m.startswith(('resblock_bench.kernels',"
        " 'resblock_bench.bench'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
