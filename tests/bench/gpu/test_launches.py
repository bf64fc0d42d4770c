"""Every kernel once: what is launched, and what is said of one that goes wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from resblock_bench.bench.errors import UsageError
from resblock_bench.bench.gpu import launches as tiny
from resblock_bench.bench.measure.operator import Tensors
from resblock_bench.bench.tune import cases
from resblock_bench.bench.tune import gpu as tune_gpu
from resblock_bench.bench.tune.cases import Case
from resblock_bench.bench.tune.gpu import DeviceLost
from resblock_bench.kernels import dispatch
from resblock_bench.kernels.tiers import Launch, Machine

H100 = Machine(sms=132, l2_bytes=50 * 2**20)
Launched = Callable[[Case, Launch], Tensors]


def test_every_tier_direction_layout_and_dtype_is_launched_on_one_size() -> None:
    for machine in (H100, tiny._INTERPRETED):
        found = list(tiny.launches(machine, ["fp32", "bf16"], sizes=1))
        kinds = {
            (one.how.tier, one.direction, one.problem.channels_last, one.dtype) for one in found
        }
        assert len(kinds) == 4 * 2 * 2 * 2


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[Launched | None], None]:
    """Launches give what eager PyTorch does, after what is done to it."""

    def set_up(around: Launched | None = None) -> None:
        right: Launched = lambda case, how: cases.reference(case)  # noqa: E731
        monkeypatch.setattr(dispatch, "interpreting", lambda: True)
        monkeypatch.setattr(cases, "launched", around or right)

    return set_up


def carry_out(capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    code = tiny.carry_out("cpu", 1, ["fp32"])
    return code, capsys.readouterr().out.splitlines()


def test_all_right_is_0(play: Any, capsys: pytest.CaptureFixture[str]) -> None:
    play()
    assert carry_out(capsys) == (0, ["16 launches are right, 0 wrong, 0 failed"])


def test_nan_is_wrong_and_named_and_the_others_are_launched(
    play: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def nan(case: Case, how: Launch) -> Tensors:
        found = cases.reference(case)
        if how.tier == "B" and case.saved is None and not how.slab % 2:
            found["y"][0] = float("nan")
        return found

    play(nan)
    code, lines = carry_out(capsys)
    assert code == 5
    assert lines[0].startswith("B forward nchw fp32 3×64×128 by 32: y has elements that are NaN")
    assert lines[-1] == "14 launches are right, 2 wrong, 0 failed"


def test_a_launch_that_is_refused_fails_and_the_others_are_launched(
    play: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(case: Case, how: Launch) -> Tensors:
        if how.tier == "C":
            raise RuntimeError("Triton Error [CUDA]: too many resources requested for launch")
        return cases.reference(case)

    play(refused)
    code, lines = carry_out(capsys)
    assert code == 3
    assert "C backward nhwc fp32" in lines[3] and "too many resources" in lines[3]
    assert lines[-1] == "12 launches are right, 0 wrong, 4 failed"


class BrokenGpu:
    """Its context is lost in the third launch."""

    machine, device = H100, torch.device("cpu")

    def __init__(self, device: torch.device, hang_s: float) -> None:
        self.launched = 0

    def run(self, case: Case, how: Launch) -> Tensors:
        self.launched += 1
        if self.launched == 3:
            raise DeviceLost("broke the GPU's context (illegal memory access)")
        return cases.reference(case)

    def give_up(self, code: int) -> int:
        return code + 100


def test_after_a_broken_context_nothing_is_launched_and_the_process_gives_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune_gpu, "open_gpu", lambda: BrokenGpu(torch.device("cpu"), 1.0))
    monkeypatch.setattr(tune_gpu, "GpuBench", BrokenGpu)
    assert tiny.carry_out("cuda", 1, ["fp32"]) == 103
    lines = capsys.readouterr().out.splitlines()
    assert "illegal memory access" in lines[0]
    assert lines[1] == "2 launches are right, 0 wrong, 1 failed"


def test_without_a_gpu_and_without_an_interpreter_a_sentence_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    with pytest.raises(UsageError, match="set TRITON_INTERPRET=1"):
        tiny.carry_out("cpu", 1, ["fp32"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="PyTorch sees none"):
        tiny.carry_out("cuda", 1, ["fp32"])
