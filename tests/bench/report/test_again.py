"""A command of a page selects what the page shows."""

import itertools
import shlex
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from resblock_bench.bench.grid.grid import PlannedCell, plan
from resblock_bench.bench.grid.plan import Plan
from resblock_bench.bench.grid.presets import choose, named
from resblock_bench.bench.records import Row, config_name
from resblock_bench.bench.report.again import command_of_cell, command_of_run

FOLDER = Path("of a run")
CONFIG = '{"_class_name":"UNet2DModel","sample_size":8}'


def options(command: str, name: str) -> list[str]:
    words = shlex.split(command)
    assert words[:2] == ["resblock-bench", "run"]
    return [value for option, value in itertools.pairwise(words) if option == name]


def selected(command: str) -> list[PlannedCell]:
    presets = options(command, "--preset")
    return plan(choose(options(command, "-a"), presets[0] if presets else None, None, "cpu").grids)


@pytest.fixture
def of(plan: Plan) -> Callable[..., Plan]:
    """A plan of the cells that axes select."""

    def make(*arguments: str, **changes: object) -> Plan:
        from resblock_bench.bench.grid.grid import plan as planned

        cells = planned(choose(arguments, None, None, "cpu").grids)
        return msgspec.structs.replace(plan, **{"cells": cells, **changes})

    return make


def test_a_run_of_a_preset_names_it(of: Callable[..., Plan]) -> None:
    sweep = named("smoke")
    cells = plan(sweep.grids)
    found = command_of_run(of("channels=32", cells=cells, rule=sweep.settings.rule()), FOLDER)
    assert found == "resblock-bench run --preset smoke --device cpu"


@pytest.mark.parametrize(
    "arguments",
    [
        ("channels=64,96", "resolution=8,16"),
        ("model=iddpm-cifar10-uncond", "resolution=32", "checkpoint=none,full"),
        ("channels=64", "out_channels=32,96", "dropout=0.1", "mode=inference", "impl=fused"),
        ("workload=model,blocks", "model=iddpm-cifar10-uncond", "batch=2", "checkpoint=none,full"),
        ("workload=model", "model=iddpm-cifar10-uncond", "batch=4", "microbatch=2"),
        ("dims=1,2", "conditioning=add", "dtype=bf16", "layout=nhwc", "batch=1,3"),
    ],
)
def test_a_run_over_axes_names_them(of: Callable[..., Plan], arguments: tuple[str, ...]) -> None:
    asked = of(*arguments)
    found = command_of_run(asked, FOLDER)
    assert found is not None
    assert {c.cell for c in selected(found)} == {c.cell for c in asked.cells}


def test_what_was_set_of_the_rule_is_set_again(of: Callable[..., Plan]) -> None:
    asked = of("channels=64", seed=3, threads=2)
    rule = msgspec.structs.replace(asked.rule, min_samples=7, max_samples=7, max_time_s=9.0)
    found = command_of_run(msgspec.structs.replace(asked, rule=rule), FOLDER)
    assert found is not None
    names = ("--samples", "--max-time", "--seed", "--threads")
    assert [options(found, name) for name in names] == [["7"], ["9s"], ["3"], ["2"]]


def test_cells_that_no_axes_select_have_no_command(of: Callable[..., Plan]) -> None:
    cells = of("channels=64,96", "resolution=8,16").cells
    assert command_of_run(of("channels=64", cells=cells[1:]), FOLDER) is None
    foreign = msgspec.structs.replace(cells[0].cell, impl="$(reboot)", channels=33)
    assert command_of_run(of("channels=64", cells=[PlannedCell(foreign, 1)]), FOLDER) is None
    assert command_of_run(of("channels=64", cells=[]), FOLDER) is None


def test_a_cell_s_command_selects_it(of: Callable[..., Plan], make_row: Callable[..., Row]) -> None:
    blocks = of("model=iddpm-cifar10-uncond", "batch=2", "checkpoint=full").cells
    wholes = of("workload=model,blocks", "model=edm-cifar10-ddpmpp-cond", "impl=fused").cells
    for asked in blocks + wholes:
        found = command_of_cell(make_row(axes=asked.cell, seed=5), FOLDER)
        assert options(found, "--seed") == ["5"]
        assert asked.cell in [item.cell for item in selected(found)]


def test_a_name_in_a_command_stays_one_word(make_row: Callable[..., Row]) -> None:
    found = command_of_cell(make_row(impl="x'; reboot #"), FOLDER)
    assert "impl=x'; reboot #" in options(found, "-a")


def test_a_model_of_diffusers_is_named_by_its_file_in_the_folder(
    make_row: Callable[..., Row],
) -> None:
    name = config_name("UNet2DModel", CONFIG)
    found = command_of_cell(make_row(workload="model", model=name, config=CONFIG), FOLDER)
    assert f"model=of a run/{name}.json" in options(found, "-a")
