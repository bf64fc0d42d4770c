from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from resblock_bench.bench.fit.lifetimes import Lifetimes
from resblock_bench.bench.fit.subject import Subject
from resblock_bench.bench.fit.training import Recipe, Training

Model = Callable[[str], Subject]
PAIRS = [
    ("unet", Recipe(impl="reference", checkpoint="none", precision="fp32", ema=True)),
    ("add", Recipe(impl="fused", checkpoint="selective", precision="fp32", ema=True)),
    ("super_res", Recipe(impl="reference", checkpoint="selective", precision="bf16")),
    ("encoder", Recipe(impl="fused", checkpoint="full", precision="fp32", accumulate=True)),
    ("edm_adm", Recipe(impl="fused", checkpoint="none", precision="fp32", optimizer="none")),
    ("edm_ddpmpp", Recipe(impl="reference", checkpoint="full", precision="fp32", accumulate=True)),
    ("add", Recipe(impl="reference", checkpoint="none", precision="fp16", ema=True)),
]


@pytest.mark.parametrize(("kind", "recipe"), PAIRS, ids=lambda v: v if isinstance(v, str) else "")
def test_fake_tensors_live_as_real_ones_do_to_the_byte(
    model: Model, kind: str, recipe: Recipe
) -> None:
    """At every moment of the step, by purpose and by place."""
    with FakeTensorMode():
        fake = Training(model(kind), recipe).watch(3)
    real = Training(model(kind), recipe).watch(3)
    assert fake.live_bytes().tolist() == real.live_bytes().tolist()
    assert fake.peak() == real.peak()
    assert fake.peak().bytes == sum(fake.peak().kinds.values()) > 10**6


@pytest.mark.parametrize("number", [0, 1])
def test_the_peak_is_that_of_pytorchs_own_tracker(model: Model, number: int) -> None:
    kind, recipe = PAIRS[number]
    peak = Training(model(kind), recipe).watch(2).peak()
    training = Training(model(kind), recipe)
    tracker = MemTracker()
    states = [t for state in training.optimizer.state.values() for t in state.values()]
    tracker.track_external(*training.parameters, *training.ema, *states)
    with tracker:
        training.watch(2)
    theirs = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert peak.bytes == theirs


class Exponential(nn.Module):
    """exp(x·w), with scratch of 1000 floats on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(10))

    def forward(self, x: Tensor) -> Tensor:
        product = x * self.weight
        scratch = torch.empty(1000)
        del scratch
        return product.exp()


def watched(batch: int, scratch: int = 0) -> Lifetimes:
    module, x = Exponential(), torch.ones(batch, 10)
    watch = Lifetimes(module)
    watch.label("parameters", module.weight)
    watch.label("inputs", x)

    def allocate(gradient: Tensor) -> None:
        torch.empty(scratch)

    with watch:
        with watch.phase("forward"):
            y = module(x)
            y.register_hook(allocate)
            loss = y.sum()
            del y
        with watch.phase("backward"):
            torch.autograd.backward(loss)
        watch.label("gradients", module.weight.grad)
    return watch


def test_the_peak_of_a_forward_by_hand() -> None:
    peak = watched(1).peak()
    assert peak.kinds == {"parameters": 40, "inputs": 40, "temporaries": 40 + 4000}
    assert (peak.bytes, peak.phase) == (4120, "forward")


def test_the_peak_of_a_backward_by_hand() -> None:
    """exp has kept its output; the product is gone, and nothing has a gradient yet."""
    peak = watched(1000, scratch=10**6).peak()
    assert peak.phase == "backward"
    assert peak.kinds == {
        "parameters": 40,
        "inputs": 40_000,
        "activations": 40_000 + 4,  # and the loss
        "temporaries": 4 * 10**6 + 4,  # and its gradient
    }


def test_what_lives_beyond_the_step_is_alive_to_its_end() -> None:
    watch = watched(2)
    live = watch.live_bytes()
    assert live[-1] >= 40 + 80 + 40  # parameters, inputs, gradient
    assert live.tolist() == watched(2).live_bytes().tolist()


def test_the_place_of_the_backward_is_the_module_that_is_differentiated(model: Model) -> None:
    recipe = Recipe(impl="reference", checkpoint="none", precision="fp32")
    with FakeTensorMode():
        peak = Training(model("unet"), recipe).watch(64).peak()
    assert peak.phase == "backward"
    assert peak.place.startswith("out")
    assert {"input_blocks.1", "output_blocks.3"} <= set(peak.places)


def test_a_checkpoint_that_stops_early_leaves_no_module_running(model: Model) -> None:
    recipe = Recipe(impl="reference", checkpoint="full", precision="fp32", ema=True)
    with FakeTensorMode():
        watch = Training(model("add"), recipe).watch(2)
    assert watch._running == []
