import csv
from pathlib import Path

import msgspec
import pytest

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.grid.axes import models, parse_arguments
from resblock_bench.bench.grid.grid import PlannedCell, plan, weight
from resblock_bench.bench.records import site_name, variant_name

SHAPES = Path(__file__).parents[2] / "data" / "resblock_shapes.csv"


def planned(text: str) -> list[PlannedCell]:
    return plan([parse_arguments(text.split())])


def test_axes_multiply() -> None:
    cells = planned("channels=32,64 resolution=8,16 batch=1,2 impl=reference")
    shapes = {(c.cell.channels, c.cell.resolution, c.cell.batch) for c in cells}
    assert len(cells) == len(shapes) == 8


def test_out_channels_follow_channels_unless_given() -> None:
    assert {c.cell.out_channels for c in planned("channels=64")} == {64}
    assert {c.cell.out_channels for c in planned("channels=64 out_channels=32,96")} == {32, 96}


def test_variants_of_a_site_are_adjacent_and_peers_next_to_each_other() -> None:
    cells = [c.cell for c in planned("batch=1,2 checkpoint=none,full impl=reference,fused")]
    assert [(cell.batch, variant_name(cell)) for cell in cells] == [
        (batch, f"{impl}/{mode}")
        for batch in (1, 2)
        for mode in ("none", "full")
        for impl in ("reference", "fused")
    ]


def test_order_is_that_of_the_request_not_of_the_values() -> None:
    assert [c.cell.batch for c in planned("batch=4,1,2 impl=reference")] == [4, 1, 2]


def test_checkpointing_only_multiplies_training() -> None:
    cells = [c.cell for c in planned("mode=inference,forward,train checkpoint=none,selective,full")]
    assert len(cells) == len(set(cells)) == 2 * (1 + 1 + 3)
    assert {cell.checkpoint for cell in cells if cell.mode != "train"} == {"none"}


def test_a_selection_without_cells_says_why() -> None:
    with pytest.raises(UsageError, match="only in mode=train"):
        planned("mode=inference checkpoint=full")


def test_cells_of_overlapping_selections_appear_once() -> None:
    first, second = parse_arguments(["batch=1,2"]), parse_arguments(["batch=2,3"])
    assert [c.cell.batch for c in plan([first, second])] == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("text", ["channels=48", "channels=64 out_channels=100"])
def test_channels_that_the_groups_do_not_divide_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="multiple of 32"):
        planned(text)


@pytest.mark.parametrize("model", models())
def test_a_model_has_exactly_its_published_blocks(model: str) -> None:
    expected: dict[tuple[object, ...], int] = {}
    with SHAPES.open() as file:
        for row in csv.DictReader(file):
            if row["model"] == model:
                key = tuple(row[k] for k in ("c_in", "c_out", "h", "emb_channels", "updown"))
                key += (float(row["dropout"]), row["use_scale_shift_norm"] == "1")
                expected[key] = expected.get(key, 0) + int(row["count"])
    found = {
        (
            *map(str, (c.cell.channels, c.cell.out_channels, c.cell.resolution)),
            str(c.cell.emb_channels),
            c.cell.updown,
            c.cell.dropout,
            c.cell.conditioning == "scale_shift",
        ): c.multiplicity
        for c in planned(f"model={model} impl=reference")
    }
    assert found == expected
    assert expected


def test_axes_pick_among_a_models_blocks() -> None:
    cells = planned("model=iddpm-cifar10-uncond resolution=16 channels=256,384 impl=fused")
    assert [(c.cell.channels, c.cell.out_channels, c.multiplicity) for c in cells] == [
        (256, 256, 2),
        (384, 256, 1),
    ]
    assert {c.cell.dropout for c in cells} == {0.3}


def test_dropout_overrides_the_models() -> None:
    cells = planned("model=iddpm-cifar10-uncond resolution=8 channels=256 dropout=0,0.1")
    assert sorted({c.cell.dropout for c in cells}) == [0.0, 0.1]


