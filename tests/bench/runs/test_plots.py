import dataclasses
import io
import os
import shutil
import typing
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import msgspec
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.grid.plan import Plan
from resblock_bench.bench.measure.conditions import conditions
from resblock_bench.bench.measure.telemetry import Reading
from resblock_bench.bench.records import OOM_EXPECTED, Cell, Environment, Ratio, Row, Status
from resblock_bench.bench.runs.dots import draw_dots
from resblock_bench.bench.runs.folder import Run
from resblock_bench.bench.runs.front import draw_front
from resblock_bench.bench.runs.multiples import draw_multiples
from resblock_bench.bench.runs.plots import draw_all, parts
from resblock_bench.bench.runs.quantities import QUANTITIES
from resblock_bench.bench.runs.style import colour_of, marker_of, site_labels

BROKEN = [status for status in typing.get_args(Status) if status != "ok"]
MODES = ("none", "selective", "full")


def known(value: float) -> Ratio:
    """To a thousandth."""
    return Ratio(value=value, low=value * 0.999, high=value * 1.001)


@pytest.fixture
def run(some_row: Callable[[str], Row], plan: Plan, found: Environment, tmp_path: Path) -> Run:
    """Two sites in every variant; timings made up, so that positions are known."""
    base = some_row("train")
    rows = []
    for batch in (2, 4):
        for position, (mode, impl) in enumerate(
            (mode, impl) for mode in MODES for impl in ("reference", "fused")
        ):
            cell = msgspec.structs.replace(base.axes, batch=batch, impl=impl, checkpoint=mode)
            median = 10.0 + position
            same = 10.0 + position - (impl == "fused")
            rows.append(
                msgspec.structs.replace(
                    base,
                    axes=cell,
                    median_ms=median,
                    ratio=known(same / median),
                    ratio_to_none=known(10.0 / median),
                    ci_low_ms=median * 0.9,
                    ci_high_ms=median * 1.1,
                    throughput_images_per_s=batch / median * 1e3,
                )
            )
    return Run(tmp_path / "a-run", plan, found, rows)


def texts(figure: Figure) -> list[str]:
    found = [text.get_text() for ax in figure.axes for text in ax.texts]
    titles = [ax.get_title() for ax in figure.axes]
    return [*found, *titles, *(text.get_text() for text in figure.texts)]


def test_all_figures_are_drawn_in_both_formats(run: Run) -> None:
    run.folder.mkdir()
    paths = draw_all(run)
    assert {path.name for path in paths} == {
        f"{name}.{suffix}"
        for name in ("throughput", "memory", "front")
        for suffix in ("png", "svg")
    }
    for path in paths:
        if path.suffix == ".png":
            pixels = plt.imread(path)
            assert pixels[..., :3].std() > 0.05, "an empty picture"
        else:
            assert path.read_text().count("<path") > 20
    assert plt.get_fignums() == []
    graphics = [path for path in paths if path.suffix == ".svg"]
    before = [path.read_bytes() for path in graphics]
    draw_all(run)
    assert [path.read_bytes() for path in graphics] == before, "the same run, the same graphics"


def test_a_dot_stands_at_its_value(run: Run) -> None:
    figure = draw_dots(run, QUANTITIES[0])
    assert figure is not None
    found = {
        (panel, line.get_color(), round(float(line.get_xdata()[0]), 3))
        for panel, ax in enumerate(figure.axes)
        for line in ax.lines
        if line.get_marker() in ("o", "D")
    }
    expected = {
        (
            MODES.index(row.axes.checkpoint),
            {"reference": "#000000", "fused": "#D55E00"}[row.axes.impl],
            round(row.throughput_images_per_s or 0, 3),
        )
        for row in run.rows
    }
    assert found == expected
    assert f"{10 / 11:.2f}× ±0.00" in texts(figure)
    plt.close(figure)


@pytest.mark.parametrize("status", BROKEN)
def test_a_cell_without_a_number_is_written_out(run: Run, status: str) -> None:
    empty = {"median_ms": None, "throughput_images_per_s": None, "memory": None}
    rows = [msgspec.structs.replace(run.rows[0], status=status, **empty), *run.rows[1:]]
    broken = dataclasses.replace(run, attempts=rows)
    for quantity in QUANTITIES:
        figure = draw_dots(broken, quantity)
        assert figure is not None
        assert texts(figure).count(status) == 1
        plt.close(figure)
    # The site without a reference has nothing to be divided by; the other one remains.
    front = draw_front(broken)
    assert front is not None
    assert "each of 1 blocks" in " ".join(supxlabels(front))
    plt.close(front)


