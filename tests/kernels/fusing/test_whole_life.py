"""What a model goes through after it was fused: training, copies, files, compilers, and undoing."""

from __future__ import annotations

import copy
import io
import pickle
import socket
from typing import Any

import pytest
import torch
from support import edm_classes as edm
from support import openai_classes as openai
from support.parity import drawn, randomised, step
from torch import Tensor, nn
from torch.nn.utils import parametrize

from resblock_bench import kernels, reference
from resblock_bench.kernels import fuse_, unfuse_
from resblock_bench.kernels.blocks import FusedBlock
from resblock_bench.kernels.fusing.edm import FusedEDMBlock
from resblock_bench.kernels.fusing.sequential import FusedSequential
from resblock_bench.kernels.modules import GroupNormSiLU


def own() -> nn.Module:
    return reference.UNetModel(8, 3, 32, 3, 1, (2,), channel_mult=(1, 2), resblock_updown=True)


class Own(nn.Module):
    """This project's model, with an embedding instead of times."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = own()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        out: Tensor = self.unet(x, emb[:, 0])
        return out


MODELS: dict[str, Any] = {
    "own": Own,
    "OpenAI's": lambda: openai.UNet(use_scale_shift_norm=True),
    "EDM's": edm.Network,
    "a sequence": lambda: Both(),
}


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 1)
        )
        self.norm = nn.GroupNorm(2, 16)
        self.last = nn.Linear(12, 16)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        out: Tensor = self.norm(self.layers(x)) * self.last(emb)[:, :, None, None]
        return out


def built(name: str) -> nn.Module:
    return randomised(MODELS[name]())


def inputs(name: str) -> list[Tensor]:
    return drawn((2, 3, 8, 8), (2, 32 if name == "OpenAI's" else 12))


def classes(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


@pytest.mark.parametrize("name", MODELS)
def test_unfused_it_is_the_model_it_was_to_the_bit(name: str) -> None:
    model = built(name)
    modules = list(model.modules())
    attributes = [{k: v for k, v in vars(m).items() if not isinstance(v, dict)} for m in modules]
    kinds, expected = classes(model), step(model, inputs(name))
    report = fuse_(model, "selective")
    assert classes(model) != kinds
    fuse_(model, "full")
    assert set(unfuse_(model)) == set(report.fused)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert classes(model) == kinds
    for module, before in zip(modules, attributes, strict=True):
        assert {k: v for k, v in vars(module).items() if not isinstance(v, dict)} == before
    found = step(model, inputs(name))
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert unfuse_(model) == []


@pytest.mark.parametrize("name", MODELS)
def test_fused_twice_the_last_mode_holds(name: str) -> None:
    model = built(name)
    fused = fuse_(model, "selective").fused
    again = fuse_(model, "full")
    assert again.fused.keys() == fused.keys() and not again.left
    assert all(b.checkpoint == "full" for b in model.modules() if isinstance(b, FusedBlock))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(model: nn.Module) -> None:
    """A norm that is fused by itself gets a subclass of its own class, with a property."""
    norm = [m for m in model.modules() if hasattr(m, "num_groups")][-1]
    parametrize.register_parametrization(norm, "weight", Doubled())


def subclassed(model: nn.Module) -> None:
    """As FSDP2's fully_shard does it."""
    for module in model.modules():
        if isinstance(module, FusedBlock | GroupNormSiLU | FusedSequential):
            module.__class__ = type(f"FSDP{type(module).__name__}", (Sharded, type(module)), {})


class Sharded:
    pass


@pytest.mark.parametrize("change", [parametrized, subclassed])
@pytest.mark.parametrize("name", MODELS)
def test_a_class_that_others_made_of_the_fused_one_lives_on(name: str, change: Any) -> None:
    model = built(name)
    kinds = classes(model)
    fuse_(model, "selective")
    change(model)
    expected = step(model, inputs(name))
    fuse_(model, "full")
    assert all(b.checkpoint == "full" for b in model.modules() if isinstance(b, FusedBlock))
    assert classes(copy.deepcopy(model)) == classes(copy.copy(model)) == classes(model)
    unfuse_(model)
    found = step(model, inputs(name))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if change is subclassed:
        bases = [cls.__bases__[1] if issubclass(cls, Sharded) else cls for cls in classes(model)]
        assert bases == kinds


def test_a_forward_that_was_set_since_is_not_left_behind() -> None:
    """As accelerate's hooks wrap it: what they call is the fused one."""
    model = built("a sequence")
    fuse_(model)
    model.layers.forward = model.layers.forward  # type: ignore[method-assign, union-attr]
    with pytest.raises(ValueError, match=r"layers \(Sequential\) has got a forward of its own"):
        unfuse_(model)
    del model.layers.forward
    assert set(unfuse_(model)) == {"layers", "norm"}


