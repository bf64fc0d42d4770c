"""The blocks of EDM's original networks, known by their structure."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import edm_classes as edm
from support.parity import check_parity, drawn, randomised, step
from torch import Tensor, nn

from resblock_bench.kernels import fuse_, prefer
from resblock_bench.kernels.fusing.edm import FusedEDMBlock

MODES = ["none", "selective", "full"]
BLOCKS: dict[str, dict[str, Any]] = {
    "adaptive": {},
    "wider": {"out_channels": 24},
    "add, scaled": {"adaptive_scale": False, "skip_scale": 0.5**0.5, "eps": 1e-6},
    "up": {"up": True},
    "down, wider": {"down": True, "out_channels": 24},
    "down, 1×1": {"down": True, "resample_proj": True},
    "attention": {"attention": True, "num_heads": 2},
    "wide filter": {"up": True, "resample_filter": (1, 3, 3, 1)},
    "uneven filter": {"down": True, "resample_filter": (1, 2)},
}


def block(name: str = "adaptive", **options: Any) -> Any:
    return randomised(
        edm.UNetBlock(**{"in_channels": 16, "out_channels": 16, "emb_channels": 12}
                      | BLOCKS[name] | options)
    )  # fmt: skip


def inputs() -> list[Tensor]:
    return drawn((2, 16, 6, 6), (2, 12))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_computes_the_same(name: str, mode: str) -> None:
    model = block(name)
    fused = copy.deepcopy(model)
    report = fuse_(fused, mode)
    assert not report.left
    assert isinstance(fused, FusedEDMBlock) and isinstance(fused, edm.UNetBlock)
    keeps = "which keeps the input of conv0" in report.fused[""]
    assert keeps == (mode == "selective" and "filter" in name)
    check_parity(model, fused, inputs())
    check_parity(model, fused, inputs(), torch.bfloat16)
    check_parity(model, fused, inputs(), autocast=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["adaptive", "add, scaled"])
def test_one_noise_level_is_of_all_images_as_in_their_sampler(name: str, mode: str) -> None:
    model = block(name)
    fused = copy.deepcopy(model)
    assert fuse_(fused, mode).fused
    check_parity(model, fused, drawn((3, 16, 6, 6), (1, 12)))


def test_one_image_at_several_noise_levels() -> None:
    model = block()
    fused = copy.deepcopy(model)
    fuse_(fused)
    check_parity(model, fused, drawn((1, 16, 6, 6), (3, 12)))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "selective"])
@pytest.mark.parametrize("name", ["adaptive", "add, scaled", "down, wider", "wide filter"])
def test_a_block_computes_the_same_in_triton(name: str, mode: str) -> None:
    """Where the biases of its convolutions are added elsewhere."""
    pytest.importorskip("triton")
    model = block(name)
    fused = copy.deepcopy(model)
    fuse_(fused, mode)
    with prefer("triton"):
        check_parity(model, fused, drawn((2, 16, 4, 4), (2, 12)))


def test_selective_keeps_no_activation_of_their_convolutions() -> None:
    def saved(model: nn.Module) -> int:
        kept: dict[int, int] = {}
        x, emb = (t.requires_grad_() for t in inputs())
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (kept.__setitem__(t.data_ptr(), t.numel()), t)[1], lambda t: t
        ):
            model(x, emb)
        return sum(kept.values())

    sizes = {}
    for mode in ("none", "selective"):
        model = block()
        fuse_(model, mode)
        sizes[mode] = saved(model)
    assert sizes["selective"] == sizes["none"] - 2 * inputs()[0].numel()


@pytest.mark.parametrize("mode", MODES)
def test_a_whole_network(mode: str) -> None:
    model = randomised(edm.Network())
    fused = copy.deepcopy(model)
    report = fuse_(fused, mode)
    assert not report.left
    assert list(report.fused) == ["blocks.0", "blocks.1", "blocks.1.norm2", "blocks.2", "out_norm"]
    check_parity(model, fused, drawn((2, 3, 8, 8), (2, 12)))
    check_parity(model, fused, drawn((2, 3, 8, 8), (2, 12)), torch.bfloat16)


@pytest.mark.parametrize("mode", MODES)
def test_dropout_draws_one_mask_for_forward_and_backward(mode: str) -> None:
    fuse_(kept := block(dropout=0.5), "none")
    fuse_(model := block(dropout=0.5), mode)
    torch.testing.assert_close(step(model, inputs()), step(kept, inputs()))
    assert not torch.equal(step(model, inputs())["y"], model.eval()(*inputs()))


class Adapter(nn.Module):
    def __init__(self, conv: edm.Conv2d) -> None:
        super().__init__()
        self.conv, self.more = conv, nn.Conv2d(conv.in_channels, conv.out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x) + self.more(x)
        return out


def doubled(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, out: 2 * out)


CALLED: dict[str, Any] = {
    "adapter": lambda m: setattr(m, "conv1", Adapter(m.conv1)),
    "hook on a convolution": lambda m: doubled(m.conv0),
    "hook on affine": lambda m: doubled(m.affine),
    "hook on the attention's norm": lambda m: doubled(m.norm2),
}
LEFT: dict[str, tuple[Any, str]] = {
    "norm": (lambda m: setattr(m, "norm0", nn.BatchNorm2d(16)), "norm0 (BatchNorm2d)"),
    "hook on a norm": (lambda m: doubled(m.norm1), "norm1 (GroupNorm)"),
    "attribute": (lambda m: setattr(m, "clip_act", 256), "has no clip_act"),
}


def changed(change: Any) -> Any:
    model = block("attention")
    torch.manual_seed(3)
    change(model)
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", CALLED.values(), ids=CALLED)
def test_what_is_more_than_its_parameters_is_called(change: Any, mode: str) -> None:
    model = changed(change)
    assert "" in fuse_(model, mode).fused
    torch.testing.assert_close(
        step(model, inputs()), step(changed(change), inputs()), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("change", "reason"), LEFT.values(), ids=LEFT)
def test_a_block_of_which_something_was_replaced_is_left(change: Any, reason: str) -> None:
    model = changed(change)
    assert reason in fuse_(model).left[""]
    assert type(model) is edm.UNetBlock
    torch.testing.assert_close(step(model, inputs()), step(changed(change), inputs()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "change", [*CALLED.values(), *(c for c, _ in LEFT.values())], ids=[*CALLED, *LEFT]
)
def test_a_change_after_fusing_is_no_other_output(change: Any, mode: str) -> None:
    model = block("attention")
    fuse_(model, mode)
    torch.manual_seed(3)
    change(model)
    torch.testing.assert_close(
        step(model, inputs()), step(changed(change), inputs()), rtol=1e-4, atol=1e-4
    )


class Otherwise(edm.UNetBlock):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return super().forward(x, -emb)


def test_a_class_that_computes_otherwise_is_left() -> None:
    model = nn.ModuleList([Otherwise(16, 16, 12), edm.UNetBlock(16, 16, 12)])
    report = fuse_(model)
    assert report.left == {"0": "Otherwise computes otherwise than EDM's"}
    assert list(report.fused) == ["1"]


def test_another_norm_of_the_same_name_is_left() -> None:
    class GroupNorm(edm.GroupNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    model = nn.ModuleList([GroupNorm(16), edm.GroupNorm(16)])
    report = fuse_(model)
    assert report.left == {"0": "GroupNorm computes another norm"}
    assert report.fused == {"1": "GroupNorm without activation"}
