import os
from pathlib import Path

import msgspec
import pytest

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.grid.grid import plan
from resblock_bench.bench.grid.presets import PRESETS_FILE, choose, load, named, presets
from resblock_bench.bench.measure.timing import DEFAULT_RULE


def written(folder: Path, text: str) -> Path:
    path = folder / "sweep.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["cpu", "cuda", "models", "smoke"])
def test_every_preset_selects_cells(name: str) -> None:
    cells = [planned.cell for planned in plan(named(name).grids)]
    assert {"reference", "fused"} <= {cell.impl for cell in cells}
    assert {cell.checkpoint for cell in cells} == {"none", "selective", "full"}


def test_the_cpu_preset_measures_real_training_steps_of_two_models() -> None:
    cells = [planned.cell for planned in plan(named("cpu").grids)]
    assert {cell.model for cell in cells} == {"iddpm-cifar10-uncond", "iddpm-imagenet64-uncond"}
    assert {(cell.mode, cell.dtype, cell.layout) for cell in cells} == {("train", "fp32", "nchw")}
    assert len({cell.resolution for cell in cells}) >= 4
    assert len({cell.channels for cell in cells}) >= 3


def test_a_file_is_read_like_a_preset(tmp_path: Path) -> None:
    preset = load(
        written(
            tmp_path,
            """
            description = "mine"
            device = "cpu"
            [settings]
            max_time = "3s"
            warmup = "10ms"
            warmup_max = "20ms"
            min_samples = 7
            [[grid]]
            channels = [64, 32]
            resolution = "[8:16:x2]"
            [[grid]]
            dims = 1
            """,
        )
    )
    assert preset.grids == ({"channels": (64, 32), "resolution": (8, 16)}, {"dims": (1,)})
    assert preset.settings.rule() == msgspec.structs.replace(
        DEFAULT_RULE, warmup_s=0.01, warmup_max_s=0.02, max_time_s=3.0, min_samples=7
    )
    assert (preset.name, preset.description, preset.device) == ("sweep", "mine", "cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[grid]]\nchanels = 64", r"grid\[0\].chanels: unknown axis.*'channels'"),
        ("[[grid]]\nbatch = 1\n[[grid]]\ndtype = ['fp8']", r"grid\[1\].dtype: .*'fp8'"),
        ("grid = 3", "grid"),
        ("grid = []", "grid"),
        ("description = 'none'", "grid"),
        ("colour = 1\n[[grid]]\nbatch = 1", "colour"),
        ("[settings]\nmax_tim = '1s'\n[[grid]]\nbatch = 1", "max_tim"),
        ("[settings]\nmax_time = 'soon'\n[[grid]]\nbatch = 1", "settings: 'soon' is not a dura"),
        ("[settings]\nmin_samples = 0\n[[grid]]\nbatch = 1", "settings.min_samples"),
        (
            "[settings]\nmin_samples = 9\nmax_samples = 8\n[[grid]]\nbatch = 1",
            "min_samples=9 is above max_samples=8",
        ),
        ("device = 'tpu'\n[[grid]]\nbatch = 1", "device"),
        ("[[grid]\nbatch = 1", "is not valid TOML.*line 1"),
    ],
)
def test_a_bad_file_is_refused_naming_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError, match=message) as refusal:
        load(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load(tmp_path / "absent.toml")


def test_arguments_replace_axes_of_every_grid_of_a_preset() -> None:
    preset = choose(["batch=3"], "cpu", None, "cpu")
    assert len(preset.grids) == len(named("cpu").grids)
    assert all(grid["batch"] == (3,) for grid in preset.grids)
    assert preset.grids[0]["channels"] == named("cpu").grids[0]["channels"]


def test_arguments_alone_stand_over_the_defaults_of_the_axes() -> None:
    assert choose(["batch=3"], None, None, "cpu").grids == ({"batch": (3,)},)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nothing_given_is_the_preset_of_the_device(device: str) -> None:
    assert choose([], None, None, device) == presets()[device]  # type: ignore[arg-type]


NAMED = """
[mine]
device = "cpu"
[mine.settings]
max_time = "2s"
[[mine.grid]]
batch = 3
"""


def test_a_preset_that_was_copied_is_read(tmp_path: Path) -> None:
    preset = choose([], None, written(tmp_path, NAMED), "cuda")
    assert (preset.name, preset.device, preset.grids) == ("mine", "cpu", ({"batch": (3,)},))
    assert preset.settings.max_time == "2s"


def test_of_several_sweeps_in_a_file_one_is_named_or_the_device_s_is_taken(tmp_path: Path) -> None:
    assert choose([], None, PRESETS_FILE, "cpu") == named("cpu")
    assert choose(["batch=3"], "smoke", PRESETS_FILE, "cpu") == named("smoke").overridden(
        {"batch": (3,)}
    )
    path = written(tmp_path, NAMED + NAMED.replace("mine", "other"))
    with pytest.raises(UsageError, match="holds 2 sweeps: name one with --preset: mine, other"):
        choose([], None, path, "cpu")
    with pytest.raises(UsageError, match="unknown preset 'cpu': it is one of mine, other"):
        choose([], "cpu", path, "cpu")


def test_what_is_wrong_with_a_named_sweep_names_it(tmp_path: Path) -> None:
    path = written(tmp_path, "[mine]\ndescription = 'no grid'\n")
    with pytest.raises(UsageError, match=r"sweep.toml: mine: .*missing required field `grid`"):
        load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = " + b"9" * 5000, "is not valid TOML: Exceeds the limit"),
        (b"a = " + b"[" * 100_000, "is not valid TOML: maximum recursion depth"),
        (b"\xff\xfe", "is not valid TOML: 'utf-8' codec"),
        (b"#" * (2**20 + 1), "it has more than 1 MiB"),
        (b"[settings]\nwarmup = ''\n[[grid]]\nbatch = 1", "settings: '' is not a duration"),
        (b"", "missing required field `grid`"),
    ],
)
def test_a_file_that_is_no_sweep_is_a_sentence(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "sweep.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load(path)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    path.write_bytes(b"\xef\xbb\xbf[[grid]]\nbatch = 1\n")
    assert load(path).grids == ({"batch": (1,)},)


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "sweep.toml")
    with pytest.raises(UsageError, match="it is a pipe, not a file"):
        load(tmp_path / "sweep.toml")


def test_the_example_of_the_docs_is_a_sweep(tmp_path: Path) -> None:
    text = (Path(__file__).parents[3] / "docs" / "measuring.md").read_text(encoding="utf-8")
    example = text.partition("```toml\n[decoder]")[2].partition("```")[0]
    preset = load(written(tmp_path, f"[decoder]{example}"))
    assert plan(preset.grids)


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'smoke'"):
        named("smok")
