import pytest

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.grid.axes import axes, models, parse_arguments, parse_values


@pytest.mark.parametrize(
    ("name", "given", "values"),
    [
        ("resolution", "[16:128:x2]", (16, 32, 64, 128)),
        ("resolution", "[16:64:+16]", (16, 32, 48, 64)),
        ("resolution", "[16:70:+16]", (16, 32, 48, 64)),
        ("resolution", "[5:5:x3]", (5,)),
        ("batch", "1,[2:8:x2],3", (1, 2, 4, 8, 3)),
        ("batch", "4,2,4", (4, 2)),
        ("dropout", "0,0.3", (0.0, 0.3)),
        ("dtype", "bf16, fp32", ("bf16", "fp32")),
        ("channels", [64, "[128:256:x2]"], (64, 128, 256)),
        ("channels", 64, (64,)),
    ],
    ids=str,
)
def test_values_are_read(name: str, given: object, values: tuple[object, ...]) -> None:
    assert parse_values(name, given) == values


def test_arguments_become_a_selection() -> None:
    assert parse_arguments(["dtype=bf16", "batch=[1:4:x2]"]) == {
        "dtype": ("bf16",),
        "batch": (1, 2, 4),
    }


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("resolutoin=8", "unknown axis 'resolutoin'.*did you mean 'resolution'"),
        ("dtype=fp8", "unknown value of axis 'dtype': 'fp8'.*fp32, bf16, fp16"),
        ("model=mine.toml", "one of iddpm-.*, the config.json of a model of diffusers"),
        ("impl=fusd", "did you mean 'fused'"),
        ("model=iddpm-cifar10", "did you mean 'iddpm-cifar10-uncond'"),
        ("dtype", "write NAME=VALUES"),
        ("dtype=", "given no value.*fp32"),
        ("batch=0", "does not take '0'.*integers from 1"),
        ("batch=2.5", "does not take '2.5'"),
        ("batch=two", "does not take 'two'"),
        ("dims=4", "does not take '4'.*1, 2, 3"),
        ("dropout=1", "0 ≤ value < 1"),
        ("dropout=nan", "0 ≤ value < 1"),
        ("resolution=[16:128]", "is not a range"),
        ("resolution=[16:128:2]", "is not a range"),
        ("resolution=[16:128:x2", "is not a range"),
        ("resolution=[a:b:x2]", "is not a range"),
        ("dropout=[0:1:+1]", "is not a range"),
        ("resolution=[128:16:x2]", "does not ascend"),
        ("resolution=[16:128:x1]", "does not ascend"),
        ("resolution=[16:128:+0]", "does not ascend"),
        ("resolution=8]", "does not take"),
        ("channels=[32:99999999999:+32]", "does not take '99999999999'.*to 16777216"),
        ("batch=[1:200000:+1]", "200,000 values.*100,000 cells: widen the step"),
        (f"batch=[1:{'9' * 5000}:+1]", "is not a range"),
        ("batch=16777217", "integers from 1 to 16777216"),
        (f"batch={'9' * 5000}", "does not take '9{60}…'"),
        (f"dtype={'9' * 5000}", "'9{60}…'"),
    ],
    ids=lambda value: value if "=" in value or value == "dtype" else "",
)
def test_bad_arguments_are_refused_in_one_sentence(argument: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as refusal:
        parse_arguments([argument])
    assert "\n" not in str(refusal.value)


def test_an_axis_given_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="given twice"):
        parse_arguments(["batch=1", "batch=2"])


@pytest.mark.parametrize("value", [True, 2.5, None, {"a": 1}])
def test_toml_values_of_the_wrong_type_are_refused(value: object) -> None:
    with pytest.raises(UsageError, match="does not take"):
        parse_values("batch", value)


def test_every_default_is_allowed() -> None:
    for axis in axes().values():
        if axis.default:
            assert parse_values(axis.name, list(axis.default)) == axis.default


def test_models_are_those_made_of_this_block() -> None:
    assert "adm-imagenet256-cond" in models()
    assert not any(str(name).startswith("edm") for name in models())
