"""The shortest way of a call: the same results as the usual one, and taken for nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from resblock_bench.kernels import calls, direct, dispatch, tuned
from resblock_bench.kernels.functional import group_norm_silu

G = 2


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    with dispatch.prefer("triton"):
        yield


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[calls.Call]:
    """The kinds of the calls that went the direct way."""
    seen: list[calls.Call] = []

    def run(call: calls.Call, *arguments: Any) -> Tensor:
        seen.append(call)
        return original(call, *arguments)

    original = direct.run
    monkeypatch.setattr(direct, "run", run)
    direct._known.clear()
    return seen


def inputs(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    scale, shift = normal(2, 16).chunk(2, dim=1)
    return {
        "x": normal(2, 8, 4, 4),
        "weight": normal(8),
        "bias": normal(8),
        "scale": scale,
        "shift": shift,
    }


def run(given: dict[str, Tensor | None], **how: Any) -> list[Tensor]:
    """y and the gradients."""
    torch.manual_seed(0)
    leaves = {k: None if t is None else t.detach().requires_grad_() for k, t in given.items()}
    y = group_norm_silu(num_groups=how.pop("num_groups", G), **leaves, **how)  # type: ignore[arg-type]
    dy = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape) / y.numel()
    present = [t for t in leaves.values() if t is not None]
    return [y.detach(), *torch.autograd.grad(y, present, dy)]


VARIANTS: dict[str, tuple[Callable[[dict[str, Any]], Any], dict[str, Any]]] = {
    "same": (lambda g: None, {}),
    "dtype": (lambda g: g.update(inputs(torch.bfloat16)), {}),
    "one dtype": (lambda g: g.update(scale=g["scale"].bfloat16()), {}),
    "no affine": (lambda g: g.update(weight=None, bias=None), {}),
    "no scale": (lambda g: g.update(scale=None), {}),
    "pre_shift": (lambda g: g.update(pre_shift=g["scale"] / 2), {}),
    "channels-last": (lambda g: g.update(x=g["x"].to(memory_format=torch.channels_last)), {}),
    "rows": (lambda g: g.update(scale=g["scale"].contiguous()), {}),
    "columns": (lambda g: g.update(scale=g["scale"].T.contiguous().T), {}),
    "strided": (lambda g: g.update(x=g["x"].transpose(2, 3)), {}),
    "groups": (lambda g: None, {"num_groups": 4}),
    "eps": (lambda g: None, {"eps": 0.5}),
    "activation": (lambda g: None, {"activation": None}),
    "dropout": (lambda g: None, {"dropout_p": 0.5}),
    "no training": (lambda g: None, {"dropout_p": 0.5, "training": False}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_as_the_usual_way(
    taken: list[calls.Call], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """After a call of the first kind, the variant is called twice; values differ each time."""
    change, how = VARIANTS[name]
    run(inputs())
    for seed in (0, 1):
        given: dict[str, Any] = inputs(seed=seed)
        change(given)
        found = run(given, **how)
        with monkeypatch.context() as patch:
            patch.setattr(direct, "find", lambda *_: None)
            expected = run(given, **how)
        for ours, usual in zip(found, expected, strict=True):
            assert ours.dtype == usual.dtype and ours.stride() == usual.stride()
            assert torch.equal(ours, usual)
    # Tensors that would be copied go the usual way; what is of the first kind does so at once.
    times = {"columns": 0, "strided": 0, "same": 2, "no training": 2}
    assert len(taken) == times.get(name, 1)


def test_a_checkpoint_may_run_the_first_call_of_a_kind_again(taken: list[calls.Call]) -> None:
    """What goes the usual way at first goes the direct way in the backward, and keeps the same."""
    given = {name: t.requires_grad_() for name, t in inputs().items()}
    y = checkpoint(
        lambda *tensors: group_norm_silu(tensors[0], G, *tensors[1:]),
        *given.values(),
        use_reentrant=False,
    )
    found = torch.autograd.grad(y, list(given.values()), torch.ones_like(y))
    assert taken
    y = group_norm_silu(num_groups=G, **given)
    expected = torch.autograd.grad(y, list(given.values()), torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_settings_are_part_of_a_kind(taken: list[calls.Call]) -> None:
    given = inputs()
    for _ in range(2):
        run(given)
    assert taken
    for change in (lambda: dispatch.prefer("triton", "C"), tuned.forget):
        block = change()
        taken.clear()
        if block is None:
            run(given)
        else:
            with block:
                run(given)
        assert not taken


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"num_groups": 3}, ValueError, "cannot be divided"),
        ({"activation": ["silu"]}, ValueError, "activation"),
        ({"activation": "relu"}, ValueError, "activation"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p"),
    ],
)
def test_a_known_kind_hides_no_error(wrong: dict[str, Any], error: Any, text: str) -> None:
    for _ in range(2):
        run(inputs())
    with pytest.raises(error, match=text):
        run(inputs(), **wrong)


def test_rows_of_another_length_are_no_known_kind() -> None:
    """With the same strides: a launch would read as many as there should be."""
    for _ in range(2):
        run(inputs())
    with pytest.raises(ValueError, match="weight"):
        run({**inputs(), "weight": torch.ones(9)})


def test_without_gradients_there_is_no_graph(taken: list[calls.Call]) -> None:
    given = inputs()
    expected = run(given)[0]
    with torch.no_grad():
        y = group_norm_silu(given["x"].requires_grad_(), G, *list(given.values())[1:])
    assert taken and not y.requires_grad and torch.equal(y, expected)
    given["x"].requires_grad_(False)
    y = group_norm_silu(given["x"], G, *list(given.values())[1:])
    assert not y.requires_grad and torch.equal(y, expected)
    assert group_norm_silu(given["x"], G, given["weight"].requires_grad_()).requires_grad


@pytest.mark.parametrize("layout", ["expanded", "channels-last", "sliced"])
def test_any_gradient_is_taken(taken: list[calls.Call], layout: str) -> None:
    given = inputs()
    x = given["x"].requires_grad_()
    dy = {
        "expanded": torch.ones(()).expand(x.shape),
        "channels-last": torch.rand(x.shape).to(memory_format=torch.channels_last),
        "sliced": torch.rand(2, 8, 4, 8)[..., ::2],
    }[layout]
    for _ in range(2):
        (found,) = torch.autograd.grad(group_norm_silu(x, G), x, dy)
    y = group_norm_silu(x, G)
    (expected,) = torch.autograd.grad(y, x, dy.contiguous())
    assert taken and torch.equal(found, expected)


def test_a_second_derivative_raises(taken: list[calls.Call]) -> None:
    x = inputs()["x"].requires_grad_()
    for _ in range(2):
        (dx,) = torch.autograd.grad(group_norm_silu(x, G).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once"):
            dx.sum().backward()
    assert taken


def test_inputs_changed_in_place_are_noticed(taken: list[calls.Call]) -> None:
    x = inputs()["x"].requires_grad_()
    group_norm_silu(x, G)
    y = group_norm_silu(x, G)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert taken


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_the_operators(taken: list[calls.Call]) -> None:
    """Of both directions, or of the backward alone."""
    x = inputs()["x"].requires_grad_()
    for _ in range(2):
        y = group_norm_silu(x, G)
    assert len(taken) == 1
    with Seen() as mode:
        torch.autograd.grad(y, x, torch.ones_like(y))
        group_norm_silu(x, G)
    assert "resblock_bench::group_norm_silu_backward" in mode.names
    assert "resblock_bench::group_norm_silu" in mode.names
    assert len(taken) == 1


def test_transforms_and_what_they_leave_behind(taken: list[calls.Call]) -> None:
    x = inputs()["x"]
    expected = group_norm_silu(x, G)
    group_norm_silu(x, G)
    assert len(taken) == 1
    found = torch.vmap(lambda part: group_norm_silu(part, G))(x[None])
    assert torch.allclose(found[0], expected, atol=1e-6)
    left: list[Tensor] = []

    def leave(part: Tensor) -> Tensor:
        left.append(part)
        return part.sum()

    torch.func.grad(leave)(x)
    assert torch.equal(group_norm_silu(left[0], G), expected)
    assert len(taken) == 1


def test_kinds_are_forgotten_before_they_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MOST", 2)
    direct._known.clear()
    for n in range(1, 5):
        group_norm_silu(torch.rand(n, 8, 2, 2), G)
        assert len(direct._known) <= 2
