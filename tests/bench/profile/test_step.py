"""Profiles of tiny steps: what adds up, what belongs to whom, and what is counted."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from support.orders import Given
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from resblock_bench.bench.errors import InvalidError
from resblock_bench.bench.measure.cell import Task
from resblock_bench.bench.measure.devices import open_device
from resblock_bench.bench.measure.kinds import KINDS
from resblock_bench.bench.measure.memory import TrackerMeter
from resblock_bench.bench.profile import step
from resblock_bench.bench.profile.events import MODULE, STEP, events_of, mark, spans_of
from resblock_bench.bench.profile.profiles import PROFILE, PROFILES, Profile, read_profiles
from resblock_bench.bench.profile.step import (
    ProfileJob,
    ProfileReply,
    counted_step,
    marked_modules,
    proton_cell,
)
from resblock_bench.bench.profile.work import operation
from resblock_bench.bench.records import Cell

aten = torch.ops.aten
VARIANTS = [
    {"impl": impl, "checkpoint": checkpoint}
    for impl in ("reference", "fused")
    for checkpoint in ("none", "selective", "full")
]
WHOLE = [*VARIANTS, {"workload": "model"}, {"workload": "model", "microbatch": 1, "dtype": "bf16"}]


def name_of(changes: dict[str, object]) -> str:
    return " ".join(map(str, changes.values()))


def flops(found: Profile, *stages: str) -> int:
    return sum(
        part.matrix_flops
        for part in found.parts
        if part.group == "convolution" and part.stage in stages
    )


@pytest.mark.parametrize("changes", WHOLE, ids=name_of)
def test_the_sums_are_the_step_and_no_operator_belongs_to_nobody(
    profiled: Callable[..., Profile], changes: dict[str, object]
) -> None:
    found = profiled(**changes)
    assert sum(part.ns for part in found.parts) == found.step_ns
    for key in (lambda p: p.module, lambda p: p.stage, lambda p: p.group):
        assert sum(found.total(key).values()) == found.step_ns
    assert sum(found.total(lambda part: part.group, "bytes").values()) == sum(
        one.bytes for one in found.operators
    )
    assert 0 < found.total(lambda part: part.stage)["forward"] < found.step_ns
    lost = {
        (part.stage, part.group)
        for part in found.parts
        if part.module is None and part.group != "gaps" and part.stage in ("backward", "recompute")
    }
    # The loss is no module's.
    assert not lost - (
        {("backward", g) for g in ("elementwise", "copies")} if found.cell.model else set()
    )
    shares = [found.attributed(stage) for stage in ("forward", "backward")]
    assert all(share is not None and 0 < share <= 1 for share in shares)


@pytest.mark.parametrize("changes", VARIANTS, ids=name_of)
def test_convolutions_have_three_times_the_operations_of_their_forward(
    profiled: Callable[..., Profile], changes: dict[str, object]
) -> None:
    """With what is computed again: of the two all but the last, whose output nobody needs."""
    found = profiled(**changes)
    forward = flops(found, "forward")
    assert forward == 2 * 2 * (2 * 32 * 32 * 9 * 8 * 8)  # two of them, two a multiply-add
    assert flops(found, "backward") == 2 * forward
    again = forward // 2 if changes["checkpoint"] == "full" else 0
    assert flops(found, "recompute") == again


@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_convolutions_have_four_times_where_checkpoints_do_not_stop_early(
    make_cell: Callable[..., Cell], impl: str
) -> None:
    cell, device = make_cell(impl=impl, checkpoint="full"), open_device("cpu", 1)
    with set_checkpoint_early_stop(False):
        work = counted_step(KINDS["block"].drawn(cell, device.torch_device, 0), device)
    by_stage = Counter()
    for part in work.parts:
        by_stage[part.stage] += part.matrix_flops * (part.group == "convolution")
    assert sum(by_stage.values()) == 4 * by_stage["forward"] > 0
    assert by_stage["recompute"] == by_stage["forward"]


def test_of_a_model_the_gradient_of_its_images_is_not_computed(
    profiled: Callable[..., Profile],
) -> None:
    found = profiled(workload="model")
    first = sum(
        part.matrix_flops
        for part in found.parts
        if part.module == "input_blocks.0.0" and part.stage == "forward"
    )
    assert first > 0
    assert flops(found, "backward") == 2 * flops(found, "forward") - first


def test_a_model_has_all_groups_and_its_update(profiled: Callable[..., Profile]) -> None:
    found = profiled(workload="model")
    work = found.total(lambda part: (part.stage, part.group), "bytes")
    time = found.total(lambda part: (part.stage, part.group))
    for stage in ("forward", "backward"):
        for group in ("convolution", "norm-act", "attention", "linear", "elementwise"):
            assert work[stage, group] > 0, (stage, group)  # type: ignore[index]
            assert time[stage, group] > 0, (stage, group)  # type: ignore[index]
    assert work["update", "optimizer"] > 0


@pytest.mark.parametrize("changes", WHOLE, ids=name_of)
def test_the_peak_is_the_measured_one(
    profiled: Callable[..., Profile], changes: dict[str, object]
) -> None:
    found = profiled(**changes)
    workload = KINDS[found.cell.workload].drawn(found.cell, torch.device("cpu"), 0)
    measured = TrackerMeter().measure(workload)
    memory = found.memory
    assert memory is not None
    assert memory.peak_bytes == measured.peak_bytes
    resident = sum(memory.bytes[name][0] for name in ("parameters", "optimizer", "inputs"))
    assert resident == measured.baseline_bytes
    held = memory.peak["activations"] + memory.peak["temporaries"]
    assert sum(memory.held.values()) == held
    assert memory.at == sorted(memory.at)
    assert [stage for _, stage in memory.stages][:2] == ["forward", "backward"]


def test_inference_has_no_backward(profiled: Callable[..., Profile]) -> None:
    found = profiled(mode="inference")
    assert {part.stage for part in found.parts if part.group != "gaps"} == {"forward"}
    assert found.attributed("backward") is None
    assert found.memory is not None
    assert not any(found.memory.bytes["gradients"])


class Nameless(nn.Module):
    """Calls a module that is not one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("<b>\x1b\ud800", nn.SiLU())
        self.hidden = [nn.Tanh()]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](getattr(self, "<b>\x1b\ud800")(x))


