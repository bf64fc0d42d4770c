from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from resblock_bench.bench.fit.lifetimes import Lifetimes
from resblock_bench.bench.fit.subject import Subject
from resblock_bench.bench.fit.training import Setup, Training

Model = Callable[[str], Subject]
PAIRS = [
    ("unet", Setup(impl="reference", checkpoint="none", precision="fp32", ema=True)),
    ("add", Setup(impl="fused", checkpoint="selective", precision="fp32", ema=True)),
    ("super_res", Setup(impl="reference", checkpoint="selective", precision="bf16")),
    ("encoder", Setup(impl="fused", checkpoint="full", precision="fp32", accumulate=True)),
    ("edm_adm", Setup(impl="fused", checkpoint="none", precision="fp32", optimizer="none")),
    ("edm_ddpmpp", Setup(impl="reference", checkpoint="full", precision="fp32", accumulate=True)),
    ("add", Setup(impl="reference", checkpoint="none", precision="fp16", ema=True)),
]


@pytest.mark.parametrize(("kind", "setup"), PAIRS, ids=lambda v: v if isinstance(v, str) else "")
def test_fake_tensors_live_as_real_ones_do_to_the_byte(
    model: Model, kind: str, setup: Setup
) -> None:
    """At every moment of the step, by purpose and by place."""
    with FakeTensorMode():
        fake = Training(model(kind), setup).watch(3)
    real = Training(model(kind), setup).watch(3)
    assert fake.live_bytes().tolist() == real.live_bytes().tolist()
    assert fake.peak() == real.peak()
    assert fake.peak().bytes == sum(fake.peak().kinds.values()) > 10**6


@pytest.mark.parametrize("number", [0, 1])
def test_the_peak_is_that_of_pytorchs_own_tracker(model: Model, number: int) -> None:
    kind, setup = PAIRS[number]
    peak = Training(model(kind), setup).watch(2).peak()
    training = Training(model(kind), setup)
    tracker = MemTracker()
    states = [t for state in training.optimizer.state.values() for t in state.values()]
    tracker.track_external(*training.parameters, *training.ema, *states)
    with tracker:
        training.watch(2)
    theirs = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    assert peak.bytes == theirs


class Doubled(nn.Module):
    """10 floats of parameters, of which each image keeps 10 more."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.weight = nn.Parameter(torch.ones(10))

    def forward(self, x: Tensor) -> Tensor:
        kept = self.inner(x * self.weight)  # x is kept, and this by exp
        scratch = torch.empty(1000)
        del scratch
        return kept.exp()  # keeps its output


def watched(batch: int) -> Lifetimes:
    module, x = Doubled(), torch.ones(batch, 10)
    watch = Lifetimes(module)
    watch.label("parameters", module.weight)
    watch.label("inputs", x)
    with watch:
        with watch.phase("forward"):
            loss = module(x).sum()
        with watch.phase("backward"):
            torch.autograd.backward(loss)
        watch.label("gradients", module.weight.grad)
    return watch


def test_bytes_and_purposes_by_hand() -> None:
    """At the peak of one image scratch lives beside x, the weights and their product; of a
    thousand the backward holds the output, its gradient and that times the output."""
    assert watched(1).peak().kinds == {
        "parameters": 40, "inputs": 40, "temporaries": 40 + 4000,
    }  # fmt: skip
    assert watched(1).peak().phase == "forward"
    large = watched(1000).peak()
    assert large.phase == "backward"
    assert large.kinds["activations"] in (40_000, 40_004)  # the loss itself is one
    assert large.kinds["inputs"] == 40_000
    assert "gradients" not in large.kinds


def test_what_lives_beyond_the_step_is_alive_to_its_end() -> None:
    watch = watched(2)
    live = watch.live_bytes()
    assert live[-1] >= 40 + 80 + 40  # parameters, inputs, gradient
    assert live.tolist() == watched(2).live_bytes().tolist()


def test_the_place_of_the_backward_is_the_module_that_is_differentiated(model: Model) -> None:
    setup = Setup(impl="reference", checkpoint="none", precision="fp32")
    with FakeTensorMode():
        peak = Training(model("unet"), setup).watch(64).peak()
    assert peak.phase == "backward"
    assert peak.place.startswith("out")
    assert {"input_blocks.1", "output_blocks.3"} <= set(peak.places)


def test_a_checkpoint_that_stops_early_leaves_no_module_running(model: Model) -> None:
    setup = Setup(impl="reference", checkpoint="full", precision="fp32", ema=True)
    with FakeTensorMode():
        watch = Training(model("add"), setup).watch(2)
    assert watch._running == []
