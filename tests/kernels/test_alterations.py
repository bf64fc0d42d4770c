"""Blocks of which a part was replaced: never another output, and a report that says why."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resblock_bench import kernels, reference
from resblock_bench.kernels import fuse_

MODES = ["none", "selective", "full"]
Change = Callable[[Any], object]


class Halved(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Adapted(nn.Conv2d):
    """A convolution that does more than its parameters say."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5 * x.mean(1, keepdim=True)


class Wrapped(nn.Module):
    """As a low-rank adapter wraps a layer."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.more = conv, nn.Conv2d(conv.in_channels, conv.out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.more(x)


def put(path: str, make: Callable[[Any], Any]) -> Change:
    """Replaces a child by what is made of it."""

    def change(block: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        owner = block.get_submodule(parent)
        setattr(owner, name, make(getattr(owner, name)))

    return change


def doubled(module: nn.Module) -> Change:
    return module.register_forward_hook(lambda module, args, out: 2 * out)


def own_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *args: 2 * forward(*args)  # type: ignore[method-assign]


def weight_norm(conv: nn.Module) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(conv)


def block(**options: Any) -> reference.ResBlock:
    torch.manual_seed(0)
    made = reference.ResBlock(32, 24, 0.0, **options)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(0.3 * torch.randn(p.shape))
    return made


def edm_block() -> reference.EDMBlock:
    torch.manual_seed(0)
    made = reference.EDMBlock(32, 32, 24)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(0.3 * torch.randn(p.shape))
    return made


def changed(change: Change, model: nn.Module | None = None) -> Any:
    """A block with the change made; the same one every time."""
    model = block() if model is None else model
    torch.manual_seed(3)
    change(model)
    return model


def step(module: nn.Module) -> list[Tensor]:
    """The output and the gradients of x and of every parameter."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 32, 4, 4, generator=generator, requires_grad=True)
    emb = torch.randn(2, 24, generator=generator)
    torch.manual_seed(2)
    y = module(x, emb)
    return [y.detach(), *torch.autograd.grad(y.square().mean(), [x, *module.parameters()])]


# What the block computes itself: it is left alone.
LEFT: dict[str, tuple[Change, str]] = {
    "another activation": (put("in_layers.1", lambda _: nn.GELU()), "in_layers.1 is a GELU"),
    "the second activation": (put("out_layers.1", lambda _: nn.Tanh()), "out_layers.1 is a Tanh"),
    "a norm's subclass": (put("in_layers.0", lambda _: Halved(32, 32)), "in_layers.0 is a Halved"),
    "no norm": (put("out_layers.0", lambda _: nn.BatchNorm2d(32)), "is a BatchNorm2d"),
    "another dropout": (put("out_layers.2", lambda _: nn.Dropout2d(0.5)), "is a Dropout2d"),
    "no dropout": (put("out_layers.2", lambda _: nn.Identity()), "out_layers.2 is a Identity"),
    "a hook on a norm": (lambda b: doubled(b.out_layers[0]), "out_layers.0 has hooks"),
    "a hook on an activation": (lambda b: doubled(b.in_layers[1]), "in_layers.1 has hooks"),
    "a norm's own forward": (lambda b: own_forward(b.in_layers[0]), "in_layers.0 has hooks or"),
}
# What it calls: it is fused, and the convolution keeps its input.
CALLED: dict[str, Change] = {
    "a convolution's subclass": put("in_layers.2", lambda _: Adapted(32, 32, 3, padding=1)),
    "a wrapped convolution": put("out_layers.3", Wrapped),
    "a circular one": put(
        "in_layers.2", lambda _: nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular")
    ),
    "one padded by a word": put("in_layers.2", lambda _: nn.Conv2d(32, 32, 3, padding="same")),
    "a hook on a convolution": lambda b: doubled(b.out_layers[3]),
    "a convolution's own forward": lambda b: own_forward(b.in_layers[2]),
    "weight norm": lambda b: weight_norm(b.in_layers[2]),
    "a parametrization": lambda b: nn.utils.parametrizations.weight_norm(b.in_layers[2]),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("change", "reason"), LEFT.values(), ids=LEFT)
