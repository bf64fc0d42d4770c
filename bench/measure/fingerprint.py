"""The code that a measurement depends on, as one short digest of names and contents.

Part of a row's identity: a row that other code measured is not the row that is asked for. Only
files count that can change a number of that cell; what shows, stores or plans does not, nor does
another implementation.
"""

import functools
import hashlib
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path

from resblock_bench.bench.checkout import package_folder
from resblock_bench.bench.records import Cell

from .implementations import module_offering, runs_kernels, versions_of

_SUITE = ("reference", "bench/measure", "bench/lockstep")
_KERNELS = "kernels"
_SUFFIXES = (".py", ".json", ".csv", ".so")
_Files = list[tuple[str, Path]]


@functools.cache
def code_fingerprint(root: Path | None = None) -> str:
    """12 hexadecimal digits over all of this project that can change a number.

    root: the folder that holds reference/, kernels/ and bench/; None is this program's own.
    """
    return _digest(_own((*_SUITE, _KERNELS), root))


def code_of_cell(cell: Cell) -> str:
    """12 hexadecimal digits over the code that a cell runs.

    What another package offers counts by the files of its top-level module, which is not imported;
    what is known here of another project, by that project's version.
    """
    return code_of(cell.impl, tuple(versions_of(cell).items()))


@functools.cache
def code_of(impl: str, versions: tuple[tuple[str, str], ...] = ()) -> str:
    """The same of an implementation, with packages by name and version."""
    if not runs_kernels(impl):
        return _digest(_own(_SUITE, None), dict(versions))
    module = module_offering(impl)
    offered = [] if module is None else _package_files(module)
    return _digest([*_own((*_SUITE, _KERNELS), None), *offered], dict(versions))


def _digest(files: Iterable[tuple[str, Path]], versions: Mapping[str, str] | None = None) -> str:
    digest = hashlib.sha256()
    for package, version in (versions or {}).items():
        digest.update(f"{package}=={version}\0".encode())
    for name, path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:12]


def _own(parts: Iterable[str], root: Path | None) -> _Files:
    found: _Files = []
    for name in parts:
        folder = package_folder(name.replace("/", ".")) if root is None else root / name
        found += _below(name, folder)
    return found


def _package_files(module: str) -> _Files:
    """Of the top-level module that holds `module`, or of the part of it where that is a namespace
    which several packages share; none where it cannot be found."""
    top, _, rest = module.partition(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return []
    if spec.submodule_search_locations is None:
        return [] if spec.origin is None else [(top, Path(spec.origin))]
    folders = [Path(location) for location in spec.submodule_search_locations]
    if spec.origin is None:
        part = rest.partition(".")[0]
        folders = [folder / part for folder in folders]
        single = [(part, folder.with_suffix(".py")) for folder in folders]
        return [*(file for file in single if file[1].is_file()), *_all_below(part, folders)]
    return _all_below(top, folders)


def _all_below(name: str, folders: Iterable[Path]) -> _Files:
    return [file for folder in folders for file in _below(name, folder)]


def _below(name: str, folder: Path) -> _Files:
    return [
        (f"{name}/{path.relative_to(folder).as_posix()}", path)
        for path in folder.rglob("*")
        if path.suffix in _SUFFIXES and path.is_file()
    ]
