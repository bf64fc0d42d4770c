"""What `make test-versions` runs, and how it judges; the versions themselves are not at hand."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

pytest.importorskip("triton")

import kernel_variants
import versions
from kernel_variants import Compiled

from resblock_bench.kernels.versions import COMPILING, LOCKED, PAIRS

ROOT = Path(__file__).parents[1]
NEWEST = "9.9.0"


def names(*, short: bool) -> list[str]:
    return [f"{step.what}, {step.under}" for step in versions.steps(NEWEST, short, 1)]


def test_every_version_of_the_table_and_the_newest_is_tried() -> None:
    found = names(short=False)
    for triton, arch in itertools.product([*COMPILING, NEWEST], (80, 90, 100)):
        assert f"compile for sm_{arch}, triton {triton}" in found
    for pair in PAIRS:
        under = f"torch {pair.torch}, triton {pair.triton}"
        tests = [name for name in found if name.endswith(under)]
        assert any("tests/kernels" in name for name in tests)
        assert any("tests/reference" in name for name in tests) is (pair.torch != LOCKED.torch)
    assert len(found) == len(set(found))


def test_the_short_form_has_the_oldest_and_the_newest() -> None:
    found = names(short=True)
    assert f"compile for sm_90, triton {COMPILING[0]}" in found
    assert f"compile for sm_90, triton {NEWEST}" in found
    assert set(found[:-1]) <= set(names(short=False))
    # It unpacks no torch, which takes a minute, and no test that it names is missing.
    packages = {p for step in versions.steps(NEWEST, True, 1) for p in step.packages}
    assert not any(package.startswith("torch") for package in packages)
    assert (ROOT / versions.SHORT_TESTS[0]).is_file()


def test_make_and_the_check_call_this_script() -> None:
    assert "tests/versions.py $(ARGS)" in (ROOT / "Makefile").read_text()
    assert "make test-versions ARGS=--short" in (ROOT / ".ci/run").read_text()


def compiled(failed: dict[str, str] | None = None, impossible: str | None = None) -> Compiled:
    return Compiled("3.2.0", 100, 5, failed or {}, impossible)


def test_what_fails_is_wrong_unless_it_is_declared_impossible() -> None:
    assert versions.judged(compiled(), None) == ("5 of 5 variants", None)
    text, failure = versions.judged(compiled({"apply": "no such register"}), None)
    assert text == "4 of 5 variants" and failure == "apply: no such register"
    # Not even a declared one may fail in another way.
    text, failure = versions.judged(compiled({"apply": "no such register"}), "too old")
    assert failure is not None
    assert versions.judged(compiled(impossible="no sm_100"), "too old") == (
        "impossible: too old",
        None,
    )
    assert versions.judged(compiled(impossible="no sm_100"), None)[1] == "no sm_100"


def test_what_is_declared_impossible_must_be() -> None:
    failure = versions.judged(compiled(), "too old")[1]
    assert failure is not None and "strike it" in failure


def test_no_variants_at_all_are_a_failure() -> None:
    assert versions.judged(Compiled("3.2.0", 90, 0, {}), None)[1] is not None


def test_every_two_options_of_a_call_are_compiled_together() -> None:
    options = [
        kernel_variants.TIERS.values(),
        kernel_variants.LAYOUTS,
        kernel_variants.SHAPES,
        kernel_variants.DROPOUT,
        kernel_variants.DTYPES,
        kernel_variants.PRESENT,
        kernel_variants.ACTIVATION,
    ]
    cases = kernel_variants.cases()
    seen = set().union(*(case.pairs() for case in cases))
    for (i, first), (j, second) in itertools.combinations(enumerate(options), 2):
        for pair in itertools.product(first, second):
            assert ((i, pair[0]), (j, pair[1])) in seen, pair
    mains = [(case.tier, case.layout, case.shape, case.dropout) for case in cases]
    assert mains == list(itertools.product(*options[:4]))


def test_each_kernel_and_each_direction_is_among_the_launches() -> None:
    """In both layouts, for tiles that fit and tiles that do not, with and without dropout."""
    launched = [
        item
        for case in kernel_variants.cases()
        for item in kernel_variants.launched(case, versions.SHORT_ARCH)
    ]
    of = {
        (i.kernel.__name__, *(i.arguments.get(name) for name in ("CHANNELS_LAST", "EVEN")))
        for i in launched
    }
    for kernel, *options in itertools.product(
        ("forward_kernel", "backward_kernel"), (False, True), (False, True)
    ):
        assert (kernel, *options) in of
    assert {i.arguments["p_seed"] is None for i in launched if "p_seed" in i.arguments} == {
        False,
        True,
    }
    residuals = kernel_variants.residuals()
    assert {i.arguments["CHANNELS_LAST"] for i in residuals} == {False, True}
    assert {i.arguments["p_bias"] is None for i in residuals} == {False, True}