def test_numbers_of_a_cell_that_is_not_right_are_not_drawn(run: Run) -> None:
    """An impossible cell has a time, which nothing may be compared with."""
    row = run.rows[1]
    rows = [run.rows[0], msgspec.structs.replace(row, status="impossible"), *run.rows[2:]]
    broken = dataclasses.replace(run, attempts=rows)
    for quantity in QUANTITIES:
        figure = draw_dots(broken, quantity)
        assert figure is not None
        assert texts(figure).count("impossible") == 1
        assert len(dots(figure)) == len(rows) - 1
        plt.close(figure)
    front = draw_front(broken)
    assert front is not None
    assert "not drawn: 1 impossible" in " ".join(supxlabels(front)).replace("\n", " ")
    plt.close(front)


def dots(figure: Figure) -> list[Line2D]:
    return [line for ax in figure.axes for line in ax.lines if line.get_marker() in ("o", "D")]


def crosses(figure: Figure) -> list[tuple[int, float, float | None]]:
    """Panel, place in GiB and paleness of every ×."""
    return [
        (panel, float(line.get_xdata()[0]) / 1024, line.get_alpha())
        for panel, ax in enumerate(figure.axes)
        for line in ax.lines
        if line.get_marker() == "x"
    ]


def without_memory(run: Run, changes: dict[int, dict[str, object]]) -> Run:
    """The run with some rows, by position, out of memory or as said."""
    empty = {"median_ms": None, "throughput_images_per_s": None, "memory": None, "status": "oom"}
    return dataclasses.replace(
        run,
        attempts=[
            msgspec.structs.replace(row, **{**empty, **changes[place]}) if place in changes else row
            for place, row in enumerate(run.rows)
        ],
    )


EXPECTED = {"status": "skipped", "reason": f"{OOM_EXPECTED}: batch 2 ran out"}


def test_cells_out_of_memory_stand_at_the_wall(run: Run) -> None:
    limit = {"memory_limit_bytes": 24 * 2**30}
    broken = without_memory(run, {0: limit, 2: {**EXPECTED, **limit}, 4: EXPECTED})
    figure = draw_dots(broken, QUANTITIES[1])
    assert figure is not None
    assert crosses(figure) == [(0, 24.0, 1.0), (1, 24.0, 0.4), (2, 24.0, 0.4)]
    assert texts(figure).count("24.0 GiB, the limit") == 3
    for ax in figure.axes:
        (wall,) = (line for line in ax.lines if list(line.get_xdata()) == [24 * 1024] * 2)
        assert ax.get_xlim()[0] < wall.get_xdata()[0] < ax.get_xlim()[1]
        assert overlapping(figure, ax) == []
    caption = " ".join(supxlabels(figure)).replace("\n", " ")
    assert "everything, parameters and inputs included" in caption
    assert "pale ×: not started" in caption
    plt.close(figure)
    throughput = draw_dots(broken, QUANTITIES[0])
    assert throughput is not None
    assert crosses(throughput) == []
    assert [texts(throughput).count(word) for word in ("oom", "skipped")] == [1, 2]
    plt.close(throughput)


def test_limits_that_differ_are_given_as_a_range(run: Run) -> None:
    gib = 2**30
    limits = {place: {"memory_limit_bytes": size * gib} for place, size in ((0, 20), (2, 24))}
    figure = draw_dots(without_memory(run, limits), QUANTITIES[1])
    assert figure is not None
    assert [place for _, place, _ in crosses(figure)] == [20.0, 24.0]
    assert "20.0 GiB to 24.0 GiB, the limits" in texts(figure)
    assert "pale" not in " ".join(supxlabels(figure))
    plt.close(figure)


@pytest.mark.parametrize(("device", "expected"), [("cuda", [(0, 80.0, 1.0)]), ("cpu", [])])
def test_the_wall_of_a_gpu_is_its_memory(
    run: Run, device: str, expected: list[tuple[int, float, float]]
) -> None:
    contract = msgspec.structs.replace(run.rows[0].contract, device=device)
    environment = msgspec.structs.replace(run.environment, gpu_memory_bytes=80 * 2**30)
    broken = dataclasses.replace(
        without_memory(run, {0: {"contract": contract}}), environment=environment
    )
    figure = draw_dots(broken, QUANTITIES[1])
    assert figure is not None
    assert crosses(figure) == expected
    assert texts(figure).count("oom") == 1 - len(expected)
    plt.close(figure)


