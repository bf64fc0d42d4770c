"""The arrow reference <- kernels <- bench, read from the imports themselves."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FOLDERS = ("reference", "kernels", "bench")
NAMESPACE = "resblock_bench"
ROOMS = (
    "machine", "measure", "grid", "lockstep", "runs", "profile", "report", "fit", "compiled",
    "cost", "sweep", "findings", "compare", "tune", "gate", "gpu", "cli",
)  # fmt: skip
"""The rooms of bench/, lower first; below them all is what lies beside them."""


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
        package = ".".join([NAMESPACE, *path.parent.relative_to(ROOT).parts])
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


def room_of(name):
    """The room of a module of bench/ by its dotted name; None for what lies beside the rooms."""
    parts = name.split(".")
    return parts[2] if len(parts) > 2 and parts[2] in ROOMS else None


def test_every_room_is_listed_and_packaged():
    assert {path.parent.name for path in ROOT.glob("bench/*/*.py")} == set(ROOMS)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = set(project["tool"]["setuptools"]["packages"])
    modules = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    needed = {".".join([NAMESPACE, *path.parent.relative_to(ROOT).parts]) for path in modules}
    assert packages == needed, "a package that is not listed is missing from the wheel"


def test_what_is_no_code_is_packaged_too():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["tool"]["setuptools"]["package-data"]
    packaged = set()
    for package, patterns in listed.items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        packaged |= {path for pattern in patterns for path in folder.glob(pattern)}
    beside = {
        path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert beside <= packaged, "missing from the wheel"


def test_a_room_imports_from_lower_rooms_only():
    """So there is no circle of rooms. `__main__` only starts the command line, and `plugins` only
    gathers names for other packages."""
    order = {room: number for number, room in enumerate(ROOMS)}
    wrong = []
    gates = ("bench/__main__.py", "bench/plugins.py")
    for file, name in imports_of("bench"):
        here = file.split("/")[1] if file.count("/") == 2 else None
        there = room_of(name) if is_or_in(name, f"{NAMESPACE}.bench") else None
        inward = name.startswith(f"{NAMESPACE}.bench.plugins")
        if inward or (file not in gates and order.get(there, -1) > order.get(here, -1)):
            wrong.append(f"{file} imports {name}")
    assert not wrong


def test_no_circle_within_a_room():
    """Also none by an import within a function."""
    modules = {
        ".".join([NAMESPACE, *path.relative_to(ROOT).with_suffix("").parts]): path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
    }
    graph = {}
    for module, path in modules.items():
        package = module.rpartition(".")[0]
        found = imported_modules(path.read_text(encoding="utf-8"), package)
        known = {prefix for name in found for prefix in (name, name.rpartition(".")[0])}
        graph[module] = {name for name in known if name in modules and name != module}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_a_word_has_one_meaning():
    """No two public classes of bench/, nor the names of types, are called alike."""
    places = {}
    for path in (ROOT / "bench").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [node.name] if isinstance(node, ast.ClassDef) else []
            if isinstance(node, ast.Assign):
                names = [one.id for one in node.targets if isinstance(one, ast.Name)]
            for name in names:
                if re.fullmatch(r"[A-Z][A-Za-z]*[a-z][A-Za-z]*", name):
                    places.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_are_relative_within_a_room_and_absolute_across(folder):
    wrong = []
    for path in (ROOT / folder).rglob("*.py"):
        package = ".".join([NAMESPACE, *path.parent.relative_to(ROOT).parts])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                inside = node.module is not None and node.module.rpartition(".")[0] == package
                if node.level > 1 or (not node.level and (inside or node.module == package)):
                    wrong.append(f"{path.relative_to(ROOT)}, line {node.lineno}")
    assert not wrong


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
