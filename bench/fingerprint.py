"""The code that a measurement depends on, as one short digest.

Other packages' implementations count by name and version.

Part of a row's identity: a row that other code measured is not the row that is asked for. Only
files count that can change a number; what shows, stores or plans does not.
"""

import functools
import hashlib
import importlib.util
from importlib import metadata
from pathlib import Path

_MEASURING = (
    "correctness",
    "cuda_graph",
    "devices",
    "implementations",
    "measure",
    "memory",
    "timing",
    "workload",
)
"""The modules of bench/ that decide what is run and how it is timed."""


@functools.cache
def code_fingerprint(root: Path | None = None) -> str:
    """12 hexadecimal digits over names and contents of reference/, kernels/ and what measures.

    root: the folder that holds reference/, kernels/ and bench/; None is this program's own.
    """
    digest = hashlib.sha256()
    for name, path in sorted(_files(root)):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    for point in metadata.entry_points(group="resblock_bench.implementations"):
        version = point.dist.version if point.dist else ""
        digest.update(f"{point.name}={point.value} {version}\0".encode())
    return digest.hexdigest()[:12]


def _files(root: Path | None) -> list[tuple[str, Path]]:
    found: list[tuple[str, Path]] = []
    for package in ("reference", "kernels"):
        folder = _folder(root, package)
        for path in folder.rglob("*"):
            if path.suffix in (".py", ".json", ".csv"):
                found.append((f"{package}/{path.relative_to(folder).as_posix()}", path))
    bench = _folder(root, "bench")
    found += [
        (f"bench/{name}.py", path) for name in _MEASURING if (path := bench / f"{name}.py").exists()
    ]
    return found


def _folder(root: Path | None, package: str) -> Path:
    if root is not None:
        return root / package
    found = importlib.util.find_spec(f"resblock_bench.{package}")  # does not import it
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).resolve().parent
