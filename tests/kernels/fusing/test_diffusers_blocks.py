"""diffusers' ResnetBlock2D, fused: every option, what is called, and what is left."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.diffusers_models import ResnetBlock2D, block, cast, check, outcome, randomise, truth
from support.saved import saved_bytes
from torch import Tensor, nn

from resblock_bench.kernels import fuse_, prefer, unfuse_
from resblock_bench.kernels.fusing.diffusers import FusedResnetBlock2D

MODES = ("none", "selective", "full")
VARIANTS: dict[str, dict[str, Any]] = {
    "add": {},
    "scale and shift": {"time_embedding_norm": "scale_shift"},
    "no embedding": {"temb_channels": None},
    "no embedding, of a decoder": {"temb_channels": None, "time_embedding_norm": "group"},
    "embedding as it is": {"skip_time_act": True, "time_embedding_norm": "scale_shift"},
    "scaled output": {"output_scale_factor": 2**0.5},
    "wider": {"out_channels": 24, "groups": 8},
    "wider, skip without bias": {"out_channels": 24, "conv_shortcut_bias": False},
    "skip of the same width": {"use_in_shortcut": True},
    "last convolution wider": {"conv_2d_out_channels": 24},
    "other groups": {"groups_out": 8, "eps": 1e-2, "out_channels": 24},
    "up": {"up": True, "time_embedding_norm": "scale_shift"},
    "down": {"down": True},
    "up by FIR": {"up": True, "kernel": "fir"},
    "down by FIR": {"down": True, "kernel": "fir", "time_embedding_norm": "scale_shift"},
    "up by function": {"up": True, "kernel": "sde_vp"},
    "down by function": {"down": True, "kernel": "sde_vp", "output_scale_factor": 2.0},
    "GELU": {"non_linearity": "gelu", "time_embedding_norm": "scale_shift"},
    "Mish": {"non_linearity": "mish"},
    "ReLU, down": {"non_linearity": "relu", "down": True},
}
KEEPING = ("by FIR", "GELU", "Mish", "ReLU")


def inputs(block: Any, n: int = 2, size: int = 8) -> tuple[Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(n, block.in_channels, size, size, generator=g)
    embedded = block.time_emb_proj is not None
    return x, torch.randn(n, 12, generator=g) if embedded else None


def fused(block: nn.Module, checkpoint: Any = None) -> Any:
    copied = copy.deepcopy(block)
    report = fuse_(copied, checkpoint)
    assert "" in report.fused, report
    return copied


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", VARIANTS)
def test_computes_the_same(name: str, mode: str) -> None:
    original = block(**VARIANTS[name])
    x = inputs(original)
    expected = outcome(original, x)
    check(expected, outcome(fused(original, mode), x), truth(original, x))


@pytest.mark.parametrize("name", ["scale and shift", "wider", "up by FIR", "GELU"])
@pytest.mark.parametrize("training", [True, False])
def test_in_16_bits_and_under_autocast(name: str, training: bool) -> None:
    original = block(**VARIANTS[name]).train(training)
    x = inputs(original)
    exact, ours = truth(original, x), fused(original, "selective")
    with torch.autocast("cpu", torch.bfloat16):
        check(outcome(original, x), outcome(ours, x), exact, floor=2**-8)
    original, ours, x = original.bfloat16(), ours.bfloat16(), cast(x, torch.bfloat16)
    check(outcome(original, x), outcome(ours, x), truth(original, x), floor=2**-8)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["scaled output", "wider", "no embedding", "up", "GELU"])
def test_computes_the_same_in_triton(name: str, mode: str) -> None:
    """Where the convolutions leave their biases to the kernels."""
    pytest.importorskip("triton")
    original = block(**VARIANTS[name])
    x, temb = inputs(original, size=4)
    x = x.contiguous(memory_format=torch.channels_last)
    exact, expected = truth(original, (x, temb)), outcome(original, (x, temb))
    with prefer("triton"):
        check(expected, outcome(fused(original, mode), (x, temb)), exact)


@pytest.mark.parametrize("name", ["add", "down by FIR", "GELU"])
def test_dropout_has_one_mask_in_every_mode_and_none_in_eval(name: str) -> None:
    original = block(dropout=0.3, **VARIANTS[name])
    x = inputs(original)
    runs = [outcome(fused(original, mode), x, seed=5) for mode in MODES]
    for other in runs[1:]:
        for key, value in runs[0].items():
            torch.testing.assert_close(other[key], value, msg=key)
    assert not torch.equal(runs[0]["y"], outcome(fused(original), x, seed=6)["y"])
    original.eval()
    torch.testing.assert_close(fused(original)(*x), original(*x))


def test_all_is_dropped() -> None:
    original = block(dropout=1.0)
    x = inputs(original)
    torch.testing.assert_close(fused(original)(*x), original(*x))


def test_what_each_mode_keeps() -> None:
    original = block(time_embedding_norm="scale_shift")
    x, temb = inputs(original, size=32)
    x.requires_grad_()
    kept = {mode: saved_bytes(fused(original, mode), x, temb) / x.nbytes for mode in MODES}
    assert 4 <= kept["none"] < 4.1  # per norm its input, and what the convolution reads
    assert 2 <= kept["selective"] < 2.1
    assert 1 <= kept["full"] < 1.1
    assert saved_bytes(original, x, temb) / x.nbytes > 5.9


@pytest.mark.parametrize("name", VARIANTS)
def test_selective_says_which_convolution_keeps_its_input(name: str) -> None:
    """Where anything stands between the norm and the convolution that is not fused with them."""
    report = fuse_(block(**VARIANTS[name]), "selective")
    assert not report.left
    assert ("keeps the input of" in report.fused[""]) is any(k in name for k in KEEPING), report


def test_an_embedding_for_all_samples() -> None:
    for norm in ("default", "scale_shift"):
        original = block(time_embedding_norm=norm)
        x, temb = inputs(original)
        expected = original(x, temb[:1])
        torch.testing.assert_close(fused(original)(x, temb[:1]), expected, rtol=1e-4, atol=1e-5)


def test_what_the_block_refuses_is_refused_as_before() -> None:
    original = block(time_embedding_norm="scale_shift", skip_time_act=True, temb_channels=None)
    x, _ = inputs(original)
    for module in (original, fused(original)):
        with pytest.raises(ValueError, match="temb"):
            module(x, None)
    original = block()
    errors = []
    for module in (original, fused(original)):
        with pytest.raises(Exception) as raised:
            module(x, None)
        errors.append(str(raised.value))
    assert errors[0] == errors[1]


def test_an_embedding_that_nobody_projects_is_added_as_before() -> None:
    original = block(temb_channels=None)
    x, _ = inputs(original)
    temb = torch.randn(2, 16, 1, 1)
    torch.testing.assert_close(fused(original)(x, temb), original(x, temb))


def test_the_argument_of_earlier_versions_is_taken_as_before() -> None:
    original = block()
    x, temb = inputs(original)
    results = []
    for module in (original, fused(original)):
        with pytest.warns(FutureWarning, match="scale"):
            results.append(module(x, temb, scale=1.0))
    torch.testing.assert_close(*results)


def test_a_skip_is_contiguous_in_training_alone() -> None:
    original = block(out_channels=24)
    x, temb = inputs(original)
    x = x.contiguous(memory_format=torch.channels_last)
    ours = fused(original)
    for module in (original, ours):
        seen = []
        module.conv_shortcut.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].is_contiguous())
        )
        module.train()(x, temb)
        module.eval()(x, temb)
        assert seen == [True, False]


class Adapter(nn.Module):
    """A low-rank adapter around a layer, as PEFT builds it."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Conv2d(base.in_channels, 2, 3, padding=1, bias=False)
        self.lora_B = nn.Conv2d(2, base.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 0.5 * self.lora_B(self.lora_A(x))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["aten", "triton"])
