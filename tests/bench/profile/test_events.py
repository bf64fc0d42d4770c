"""To what every nanosecond of a step belongs, on events that are written down here."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from resblock_bench.bench.profile.events import (
    MODULE,
    STEP,
    Event,
    Slice,
    events_of,
    slices_of,
    spans_of,
)
from resblock_bench.bench.profile.groups import group_of

NODE = "autograd::engine::evaluate_function: "
DEVICES = torch._C._autograd.DeviceType


def within(*events: Event, end: int = 1000) -> list[Event]:
    """A step of these events, in the order of time."""
    return sorted([Event(STEP, 0, end), *events], key=lambda one: (one.start, -one.end))


def by(slices: list[Slice], *names: str) -> Counter:
    found: Counter = Counter()
    for one in slices:
        found[tuple(getattr(one, name) for name in names)] += one.ns
    return found


TRAINING = within(
    Event(f"{MODULE}", 10, 400),
    Event(f"{MODULE}conv", 20, 200),
    Event("aten::conv2d", 30, 190, sequence=7),
    Event("aten::mkldnn_convolution", 40, 180),
    Event("aten::mul", 210, 300, sequence=8),
    Event("aten::mse", 410, 420, sequence=9),
    Event(f"{NODE}MseBackward0", 430, 440, sequence=9),
    Event(f"{NODE}MulBackward0", 450, 500, sequence=8),
    Event("MulBackward0", 455, 495, sequence=8),
    Event("aten::mul", 460, 490),
    Event(f"{NODE}ConvolutionBackward0", 510, 800, sequence=7),
    Event("aten::convolution_backward", 520, 790),
    Event(f"{NODE}torch::autograd::AccumulateGrad", 801, 820),
    Event("aten::detach", 802, 810),
    Event("aten::_fused_adamw_", 850, 900),
)


def test_all_parts_add_up_to_the_step() -> None:
    slices = slices_of(TRAINING)
    assert sum(one.ns for one in slices) == 1000
    assert all(one.ns >= 0 for one in slices)


def test_the_backward_belongs_to_the_module_that_made_its_node() -> None:
    found = by(slices_of(TRAINING), "module", "stage")
    assert found["conv", "forward"] == 180
    assert found["conv", "backward"] == 290 + 19  # with the accumulation of its gradient
    assert found["", "backward"] == 50
    assert found["", "forward"] == 390 - 180
    assert found[None, "backward"] == 10
    assert found[None, "update"] == 50


def test_what_an_operator_calls_is_of_its_group_and_the_rest_are_gaps() -> None:
    found = by(slices_of(TRAINING), "stage", "group")
    assert found["forward", "convolution"] == 160
    assert found["backward", "convolution"] == 270
    assert found["backward", "elementwise"] == 30 + 8
    assert found["update", "optimizer"] == 50
    assert by(slices_of(TRAINING), "name")[("aten::conv2d",)] == 20
    assert all((one.name is None) == (one.group == "gaps") for one in slices_of(TRAINING))


def test_what_a_checkpoint_computes_again_is_no_backward() -> None:
    events = within(
        Event(f"{MODULE}block", 0, 300),
        Event(f"{MODULE}block.conv", 10, 100),
        Event("aten::conv2d", 20, 90, sequence=1),
        Event("aten::add", 110, 120, sequence=2),
        Event(f"{NODE}ConvolutionBackward0", 400, 900, sequence=1),
        Event("aten::mul", 405, 410, sequence=5),  # of the block itself, whose call is not seen
        Event(f"{MODULE}block.conv", 410, 500),
        Event("aten::conv2d", 420, 490, sequence=6),
        Event("FusedFunction", 500, 520, sequence=7),
        Event("aten::add", 505, 515),
        Event("aten::convolution_backward", 600, 700),
        Event(f"{NODE}ConvolutionBackward0", 910, 950, sequence=6),
    )
    found = by(slices_of(events), "module", "stage")
    assert found["block.conv", "recompute"] == 90
    assert found["block", "recompute"] == 5 + 20
    assert found["block.conv", "backward"] == 500 - 90 - 25 + 40


def test_two_nodes_with_numbers_of_one_operator_are_of_the_last_that_had_the_number() -> None:
    """What makes no node has the number of the next one that does."""
    events = within(
        Event(f"{MODULE}first", 0, 100),
        Event("aten::to", 10, 20, sequence=3),
        Event(f"{MODULE}second", 100, 200),
        Event("aten::silu", 110, 120, sequence=3),
        Event(f"{NODE}SiluBackward0", 300, 400, sequence=3),
    )
    assert by(slices_of(events), "module", "stage")["second", "backward"] == 100


def test_a_microbatch_after_a_backward_is_forward_again() -> None:
    events = within(
        Event(f"{NODE}AddBackward0", 100, 200, sequence=1),
        Event("aten::slice", 210, 220, sequence=2),
        Event(f"{MODULE}conv", 220, 300),
        Event(f"{NODE}AddBackward0", 400, 500, sequence=2),
        Event("Optimizer.step#AdamW.step", 600, 700),
        Event("aten::add", 610, 620),
    )
    found = by(slices_of(events), "stage")
    assert found["update",] == 100
    assert found["backward",] == 200


ON_A_GPU = within(
    Event(f"{MODULE}conv", 10, 100),
    Event("aten::conv2d", 20, 90, sequence=1, correlation=5),
    Event("cudaLaunchKernel", 30, 40, thread=9, correlation=71),
    Event(f"{MODULE}norm", 100, 200),
    Event("_DirectFunction", 110, 190, sequence=2, correlation=6),
    Event("cuLaunchKernelEx", 120, 130, correlation=72),
    Event(f"{NODE}ConvolutionBackward0", 300, 400, sequence=1, correlation=7),
    Event("cudaLaunchKernel", 310, 320, correlation=73),
    Event("cudnn_gemm", 50, 350, kernel=True, correlation=71, cause=5),
    Event("forward_kernel", 340, 500, kernel=True, correlation=72),
    Event("wgrad", 600, 700, kernel=True, correlation=73, cause=7),
    Event("hidden", 610, 650, kernel=True, correlation=98),
    Event("Memset (Device)", 700, 710, kernel=True, correlation=99),
)


def test_on_a_gpu_the_step_is_its_kernels_and_what_lies_between_them() -> None:
    slices = slices_of(ON_A_GPU)
    assert sum(one.ns for one in slices) == 1000
    found = by(slices, "name", "module", "stage", "group")
    assert found["cudnn_gemm", "conv", "forward", "convolution"] == 300
    assert found["forward_kernel", "norm", "forward", "norm-act"] == 150  # 10 are the first's
    assert found["wgrad", "conv", "backward", "convolution"] == 100
    assert found["Memset (Device)", None, "forward", "copies"] == 10
    assert [one.ns for one in slices if one.name == "hidden"] == [0]
    assert found[None, "conv", "forward", "gaps"] == 50
    assert found[None, "conv", "backward", "gaps"] == 100
    assert found[None, None, "update", "gaps"] == 290


def recorded(kind: object, name: str, start: int, **more: int) -> SimpleNamespace:
    given = {"bytes": 0, "annotation": False, **more}
    return SimpleNamespace(
        device_type=lambda: kind,
        name=lambda: name,
        start_ns=lambda: start,
        duration_ns=lambda: 5,
        sequence_nr=lambda: -1,
        start_thread_id=lambda: 1,
        correlation_id=lambda: 3,
        linked_correlation_id=lambda: 0,
        device_resource_id=lambda: 7,
        nbytes=lambda: given["bytes"],
        is_user_annotation=lambda: given["annotation"],
    )


@pytest.mark.parametrize(("device", "bytes_"), [("cpu", [8]), ("cuda", [64])])
def test_only_the_memory_of_the_device_and_no_mark_twice(device: str, bytes_: list[int]) -> None:
    events = [
        recorded(DEVICES.CUDA, STEP, 9),
        recorded(DEVICES.CUDA, "Optimizer.step#AdamW.step", 9, annotation=True),
        recorded(DEVICES.CUDA, "a_kernel", 7),
        recorded(DEVICES.CUDA, "[memory]", 6, bytes=64),
        recorded(DEVICES.CPU, "[memory]", 5, bytes=8),
        recorded(DEVICES.CPU, STEP, 1),
    ]
    results = SimpleNamespace(events=lambda: events)
    profiler = SimpleNamespace(profiler=SimpleNamespace(kineto_results=results))
    found = events_of(profiler, device)
    assert [one.bytes for one in found if one.name == "[memory]"] == bytes_
    assert [(one.name, one.kernel) for one in found if one.name != "[memory]"] == [
        (STEP, False),
        ("a_kernel", True),
    ]


def test_an_event_that_outlasts_the_one_around_it_is_cut() -> None:
    spans = spans_of(within(Event("aten::add", 0, 100), Event("aten::to", 50, 120)))
    assert [span.own_ns for span in spans] == [900, 50, 50]


@pytest.mark.parametrize(
    ("name", "caller", "group"),
    [
        ("aten::mkldnn_convolution", None, "convolution"),
        ("aten::empty", "convolution", "convolution"),
        ("NormActConvFunction", None, "norm-act"),
        ("aten::convolution", "norm-act", "convolution"),
        ("aten::mul", "norm-act", "norm-act"),
        ("resblock_bench::group_norm_silu_backward", None, "norm-act"),
        ("aten::silu_backward", None, "norm-act"),
        ("aten::bmm", None, "attention"),
        ("aten::_softmax", None, "attention"),
        ("aten::_log_softmax_backward_data", None, None),  # of a loss
        ("aten::addmm", None, "linear"),
        ("aten::mm", None, "linear"),
        ("aten::_foreach_copy_", None, "optimizer"),
        ("aten::_fused_adamw_", None, "optimizer"),
        ("aten::copy_", None, "copies"),
        ("aten::_to_copy", None, "copies"),
        ("aten::cat", None, "copies"),
        ("aten::add", "copies", "copies"),
        ("CompiledFunctionBackward", None, "compiled"),
        ("aten::mul", None, None),
        ("aten::convert_element_type", None, None),
        ("resblock_bench::residual_add", None, None),
    ],
)
def test_groups(name: str, caller: str | None, group: str | None) -> None:
    assert group_of(name, caller) == group  # type: ignore[arg-type]
