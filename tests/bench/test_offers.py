"""What other packages offer: a name stands for one thing, and can be written down."""

from collections.abc import Callable
from importlib import metadata

import pytest

from resblock_bench.bench import offers as bench_offers
from resblock_bench.bench.compiled.cases import KernelCase, cases_of
from resblock_bench.bench.errors import InvalidError
from resblock_bench.bench.grid import axes
from resblock_bench.bench.offers import NAME, check_offers

GROUP = "resblock_bench.implementations"


@pytest.fixture
def offering(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs entry points of these names, each of a module of its own."""

    def install(*names: str) -> None:
        points = [metadata.EntryPoint(name, f"p{i}:x", GROUP) for i, name in enumerate(names)]
        monkeypatch.setattr(bench_offers, "entry_points", lambda group: points)

    return install


def test_names_of_their_own_are_welcome(offering: Callable) -> None:
    offering("mine", "other", "v2.1", "_x", "A-b")
    check_offers(GROUP, ("reference", "fused"))


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("fused",), "the package p0:x offers 'fused' .*, and this suite has one of that name"),
        (("mine", "mine"), "p1:x offers 'mine' .*, and so does p0:x: have it renamed"),
        (("my,block",), "offers 'my,block' .*, and a name is up to 100 letters"),
        (("..",), "a name is"),
        (("",), "a name is"),
        (("a b",), "a name is"),
        (("\x1b[31m",), r"offers '\\x1b\[31m'"),
        (("机器",), "a name is"),
        (("x" * 101,), "a name is"),
    ],
)
def test_a_name_that_hides_another_or_cannot_be_written_is_refused(
    offering: Callable, names: tuple[str, ...], why: str
) -> None:
    offering("first", *names) if why.startswith("a name") else offering(*names)
    with pytest.raises(InvalidError, match=why):
        check_offers(GROUP, ("reference", "fused"))


def test_no_grid_is_made_where_one_hides_behind_the_suite_s_own(
    offering: Callable, run_cli: Callable
) -> None:
    offering("fused")
    axes._check_implementations.cache_clear()
    done = run_cli("list")
    axes._check_implementations.cache_clear()
    assert done.code == 3
    assert "offers 'fused'" in done.err
    assert done.out == ""


@pytest.mark.parametrize("name", [".", "..", ".hidden", "-rf", "", "a/b", "a\n", "x" * 101, None])
def test_a_case_s_name_is_that_of_a_file(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    case = KernelCase(name, None, (1,), lambda device: {})
    monkeypatch.setattr(metadata.EntryPoint, "load", lambda self: lambda: [case])
    with pytest.raises(InvalidError, match="is no name: use up to 100 letters"):
        cases_of("m:f")


def test_every_name_in_the_examples_is_one() -> None:
    assert all(map(NAME.fullmatch, ("scale", "residual-bf16-nchw", "1x64-bf16", "seeded")))
