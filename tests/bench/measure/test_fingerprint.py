"""Which code a row is of: that which its cell runs, and nobody else's."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from resblock_bench.bench.measure import fingerprint, implementations
from resblock_bench.bench.measure.fingerprint import code_fingerprint, code_of


class Point:
    def __init__(self, module: str) -> None:
        self.module = module


@pytest.fixture
def offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, str], Path]]:
    """Offer an implementation `mine` in a module; the folder of its files."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def offer(module: str, file: str) -> Path:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("raise RuntimeError('imported')\n")
        monkeypatch.setitem(implementations._OFFERS, "mine", Point(module))
        return path

    yield offer
    assert not {name for name in sys.modules if name.startswith("their_")} - before


def code() -> str:
    code_of.cache_clear()
    return code_of("mine")


@pytest.mark.parametrize(
    ("module", "file"),
    [
        ("their_module", "their_module.py"),
        ("their_package.blocks", "their_package/__init__.py"),
        ("their_namespace.part.blocks", "their_namespace/part/blocks.py"),
        ("their_namespace.part", "their_namespace/part.py"),
    ],
)
def test_an_edited_file_of_its_package_is_other_code(
    offered: Callable[[str, str], Path], module: str, file: str
) -> None:
    path = offered(module, file)
    reference, fused, before = code_of("reference"), code_of("fused"), code()
    path.write_text(path.read_text() + "# edited\n")
    assert code() != before
    assert (code_of("reference"), code_of("fused")) == (reference, fused)


def test_another_package_of_the_same_namespace_does_not_count(
    offered: Callable[[str, str], Path], tmp_path: Path
) -> None:
    offered("their_namespace.part.blocks", "their_namespace/part/blocks.py")
    before = code()
    (tmp_path / "their_namespace" / "other").mkdir()
    (tmp_path / "their_namespace" / "other" / "big.py").write_text("")
    assert code() == before


def test_a_package_that_is_not_there_has_a_code(offered: Callable[[str, str], Path]) -> None:
    offered("their_absent.module", "elsewhere/absent.py")
    assert len(code()) == 12


def test_a_cell_of_the_reference_is_not_of_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {}
    for name in ("reference", "kernels", "bench.measure", "bench.lockstep"):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        (folders[name] / "file.py").write_text("")
    monkeypatch.setattr(fingerprint, "package_folder", folders.__getitem__)

    def codes() -> list[str]:
        code_of.cache_clear()
        code_fingerprint.cache_clear()
        return [code_of("reference"), code_of("compiled"), code_of("fused"), code_fingerprint()]

    changed = {}
    before = codes()
    for name, folder in folders.items():
        (folder / "file.py").write_text("edited")
        now = codes()
        changed[name] = [a != b for a, b in zip(before, now, strict=True)]
        before = now
    assert changed.pop("kernels") == [False, False, True, True]
    assert all(all(flags) for flags in changed.values())
    code_of.cache_clear()
    code_fingerprint.cache_clear()