def test_a_module_without_a_name_is_a_part_of_the_one_that_calls_it() -> None:
    model = Nameless()
    with marked_modules(model), torch.profiler.profile() as profiler, mark(STEP):
        model(torch.ones(3))
    spans = spans_of(events_of(profiler, "cpu"))
    names = [s.event.name for s in spans if s.event.name.startswith(MODULE)]
    assert names == [MODULE, f"{MODULE}<b>\ufffd"]
    modules = {span.event.name: span.module for span in spans}
    assert (modules["aten::silu"], modules["aten::tanh"]) == ("<b>\ufffd", "")


@pytest.mark.parametrize("written", [True, False])
def test_a_snapshot_is_of_one_step_and_recording_ends(
    make_cell: Callable[..., Cell], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, written: bool
) -> None:
    calls: list[object] = []
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda **how: calls.append(how))

    def dump(path: str) -> None:
        calls.append("dump")
        if written:
            Path(path).write_bytes(b"")

    monkeypatch.setattr(memory, "_dump_snapshot", dump)
    device = open_device("cpu", 1)
    workload = KINDS["block"].drawn(make_cell(), device.torch_device, 0)
    monkeypatch.setattr(workload, "step", lambda: calls.append("step"))
    notes = step._snapshot(workload, device, tmp_path / "snapshot.pickle")
    assert notes == ([] if written else ["snapshot.pickle could not be written"])
    begun, *between, ended = calls
    assert (between, ended) == (["step", "dump"], {"enabled": None})
    assert begun["max_entries"] > 10_000  # type: ignore[index]


@pytest.mark.parametrize("works", [True, False])
def test_proton_runs_one_step_where_it_works(
    make_task: Callable[..., Task], monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    calls: list[object] = []

    def start(path: str, hook: str) -> None:
        if not works:
            raise RuntimeError("no CUPTI")
        calls.append((path, hook))

    ended = lambda: calls.append("ended")  # noqa: E731
    module = SimpleNamespace(start=start, finalize=ended)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(profiler=module))
    monkeypatch.setitem(sys.modules, "triton.profiler", module)
    job = ProfileJob(task=make_task(), truth="", folder="/folder", cpus=[], alone=True)
    reply = msgspec.json.decode(proton_cell(msgspec.json.encode(job), Given()), type=ProfileReply)
    if works:
        assert reply.status == "ok"
        assert calls == [("/folder/proton", "triton"), "ended"]
    else:
        assert (reply.status, calls) == ("failed", [])
        assert "RuntimeError: no CUPTI" in str(reply.reason)


def test_hooks_are_gone_afterwards() -> None:
    before = len(torch.nn.modules.module._global_forward_hooks)
    with pytest.raises(KeyError), marked_modules(nn.SiLU()):
        raise KeyError
    assert len(torch.nn.modules.module._global_forward_hooks) == before


X = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("func", "args", "bytes_", "flops"),
    [
        (aten.add.Tensor, (X, X), 3 * 128, 32),
        (aten.add.Tensor, (X, torch.ones(1, 8)), 2 * 128 + 32, 32),
        (aten.mul.Tensor, (X, torch.ones(1, 1).expand(4, 8)), 2 * 128 + 4, 32),
        (aten.add_.Tensor, (X.clone(), X), 3 * 128, 32),
        (aten.copy_.default, (X.clone(), X), 2 * 128, 0),
        (aten.zero_.default, (X.clone(),), 128, 32),
        (aten.sum.default, (X,), 128 + 4, 32),
        (aten.cat.default, ([X, X],), 4 * 128, 0),
        (aten.view.default, (X, [32]), 0, 0),
        (aten.t.default, (X,), 0, 0),
        (aten.empty_like.default, (X,), 0, 0),
        (aten.mm.default, (X, torch.ones(8, 2)), 128 + 64 + 32, 2 * 4 * 8 * 2),
        (aten._foreach_mul_.Scalar, ([X.clone(), X.clone()], 2.0), 4 * 128, 64),
    ],
    ids=lambda value: str(value) if isinstance(value, torch._ops.OpOverload) else "",
)
def test_what_an_operator_moves_and_computes(
    func: object, args: tuple[object, ...], bytes_: int, flops: int
) -> None:
    done = operation(func, args, {}, func(*args))  # type: ignore[operator]
    assert (done.bytes, done.flops) == (bytes_, flops)


def test_our_own_operators_count_forward_and_backward() -> None:
    """On tensors without data: they run on a GPU only."""
    pytest.importorskip("triton")
    from torch._subclasses.fake_tensor import FakeTensorMode

    import resblock_bench.kernels  # noqa: F401

    ours = torch.ops.resblock_bench
    with FakeTensorMode():
        x, rows = torch.ones(2, 32, 8, 8), torch.ones(2, 32)
        weight = torch.ones(32)
        call = (weight, weight, rows, rows, None, None, 32, 1e-5, True, 0.0, torch.float32)
        args = (x, *call)
        out = ours.group_norm_silu(*args)
        forward = operation(ours.group_norm_silu.default, args, {}, out)
        args = (x, x, *out[1:], *call)
        out = ours.group_norm_silu_backward(*args)
        backward = operation(ours.group_norm_silu_backward.default, args, {}, out)
        args = (x, x, weight, 1.0)
        added = operation(ours.residual_add.default, args, {}, ours.residual_add(*args))
    activation, small = 4 * 2 * 32 * 64, 4 * (2 * 32 + 2 * 2 * 32)
    assert forward.bytes == 2 * activation + small + 4 * 2 * 2 * 32
    assert forward.flops == 4 * x.numel()
    assert backward.bytes == 3 * activation + 2 * small + 4 * 2 * 2 * 32
    assert backward.flops > forward.flops
    assert (added.bytes, added.flops) == (3 * activation + 4 * 32, x.numel())


@pytest.mark.slow
def test_a_step_in_triton_counts_our_operators_forward_and_backward(
    make_cell: Callable[..., Cell],
) -> None:
    """Interpreted, where a call through the registry is the one that a dispatch mode sees."""
    from resblock_bench.kernels import dispatch, prefer

    if not (dispatch.triton_installed() and dispatch.interpreting()):
        pytest.skip("needs Triton's interpreter")
    device = open_device("cpu", 1)
    cell = make_cell(impl="fused", resolution=4, batch=1)
    workload = KINDS["block"].drawn(cell, device.torch_device, 0)
    with prefer("triton"):
        work = counted_step(workload, device)
    ours = {(one.name, one.stage): one for one in work.operators if "resblock_bench" in one.name}
    assert {key: (one.calls, one.group) for key, one in ours.items()} == {
        ("resblock_bench::group_norm_silu", "forward"): (2, "norm-act"),
        ("resblock_bench::group_norm_silu_backward", "backward"): (2, "norm-act"),
        ("resblock_bench::residual_add", "forward"): (1, "elementwise"),
    }
    assert all(one.bytes > 0 and one.flops > 0 for one in ours.values())


def test_profiles_are_validated_when_read(profiled: Callable[..., Profile], tmp_path) -> None:
    assert read_profiles(tmp_path) == []
    found = profiled()
    folder = tmp_path / PROFILES / found.id
    folder.mkdir(parents=True)
    text = msgspec.json.encode(found)
    (folder / PROFILE).write_bytes(text)
    assert read_profiles(tmp_path) == [found]
    whole = msgspec.to_builtins(found)
    memory, ceilings = whole["memory"], whole["ceilings"]
    for changes, message in (
        ({"step_ns": found.step_ns + 1}, "the parts do not add up to the step"),
        ({"kernels": []}, "kernels and gaps do not add up to the step"),
        ({"plain_ns": []}, "plain_ns"),
        ({"memory": memory | {"bytes": {"inputs": memory["bytes"]["inputs"]}}}, "are not whole"),
        ({"memory": memory | {"peak_bytes": 1}}, "do not add up to the peak"),
        ({"ceilings": ceilings | {"matrix_flops_per_s": {}}}, "lack the cell's dtype"),
        ({"profile_version": 99}, "profile the cell again"),
    ):
        (folder / PROFILE).write_bytes(msgspec.json.encode(whole | changes))
        with pytest.raises(InvalidError, match=message):
            read_profiles(tmp_path)