def test_what_a_block_would_compute_itself_is_left(change: Change, reason: str, mode: str) -> None:
    expected = step(changed(change))
    model = changed(change)
    with pytest.warns(UserWarning, match="changed nothing"):
        report = fuse_(model, mode)
    assert type(model) is reference.ResBlock
    assert not report.fused
    assert reason in report.left[""]
    torch.testing.assert_close(step(model), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", CALLED.values(), ids=CALLED)
def test_a_convolution_that_is_more_than_its_parameters_is_called(
    change: Change, mode: str
) -> None:
    expected = step(changed(change))
    model = changed(change)
    report = fuse_(model, mode)
    assert type(model) is kernels.ResBlock
    assert not report.left
    assert ("which keeps the input of" in report.fused[""]) == (mode == "selective")
    torch.testing.assert_close(step(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", [c for c, _ in LEFT.values()] + list(CALLED.values()))
def test_a_change_after_fusing_is_no_other_output(change: Change, mode: str) -> None:
    expected = step(changed(change))
    fused = block()
    fuse_(fused, mode)
    changed(change, fused)
    torch.testing.assert_close(step(fused), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["in_layers", "out_layers"])
def test_an_additional_layer_is_left(name: str) -> None:
    model = block()
    getattr(model, name).append(nn.Tanh())
    with pytest.warns(UserWarning, match="changed nothing"):
        report = fuse_(model)
    assert f"{name} has not the" in report.left[""]


@pytest.mark.parametrize(
    ("options", "change", "reason"),
    [
        ({"up": True}, put("h_upd", lambda _: reference.Upsample(32, True)), "a convolution of"),
        ({"down": True}, put("h_upd", lambda _: nn.MaxPool2d(2)), "h_upd is a MaxPool2d"),
        ({"down": True}, put("h_upd.op", lambda _: nn.MaxPool2d(2)), "h_upd.op is MaxPool2d"),
        ({"down": True}, put("h_upd.op", lambda _: nn.AvgPool2d(4, 2, 1)), "h_upd.op is AvgPool2d"),
        ({"up": True}, lambda b: doubled(b.h_upd), "h_upd is a Upsample"),
        ({}, own_forward, "it has a forward of its own"),
    ],
)
def test_another_resampling_or_forward_is_left(
    options: dict[str, Any], change: Change, reason: str
) -> None:
    expected = step(changed(change, block(**options)))
    model = changed(change, block(**options))
    with pytest.warns(UserWarning, match="changed nothing"):
        report = fuse_(model, "selective")
    assert reason in report.left[""]
    torch.testing.assert_close(step(model), expected)


@pytest.mark.parametrize("mode", MODES)
def test_an_edm_block_with_another_norm_is_left_and_with_another_convolution_fused(
    mode: str,
) -> None:
    for change, fused in (
        (put("norm0", lambda _: Halved(8, 32)), False),
        (lambda b: doubled(b.norm1), False),
        (put("conv0", lambda _: Adapted(32, 32, 3, padding=1)), True),
        (put("conv1", Wrapped), True),
    ):
        expected = step(changed(change, edm_block()))
        model = changed(change, edm_block())
        with contextlib.nullcontext() if fused else pytest.warns(UserWarning, match="nothing"):
            report = fuse_(model, mode)
        assert (list(report.fused), list(report.left)) == (([""], []) if fused else ([], [""]))
        torch.testing.assert_close(step(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_dropout_that_was_switched_off_alone_stays_off(mode: str) -> None:
    def switch_off(block: Any) -> None:
        block.out_layers[2].p = 0.5
        block.out_layers[2].eval()

    expected, model = step(changed(switch_off)), changed(switch_off)
    fuse_(model, mode)
    torch.testing.assert_close(step(model), expected, rtol=1e-4, atol=1e-5)


def test_a_bare_norm_s_hooks_still_run_and_its_own_forward_is_left() -> None:
    hooked, own = nn.GroupNorm(4, 16), nn.GroupNorm(4, 16)
    doubled(hooked)
    own_forward(own)
    model = nn.Sequential(hooked, own)
    x = torch.randn(2, 16, 4, 4)
    expected = model(x)
    assert fuse_(model).left == {"1": "GroupNorm has a forward of its own"}
    torch.testing.assert_close(model(x), expected)