def test_several_models_follow_one_another() -> None:
    cells = planned("model=adm-classifier64,iddpm-cifar10-uncond resolution=16 impl=fused")
    names = [c.cell.model for c in cells]
    assert list(dict.fromkeys(names)) == ["adm-classifier64", "iddpm-cifar10-uncond"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resolution=17", "no block of iddpm-cifar10-uncond has resolution=17: it is one of 4, 8"),
        ("channels=192", "has channels=192: it is one of 128, 256"),
        ("conditioning=add", "has conditioning=add: it is one of scale_shift"),
        ("resolution=32 channels=512", "has all of resolution=32 channels=512"),
        ("dims=3", "two-dimensional"),
    ],
)
def test_what_a_model_does_not_have_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        planned(f"model=iddpm-cifar10-uncond {text}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch=[1:400:+1] resolution=[1:400:+1]", "320,000 combinations.*100,000 cells"),
        ("batch=16777216 resolution=16777216", "which no tensor holds: give a smaller batch"),
    ],
)
def test_what_nobody_can_measure_is_no_plan(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        planned(text)


def test_a_whole_model_is_one_site_with_the_sizes_of_its_images() -> None:
    cells = [
        item.cell
        for item in planned(
            "workload=model model=iddpm-cifar10-uncond batch=2 checkpoint=none,full impl=fused"
        )
    ]
    assert [variant_name(cell) for cell in cells] == ["fused/none", "fused/full"]
    assert {(c.resolution, c.channels, c.out_channels, c.dropout) for c in cells} == {
        (32, 3, 6, 0.3)
    }
    assert {site_name(cell) for cell in cells} == {"iddpm-cifar10-uncond whole model 32² b2 p=0.3"}


def test_models_of_another_block_are_run_whole_alone() -> None:
    name = "edm-cifar10-ddpmpp-cond"
    cells = planned(f"workload=model,blocks model={name} impl=reference")
    assert [item.cell.workload for item in cells] == ["model", "blocks"]
    with pytest.raises(UsageError, match=r"blocks of another kind.*workload=model or workload=bl"):
        planned(f"model={name}")
    with pytest.raises(UsageError, match="blocks of another kind"):
        planned(f"workload=block,model model={name}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("workload=model", "needs a model: give model=NAME, one of iddpm-cifar10"),
        ("workload=blocks", "needs a model"),
        ("workload=model resolution=8", "needs a model"),
        ("workload=model model=adm-lsun256 resolution=8", "resolution would pick .*workload=block"),
        ("workload=blocks model=adm-lsun256 channels=256", "channels would pick among"),
        ("workload=model model=adm-lsun256 dims=3", "two-dimensional"),
        ("workload=modell", "did you mean 'model'"),
        ("workload=model model=adm-lsun255", "did you mean 'adm-lsun256'"),
        ("microbatch=2", "microbatch is for workload=model"),
        ("microbatch=2 workload=blocks model=adm-lsun256", "microbatch is for workload=model"),
        ("workload=model model=adm-lsun256 microbatch=0", "integers from 1"),
    ],
)
def test_what_no_whole_model_has_is_refused_in_one_sentence(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as refusal:
        planned(text)
    assert "\n" not in str(refusal.value)


def test_microbatches_are_of_training_and_smaller_than_the_batch() -> None:
    text = "workload=model,blocks model=adm-lsun256 batch=2,4 microbatch=1,2 mode=train,inference"
    cells = [item.cell for item in planned(f"{text} impl=reference")]
    assert len(cells) == len(set(cells))
    assert {(c.workload, c.mode, c.batch, c.microbatch) for c in cells} == {
        ("model", "train", 2, None), ("model", "train", 2, 1),
        ("model", "train", 4, 1), ("model", "train", 4, 2),
        *((w, m, b, None) for w, m in (("model", "inference"), ("blocks", "train"),
                                       ("blocks", "inference")) for b in (2, 4)),
    }  # fmt: skip


def test_a_model_weighs_as_much_as_its_blocks() -> None:
    name = "adm-imagenet64-cond"
    (whole,) = planned(f"workload=model model={name} batch=3 impl=reference")
    blocks = planned(f"model={name} batch=3 impl=reference")
    assert weight(whole.cell, 1) == sum(weight(b.cell, b.multiplicity) for b in blocks)


def test_cells_of_blocks_are_written_as_before_there_were_models() -> None:
    (cell,) = (item.cell for item in planned("impl=reference"))
    assert {"workload", "microbatch"}.isdisjoint(msgspec.json.decode(msgspec.json.encode(cell)))
    (whole,) = (item.cell for item in planned("workload=model model=adm-lsun256 impl=reference"))
    assert msgspec.json.decode(msgspec.json.encode(whole), type=type(whole)) == whole
