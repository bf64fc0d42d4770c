from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from resblock_bench.bench.fit import training as trainings
from resblock_bench.bench.fit.subject import Subject
from resblock_bench.bench.fit.training import Recipe, Training
from resblock_bench.bench.fit.variant import (
    VariantJob,
    VariantReply,
    as_on_a_gpu,
    plan_variant,
    variant_plan,
)
from resblock_bench.reference import ResBlock

GIB = 2**30
REFERENCE = Recipe(impl="reference", checkpoint="none", precision="fp32", ema=True)


def job_of(subject: Subject, recipe: Recipe = REFERENCE, batch: int = 3) -> VariantJob:
    return VariantJob(subject=subject, recipe=recipe, batch=batch, capacities=[2**24, GIB])


def reply_of(job: VariantJob) -> VariantReply:
    reply = plan_variant(msgspec.json.encode(job), None)
    return msgspec.json.decode(reply, type=VariantReply)


@pytest.mark.parametrize("checkpoint", ["none", "selective"])
def test_the_peak_at_any_batch_is_that_of_a_step(
    model: Callable[[str], Subject], checkpoint: str
) -> None:
    recipe = msgspec.structs.replace(REFERENCE, impl="fused", checkpoint=checkpoint)
    subject = model("add")
    plan = variant_plan(job_of(subject, recipe))
    with FakeTensorMode(), as_on_a_gpu():
        training = Training(subject, recipe)
        for batch in (2, 3, 11, 200):
            assert plan.peak_at(batch) == training.watch(batch).peak().bytes
    largest = plan.largest_batch(GIB)
    assert plan.peak_at(largest) <= GIB < plan.peak_at(largest + 1)
    assert plan.confirmed_batch == largest


def test_a_single_image_is_planned_by_its_own_step(block: Subject) -> None:
    plan = variant_plan(job_of(block, batch=1))
    with FakeTensorMode(), as_on_a_gpu():
        assert plan.peak.bytes == Training(block, REFERENCE).watch(1).peak().bytes
    assert plan.largest_batch(plan.peak.bytes) >= 1
    assert plan.largest_batch(plan.peak.bytes - 1) == 0


def test_fused_takes_the_path_that_it_takes_on_a_gpu(block: Subject) -> None:
    pytest.importorskip("triton")
    with FakeTensorMode(), as_on_a_gpu():
        watch = Training(block, msgspec.structs.replace(REFERENCE, impl="fused")).watch(2)
    with FakeTensorMode():
        elsewhere = Training(block, msgspec.structs.replace(REFERENCE, impl="fused")).watch(2)
    assert watch.peak() != elsewhere.peak()


def test_purposes_of_a_step_in_float16(model: Callable[[str], Subject]) -> None:
    """Convolutions in 2 bytes, masters of all in 4, two states and their counts, an average."""
    recipe = Recipe(impl="reference", checkpoint="none", precision="fp16", ema=True)
    with FakeTensorMode():
        training = Training(model("unet"), recipe)
        kinds = training.watch(1).peak().kinds
    count = sum(p.numel() for p in training.parameters)
    assert kinds["masters"] == kinds["ema"] == 4 * count
    assert kinds["optimizer"] == 8 * count + 4 * len(training.parameters)
    assert 2 * count < kinds["parameters"] < 4 * count


def test_attention_that_is_computed_again_needs_less(model: Callable[[str], Subject]) -> None:
    again = msgspec.structs.replace(REFERENCE, recompute_attention=True)
    plans = [variant_plan(job_of(model("unet"), recipe)) for recipe in (REFERENCE, again)]
    assert plans[1].peak_at(100) < plans[0].peak_at(100)


def test_microbatches_hold_the_gradients_of_the_pass_before(block: Subject) -> None:
    recipe = msgspec.structs.replace(REFERENCE, accumulate=True)
    peaks = [variant_plan(job_of(block, one, batch=64)).peak for one in (REFERENCE, recipe)]
    with FakeTensorMode():
        count = sum(p.numel() for p in Training(block, recipe).parameters)
    assert peaks[0].kinds.get("gradients", 0) == 0
    assert peaks[1].kinds["gradients"] == 4 * count


def failing_with(monkeypatch: pytest.MonkeyPatch, step: Callable[[Tensor], object]) -> None:
    """The step of every block does something else first."""

    def forward(self: ResBlock, x: Tensor, emb: Tensor) -> Tensor:
        step(x)
        return self._forward(x, emb)

    monkeypatch.setattr(ResBlock, "forward", forward)


def test_a_number_that_is_asked_for_names_the_line(
    monkeypatch: pytest.MonkeyPatch, block: Subject
) -> None:
    failing_with(monkeypatch, lambda x: x.max().item() > 0)
    problem = reply_of(job_of(block)).problem
    assert problem is not None
    assert f"{Path(__file__).name}, line " in problem
    assert "x.max().item() > 0" in problem
    assert "asks for a number" in problem


def test_a_size_that_depends_on_numbers_does_so_too(
    monkeypatch: pytest.MonkeyPatch, block: Subject
) -> None:
    failing_with(monkeypatch, lambda x: x.nonzero())
    problem = reply_of(job_of(block)).problem
    assert problem is not None
    assert "x.nonzero()" in problem


def test_a_step_that_fails_is_a_sentence_with_its_line(
    monkeypatch: pytest.MonkeyPatch, block: Subject
) -> None:
    failing_with(monkeypatch, lambda x: x.view(-1, 7))
    problem = reply_of(job_of(block)).problem
    assert problem is not None
    assert problem.startswith("its step failed: RuntimeError: ")
    assert "x.view(-1, 7)" in problem


def test_a_step_of_another_kind_at_a_large_batch_is_found_out(
    monkeypatch: pytest.MonkeyPatch, block: Subject
) -> None:
    """The third step does not confirm what two small ones let expect."""
    kept: list[Tensor] = []

    def loss(self: Training, inputs: dict[str, Tensor]) -> Tensor:
        kept.append(torch.empty(10**6 if len(inputs["x"]) > 10 else 1))
        return true_loss(self, inputs)

    true_loss = trainings.Training._loss
    monkeypatch.setattr(trainings.Training, "_loss", loss)
    problem = reply_of(job_of(block)).problem
    assert problem is not None
    assert "the steps at 3 and 4 let expect" in problem


def test_what_no_address_can_reach_is_a_sentence(block: Subject) -> None:
    cell = msgspec.structs.replace(block.cell, channels=65536, resolution=8192 * 8192, dims=1)
    problem = reply_of(job_of(Subject(name="huge", cell=cell), batch=65536)).problem
    assert problem == (
        "huge at 65536 images has a tensor of more than 256 TiB: give a smaller --batch or image"
    )
