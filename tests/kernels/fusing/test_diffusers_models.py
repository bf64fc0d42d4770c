"""Whole models of diffusers, fused: UNet2DModel, UNet2DConditionModel and AutoencoderKL."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support.diffusers_models import (
    MODELS,
    autoencoder,
    cast,
    check,
    conditional,
    in_64_bits,
    known,
    ncsnpp,
    of_autoencoder,
    of_conditional,
    of_unet,
    outcome,
    overall,
    tiny,
    truth,
    unet,
)
from torch import Tensor, nn

from resblock_bench.kernels import GroupNormSiLU, fuse_, unfuse_

MODES = ("none", "selective", "full")
NAMES = list(MODELS)
PICKLED = [name for name in NAMES if "FIR" not in name]  # whose blocks hold lambdas
THREE = ["UNet2DModel, scale and shift", "UNet2DConditionModel", "AutoencoderKL"]


def blocks(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if "ResnetBlock2D" in type(m).__name__]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_computes_the_same(name: str, mode: str) -> None:
    original, inputs, expected, exact = known(name)
    ours = copy.deepcopy(original)
    report = fuse_(ours, mode)
    check(expected, outcome(ours, inputs), exact)
    assert list(ours.state_dict()) == list(original.state_dict())
    left = {"": "UNet2DConditionModel has another head than is built: conv_act is a GELU"}
    for where, why in report.left.items():
        assert "simple" in name and why.startswith(left[where]), report


@pytest.mark.parametrize("name", NAMES)
def test_computes_the_same_in_eval(name: str) -> None:
    make, of = MODELS[name]
    original, inputs = make().eval(), of()
    ours = copy.deepcopy(original)
    fuse_(ours)
    with torch.no_grad():
        exact = in_64_bits(original)(*cast(inputs, torch.float64)).sample
        expected, found = original(*inputs).sample, ours(*inputs).sample
    check({"y": expected}, {"y": found}, {"y": exact})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", THREE)
def test_in_16_bits_and_under_autocast(name: str, mode: str) -> None:
    original, inputs, _, exact = known(name)
    original, ours = copy.deepcopy(original), copy.deepcopy(original)
    fuse_(ours, mode)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = outcome(original, inputs), outcome(ours, inputs)
    check_in_16_bits(expected, found, exact)
    original, ours, inputs = original.bfloat16(), ours.bfloat16(), cast(inputs, torch.bfloat16)
    check_in_16_bits(outcome(original, inputs), outcome(ours, inputs), truth(original, inputs))


def check_in_16_bits(
    original: dict[str, Tensor], fused: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    """Single gradients of a few elements are by chance better or worse, not all of them."""
    check(original, fused, exact, floor=2**-5)
    assert overall(fused, exact) <= 1.2 * overall(original, exact)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", THREE)
def test_one_sample_in_either_layout(name: str, layout: torch.memory_format) -> None:
    """diffusers' attention hands on one sample with strides of either layout or of none."""
    make, of = MODELS[name]
    original, inputs = make().to(memory_format=layout), of(1)
    inputs = (inputs[0].contiguous(memory_format=layout), *inputs[1:])
    ours = copy.deepcopy(original)
    fuse_(ours, "selective")
    expected, exact = outcome(original, inputs), truth(original, inputs)
    check(expected, outcome(ours, inputs), exact)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", THREE)
def test_their_checkpoints_and_ours_never_double(name: str, mode: str, when: str) -> None:
    original, inputs, expected, exact = known(name)
    ours = copy.deepcopy(original).train()
    if when == "before":
        ours.enable_gradient_checkpointing()
    fuse_(ours, mode)
    if when == "after":
        ours.enable_gradient_checkpointing()
    counts: dict[nn.Module, int] = {}
    for b in blocks(ours):
        counts[b.conv1] = 0
        b.conv1.register_forward_pre_hook(lambda m, _: counts.update({m: counts[m] + 1}))
    check(expected, outcome(ours, inputs), exact)
    assert set(counts.values()) <= {1, 2}
    if mode == "full":
        assert set(counts.values()) == {2}


