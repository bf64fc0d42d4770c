"""What `fuse_` leaves of models that it does not know wholly, and that it says so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resblock_bench import kernels, reference
from resblock_bench.kernels import GroupNormSiLU, fuse_


def small(cls: type[nn.Module] = reference.UNetModel, **options: Any) -> Any:
    torch.manual_seed(0)
    model = cls(8, 3, 32, 3, 1, (), channel_mult=(1,), **options)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape))
    return model


class Features(reference.UNetModel):
    """Uses the norm of its head alone."""

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self._embed(x, timesteps, y)
        return self.out[0](self.input_blocks[0](x, emb))


class ResnetBlock2D(nn.Module):
    """As diffusers' block: the activation is a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1)
        self.nonlinearity = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.nonlinearity(self.norm1(x)))
        return x + self.conv2(self.nonlinearity(self.norm2(h)))


class ByFunction(ResnetBlock2D):
    """As latent diffusion's block: the activation is a function."""

    def __init__(self) -> None:
        super().__init__()
        del self.nonlinearity
        self.nonlinearity = F.silu


class InLists(nn.Module):
    """As OpenAI's block: the layers stand in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {"a": nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1))}
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers["a"](x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(4, 16), nn.Conv2d(16, 48, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=1)
        return x + q * k * v


class Rectified(nn.Sequential):
    """Nobody expects its activation to be fused."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU())


def head() -> nn.Sequential:
    return nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 3, 3))


UNKNOWN = "is of no class that is known: of its own layers the group norms alone are fused"


@pytest.mark.parametrize("make", [ResnetBlock2D, ByFunction])
def test_a_block_of_an_unknown_class_is_listed(make: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 1), make(), Attention(), Rectified())
    norms = sum(isinstance(m, nn.GroupNorm) for m in model.modules())
    x = torch.randn(2, 16, 4, 4)
    expected = model(x)
    report = fuse_(model)
    assert report.left == {"1": f"{make.__name__} {UNKNOWN}"}
    assert len(report.fused) == norms
    torch.testing.assert_close(model(x), expected)
    assert fuse_(model).left == report.left


def test_sequences_are_fused_wherever_they_stand() -> None:
    assert list(fuse_(head()).fused) == [""]
    report = fuse_(nn.Sequential(nn.ModuleList([head()]), InLists()))
    assert list(report.fused) == ["0.0", "1.layers.a"]
    assert not report.left


def test_a_sequence_with_a_changed_layer_is_listed_as_its_owner_s() -> None:
    model = nn.Sequential(nn.ModuleList([head()]))
    hook(model[0][0][1])
    report = fuse_(model)
    assert report.left == {"": f"Sequential {UNKNOWN}"}
    assert list(report.fused) == ["0.0.0"]


def test_what_is_fused_already_is_not_listed() -> None:
    model = nn.Sequential(GroupNormSiLU(4, 16), nn.Conv2d(16, 3, 3))
    with pytest.warns(UserWarning, match="changed nothing"):
        assert not fuse_(model).left


def test_a_subclass_that_uses_its_norm_alone_computes_the_same() -> None:
    model = small(Features)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 500.0])
    expected = model(x, t)
    report = fuse_(model)
    torch.testing.assert_close(model(x, t), expected, rtol=1e-4, atol=1e-5)
    assert not report.left
    assert "out" in report.fused and type(model.out[0]) is reference.GroupNorm32


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, out: out + 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: hook(model.out[0]),
        lambda model: hook(model.out[1]),
        lambda model: model.out.__setitem__(1, nn.GELU()),
        lambda model: model.out.insert(1, nn.Tanh()),
    ],
    ids=[
        "norm hooked",
        "SiLU hooked",
        "GELU",
        "a layer between",
    ],
)
def test_a_changed_head_computes_the_same_and_is_listed(change: Any) -> None:
    model = small()
    change(model)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 500.0])
    expected = model(x, t)
    report = fuse_(model)
    torch.testing.assert_close(model(x, t), expected, rtol=1e-4, atol=1e-5)
    assert "UNetModel has another head than is built" in report.left[""]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: hook(model.out),
        lambda model: model.middle_block.append(model.out[0]),
        lambda model: setattr(
            model, "forward", lambda x, t: model.out[0](x.mean() + torch.zeros(2, 32, 4, 4))
        ),
    ],
    ids=["head hooked", "norm used elsewhere", "model's own forward"],
)
def test_what_is_around_a_head_is_as_it_was(change: Any) -> None:
    model = small()
    change(model)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 500.0])
    expected = model(x, t)
    report = fuse_(model)
    torch.testing.assert_close(model(x, t), expected, rtol=1e-4, atol=1e-5)
    assert "out" in report.fused


@pytest.mark.parametrize(
    "make",
    [
        small,
        lambda: small(reference.SuperResModel),
        lambda: small(reference.EncoderUNetModel),
        lambda: small(reference.EncoderUNetModel, pool="spatial"),
        lambda: small(reference.EncoderUNetModel, pool="spatial_v2"),
    ],
)
def test_this_project_s_models_leave_nothing(make: Any) -> None:
    model = make()
    for _ in range(2):
        assert not fuse_(model).left
    assert not fuse_(nn.ModuleList([make()])).left


@pytest.mark.parametrize("training", [True, False])
def test_every_module_stays_in_its_mode(training: bool) -> None:
    model = small().train(training)
    fuse_(model)
    assert {m.training for m in model.modules()} == {training}


def test_two_models_with_one_head_compute_the_same() -> None:
    a, b = small(), small()
    b.out = a.out
    model = nn.ModuleList([a, b])
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 500.0])
    expected = [m(x, t) for m in model]
    fuse_(model)
    for m, y in zip(model, expected, strict=True):
        torch.testing.assert_close(m(x, t), y, rtol=1e-4, atol=1e-5)


def test_a_norm_compiled_by_torchscript_is_listed() -> None:
    with pytest.warns(DeprecationWarning):
        model = nn.Sequential(torch.jit.script(nn.GroupNorm(4, 16)))
    with pytest.warns(UserWarning, match="changed nothing"):
        report = fuse_(model)
    assert report.left == {"0": "GroupNorm is compiled by TorchScript"}


def test_copies_of_a_fused_model_fuse_alike() -> None:
    model = small()
    report = fuse_(model, "selective")
    assert fuse_(copy.deepcopy(model)).left == report.left == {}
    assert isinstance(model.input_blocks[1][0], kernels.ResBlock)
