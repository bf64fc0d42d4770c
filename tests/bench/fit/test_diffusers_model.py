"""Models of diffusers by their config.json; what needs diffusers is skipped without it."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F
from support.diffusers_configs import CONFIGS, needs_diffusers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.fit import training as trainings
from resblock_bench.bench.fit.cuda_autocast import cuda_autocast
from resblock_bench.bench.fit.plans import MemoryPlan
from resblock_bench.bench.fit.subject import Subject, read_subject
from resblock_bench.bench.fit.training import Recipe, Training
from resblock_bench.bench.fit.variant import VariantJob, variant_plan
from resblock_bench.bench.measure.diffusers_model import build_model, call, draw_inputs
from resblock_bench.kernels import FuseReport

K_BLOCKS: dict[str, Any] = {
    "down_block_types": ["KDownBlock2D", "KDownBlock2D"],
    "up_block_types": ["KUpBlock2D", "KUpBlock2D"],
    "act_fn": "gelu",
    "resnet_time_scale_shift": "scale_shift",
}
REFERENCE = Recipe(impl="reference", checkpoint="none", precision="fp32", ema=True)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """A config.json with some keys changed; those that are None are missing."""

    def written(config: dict[str, Any], **changes: object) -> str:
        path = tmp_path / "config.json"
        merged = {**config, **changes}
        path.write_text(json.dumps({k: v for k, v in merged.items() if v is not None}))
        return str(path)

    return written


@needs_diffusers
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_of_diffusers_is_a_subject_that_runs(write: Callable[..., str], kind: str) -> None:
    given = write(CONFIGS[kind], _diffusers_version="0.20.0")
    subject = read_subject(given, [])
    assert subject.name.startswith(f"{CONFIGS[kind]['_class_name']} of {given[:40]}")
    assert subject.diffusers is not None
    with torch.device("meta"):
        inputs = draw_inputs(subject.diffusers, 3)
        target = inputs.pop("target")
        assert call(build_model(subject.diffusers), inputs).shape == target.shape
    assert len(target) == 3


@needs_diffusers
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("unet", {}),
        ("scale_shift", {"checkpoint": "selective"}),
        ("text", {"checkpoint": "full"}),
        ("sdxl", {"precision": "bf16"}),
        ("vae", {"checkpoint": "selective", "accumulate": True}),
        ("unet", {"impl": "fused", "checkpoint": "full"}),
        ("vae", {"impl": "fused", "checkpoint": "selective"}),
        ("text", {"precision": "bf16", "checkpoint": "full"}),
        ("scale_shift", {"precision": "fp16", "checkpoint": "selective"}),
    ],
)
def test_fake_tensors_of_a_model_of_diffusers_live_as_real_ones_do(
    kind: str, changes: dict[str, Any]
) -> None:
    recipe = msgspec.structs.replace(REFERENCE, **changes)
    subject = Subject(name=kind, diffusers=CONFIGS[kind])
    with FakeTensorMode():
        fake = Training(subject, recipe).watch(2)
    real = Training(subject, recipe).watch(2)
    assert fake.live_bytes().tolist() == real.live_bytes().tolist()
    assert fake.peak() == real.peak()


@needs_diffusers
def test_the_loss_of_an_autoencoder_has_its_posteriors_divergence() -> None:
    training = Training(Subject(name="vae", diffusers=CONFIGS["vae"]), REFERENCE)
    with torch.no_grad():
        for p in training.parameters:
            p.normal_(std=0.1)
    image = torch.randn(2, 3, 16, 16)
    inputs = {"sample": image, "target": image}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss = training._loss(inputs)
        torch.manual_seed(0)
        out = training.model(image, sample_posterior=True).sample
    posterior = training.model.encode(image).latent_dist
    expected = F.mse_loss(out, image) + 1e-6 * posterior.kl().mean()
    torch.testing.assert_close(loss, expected)
    assert posterior.kl().mean() > 1


@needs_diffusers
def test_checkpointing_needs_less_and_has_the_same_parameters() -> None:
    subject = Subject(name="unet", diffusers=CONFIGS["unet"])
    peaks = {}
    for mode in ("none", "selective", "full"):
        recipe = msgspec.structs.replace(REFERENCE, checkpoint=mode)
        with FakeTensorMode():
            peaks[mode] = Training(subject, recipe).watch(64).peak()
    assert peaks["full"].bytes < peaks["selective"].bytes < peaks["none"].bytes
    assert len({peak.kinds["parameters"] for peak in peaks.values()}) == 1


@needs_diffusers
def test_a_plan_of_a_model_of_diffusers_says_what_was_fused(
    write: Callable[..., str], run_cli: Callable, planned_here: list[bytes], tmp_path: Path
) -> None:
    out = tmp_path / "plan.json"
    only = ("--impl", "fused", "--checkpoint", "none")
    done = run_cli("plan", write(CONFIGS["unet"]), "--batch", 2, *only, "--json", out)
    assert done.code == 0, done.err
    text = " ".join(done.out.split())
    assert "fused none: it has " in text
    assert " modules were left as they are" in text
    assert "caching allocator would reserve, an estimate that is not confirmed on a GPU" in text
    found = msgspec.json.decode(out.read_bytes(), type=MemoryPlan)
    (plan,) = found.variants
    assert plan.reserved_bytes is not None
    assert plan.reserved_bytes > plan.peak.bytes
    assert found.subject.diffusers == CONFIGS["unet"]


@needs_diffusers
def test_a_model_in_which_nothing_is_fused_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(model: nn.Module, checkpoint: object) -> FuseReport:
        import warnings

        warnings.warn("nothing was fused", stacklevel=2)
        return FuseReport()

    monkeypatch.setattr(trainings, "fuse_", nothing)
    job = VariantJob(
        subject=Subject(name="unet", diffusers=CONFIGS["unet"]),
        recipe=msgspec.structs.replace(REFERENCE, impl="fused"),
        batch=2,
        capacities=[2**28],
    )
    assert variant_plan(job).note == "nothing was fused, so this is the reference"


@needs_diffusers
@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("unet", {"layers_per_blok": 2}, "did you mean 'layers_per_block'"),
        ("unet", {"sample_size": None}, "has no sample_size"),
        ("unet", {"sample_size": "big"}, "has no sample_size"),
        ("unet", {"sample_size": 16384}, "sample_size is 16384, and at most 8192"),
        ("unet", {"layers_per_block": 10**6}, "layers_per_block is 1000000, and at most 64"),
        ("unet", {"block_out_channels": [32] * 13}, "block_out_channels has 13 values"),
        ("unet", {"block_out_channels": [32, 40]}, "describes no model that runs: "),
        ("unet", {"block_out_channels": [32]}, "describes no model that runs: "),
        ("unet", {"down_block_types": ["Down", "Down"]}, "describes no model that runs: "),
        ("unet", {"sample_size": 17}, "describes no model that runs: "),
        ("unet", {"sample_size": -8}, "describes no model that runs: "),
        ("vae", {"sample_size": 17}, "set sample_size to a multiple of 2"),
        ("text", {"addition_embed_type": "image"}, "addition_embed_type is 'image', and null"),
        ("text", {"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type is 'image_proj'"),
        ("text", {"cross_attention_dim": [48, 48]}, "cross_attention_dim has several values"),
        ("text", {"class_embed_type": "identity"}, "class_embed_type is 'identity'"),
        ("text", K_BLOCKS, "constants beside its weights (down_blocks.0.downsamplers.0.kernel)"),
    ],
)  # fmt: skip
def test_a_config_that_describes_no_model_is_one_sentence(
    write: Callable[..., str], kind: str, changes: dict[str, Any], message: str
) -> None:
    given = write(CONFIGS[kind], **changes)
    with pytest.raises(UsageError) as error:
        read_subject(given, [])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert given in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"_class_name": "FluxTransformer2DModel"}', "describes a FluxTransformer2DModel, and "),
        ('{"architectures": ["BertModel"]}', "no model of diffusers, lacking _class_name"),
        ('{"_class_name": 3}', "describes a 3, and UNet2DModel"),
        ("[1, 2]", "is no configuration in JSON: Expected `object`, got `array`"),
        ("{", "is no configuration in JSON"),
        ("[" * 10**5, "is no configuration in JSON"),
        (f'{{"_class_name": "UNet2DModel", "norm_eps": {"[" * 800 + "]" * 800}}}', "config.json "),
        ('"' + "a" * 2**20 + '"', "more than 1 MiB, the most that is read"),
    ],
    ids=["transformer", "bert", "number", "list", "damaged", "deep", "nested", "large"],
)  # fmt: skip
def test_a_config_of_another_architecture_is_one_sentence_and_2(
    run_cli: Callable, tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    done = run_cli("plan", path)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1


def test_a_config_without_diffusers_says_what_to_install(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "diffusers" else find(name)
    )
    with pytest.raises(UsageError, match="is not installed: pip install diffusers"):
        read_subject(write(CONFIGS["unet"]), [])


@needs_diffusers
def test_a_number_that_a_model_of_diffusers_asks_for_names_the_line(
    run_cli: Callable,
    write: Callable[..., str],
    planned_here: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = write(CONFIGS["unet"])
    made = trainings.diffusers_model.build_model

    def asking(config: dict[str, Any], *, checkpoint: bool) -> nn.Module:
        model = made(config, checkpoint=checkpoint)
        model.conv_in.register_forward_hook(lambda module, inputs, out: out.max().item())
        return model

    monkeypatch.setattr(trainings.diffusers_model, "build_model", asking)
    monkeypatch.setattr("resblock_bench.bench.fit.subject.diffusers_model.read_config", json_of)
    done = run_cli("plan", given, "--impl", "reference", "--checkpoint", "none")
    assert done.code == 3
    text = " ".join(done.out.split())
    assert f"{Path(__file__).name}, line " in text
    assert "asks for a number in a tensor" in text


def test_norms_under_autocast_are_in_float32_as_on_cuda() -> None:
    x, weight = torch.ones(2, 4, 3, dtype=torch.bfloat16), torch.ones(4)
    with cuda_autocast():
        assert F.group_norm(x, 2, weight, weight).dtype == torch.bfloat16, "autocast is off"
        with torch.autocast("cpu", torch.bfloat16):
            assert nn.GroupNorm(2, 4)(x).dtype == torch.float32
            assert F.layer_norm(x, [3]).dtype == torch.float32
            assert F.interpolate(x, scale_factor=2.0).dtype == torch.float32
            assert x.softmax(-1).dtype == torch.float32
            assert nn.Conv1d(4, 4, 1)(x).dtype == torch.bfloat16


def json_of(given: str) -> dict[str, Any]:
    """Unchecked."""
    config: dict[str, Any] = json.loads(Path(given).read_text())
    return config


def test_attention_is_no_option_of_a_model_of_diffusers(run_cli: Callable) -> None:
    done = run_cli("plan", "-a", "channels=32", "--recompute-attention")
    assert done.code == 2
    assert "has no attention block of this suite to compute again: leave it out" in done.err