@pytest.mark.parametrize("name", THREE)
def test_outcome_is_the_original_s_to_the_bit_after_unfusing(name: str) -> None:
    make, of = MODELS[name]
    model, inputs = make(), of()
    before = {n: (type(m), m, dict(m.__dict__)) for n, m in model.named_modules()}
    state, expected = copy.deepcopy(model.state_dict()), outcome(model, inputs)
    fuse_(model, "selective")
    unfuse_(model)
    after = {n: (type(m), m) for n, m in model.named_modules()}
    assert after == {n: (kind, m) for n, (kind, m, _) in before.items()}
    for name, (_, module, attributes) in before.items():
        assert module.__dict__ == attributes, name
    for name, t in outcome(model, inputs).items():
        assert torch.equal(t, expected[name]), name
    for name, t in model.state_dict().items():
        assert torch.equal(t, state[name]), name


@pytest.mark.parametrize("name", PICKLED[:1] + THREE)
def test_copies_and_pickles_compute_the_same_and_can_be_unfused(name: str) -> None:
    make, of = MODELS[name]
    model, inputs = make().eval(), of()
    with torch.no_grad():
        plain = model(*inputs).sample
        fuse_(model, "full")
        expected = model(*inputs).sample
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(*inputs).sample, expected)
            unfuse_(other)
            assert torch.equal(other(*inputs).sample, plain)


def test_every_norm_of_a_unet_is_fused_and_the_head_s_activation_with_its_norm() -> None:
    for make in (unet, conditional):
        model = make()
        head = model.conv_act
        fuse_(model)
        model(*(of_unet() if make is unet else of_conditional()))
        assert model.conv_norm_out.activation == "silu"
        assert torch.equal(model.conv_act(torch.ones(1)), torch.ones(1))
        norms = [m for m in model.modules() if type(m) is nn.GroupNorm]
        inside = [n for b in blocks(model) for n in (b.norm1, b.norm2)]
        assert set(norms) <= set(inside)
        unfuse_(model)
        assert model.conv_act is head and type(head) is nn.SiLU
        assert type(model.conv_norm_out) is nn.GroupNorm
    model = autoencoder()
    fuse_(model)
    model(*of_autoencoder())
    for part in (model.encoder, model.decoder):
        assert part.conv_norm_out.activation == "silu"


def test_whole_models_are_verified() -> None:
    for make in (unet, autoencoder):
        model = make()
        report = fuse_(model, "selective", verify=True)
        assert not report.left
        assert fuse_(make(), "selective").fused == report.fused


@pytest.mark.parametrize("late", ["gelu", "hook", "hook_norm"])
def test_a_head_that_changes_after_it_was_fused_computes_what_it_is_now(late: str) -> None:
    original, inputs = unet().eval(), of_unet()
    ours = copy.deepcopy(original)
    fuse_(ours)
    with torch.no_grad():
        ours(*inputs)
        for model in (original, ours):
            {"gelu": gelu, "hook": hook, "hook_norm": hook_norm}[late](model)
        expected = original(*inputs).sample
        torch.testing.assert_close(ours(*inputs).sample, expected, rtol=1e-4, atol=1e-5)


def test_a_head_whose_norm_is_used_elsewhere_keeps_it_as_it_is() -> None:
    model = unet().eval()
    model.norm_of_another = model.conv_norm_out
    report = fuse_(model)
    assert "conv_norm_out stands in another place" in report.left[""]
    with torch.no_grad():
        model(*of_unet())
    x = torch.randn(2, 8, 8, 8)
    expected = nn.functional.group_norm(
        x, 4, model.conv_norm_out.weight, model.conv_norm_out.bias, model.conv_norm_out.eps
    )
    torch.testing.assert_close(model.norm_of_another(x), expected)


def test_attention_norms_have_no_activation() -> None:
    model = conditional()
    fuse_(model)
    attention = [m for n, m in model.named_modules() if n.endswith("attentions.0.norm")]
    assert attention and all(
        isinstance(m, GroupNormSiLU) and m.activation is None for m in attention
    )


def gelu(model: Any) -> None:
    model.conv_act = nn.GELU()


def hook(model: Any) -> None:
    model.conv_act.register_forward_hook(lambda m, args, out: out + 1)


def hook_norm(model: Any) -> None:
    model.conv_norm_out.register_forward_hook(lambda m, args, out: out + 1)


