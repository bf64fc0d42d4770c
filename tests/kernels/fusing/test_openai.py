"""OpenAI's blocks, known by their structure."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import openai_classes as openai
from support.parity import check_parity, drawn, randomised, step
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from resblock_bench.kernels import fuse_, prefer, unfuse_
from resblock_bench.kernels.fusing.openai import FusedOpenAIBlock

MODES = ["none", "selective", "full"]
BLOCKS: dict[str, Any] = {
    "scale-shift": lambda **o: openai.ResBlock(32, 16, use_scale_shift_norm=True, **o),
    "add, wider": lambda **o: openai.ResBlock(32, 16, out_channels=64, **o),
    "add, 3×3 skip": lambda **o: openai.ResBlock(32, 16, out_channels=64, use_conv=True, **o),
    "up": lambda **o: openai.ResBlock(32, 16, up=True, use_scale_shift_norm=True, **o),
    "down": lambda **o: openai.ResBlock(32, 16, down=True, out_channels=64, **o),
    "improved": lambda **o: openai.ImprovedResBlock(32, 16, use_scale_shift_norm=True, **o),
    "improved, add": lambda **o: openai.ImprovedResBlock(32, 16, out_channels=64, **o),
}


def block(name: str = "scale-shift", dropout: float = 0.0, **options: Any) -> Any:
    return randomised(BLOCKS[name](dropout=dropout, **options))


def inputs(size: tuple[int, ...] = (6, 6)) -> list[Tensor]:
    return drawn((2, 32, *size), (2, 16))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_computes_the_same(name: str, mode: str) -> None:
    model = block(name)
    fused = copy.deepcopy(model)
    report = fuse_(fused, mode)
    assert list(report.fused) == [""] and not report.left
    assert isinstance(fused, FusedOpenAIBlock) and isinstance(fused, type(model))
    check_parity(model, fused, inputs())
    check_parity(model, fused, inputs(), torch.bfloat16)
    check_parity(model, fused, inputs(), autocast=True)
    check_parity(model.eval(), fused.eval(), inputs())


@pytest.mark.parametrize(("dims", "size"), [(1, (8,)), (3, (2, 4, 4))])
@pytest.mark.parametrize("resampled", [{"up": True}, {"down": True}])
def test_other_numbers_of_dimensions(
    dims: int, size: tuple[int, ...], resampled: dict[str, bool]
) -> None:
    model = randomised(openai.ResBlock(32, 16, 0.0, dims=dims, **resampled))
    fused = copy.deepcopy(model)
    assert fuse_(fused, "selective").fused
    check_parity(model, fused, inputs(size))


@pytest.mark.parametrize("samples", [(3, 1), (1, 3)])
@pytest.mark.parametrize("name", ["scale-shift", "add, wider"])
def test_one_embedding_is_of_all_images_and_one_image_of_all_embeddings(
    name: str, samples: tuple[int, int]
) -> None:
    model = block(name)
    fused = copy.deepcopy(model)
    assert fuse_(fused, "selective").fused
    check_parity(model, fused, drawn((samples[0], 32, 4, 4), (samples[1], 16)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode"), [("scale-shift", "none"), ("add, wider", "selective"), ("down", "selective")]
)
def test_a_block_computes_the_same_in_triton(name: str, mode: str) -> None:
    """Where the biases of its convolutions are added elsewhere."""
    pytest.importorskip("triton")
    model = block(name)
    fused = copy.deepcopy(model)
    fuse_(fused, mode)
    with prefer("triton"):
        check_parity(model, fused, drawn((2, 32, 4, 4), (2, 16)))


@pytest.mark.parametrize("mode", MODES)
def test_dropout_is_that_of_the_class(mode: str) -> None:
    """In training the mask of a step is one in forward and backward, in every mode."""
    model = block(dropout=0.5)
    fuse_(model, mode)
    x, emb = inputs()
    first = step(model, [x, emb])
    again = step(model, [x, emb])
    torch.testing.assert_close(first, again)
    assert not torch.equal(first["y"], model.eval()(x, emb))
    fuse_(same := block(dropout=0.5), "none")
    torch.testing.assert_close(step(same, [x, emb]), first)


def test_a_checkpoint_with_frozen_weights_and_dropout_is_right() -> None:
    """The original's raises for the first, and has another mask in the backward."""
    model = block(dropout=0.5, use_checkpoint=True)
    model.in_layers[2].weight.requires_grad_(False)
    with pytest.raises(RuntimeError):
        step(model, inputs())
    fuse_(model)
    assert model.checkpoint == "full"
    fuse_(kept := block(dropout=0.5), "none")
    kept.in_layers[2].weight.requires_grad_(False)
    torch.testing.assert_close(step(model, inputs()), step(kept, inputs()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["guided", "improved"])
def test_a_whole_model(kind: str, mode: str) -> None:
    if kind == "guided":
        model = randomised(openai.UNet(use_scale_shift_norm=True))
    else:
        model = randomised(openai.UNet(openai.ImprovedResBlock, updown=False))
    fused = copy.deepcopy(model)
    report = fuse_(fused, mode)
    blocks = [m for m in model.modules() if isinstance(m, openai.TimestepBlock)]
    blocks = [m for m in blocks if not isinstance(m, nn.Sequential)]
    assert len(report.fused) == len(blocks) + 2  # the attention's norm, the head
    assert not report.left
    assert "norm" in next(n for n in report.fused if n.startswith("middle_block.1"))
    assert report.fused["out"] == "Sequential with 0: GroupNorm32 + SiLU in one"
    assert list(fused.state_dict()) == list(model.state_dict())
    x = drawn((1, 3, 8, 8), (1, 32))
    check_parity(model, fused, x)


def changed(change: Any, **options: Any) -> Any:
    model = block(**options)
    torch.manual_seed(3)
    change(model)
    return model


class Halved(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) / 2
        return out


class Swished(openai.GroupNorm32):
    """As GLIDE's norm, which has the activation in it."""


class GroupNorm32(nn.GroupNorm):
    """One that has OpenAI's name and computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype) * 2


def doubled(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, out: 2 * out)


def put(name: str, index: int, make: Any) -> Any:
    def change(model: Any) -> None:
        layers = getattr(model, name)
        layers[index] = make(layers[index])

    return change


LEFT: dict[str, tuple[Any, str]] = {
    "another activation": (put("in_layers", 1, lambda _: nn.GELU()), r"in_layers.1 \(GELU\)"),
    "another norm": (put("out_layers", 0, lambda _: GroupNorm32(32, 32)), "out_layers.0"),
    "a norm with more": (
        lambda m: setattr(m.in_layers[0], "swish", 1.0),
        "in_layers.0",
    ),
    "another dropout": (put("out_layers", 2, lambda _: nn.Dropout2d(0.5)), "out_layers.2"),
    "a hook on a norm": (lambda m: doubled(m.out_layers[0]), "out_layers.0"),
    "a hook on a sequence": (lambda m: doubled(m.in_layers), "in_layers has not"),
    "an attribute": (lambda m: setattr(m, "skip_t_emb", False), "has no skip_t_emb"),
    "a layer": (lambda m: m.add_module("more", nn.Identity()), "has no more"),
    "a forward of its own": (
        lambda m: setattr(m, "forward", lambda x, emb: m._forward(x, emb) * 2),
        "a forward of its own",
    ),
}
CALLED: dict[str, Any] = {
    "an adapter": put("in_layers", 2, Halved),
    "a second adapter": put("out_layers", 3, Halved),
    "a hook on a convolution": lambda m: doubled(m.out_layers[3]),
    "a parametrization": lambda m: nn.utils.parametrizations.weight_norm(m.in_layers[2]),
    "an adapter of the embedding": put("emb_layers", 1, Halved),
    "a hook on the skip": lambda m: doubled(m.skip_connection),
    "a hook on the block": doubled,
}


@pytest.mark.parametrize(("change", "reason"), LEFT.values(), ids=LEFT)
def test_a_block_of_which_something_was_replaced_is_left(change: Any, reason: str) -> None:
    model = changed(change)
    with pytest.warns(UserWarning, match="changed nothing") as warned:
        report = fuse_(model, "selective")
    assert not report.fused
    assert type(model) is openai.ResBlock
    assert reason.replace("\\", "") in report.left[""] and len(warned) == 1
    torch.testing.assert_close(step(model, inputs()), step(changed(change), inputs()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", CALLED.values(), ids=CALLED)
def test_what_is_more_than_its_parameters_is_called(change: Any, mode: str) -> None:
    model = changed(change)
    report = fuse_(model, mode)
    assert not report.left
    torch.testing.assert_close(
        step(model, inputs()), step(changed(change), inputs()), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "change", [*(c for c, _ in LEFT.values()), *CALLED.values()], ids=[*LEFT, *CALLED]
)
def test_a_change_after_fusing_is_no_other_output(change: Any, mode: str) -> None:
    model = block()
    fuse_(model, mode)
    torch.manual_seed(3)
    change(model)
    torch.testing.assert_close(
        step(model, inputs()), step(changed(change), inputs()), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_resampling_replaced_after_fusing_is_called(mode: str) -> None:
    model = block("up")
    fuse_(model, mode)
    expected = copy.deepcopy(model)
    unfuse_(expected)
    for one in (model, expected):
        one.h_upd = nn.Upsample(scale_factor=2, mode="bilinear")
    torch.testing.assert_close(
        step(model, inputs()), step(expected, inputs()), rtol=1e-4, atol=1e-4
    )


def test_another_resampling_is_left() -> None:
    model = block("up")
    model.h_upd = nn.Upsample(scale_factor=2, mode="bilinear")
    with pytest.warns(UserWarning, match="h_upd .Upsample. is no plain resampling"):
        fuse_(model)


class Otherwise(openai.ResBlock):
    """Adds the shift before the scale: the same structure, another formula."""

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x)
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.out_layers[1:]((self.out_layers[0](h) + shift) * (1 + scale))
        out: Tensor = self.skip_connection(x) + h
        return out


class Alike(openai.ResBlock):
    """Another class that computes the same."""


def test_a_class_that_computes_otherwise_is_left_and_one_that_does_not_is_fused() -> None:
    model = randomised(Otherwise(32, 16, 0.0, use_scale_shift_norm=True))
    with pytest.warns(UserWarning, match="Otherwise computes otherwise than OpenAI's"):
        fuse_(model)
    assert fuse_(Alike(32, 16, 0.0)).fused


def test_recognising_a_class_draws_no_random_number() -> None:
    class Fresh(openai.ResBlock):
        pass

    model = Fresh(32, 16, 0.0)
    before = torch.get_rng_state()
    fuse_(model, verify=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_fusing_under_fake_tensors_tries_real_ones() -> None:
    class Fresh(openai.ResBlock):
        pass

    with FakeTensorMode():
        model = nn.Sequential(Fresh(32, 16, 0.0, up=True), openai.normalization(32), openai.SiLU())
        assert list(fuse_(model).fused) == ["", "0"]


def test_a_class_is_tried_in_float32_whatever_the_default_is() -> None:
    class Fresh(openai.ResBlock):
        pass

    model = Fresh(32, 16, 0.0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert fuse_(model).fused
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_class_that_could_not_be_tried_once_is_tried_again() -> None:
    class Fresh(openai.ResBlock):
        broken = True

        def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
            if self.broken:
                raise RuntimeError("not now")
            out: Tensor = super()._forward(x, emb)
            return out

    model = Fresh(32, 16, 0.0)
    with pytest.warns(UserWarning, match="Fresh cannot be tried: RuntimeError: not now"):
        fuse_(model)
    Fresh.broken = False
    assert fuse_(model).fused
