"""What is said of torch and Triton, and that the table of versions is what is claimed elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from resblock_bench.kernels import versions
from resblock_bench.kernels.versions import COMPILING, LOCKED, PAIRS, Pair

ROOT = Path(__file__).parents[2]


def release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def test_what_is_installed_is_found_without_its_build(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    assert versions.installed() == (torch.__version__.partition("+")[0], triton.__version__)
    monkeypatch.setattr(torch, "__version__", "2.6.0+cu124")
    monkeypatch.setattr(triton, "__version__", "3.2.0+git123")
    assert versions.installed() == ("2.6.0", "3.2.0")
    monkeypatch.setattr(versions, "triton_installed", lambda: False)
    assert versions.installed() is None


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        (PAIRS[0], "torch 2.6.0, triton 3.2.0: tested together"),
        (LOCKED, f"torch {LOCKED.torch}, triton {LOCKED.triton}: tested together"),
        # Both are in the table, but not with each other.
        (
            Pair("2.6.0", "3.7.1"),
            "torch 2.6.0, triton 3.7.1: not tested together; this Triton compiles the kernels",
        ),
        (Pair("2.13.0", "3.3.1"), "torch 2.13.0, triton 3.3.1: not tested together"),
    ],
)
def test_a_pair_is_tested_as_a_pair(pair: Pair, said: str) -> None:
    assert versions.describe(pair) == said
    assert versions.tested(pair) is (": tested" in said)


def test_the_last_pair_is_the_locked_one() -> None:
    locked = (ROOT / "constraints.txt").read_text()
    for name, version in zip(Pair._fields, LOCKED, strict=True):
        assert re.search(rf"^{name}==([\d.]+)", locked, re.MULTILINE)[1] == version


def test_the_oldest_versions_that_are_claimed_are_in_the_table() -> None:
    """A minimum that nobody ran is not claimed."""
    oldest = Pair(*(min((pair[i] for pair in PAIRS), key=release) for i in range(2)))
    assert oldest in PAIRS
    assert min(COMPILING, key=release) == oldest.triton
    assert {pair.triton for pair in PAIRS} <= set(COMPILING)
    project, readme = ((ROOT / name).read_text() for name in ("pyproject.toml", "README.md"))
    for name, version in zip(Pair._fields, oldest, strict=True):
        minor = version.rpartition(".")[0]
        assert f'"{name}>={minor}' in project
        assert f"{name} ≥ {minor}" in readme