@pytest.mark.parametrize("change", [gelu, hook, hook_norm])
def test_a_changed_head_is_left_with_a_reason(change: Any) -> None:
    model = unet()
    change(model)
    inputs = of_unet()
    expected = model(*inputs).sample
    report = fuse_(model)
    assert any("conv_norm_out" in why or "head" in why for why in report.left.values()), report
    torch.testing.assert_close(model(*inputs).sample, expected, rtol=1e-4, atol=1e-5)


def test_spatial_norms_are_left_with_a_reason() -> None:
    """VQ models whose decoder's norms are modulated by the latent."""
    from diffusers import VQModel

    model = VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        num_vq_embeddings=8,
        norm_type="spatial",
    ).eval()
    (x,) = of_autoencoder()
    with torch.no_grad():
        expected = model(x).sample
        report = fuse_(model)
        torch.testing.assert_close(model(x).sample, expected, rtol=1e-4, atol=1e-5)
    assert report.left["decoder"].startswith("Decoder has another head than is built"), report
    conditioned = [
        n for n, m in model.named_modules() if type(m).__name__ == "ResnetBlockCondNorm2D"
    ]
    assert conditioned and all("its norms depend on" in report.left[n] for n in conditioned)
    assert "encoder.conv_norm_out" in report.fused


def train(model: Any, steps: int) -> list[float]:
    """Noise to be predicted from noised images, the same ones for every model."""
    g = torch.Generator().manual_seed(7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        x, noise = torch.randn(2, 3, 8, 8, generator=g), torch.randn(2, 3, 8, 8, generator=g)
        t = torch.randint(0, 1000, (2,), generator=g)
        loss = (model(0.7 * x + 0.7 * noise, t).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("make", [unet, ncsnpp])
def test_twenty_steps_of_training_have_one_curve(make: Any) -> None:
    original = make().train()
    ours = copy.deepcopy(original)
    fuse_(ours, "selective")
    expected, found = train(original, 20), train(ours, 20)
    assert max(abs(a - b) / abs(a) for a, b in zip(expected, found, strict=True)) <= 1e-4
    assert expected[-1] < expected[0]


def test_an_optimizer_and_an_average_made_before_go_on() -> None:
    model = unet().train()
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    fuse_(model, "selective")
    model(*of_unet()).sample.square().mean().backward()
    optimizer.step()
    average.update_parameters(model)
    for name, p in model.named_parameters():
        moves = p.grad.abs().max() > 1e-5
        assert not (moves and torch.equal(p, before[name])), name
    average.module(*of_unet())


def test_it_is_saved_and_loaded_as_before(tmp_path: Any) -> None:
    model = unet().eval()
    with torch.no_grad():
        expected = model(*of_unet()).sample
        fuse_(model)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()
        assert torch.equal(again(*of_unet()).sample, expected)
        fuse_(again)
        assert torch.equal(again(*of_unet()).sample, model(*of_unet()).sample)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize(("mode", "checkpointing"), [("selective", False), ("full", True)])
def test_torch_compile_takes_it(mode: Any, checkpointing: bool) -> None:
    model, inputs = tiny().train(), of_unet()
    expected = outcome(model, inputs)
    if checkpointing:
        model.enable_gradient_checkpointing()
    fuse_(model, mode)
    torch._dynamo.reset()
    found = outcome(torch.compile(model, backend="aot_eager"), inputs)
    for name, t in expected.items():
        torch.testing.assert_close(
            found.get(name, found.get(f"_orig_mod.{name}")), t, rtol=1e-3, atol=1e-4, msg=name
        )


def test_conditional_inputs_beyond_the_usual() -> None:
    """Residuals of a control network, as pipelines hand them in."""
    model = conditional().eval()
    x, t, text = of_conditional()
    ours = copy.deepcopy(model)
    fuse_(ours)
    with torch.no_grad():
        residuals: dict[str, Tensor] = {}

        def keep(module: nn.Module, args: Any, out: Any) -> None:
            residuals["middle"] = torch.randn(out.shape)

        handle = model.mid_block.register_forward_hook(keep)
        model(x, t, text)
        handle.remove()
        options = {"mid_block_additional_residual": residuals["middle"]}
        down = [torch.randn(2, c, s, s) for c, s in [(8, 8), (8, 8), (8, 4), (16, 4)]]
        options["down_block_additional_residuals"] = tuple(down)
        torch.testing.assert_close(
            ours(x, t, text, **options).sample,
            model(x, t, text, **options).sample,
            rtol=1e-4,
            atol=1e-5,
        )