def test_a_block_built_fused_stays_so_and_gets_its_mode_back() -> None:
    model = kernels.ResBlock(32, 8, 0.0, checkpoint="selective")
    fuse_(model, "full")
    assert unfuse_(model) == [""]
    assert type(model) is kernels.ResBlock and model.checkpoint == "selective"


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"unfuse_: model must be an nn\.Module, got 'x'"):
        unfuse_("x")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_parameters_and_names_stay(name: str) -> None:
    model, plain = built(name), built(name)
    before = dict(model.named_parameters())
    fuse_(model)
    assert all(p is before[n] for n, p in model.named_parameters())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_an_optimizer_made_before_and_an_average_made_after_go_on(name: str) -> None:
    model, plain = built(name), built(name)
    losses = []
    for one in (model, plain):
        optimizer = torch.optim.AdamW(one.parameters(), lr=1e-3)
        if one is model:
            fuse_(one, "selective")
        average = copy.deepcopy(one)
        found = []
        for _ in range(5):
            x, emb = inputs(name)
            loss = one(x, emb).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for p, q in zip(average.parameters(), one.parameters(), strict=True):
                    p.lerp_(q, 0.5)
            found += [loss.item(), average(x, emb).square().mean().item()]
        losses.append(found)
        assert found[0] != found[-2]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_is_fused_alike_and_may_be_undone_alone(name: str) -> None:
    model = built(name)
    kinds = classes(model)
    fuse_(model, "selective")
    twin = copy.deepcopy(model)
    assert classes(twin) == classes(model)
    found, expected = step(twin, inputs(name)), step(model, inputs(name))
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    unfuse_(twin)
    assert classes(twin) == kinds and classes(model) != kinds


@pytest.mark.parametrize("name", MODELS)
def test_pickled_and_saved_it_comes_back_fused(name: str) -> None:
    model = built(name)
    kinds = classes(model)
    fuse_(model, "selective")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    expected = step(model, inputs(name))
    for back in (
        pickle.loads(pickle.dumps(model)),
        pickle.loads(pickle.dumps(model, protocol=2)),
        torch.load(file, weights_only=False),
    ):
        assert classes(back) == classes(model)
        found = step(back, inputs(name))
        assert all(torch.equal(found[n], expected[n]) for n in expected)
        unfuse_(back)
        assert classes(back) == kinds


class Remembering(openai.ResBlock):
    """As EDM's persistent classes: pickled by a function of its own."""

    def __reduce__(self) -> Any:
        return _remembered, (type(self),), vars(self)


def _remembered(cls: type) -> Any:
    made = cls.__new__(cls)
    made.remembered = True
    return made


def test_a_class_that_pickles_itself_does_so() -> None:
    model = randomised(Remembering(32, 16, 0.0))
    fuse_(model)
    back = copy.deepcopy(model)
    assert type(back) is type(model) and vars(back)["remembered"]


def persistent(module: nn.Module) -> nn.Module:
    """With every class replaced by one that no name finds, which pickles itself by its source."""
    for part in module.modules():
        part.__class__ = _persistent_class(type(part))
    return module


def _persistent_class(cls: type) -> type:
    def reduce(self: Any) -> Any:
        return _from_source, (cls, dict(vars(self)))

    return type(cls.__name__, (cls,), {"__reduce__": reduce, "__qualname__": "<locals>.Decorator"})


def _from_source(cls: type, state: dict[str, Any]) -> Any:
    cls = _persistent_class(cls)
    made = cls.__new__(cls)
    vars(made).update(state)
    return made


def test_a_class_that_no_name_finds_is_pickled_as_it_says() -> None:
    model = persistent(randomised(edm.UNetBlock(16, 24, 12, attention=True, num_heads=2)))
    x = drawn((2, 16, 6, 6), (2, 12))
    report = fuse_(model, "selective")
    assert list(report.fused) == ["", "norm2"]
    expected = step(model, x)
    for back in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert isinstance(back, FusedEDMBlock)
        found = step(back, x)
        assert all(torch.equal(found[n], expected[n]) for n in expected)
        assert unfuse_(back) == ["", "norm2"]
        assert not isinstance(back, FusedEDMBlock) and type(back).__name__ == "UNetBlock"


def test_a_fused_class_has_the_name_of_its_own() -> None:
    model = openai.ResBlock(32, 16, 0.0)
    fuse_(model)
    assert type(model).__name__ == "ResBlock" and type(model).__module__ == openai.__name__
    assert type(model) is not openai.ResBlock and isinstance(model, openai.ResBlock)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: openai.ResBlock(32, 12, 0.0, up=True, use_scale_shift_norm=True), 32),
        (lambda: edm.UNetBlock(16, 24, 12, down=True, attention=True, num_heads=2), 16),
        (Both, 3),
    ],
    ids=["OpenAI's", "EDM's", "a sequence"],
)
def test_it_compiles(make: Any, size: int) -> None:
    torch.compiler.reset()
    model, x = randomised(make()), drawn((2, size, 8, 8), (2, 12))
    expected = step(model, x)
    fuse_(model, "selective")
    found = step(torch.compile(model, backend="aot_eager", fullgraph=True), x)
    found = {name.removeprefix("_orig_mod."): t for name, t in found.items()}
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["OpenAI's", "EDM's"])
def test_under_data_parallelism(name: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"tcp://127.0.0.1:{port}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        model, plain = built(name), built(name)
        fuse_(model, "selective")
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped(*inputs(name)).square().mean().backward()
        plain(*inputs(name)).square().mean().backward()
        for (n, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=n)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_what_is_compiled_already_is_compiled_anew() -> None:
    graphs: list[list[str]] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append([str(node.target) for node in module.graph.nodes])
        return module.forward

    def norms_of_pytorch() -> int:
        return sum("group_norm" in target for target in graphs[-1])

    torch._dynamo.reset()
    model = Both()
    compiled, inputs = torch.compile(model, backend=backend), drawn((2, 3, 4, 4), (2, 12))
    before = compiled(*inputs)
    assert (len(graphs), norms_of_pytorch()) == (1, 2)
    assert len(fuse_(compiled).fused) == 2
    torch.testing.assert_close(compiled(*inputs), before)
    assert (len(graphs), norms_of_pytorch()) == (2, 0)
    unfuse_(model)
    assert torch.equal(compiled(*inputs), before)
