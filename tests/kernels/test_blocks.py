"""The fused blocks against their references: outputs, gradients, state dicts, what is saved."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support.oracle import error
from support.saved import saved_bytes
from torch import Tensor, nn

from resblock_bench import kernels, reference
from resblock_bench.kernels import prefer

MODES = ("none", "selective", "full")
VARIANTS: dict[str, dict[str, Any]] = {
    "scale-shift": {"use_scale_shift_norm": True},
    "add": {},
    "up": {"up": True, "use_scale_shift_norm": True},
    "down": {"down": True},
    "wider": {"out_channels": 96, "use_scale_shift_norm": True},
    "wider, 3×3 skip": {"out_channels": 96, "use_conv": True},
    "length": {"dims": 1, "use_scale_shift_norm": True, "down": True},
    "volume": {"dims": 3, "up": True},
}


def randomise(module: nn.Module) -> nn.Module:
    """The last convolution starts at zero, which would make every block its skip path."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.5 / p[0].numel() ** 0.5))
    return module


def pair(mode: str, dropout: float = 0.0, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A reference block and the fused one with the same weights."""
    block = randomise(reference.ResBlock(64, 24, dropout, **options))
    fused = kernels.ResBlock(64, 24, dropout, **options, checkpoint=mode)
    fused.load_state_dict(block.state_dict(), strict=True)
    return block, fused


def inputs(
    dims: int = 2, size: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(2, 64, *(size,) * dims, generator=g).to(dtype)
    return x.requires_grad_(), torch.randn(2, 24, generator=g).to(dtype).requires_grad_()


def outcome(block: nn.Module, x: Tensor, emb: Tensor, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    y = block(x, emb)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, emb, *block.parameters()], g)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_is_its_reference(options: dict[str, Any], mode: str) -> None:
    block, fused = pair(mode, **options)
    x, emb = inputs(options.get("dims", 2))
    eager, ours = outcome(block, x, emb), outcome(fused, x, emb)
    exact = copy.deepcopy(block).double()
    truth = outcome(
        exact, x.detach().double().requires_grad_(), emb.detach().double().requires_grad_()
    )
    assert len(eager) == len(ours) == len(truth)
    for e, o, t in zip(eager, ours, truth, strict=True):
        assert error(o, t) <= 2 * error(e, t) + 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_edm_block_is_its_reference(options: dict[str, Any], mode: str) -> None:
    if options.get("dims", 2) != 2 or "use_conv" in options:
        pytest.skip("EDM's block is two-dimensional and has 1×1 skips")
    arguments = {
        "in_channels": 64,
        "out_channels": options.get("out_channels", 64),
        "emb_channels": 24,
        "up": options.get("up", False),
        "down": options.get("down", False),
        "adaptive_scale": options.get("use_scale_shift_norm", False),
        "attention": True,
        "skip_scale": 0.7,
        "channels_per_head": 32,
    }
    block = randomise(reference.EDMBlock(**arguments))
    fused = kernels.EDMBlock(**arguments, checkpoint=mode)
    fused.load_state_dict(block.state_dict(), strict=True)
    x, emb = inputs()
    for e, o in zip(outcome(block, x, emb), outcome(fused, x, emb), strict=True):
        torch.testing.assert_close(o, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{"use_scale_shift_norm": True, "out_channels": 32}, {}],
                         ids=["scale-shift, wider", "add"])  # fmt: skip
def test_is_its_reference_in_triton(options: dict[str, Any], mode: str) -> None:
    """Where both convolutions leave their bias to the kernels; channels-last from end to end."""
    pytest.importorskip("triton")
    block, fused = pair(mode, **options)
    x, emb = inputs(size=4)
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    with prefer("triton"):
        ours = outcome(fused, x, emb)
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in ours[:2])
    eager = outcome(block, x, emb)
    exact = copy.deepcopy(block).double()
    truth = outcome(
        exact, x.detach().double().requires_grad_(), emb.detach().double().requires_grad_()
    )
    names = ["y", "x", "emb", *(name for name, _ in block.named_parameters())]
    for name, e, o, t in zip(names, eager, ours, truth, strict=True):
        if name == "in_layers.2.bias" and "out_channels" in options:
            continue  # one channel a group: the norm removes this bias, its gradient is zero
        assert error(o, t) <= 2 * error(e, t) + 1e-6, name


@pytest.mark.parametrize("backend", ["aten", "triton"])
def test_down_block_of_odd_size(backend: str) -> None:
    """Pooling leaves out a row and a column, whose gradient is zero and must be there."""
    if backend == "triton":
        pytest.importorskip("triton")
    block, fused = pair("selective", down=True)
    x, emb = inputs(size=5)
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    with prefer(backend):
        ours = outcome(fused, x, emb)
    for e, o in zip(outcome(block, x, emb), ours, strict=True):
        torch.testing.assert_close(o, e, rtol=1e-4, atol=1e-4)


def test_edm_block_is_its_reference_in_triton() -> None:
    pytest.importorskip("triton")
    arguments = {"in_channels": 64, "out_channels": 64, "emb_channels": 24, "skip_scale": 0.7}
    block = randomise(reference.EDMBlock(**arguments))
    fused = kernels.EDMBlock(**arguments, checkpoint="selective")
    fused.load_state_dict(block.state_dict(), strict=True)
    x, emb = inputs(size=4)
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    with prefer("triton"):
        ours = outcome(fused, x, emb)
    for e, o in zip(outcome(block, x, emb), ours, strict=True):
        torch.testing.assert_close(o, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_biases_cost_no_pass_of_their_own_in_triton(mode: str) -> None:
    """The first one is in the add before the second norm, the second in the residual addition."""
    pytest.importorskip("triton")
    from resblock_bench.kernels.launch import recording

    _, fused = pair(mode)
    x, emb = inputs(size=4)
    with prefer("triton"), recording() as launches:
        fused(x, emb)
    first, second, last = launches
    assert first.kernel is second.kernel and first.arguments["p_pre"] is None
    expected = fused.emb_layers(emb) + fused.in_layers[2].bias
    torch.testing.assert_close(second.arguments["p_pre"], expected)
    assert last.arguments["p_bias"] is fused.out_layers[3].bias


def test_a_convolution_with_hooks_is_called_with_its_bias_in_triton() -> None:
    pytest.importorskip("triton")
    _, fused = pair("none")
    calls = []
    fused.in_layers[2].register_forward_hook(lambda module, args, output: calls.append(module))
    x, emb = inputs(size=4)
    x = x.detach().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = fused(x, emb)
        with prefer("triton"):
            torch.testing.assert_close(fused(x, emb), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "options", [{"use_scale_shift_norm": True}, {}], ids=["scale-shift", "add"]
)
def test_dropout_has_one_mask_in_every_mode(options: dict[str, Any]) -> None:
    x, emb = inputs()
    runs = []
    for mode in MODES:
        _, fused = pair(mode, dropout=0.3, **options)
        runs.append(outcome(fused, x, emb, seed=5))
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(runs[0][0], outcome(fused, x, emb, seed=6)[0])
    fused.eval()
    block, _ = pair("none", **options)
    torch.testing.assert_close(fused(x, emb), block(x, emb))


@pytest.mark.parametrize(
    "options", [{"use_scale_shift_norm": True}, {}], ids=["scale-shift", "add"]
)
def test_selective_keeps_two_activations(options: dict[str, Any]) -> None:
    block, selective = pair("selective", **options)
    _, none = pair("none", **options)
    x, emb = inputs(size=32)
    ours = saved_bytes(selective, x, emb)
    assert 2 * x.nbytes <= ours < 2.1 * x.nbytes  # x and the second norm's input
    assert 4 * x.nbytes <= saved_bytes(none, x, emb) < 4.1 * x.nbytes
    ratio = ours / saved_bytes(block, x, emb)
    assert ratio <= (0.35 if options else 0.42)  # the additive block has one activation less


@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode: str) -> None:
    block, fused = pair(mode, use_scale_shift_norm=True, out_channels=96)
    x, emb = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        eager, ours = outcome(block, x, emb), outcome(fused, x, emb)
    exact = copy.deepcopy(block).double()
    truth = outcome(
        exact, x.detach().double().requires_grad_(), emb.detach().double().requires_grad_()
    )
    for e, o, t in zip(eager, ours, truth, strict=True):
        assert o.dtype == e.dtype
        assert error(o, t) <= 2 * error(e, t) + 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "frozen", ["in_layers.0.weight", "in_layers.2.weight", "out_layers.3.bias"]
)
def test_frozen_parameters(mode: str, frozen: str) -> None:
    block, fused = pair(mode, use_scale_shift_norm=True)
    for module in (block, fused):
        module.get_parameter(frozen).requires_grad_(False)
    x, emb = inputs()
    for module in (block, fused):
        module(x, emb).square().sum().backward()
    for (name, e), (_, o) in zip(block.named_parameters(), fused.named_parameters(), strict=True):
        assert (o.grad is None) == (e.grad is None) == (name == frozen)
        if o.grad is not None:
            torch.testing.assert_close(o.grad, e.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_inputs_without_gradient(mode: str) -> None:
    block, fused = pair(mode, use_scale_shift_norm=True)
    x, emb = (t.detach() for t in inputs())
    block(x, emb).sum().backward()
    fused(x, emb).sum().backward()
    for e, o in zip(block.parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(o.grad, e.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_second_backward_through_a_retained_graph(mode: str) -> None:
    _, fused = pair(mode, dropout=0.3, use_scale_shift_norm=True)
    x, emb = inputs()
    y = fused(x, emb)
    first = torch.autograd.grad(y.sum(), [x, emb], retain_graph=True)
    second = torch.autograd.grad(y.sum(), [x, emb])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_input_changed_in_place_is_noticed(mode: str) -> None:
    _, fused = pair(mode)
    x, emb = inputs()
    z = x * 1
    y = fused(z, emb)
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_channels_last_is_kept(mode: str) -> None:
    block, fused = pair(mode, use_scale_shift_norm=True)
    x, emb = inputs()
    fused = fused.to(memory_format=torch.channels_last)
    z = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    y = fused(z, emb)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (dz,) = torch.autograd.grad(y.sum(), z)
    (dx,) = torch.autograd.grad(block(x, emb).sum(), x)
    torch.testing.assert_close(dz, dx, rtol=1e-4, atol=1e-4)


def test_copies_and_pickles() -> None:
    _, fused = pair("selective")
    x, emb = inputs()
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert other.checkpoint == "selective"
        assert torch.equal(other(x, emb), fused(x, emb))


@pytest.mark.parametrize("samples", [(3, 1), (1, 3)])
def test_one_embedding_is_of_all_images_and_one_image_of_all_embeddings(
    samples: tuple[int, int],
) -> None:
    x, emb = torch.randn(samples[0], 32, 4, 4), torch.randn(samples[1], 8)
    for name, arguments in (("ResBlock", (32, 8, 0.0)), ("EDMBlock", (32, 32, 8))):
        plain, fused = (getattr(package, name)(*arguments) for package in (reference, kernels))
        with torch.no_grad():
            for p in plain.parameters():
                p.normal_(std=0.1)
        fused.load_state_dict(plain.state_dict())
        torch.testing.assert_close(fused(x, emb), plain(x, emb), rtol=1e-4, atol=1e-5)


def test_is_a_timestep_block() -> None:
    _, fused = pair("none")
    x, emb = inputs()
    sequence = reference.TimestepEmbedSequential(fused)
    assert torch.equal(sequence(x, emb), fused(x, emb))


def test_mode_can_be_changed_and_is_checked() -> None:
    fused = kernels.ResBlock(64, 24, 0.0, use_checkpoint=True)
    assert fused.checkpoint == "full"
    fused.checkpoint = "selective"
    assert not fused.use_checkpoint
    with pytest.raises(ValueError, match="checkpoint is 'some'; allowed are"):
        fused.checkpoint = "some"
    with pytest.raises(ValueError, match="checkpoint is 'some'"):
        kernels.ResBlock(64, 24, 0.0, checkpoint="some")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("direction", ["none", "up", "down"])
@pytest.mark.parametrize("dims", [2, 3])
def test_autocast_with_an_identity_skip(dims: int, direction: str, mode: str) -> None:
    """x in fp32 beside a branch in bf16: the sum is fp32, as the reference's."""
    options = {} if direction == "none" else {direction: True}
    block, fused = pair(mode, dims=dims, **options)
    x, emb = inputs(dims, size=4)
    with torch.autocast("cpu", torch.bfloat16):
        e, o = block(x, emb), fused(x, emb)
    assert o.dtype == e.dtype
    torch.testing.assert_close(o, e, rtol=0.05, atol=0.05)
    o.float().sum().backward()


def test_hook_on_a_convolution_sees_its_output() -> None:
    block, fused = pair("none")
    seen = []
    for module in (block, fused):
        module.out_layers[3].register_forward_hook(lambda m, i, o: seen.append(o))
    x, emb = inputs()
    for module in (block, fused):
        module(x, emb)
    torch.testing.assert_close(seen[1], seen[0])


@pytest.mark.parametrize(
    "options", [{"use_scale_shift_norm": True}, {}], ids=["scale-shift", "add"]
)
def test_selective_is_none_in_triton(options: dict[str, Any]) -> None:
    """The activation that the backward writes again is the forward's."""
    pytest.importorskip("triton")
    x, emb = (t.detach()[:1] for t in inputs(size=2))
    # Channels-last, where a program has many groups: the interpreter's time is programs.
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    emb.requires_grad_()
    with prefer("triton"):
        runs = [
            outcome(pair(mode, dropout=0.3, **options)[1], x, emb) for mode in ("none", "selective")
        ]
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# Dynamo instantiates autograd functions, and warns of itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("mode", MODES)
def test_compiles_without_a_graph_break(mode: str) -> None:
    _, fused = pair(mode, use_scale_shift_norm=True)
    x, emb = inputs()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, emb), fused(x, emb))
