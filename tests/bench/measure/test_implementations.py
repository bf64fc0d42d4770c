import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from resblock_bench.bench.measure.implementations import (
    IMPLEMENTATIONS,
    _offered,
    declined,
)
from resblock_bench.bench.measure.peers import Ability, DeclinedError
from resblock_bench.bench.measure.predict_memory import unpredictable
from resblock_bench.bench.measure.workload import Workload, draw_inputs, draw_weights
from resblock_bench.bench.records import Cell, Row

CPU = torch.device("cpu")


class Counter(TorchDispatchMode):
    """Counts calls of operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("checkpoint", "convolutions", "norms"),
    [("none", 3, 2), ("selective", 3, 4), ("full", 6, 4)],
)
def test_reference_modes_recompute_what_they_say(
    make_cell: Callable[..., Cell], checkpoint: str, convolutions: int, norms: int
) -> None:
    """Selective keeps convolutions and recomputes norms; full recomputes both."""
    cell = make_cell(checkpoint=checkpoint, out_channels=64)
    made = Workload(cell, draw_weights(cell, 0), draw_inputs(cell, CPU, 0), CPU)
    with Counter() as counter:
        made.step()
    forward = counter.calls["convolution"]
    # Non-reentrant checkpointing stops recomputing early, once everything needed is there.
    assert forward in (convolutions, convolutions - 1)
    assert counter.calls["native_group_norm"] == norms


@pytest.mark.parametrize("ending", [SystemExit(0), SystemExit("bye"), ImportError("no such")])
def test_a_foreign_module_ends_nothing_but_itself(
    monkeypatch: pytest.MonkeyPatch, ending: BaseException
) -> None:
    def load(point: metadata.EntryPoint) -> None:
        raise ending

    monkeypatch.setattr(metadata.EntryPoint, "load", load)
    offered = _offered(metadata.EntryPoint("mine", "m:x", "resblock_bench.implementations"))
    reason = offered.unusable("cpu")
    assert reason is not None
    assert f"its package cannot be used ({type(ending).__name__}" in reason


def test_compilation_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = IMPLEMENTATIONS["compiled"]
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    assert "g++, clang++, c++ was found" in (compiled.unusable("cpu") or "")
    monkeypatch.setenv("CXX", "mycc -O2")
    assert "none of mycc was found" in (compiled.unusable("cpu") or "")
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    assert compiled.unusable("cpu") is None


def test_autotuned_compilation_is_the_mode_of_torch_compile(
    make_cell: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def compile(call: object, *, dynamic: bool, mode: str | None) -> object:
        asked.append((dynamic, mode))
        return call

    monkeypatch.setattr(torch, "compile", compile)
    for name in ("compiled", "compiled-max-autotune"):
        cell = make_cell(impl=name)
        Workload(cell, draw_weights(cell, 0), draw_inputs(cell, CPU, 0), CPU).step()
        assert "torch.compile" in (unpredictable(cell) or "")
    assert asked == [(False, None), (False, "max-autotune")]


def test_a_package_says_which_cells_its_own_is_made_for(
    make_cell: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = replace(IMPLEMENTATIONS["reference"], can=Ability(modes=("inference",)))
    monkeypatch.setattr(metadata.EntryPoint, "load", lambda point: narrow)
    offered = _offered(metadata.EntryPoint("mine", "m:x", "resblock_bench.implementations"))
    assert offered.build(make_cell(impl="mine", mode="inference")) is not None
    with pytest.raises(DeclinedError, match="mine takes mode=inference only"):
        offered.build(make_cell(impl="mine"))


def test_a_cell_without_a_compiler_is_skipped_with_the_reason(
    measure: Callable[..., Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    row = measure(impl="compiled")
    assert row.status == "skipped"
    assert "C++ compiler" in (row.reason or "")


def test_a_refusal_of_torch_compile_is_not_a_failure(
    measure: Callable[..., Row], add_implementation: Callable[..., None]
) -> None:
    def refuse(module: torch.nn.Module, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        raise torch._dynamo.exc.Unsupported("cannot trace this")

    add_implementation("refusing", refuse)
    row = measure(impl="refusing")
    assert (row.status, declined(ValueError())) == ("skipped", False)
    assert "cannot trace this" in (row.reason or "")


@pytest.mark.slow
@pytest.mark.skipif(
    IMPLEMENTATIONS["compiled"].unusable("cpu") is not None, reason="needs a C++ compiler"
)
def test_compiled_cells_are_right_and_say_why_their_memory_is_unknown(
    measure: Callable[..., Row],
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        row = measure(impl="compiled", mode="inference")
    assert (row.status, row.memory) == ("ok", None)
    assert "torch.compile" in (row.memory_note or "")


def test_one_that_no_package_offers_any_more_is_skipped(
    measure: Callable[..., Row], make_cell: Callable[..., Cell]
) -> None:
    row = measure(impl="gone", mode="inference")
    assert row.status == "skipped"
    assert "no installed package offers the implementation 'gone'" in (row.reason or "")
    assert unpredictable(make_cell(impl="gone")) == row.reason