def test_another_reason_to_skip_is_no_wall(run: Run) -> None:
    reason = {"status": "skipped", "reason": "no such layout", "memory_limit_bytes": 2**30}
    figure = draw_dots(without_memory(run, {0: reason}), QUANTITIES[1])
    assert figure is not None
    assert crosses(figure) == []
    assert texts(figure).count("skipped") == 1
    plt.close(figure)


def test_the_caption_stays_inside_the_figure(run: Run) -> None:
    name = " ".join(["a processor with a long name"] * 10)
    rows = [msgspec.structs.replace(row, device_name=name) for row in run.rows]
    figure = draw_front(dataclasses.replace(run, attempts=rows))
    assert figure is not None
    figure.canvas.draw()
    caption = figure._supxlabel  # type: ignore[attr-defined]
    box = caption.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
    assert name in caption.get_text().replace("\n", " ")
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
    plt.close(figure)


def supxlabels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(plt.Text)]


def test_figures_in_a_foreign_folder_are_written_through_no_link(run: Run, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    figures = run.folder / "figures"
    figures.mkdir(parents=True)
    (figures / "front.png").symlink_to(theirs)
    os.mkfifo(figures / "front.svg")
    draw_all(run)
    assert theirs.read_text() == "theirs"
    assert all(path.is_file() and not path.is_symlink() for path in figures.iterdir())
    shutil.rmtree(figures)
    figures.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(UsageError, match=r"figures cannot be written \(figures is a link\)"):
        draw_all(run)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_names_are_drawn_as_they_are_and_steer_nothing(run: Run) -> None:
    folder = run.folder.parent / "cost $x_ 100% {a} \\frac 机器"
    folder.mkdir()
    name = "\x1b[31mCPU $\\frac \u202e\ud800"  # the second `$` of the caption
    rows = [msgspec.structs.replace(row, device_name=name) for row in run.rows]
    paths = draw_all(dataclasses.replace(run, folder=folder, attempts=rows))
    for path in paths:
        if path.suffix == ".svg":
            ElementTree.parse(path)  # no control character is left in it
            assert "[31mCPU $\\frac \ufffd" in path.read_text(encoding="utf-8")


def test_a_figure_that_cannot_be_written_is_named(run: Run) -> None:
    run.folder.mkdir()
    (run.folder / "figures").write_text("no folder")
    with pytest.raises(UsageError, match=r"figures cannot be written \(File exists\): make it"):
        draw_all(run)
    (run.folder / "figures").unlink()
    (run.folder / "figures" / "front.png").mkdir(parents=True)
    with pytest.raises(UsageError, match="Is a directory"):
        draw_all(run)
    assert not list((run.folder / "figures").glob(".*"))


def test_nothing_measured_draws_nothing(run: Run) -> None:
    empty = {"median_ms": None, "throughput_images_per_s": None, "memory": None}
    rows = [msgspec.structs.replace(row, status="oom", **empty) for row in run.rows]
    broken = dataclasses.replace(run, attempts=rows)
    broken.folder.mkdir()
    assert draw_all(broken) == []


def test_the_front_is_relative_to_the_reference_without_checkpointing(run: Run) -> None:
    figure = draw_front(run)
    assert figure is not None
    for ax in figure.axes:
        offsets = [tuple(map(float, c.get_offsets()[0])) for c in ax.collections]
        assert (1.0, 1.0) in offsets
        assert {round(y, 6) for _, y in offsets} == {
            round(10 / (10 + position), 6) for position in range(6)
        }
    plt.close(figure)


def test_a_line_of_a_sweep_is_one_in_every_reader_of_graphics(run: Run) -> None:
    """A dash pattern of no dashes is invalid, and some draw nothing then."""
    rows = [
        msgspec.structs.replace(row, axes=msgspec.structs.replace(row.axes, resolution=size))
        for size in (8, 16)
        for row in run.rows[:2]
    ]
    figure = draw_multiples(dataclasses.replace(run, attempts=rows), QUANTITIES[0])
    assert figure is not None
    text = io.StringIO()
    figure.savefig(text, format="svg")
    plt.close(figure)
    assert "stroke-dasharray: 4" in text.getvalue()
    assert "stroke-dasharray: ;" not in text.getvalue()


def test_the_caption_says_where_the_numbers_are_from(run: Run) -> None:
    for figure in (*(draw_dots(run, quantity) for quantity in QUANTITIES), draw_front(run)):
        assert figure is not None
        text = " ".join(supxlabels(figure))
        for fact in (run.rows[0].device_name, "torch 2", "triton", "run a-run", "fp32"):
            assert fact in text
        plt.close(figure)


def overlapping(figure: Figure, ax: Axes) -> list[tuple[str, str]]:
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    labels = [*ax.get_yticklabels(), *ax.get_xticklabels(), *ax.texts, ax.title, ax.xaxis.label]
    low, high = sorted(ax.get_xlim())
    boxes = [
        (label.get_text(), label.get_window_extent(renderer))
        for label in labels
        if label.get_text() and (label not in ax.get_xticklabels() or low <= label._x <= high)
    ]
    return [
        (a, b)
        for i, (a, first) in enumerate(boxes)
        for b, second in boxes[i + 1 :]
        if first.overlaps(second)
    ]


def test_no_label_covers_another(run: Run) -> None:
    for figure in (*(draw_dots(run, quantity) for quantity in QUANTITIES), draw_front(run)):
        assert figure is not None
        figure.canvas.draw()
        for ax in figure.axes:
            assert overlapping(figure, ax) == []
        plt.close(figure)


def test_labels_name_only_what_differs(make_cell: Callable[..., Cell]) -> None:
    sites = [make_cell(), make_cell(batch=4), make_cell(resolution=16, out_channels=64)]
    assert list(site_labels(sites).values()) == ["32, 8²\nb2", "32, 8²\nb4", "32→64, 16²\nb2"]
    assert list(site_labels(sites[:1]).values()) == ["32, 8²"]


def test_what_only_the_model_changes_is_left_to_its_name(make_cell: Callable[..., Cell]) -> None:
    sites = [make_cell(model="a", dropout=0.3), make_cell(model="b", dropout=0.1)]
    assert list(site_labels(sites).values()) == ["32, 8²\na", "32, 8²\nb"]


def test_a_disturbed_cell_is_hollow_and_says_no_ratio(run: Run) -> None:
    hot = conditions(
        Reading(t_s=0.0, throttled_us={"heat": 0}), Reading(t_s=1.0, throttled_us={"heat": 9}),
        source="test", images=1, threads=1,
    )  # fmt: skip
    rows = [msgspec.structs.replace(row, conditions=hot) for row in run.rows]
    shaken = dataclasses.replace(run, attempts=[*rows[:6], *run.rows[6:]])
    figure = draw_dots(shaken, QUANTITIES[0])
    assert figure is not None
    assert sum("×" in text for text in texts(figure)) == 3
    calm = draw_dots(run, QUANTITIES[0])
    assert calm is not None
    assert sum("×" in text for text in texts(calm)) == 6
    plt.close("all")


def test_sixteen_other_implementations_differ_in_colour_or_marker() -> None:
    names = ["reference", "fused", *(f"peer{number}" for number in range(16))]
    looks = {(colour_of(name, names), marker_of(name, names)) for name in names}
    assert len(looks) == len(names)


def test_a_model_is_a_line_of_its_own_and_drawn_apart_from_blocks(run: Run) -> None:
    names = ("iddpm-cifar10-uncond", "adm-imagenet64-cond")
    rows = list(run.rows)
    for row in run.rows:
        name, dropout = names[row.axes.batch == 4], 0.3 * (row.axes.batch == 4)
        cell = msgspec.structs.replace(
            row.axes, workload="model", model=name, dropout=dropout, batch=1
        )
        rows.append(msgspec.structs.replace(row, axes=cell))
    mixed = dataclasses.replace(run, attempts=rows)
    found = parts(mixed)
    assert list(found) == ["-block-dropout0.0", "-model"]
    whole = found["-model"]
    figure = draw_dots(whole, QUANTITIES[0])
    assert figure is not None
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert {label.split(",")[0] for label in labels} == set(names)
    assert "Throughput of a whole model" in " ".join(t.get_text() for t in figure.texts)
    front = draw_front(whole)
    assert front is not None
    assert "each of 2 models" in " ".join(supxlabels(front))
    plt.close("all")
