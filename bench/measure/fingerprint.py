"""The code that a measurement depends on, as one short digest.

Other packages' implementations count by name and version.

Part of a row's identity: a row that other code measured is not the row that is asked for. Only
folders count that can change a number; what shows, stores or plans does not.
"""

import functools
import hashlib
from importlib import metadata
from pathlib import Path

from resblock_bench.bench.checkout import package_folder

_MEASURING = ("reference", "kernels", "bench/measure")


@functools.cache
def code_fingerprint(root: Path | None = None) -> str:
    """12 hexadecimal digits over names and contents of reference/, kernels/ and bench/measure/.

    root: the folder that holds reference/, kernels/ and bench/; None is this program's own.
    """
    digest = hashlib.sha256()
    for name, path in sorted(_files(root)):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    points = metadata.entry_points(group="resblock_bench.implementations")
    offers = (f"{p.name}={p.value} {p.dist.version if p.dist else ''}\0" for p in points)
    digest.update("".join(sorted(offers)).encode())
    return digest.hexdigest()[:12]


def _files(root: Path | None) -> list[tuple[str, Path]]:
    found: list[tuple[str, Path]] = []
    for name in _MEASURING:
        folder = package_folder(name.replace("/", ".")) if root is None else root / name
        for path in folder.rglob("*"):
            if path.suffix in (".py", ".json", ".csv"):
                found.append((f"{name}/{path.relative_to(folder).as_posix()}", path))
    return found
