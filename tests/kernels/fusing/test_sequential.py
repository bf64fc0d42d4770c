"""A group norm with what follows it inside an nn.Sequential."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import edm_classes as edm
from support import openai_classes as openai
from support.parity import check_parity, drawn, randomised, step
from torch import Tensor, nn

from resblock_bench.kernels import fuse_
from resblock_bench.kernels.fusing.sequential import FusedSequential


def head(*between: nn.Module) -> nn.Sequential:
    made = nn.Sequential(nn.GroupNorm(4, 16), *between, nn.Conv2d(16, 3, 3))
    randomised(made)
    return made


SEQUENCES: dict[str, tuple[Any, str]] = {
    "SiLU": (lambda: head(nn.SiLU()), "0: GroupNorm + SiLU"),
    "SiLU in place": (lambda: head(nn.SiLU(inplace=True)), "0: GroupNorm + SiLU"),
    "SiLU, dropout": (lambda: head(nn.SiLU(), nn.Dropout(0.5)), "0: GroupNorm + SiLU + Dropout"),
    "dropout": (lambda: head(nn.Dropout(0.5)), "0: GroupNorm + Dropout"),
    "OpenAI's": (
        lambda: randomised(
            nn.Sequential(openai.normalization(32), openai.SiLU(), nn.Conv2d(32, 3, 3))
        ),
        "0: GroupNorm32 + SiLU",
    ),
    "two": (
        lambda: randomised(
            nn.Sequential(
                nn.Conv2d(3, 16, 1), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 8, 1),
                nn.GroupNorm(2, 8), nn.SiLU(),
            )
        ),
        "1: GroupNorm + SiLU, 4: GroupNorm + SiLU",
    ),
}  # fmt: skip


def channels(model: nn.Sequential) -> int:
    first: Any = model[0]
    return getattr(first, "in_channels", None) or first.num_channels


@pytest.mark.parametrize(("make", "what"), SEQUENCES.values(), ids=SEQUENCES)
def test_a_run_of_layers_is_one(make: Any, what: str) -> None:
    model = make().eval()
    fused = copy.deepcopy(model)
    report = fuse_(fused)
    assert report.fused == {"": f"Sequential with {what} in one"}
    assert not report.left
    x = drawn((2, channels(model), 6, 6))
    check_parity(model, fused, x)
    check_parity(model, fused, x, torch.bfloat16)
    assert [type(m) for m in fused] == [type(m) for m in model]


def test_dropout_is_drawn_in_training_only_and_with_its_probability_of_now() -> None:
    model = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Dropout(0.2))
    fuse_(model)
    x = torch.randn(4, 16, 16, 16)
    model[2].p = 0.75
    share = (model(x) == 0).float().mean()
    assert abs(float(share) - 0.75) < 0.03
    model[2].eval()
    assert not (model(x) == 0).any()


def test_a_layer_taken_out_is_what_it_was() -> None:
    model = head(nn.SiLU())
    plain = copy.deepcopy(model)
    fuse_(model)
    x = torch.randn(2, 16, 6, 6)
    torch.testing.assert_close(model[0](x), plain[0](x))
    torch.testing.assert_close(model[:2](x), plain[:2](x))
    torch.testing.assert_close(model[1:](x), plain[1:](x))


def doubled(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, out: 2 * out)


CHANGES: dict[str, Any] = {
    "hook on the norm": lambda m: doubled(m[0]),
    "hook on the activation": lambda m: doubled(m[1]),
    "hook on the sequence": doubled,
    "another activation": lambda m: m.__setitem__(1, nn.GELU()),
    "a layer between": lambda m: m.insert(1, nn.Tanh()),
    "a layer less": lambda m: m.__delitem__(1),
    "another norm": lambda m: m.__setitem__(0, nn.BatchNorm2d(16)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("after", [False, True], ids=["before fusing", "after fusing"])
def test_a_change_is_no_other_output(change: Any, after: bool) -> None:
    model, plain = head(nn.SiLU()), head(nn.SiLU())
    change(plain)
    if not after:
        change(model)
    if change is CHANGES["another norm"] and not after:
        with pytest.warns(UserWarning, match="nothing to fuse"):
            fuse_(model)
    else:
        fuse_(model)
    if after:
        change(model)
    x = drawn((2, 16, 6, 6))
    torch.testing.assert_close(step(model, x), step(plain, x), rtol=1e-4, atol=1e-5)


def test_a_sequence_with_a_forward_of_its_own_is_not_fused() -> None:
    class Reversed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for layer in reversed(self):
                x = layer(x)
            return x

    model = Reversed(nn.GroupNorm(4, 16), nn.SiLU())
    expected = model(torch.ones(1, 16, 2, 2).cumsum(1))
    report = fuse_(model)
    assert not isinstance(model, FusedSequential)
    assert report.fused == {"0": "GroupNormSiLU without activation"}
    torch.testing.assert_close(model(torch.ones(1, 16, 2, 2).cumsum(1)), expected)


def test_an_activation_called_silu_that_is_none_is_called() -> None:
    class SiLU(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(1.5 * x)

    model = nn.Sequential(nn.GroupNorm(4, 16), SiLU())
    x = torch.randn(2, 16, 4, 4)
    expected = model(x)
    assert fuse_(model).fused == {"0": "GroupNormSiLU without activation"}
    torch.testing.assert_close(model(x), expected)


def test_a_head_inside_a_sequence_that_hands_on_an_embedding() -> None:
    """OpenAI's TimestepEmbedSequential has a forward of its own: of what stands in it directly the
    norms alone are fused."""
    norm, silu, conv = openai.normalization(32), openai.SiLU(), nn.Conv2d(32, 3, 3)
    inner = nn.Sequential(openai.normalization(32), openai.SiLU(), nn.Conv2d(32, 32, 1))
    block = openai.ResBlock(32, 12, 0.0)
    model = randomised(openai.TimestepEmbedSequential(block, inner, norm, silu, conv))
    fused = copy.deepcopy(model)
    report = fuse_(fused)
    assert report.fused == {
        "0": "ResBlock, checkpoint none",
        "1": "Sequential with 0: GroupNorm32 + SiLU in one",
        "2": "GroupNormSiLU without activation",
    }
    check_parity(model, fused, drawn((2, 32, 6, 6), (2, 12)))


@pytest.mark.filterwarnings("ignore:fuse_ changed nothing")
@pytest.mark.parametrize("after", [False, True], ids=["before fusing", "after fusing"])
def test_a_dropout_of_everything_is_called(after: bool) -> None:
    for model, dropout, x in (
        (head(nn.SiLU(), nn.Dropout(0.5)), lambda m: m[2], drawn((2, 16, 6, 6))),
        (openai.ResBlock(32, 12, 0.5), lambda m: m.out_layers[2], drawn((2, 32, 6, 6), (2, 12))),
    ):
        plain = copy.deepcopy(model)
        dropout(plain).p = 1.0
        if after:
            fuse_(model)
        dropout(model).p = 1.0
        if not after:
            said = str(fuse_(model))
            assert "its dropout is 1" in said or said.endswith("0: GroupNorm + SiLU in one")
        torch.testing.assert_close(model(*x), plain(*x))
    model = edm.UNetBlock(16, 16, 12, dropout=1.0)
    x, plain = drawn((2, 16, 6, 6), (2, 12)), copy.deepcopy(model)
    assert "its dropout is 1" in fuse_(model).left[""]
    torch.testing.assert_close(model(*x), plain(*x))
