"""Dropout by seed: no mask is kept, and the backward draws the same one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.oracle import gradients, problem
from support.running import Runner, run_operator

from resblock_bench.kernels import aten, dispatch, group_norm_silu


@pytest.fixture
def dropping(run: Runner) -> Runner:
    return lambda p: run_operator(p, dropout_p=0.4)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_zeroes_p_of_the_elements_and_scales_the_rest(
    dropping: Runner, channels_last: bool
) -> None:
    p = problem(2, 6, 16, 16, groups=2, channels_last=channels_last)
    kept = run_operator(p)
    dropped = dropping(p)
    mask = dropped != 0
    torch.testing.assert_close(dropped, torch.where(mask, kept / 0.6, 0.0))
    assert 0.35 < 1 - float(mask.double().mean()) < 0.45


def test_backward_draws_the_mask_of_the_forward(dropping: Runner) -> None:
    """The gradient of the offset is Σ dz: elements that were dropped must not be in it."""
    p = problem(2, 6, 8, 8, groups=2, pre_shift=True, activation=None)
    torch.manual_seed(1)
    outcome = gradients(dropping, p)
    mask = (outcome["y"] != 0).double() / 0.6
    torch.testing.assert_close(outcome["shift"], (p.dy * mask).sum((2, 3)).float())
    masked = gradients(run_operator, replace(p, dy=(p.dy * mask.float())))
    for name in ("x", "weight", "bias", "scale", "pre_shift"):
        torch.testing.assert_close(outcome[name], masked[name], msg=name)


def test_manual_seed_fixes_the_mask(dropping: Runner) -> None:
    p = problem(2, 6, 8, 8, groups=2)
    torch.manual_seed(7)
    first, second = dropping(p), dropping(p)
    torch.manual_seed(7)
    assert torch.equal(first, dropping(p))
    assert not torch.equal(first, second)


def test_mask_differs_between_samples_and_channels(dropping: Runner) -> None:
    p = problem(2, 6, 16, 16, groups=2)
    mask = dropping(p) != 0
    assert not torch.equal(mask[0], mask[1])
    assert not torch.equal(mask[:, 0], mask[:, 1])


@pytest.mark.parametrize("shape", [(1, 8, 30, 34), (1, 256, 3, 3)], ids=["HW % 4 = 0", "HW odd"])
def test_neighbours_are_dropped_independently(dropping: Runner, shape: tuple[int, ...]) -> None:
    """Four positions share a draw, and must not share its bits; nor must channels."""
    kept = (dropping(problem(*shape, groups=1)) != 0).double().flatten(2)
    pairs = [(kept[..., :-d], kept[..., d:]) for d in (1, 2, 3, 4)]
    pairs.append((kept[:, :-1], kept[:, 1:]))
    pairs.append((kept[:, :-1, -1], kept[:, 1:, 0]))  # the end of one channel, the next one's
    for a, b in pairs:
        both, expected = float((a * b).mean()), 0.36
        assert abs(both - expected) < 4 * (expected / a.numel()) ** 0.5 + 0.02


def test_mask_depends_on_neither_layout_nor_tier() -> None:
    pytest.importorskip("triton")
    masks = []
    for channels_last in (False, True):
        for tier in ("A", "B", "C", "D"):
            with dispatch.prefer("triton", tier):
                torch.manual_seed(3)
                p = problem(2, 6, 8, 8, groups=2, channels_last=channels_last)
                masks.append(run_operator(p, dropout_p=0.4) != 0)
    assert all(torch.equal(masks[0], mask) for mask in masks)


def test_none_unless_training(run: Runner) -> None:
    p = problem(2, 6, 8, 8, groups=2)
    y = group_norm_silu(p.x, 2, p.weight, p.bias, dropout_p=0.4, training=False)
    assert torch.equal(y, group_norm_silu(p.x, 2, p.weight, p.bias))


def test_mask_operator_is_registered_right() -> None:
    """Its schema, its fake form, and that it draws the same under every kind of dispatch."""
    like = torch.empty(2, 4, 3, 3)
    torch.library.opcheck(aten._keep_mask, (torch.tensor(3), like, 0.4))