def test_an_adapter_is_called(mode: str, backend: str) -> None:
    """One that was there, and one that comes after."""
    if backend == "triton":
        pytest.importorskip("triton")
    original = block(out_channels=24)
    x = inputs(original, size=4)
    original.conv1 = randomise(Adapter(original.conv1))
    ours = fused(original, mode)
    for module in (original, ours):
        module.conv2 = randomise(Adapter(module.conv2))
        module.base = module.conv1.base_layer.requires_grad_(False)
    expected, exact = outcome(original, x), truth(original, x)
    with prefer(backend):
        found = outcome(ours, x)
    assert "conv1.lora_A.weight" in found and "conv1.base_layer.weight" not in found
    check(expected, found, exact)


def add_one(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out + 1


CALLED = ["conv1", "conv2", "nonlinearity", "dropout", "time_emb_proj", "conv_shortcut", "upsample"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CALLED)
def test_hooks_run_of_whatever_is_called(name: str, when: str) -> None:
    original = block(out_channels=24, up=True)
    ours = original if when == "before" else fused(original, "selective")
    for module in {original, ours}:
        module.get_submodule(name).register_forward_hook(add_one)
    if when == "before":
        ours = fused(original, "selective")
    x = inputs(original)
    torch.testing.assert_close(ours(*x), original(*x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["norm1", "norm2"])
def test_a_norm_with_hooks_keeps_its_block_as_it_is(name: str) -> None:
    original = block()
    x = inputs(original)
    late = fused(original, "selective")
    for module in (original, late):
        module.get_submodule(name).register_forward_hook(add_one)
    expected = original(*x)
    torch.testing.assert_close(late(*x), expected)
    with pytest.warns(UserWarning, match="changed nothing"):
        report = fuse_(original)
    assert not report.fused and name in report.left[""] and "hooks" in report.left[""]
    assert type(original) is ResnetBlock2D
    torch.testing.assert_close(original(*x), expected)


class Special(ResnetBlock2D):
    def forward(self, input_tensor: Tensor, temb: Tensor | None) -> Tensor:
        return 2 * super().forward(input_tensor, temb)


def own_forward(block: Any) -> None:
    block.forward = lambda x, temb: x


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda b: setattr(b, "norm1", nn.BatchNorm2d(16)), "norm1 is a BatchNorm2d"),
        (lambda b: setattr(b, "time_embedding_norm", "spatial"), "time_embedding_norm"),
        (lambda b: setattr(b, "__class__", Special), "Special is a subclass"),
        (own_forward, "forward of its own"),
    ],
    ids=["norm", "embedding", "subclass", "forward"],
)
def test_another_block_is_left_with_a_reason(change: Any, why: str) -> None:
    original = block()
    change(original)
    x = inputs(original)
    kind, expected = type(original), original(*x)
    with pytest.warns(UserWarning, match="changed nothing"):
        report = fuse_(original)
    assert why in report.left[""], report
    assert type(original) is kind
    torch.testing.assert_close(original(*x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_inside_a_checkpoint_a_block_runs_twice_and_not_three_times(
    mode: str, reentrant: bool
) -> None:
    from torch.utils.checkpoint import checkpoint

    original = block()
    x, temb = inputs(original)
    x.requires_grad_()
    ours, calls = fused(original, mode), []
    ours.time_emb_proj.register_forward_hook(lambda *_: calls.append(1))
    wanted = [x, *original.parameters()]
    expected = torch.autograd.grad(original(x, temb).square().sum(), wanted)
    checkpoint(ours, x, temb, use_reentrant=reentrant).square().sum().backward()
    assert len(calls) == 2
    for e, p in zip(expected, [x, *ours.parameters()], strict=True):
        torch.testing.assert_close(p.grad, e, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_it_can_be_copied_and_pickled_and_given_back(mode: str) -> None:
    original = block(time_embedding_norm="scale_shift")
    x = inputs(original)
    expected, state = original(*x), copy.deepcopy(original.state_dict())
    before = dict(original.__dict__)
    fuse_(original, mode)
    ours = original(*x)
    assert isinstance(original, ResnetBlock2D) and type(original) is not ResnetBlock2D
    for other in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        assert type(other) is type(original)
        assert torch.equal(other(*x), ours)
        unfuse_(other)
        assert type(other) is ResnetBlock2D and torch.equal(other(*x), expected)
    unfuse_(original)
    assert type(original) is ResnetBlock2D and original.__dict__ == before
    assert torch.equal(original(*x), expected)
    for name, t in original.state_dict().items():
        assert torch.equal(t, state[name])


def test_a_mode_may_be_set_later_and_stays_otherwise() -> None:
    ours = fused(block())
    assert ours.checkpoint == "none"
    assert "was fused before" in str(fuse_(ours, "selective"))
    assert ours.checkpoint == "selective"
    fuse_(ours)
    assert ours.checkpoint == "selective"
    with pytest.raises(ValueError, match="half"):
        ours.checkpoint = "half"


@pytest.mark.parametrize("name", ["scale and shift", "no embedding", "up by FIR", "GELU"])
def test_a_right_block_is_verified_and_a_wrong_one_given_back(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = block(dropout=0.5, **VARIANTS[name])
    x = inputs(original.eval())
    expected = original(*x)
    report = fuse_(original, "selective", verify=True)
    assert list(report.fused) == [""] and not report.left
    unfuse_(original)
    monkeypatch.setattr(FusedResnetBlock2D, "_norm_act_conv", lambda self, x, *_, **__: x)
    with pytest.warns(UserWarning, match="changed nothing"):
        report = fuse_(original, "selective", verify=True)
    assert "found wrong" in report.left[""]
    assert type(original) is ResnetBlock2D and torch.equal(original(*x), expected)


def test_a_block_is_verified_with_an_adapter_on_its_embedding() -> None:
    class Low(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base_layer, self.lora = base, nn.Linear(12, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.lora(x)

    original = block()
    original.time_emb_proj = Low(original.time_emb_proj)
    assert not fuse_(original, verify=True).left


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "mode"),
    [("scale and shift", "none"), ("wider", "selective"), ("up by FIR", "full"), ("GELU", "none")],
)
def test_torch_compile_takes_it(name: str, mode: str) -> None:
    original = block(**VARIANTS[name])
    x, temb = inputs(original)
    x.requires_grad_()
    ours = fused(original, mode)
    expected = outcome(ours, (x, temb))
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    y = compiled(x, temb)
    torch.testing.assert_close(y, expected["y"], rtol=1e-4, atol=1e-5)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    wanted = [x, *ours.parameters()]
    names = ["x", *(name for name, _ in ours.named_parameters())]
    for key, found in zip(names, torch.autograd.grad(y, wanted, g), strict=True):
        torch.testing.assert_close(found, expected[key], rtol=1e-3, atol=1e-4, msg=key)


def test_another_of_their_layers_that_resamples_is_called() -> None:
    from diffusers.models.upsampling import KUpsample2D

    original = block()
    original.upsample = KUpsample2D()
    ours, x = fused(original, "selective"), inputs(original)
    check(outcome(original, x), outcome(ours, x), truth(original, x))


@pytest.mark.filterwarnings("ignore")  # of tracing itself
def test_a_trace_takes_another_number_of_samples() -> None:
    original = block().eval()
    traced = torch.jit.trace(fused(original), inputs(original))
    x = inputs(original, n=3)
    torch.testing.assert_close(traced(*x), original(*x), rtol=1e-4, atol=1e-5)


def test_resampling_of_another_kind_is_called() -> None:
    for resample in (
        partial(F.interpolate, scale_factor=2.0, mode="bilinear"),
        partial(F.interpolate, scale_factor=3.0, mode="nearest"),
    ):
        original = block(up=True, kernel="sde_vp")
        original.upsample = resample
        x = inputs(original)
        expected = outcome(original, x)
        check(expected, outcome(fused(original, "selective"), x), truth(original, x))
