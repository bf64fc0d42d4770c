from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.fit.subject import read_subject
from resblock_bench.bench.measure.networks import zero_inputs
from resblock_bench.reference import PUBLISHED, build

TOML = """
family = "unet"
image_size = 16
model_channels = 32
channel_mult = [1, 2]
num_res_blocks = 1
attention_resolutions = [8]
"""


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return str(path)

    return write


def test_a_published_model_by_its_name() -> None:
    assert read_subject("adm-lsun256", []).config == PUBLISHED["adm-lsun256"]


def test_a_toml_file_has_the_fields_of_a_config(toml: Callable[[str], str]) -> None:
    subject = read_subject(toml(TOML + "dropout = 0.1\n"), [])
    assert subject.name == "mine"
    assert subject.config is not None
    assert subject.config.channel_mult == (1, 2)
    assert subject.config.dropout == 0.1


def test_a_block_by_its_axes() -> None:
    subject = read_subject(None, ["channels=64", "resolution=8", "dims=3"])
    assert subject.cell is not None
    assert (subject.cell.channels, subject.cell.dims) == (64, 3)
    assert subject.name == "64 8³"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model_chanels = 3", "unknown key in"),
        ("model_chanels = 3", "did you mean 'model_channels'"),
        ("dropout = 2.0", "dropout must lie in [0, 1)"),
        ("dropout = 'x'", "Expected `float`, got `str` - at `dropout`"),
        ("family = 'vit'", "'vit': it is one of unet, super_res, encoder, edm_adm, edm_ddpmpp"),
        ("num_classes = 100000000", "num_classes is 100000000, and at most"),
        ("attention_resolutions = [5]", "attention_resolutions"),
        ("image_size = 17\nattention_resolutions = []", "multiples of 2"),
        ("image_size = 16384\nattention_resolutions = []", "image_size is 16384, and at most 8192"),
        ("channel_mult = [1, 100000]", "3200000 channels"),
        (f"channel_mult = {[1] * 13}", "13 levels"),
        ("model_channels = 40", "32"),
        ("= 4", "is not valid TOML"),
        ("x = '" + "a" * 2**20 + "'", "more than 1 MiB, the most that is read"),
    ],
)  # fmt: skip
def test_a_file_that_describes_no_model_is_one_sentence(
    toml: Callable[[str], str], change: str, message: str
) -> None:
    names = {line.split(" =")[0] for line in change.splitlines()}
    kept = [line for line in TOML.splitlines() if line.split(" =")[0] not in names]
    with pytest.raises(UsageError) as error:
        read_subject(toml("\n".join([*kept, change])), [])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "mine.toml" in str(error.value)


def test_a_missing_field_is_named(toml: Callable[[str], str]) -> None:
    with pytest.raises(UsageError, match="the file lacks required field `image_size`"):
        read_subject(toml('family = "unet"\nmodel_channels = 32\n'), [])


@pytest.mark.parametrize(
    ("given", "axes", "message"),
    [
        (None, [], "nothing to plan"),
        ("adm-lsun256", ["channels=64"], "both given"),
        ("adm-lsun265", [], "did you mean 'adm-lsun256'"),
        ("config.json", [], "cannot read config.json"),
        ("absent.toml", [], "cannot read absent.toml"),
        (".", [], "is no TOML file and no config.json by its name"),
        (None, ["channels=64,128"], "the axes select 2 blocks"),
        (None, ["batch=3"], "-a batch is no axis of a block"),
        (None, ["channels=131072"], "more than 65536 channels"),
        (None, ["resolution=8193"], "more than 8192² positions"),
        (None, ["chanels=64"], "did you mean 'channels'"),
    ],
)
def test_what_is_no_subject_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: str | None,
    axes: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as error:
        read_subject(given, axes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_model_takes_its_inputs(name: str) -> None:
    config = PUBLISHED[name]
    with torch.device("meta"):
        inputs = zero_inputs(config, 2)
        target = inputs.pop("target")
        out = build(config)(**inputs)
    assert len(out) == len(target) == 2
    assert config.family == "encoder" or out.shape == target.shape
