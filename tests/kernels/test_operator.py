"""The operator's outputs and gradients against float64, in ATen and in every Triton tier."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from support.oracle import check, eager, error, gradients, problem
from support.running import Runner, run_operator

from resblock_bench.kernels import dispatch, tiers

HALF = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_every_input_at_once(run: Runner, channels_last: bool, dtype: torch.dtype) -> None:
    """In bf16 also the guard of the interpreter, whose bf16 products are garbage (1e38): the
    kernels must compute in fp32 between load and store."""
    check(
        run,
        problem(2, 12, 9, 7, groups=3, dtype=dtype, pre_shift=True, channels_last=channels_last),
    )


@pytest.mark.parametrize("channels_per_group", [1, 3, 7, 10, 80])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_channels_per_group(run: Runner, channels_last: bool, channels_per_group: int) -> None:
    """Mostly no power of two: padded lanes must neither read nor write the neighbour group."""
    p = problem(1, 3 * channels_per_group, 5, 5, groups=3, channels_last=channels_last)
    check(run, p)


@pytest.mark.parametrize("groups", [1, 8], ids=["one group", "a group a channel"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_extreme_groups(run: Runner, channels_last: bool, groups: int) -> None:
    check(run, problem(1, 8, 6, 6, groups=groups, channels_last=channels_last))


@pytest.mark.parametrize("positions", [1, 63, 64, 4096])
def test_positions(run: Runner, positions: int) -> None:
    try:
        check(run, problem(1, 8, positions, groups=2))
    except ValueError as error:
        if positions < 4096 or "tier A holds" not in str(error):
            raise
        pytest.skip("tier A does not hold so many positions")


@pytest.mark.parametrize("samples", [256, 512])
def test_many_samples_in_aten(samples: int) -> None:
    """apex#1984: more samples than one grid dimension or reduction expected."""
    check(run_operator, problem(samples, 2, 3, groups=1))


def test_many_samples_in_triton() -> None:
    """More than one block of the sum over samples, the last one partial."""
    pytest.importorskip("triton")
    from resblock_bench.kernels.launch import FOLD_ELEMENTS

    samples = FOLD_ELEMENTS // 2 * 2 + 3  # a unit has 2 channels, and a program a warp
    with dispatch.prefer("triton"):
        check(run_operator, problem(samples, 2, 3, groups=1))


@pytest.mark.parametrize(
    "spatial", [(11,), (3, 5), (2, 3, 5)], ids=["length", "height×width", "volume"]
)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_dimensions(run: Runner, channels_last: bool, spatial: tuple[int, ...]) -> None:
    """Liger#1375: a backward that only knew 3-D input."""
    if channels_last and len(spatial) == 1:
        pytest.skip("PyTorch has no channels-last layout for lengths")
    check(run, problem(2, 8, *spatial, groups=2, channels_last=channels_last, pre_shift=True))


@pytest.mark.parametrize("affine", [False, True], ids=["no affine", "affine"])
@pytest.mark.parametrize("modulated", [False, True], ids=["no modulation", "modulation"])
@pytest.mark.parametrize("activation", [None, "silu"], ids=["no activation", "silu"])
def test_options(run: Runner, affine: bool, modulated: bool, activation: str | None) -> None:
    check(run, problem(2, 6, 5, 5, groups=2, affine=affine, modulated=modulated,
                       activation=activation))  # fmt: skip


@pytest.mark.parametrize("missing", ["weight", "bias", "scale", "shift"])
def test_one_modulation_tensor_missing(run: Runner, missing: str) -> None:
    check(run, replace(problem(2, 6, 5, 5, groups=2, pre_shift=True), **{missing: None}))


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_mean_far_from_zero(run: Runner, channels_last: bool) -> None:
    """Mean / standard deviation of 1e4: E[x²] − μ² would have nothing left of the variance."""
    check(run, problem(1, 6, 16, 16, groups=2, mean=1e4, channels_last=channels_last))


def test_constant_groups(run: Runner) -> None:
    """Variance 0: rstd is 1/√eps (apex returned 1), and the output is the offset alone."""
    p = problem(2, 6, 4, 4, groups=2)
    p = replace(p, x=torch.full_like(p.x, 3.0))
    outcome, truth = gradients(run, p), gradients(eager, p.to(torch.float64))
    # rstd is 316, and so are the roundings of x and of the mean against each other.
    torch.testing.assert_close(outcome["y"].double(), truth["y"], rtol=0, atol=3e-4)
    for name in ("x", "bias", "shift"):
        assert error(outcome[name], truth[name]) < 1e-3, name
    assert all(g.isfinite().all() for g in outcome.values())


@pytest.mark.parametrize("size", [1e3, 6e4])
def test_large_fp16(run: Runner, size: float) -> None:
    """x² overflows fp16 from 256 on (Liger squared in 16 bits)."""
    p = problem(1, 6, 8, 8, groups=2, dtype=torch.float16)
    sign = torch.where(p.x > 0, 1.0, -1.0).half()
    check(run, replace(p, x=sign * size * (1 - p.x.abs() / 64)))


@pytest.mark.parametrize("backend", ["aten", "triton"])
@pytest.mark.parametrize("how", ["other layout", "strided", "expanded"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_gradient_in_another_layout(
    backend: dispatch.Backend, channels_last: bool, how: str
) -> None:
    """In one tier: what reaches a kernel is dense."""
    if backend == "triton":
        pytest.importorskip("triton")
    p = problem(2, 6, 4, 5, groups=2, channels_last=channels_last)
    if how == "other layout":
        other = torch.contiguous_format if channels_last else torch.channels_last
        dy = p.dy.contiguous(memory_format=other)
    elif how == "strided":
        dy = torch.stack([p.dy, p.dy], dim=-1)[..., 0]
    else:
        dy = torch.ones(()).expand(p.dy.shape)
    with dispatch.prefer(backend):
        check(run_operator, replace(p, dy=dy))
        if backend == "aten":  # which takes another way without an activation
            check(run_operator, replace(p, dy=dy, activation=None))


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_layout_is_kept(run: Runner, channels_last: bool) -> None:
    p = problem(2, 6, 4, 5, groups=2, channels_last=channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    outcome = gradients(run, p)
    assert outcome["y"].is_contiguous(memory_format=layout)
    assert outcome["x"].is_contiguous(memory_format=layout)


def test_layout_of_volumes_is_kept(run: Runner) -> None:
    outcome = gradients(run, problem(2, 6, 2, 3, 4, groups=2, channels_last=True))
    assert outcome["y"].is_contiguous(memory_format=torch.channels_last_3d)
    assert outcome["x"].is_contiguous(memory_format=torch.channels_last_3d)


def test_strided_input_is_copied_not_misread(run: Runner) -> None:
    p = problem(2, 6, 8, 5, groups=2)
    check(run, replace(p, x=p.x[:, :, ::2], dy=p.dy[:, :, ::2]))


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_strided_and_expanded_modulation(run: Runner, channels_last: bool) -> None:
    p = problem(3, 6, 4, 5, groups=2, pre_shift=True, channels_last=channels_last)
    columns = {name: getattr(p, name).t().contiguous().t() for name in ("scale", "shift")}
    check(run, replace(p, **columns, pre_shift=p.pre_shift.t().contiguous().t()))
    check(
        run,
        replace(
            p,
            weight=torch.stack([p.weight, p.bias], dim=1)[:, 0],
            bias=torch.ones(1).expand(6),
            scale=torch.ones(3, 1).expand(3, 6),
        ),
    )


def test_one_tensor_as_scale_and_shift(run: Runner) -> None:
    """Both gradients must reach a tensor that is passed twice."""
    p = problem(2, 6, 4, 4, groups=2)
    shared = p.shift.clone().requires_grad_()
    run(replace(p, scale=shared, shift=shared)).backward(p.dy)
    truth = p.to(torch.float64)
    twice = shared.detach().double().requires_grad_()
    eager(replace(truth, scale=twice, shift=twice)).backward(truth.dy)
    assert error(shared.grad, twice.grad) < 1e-6


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_bitwise_repeatable(run: Runner, channels_last: bool) -> None:
    p = problem(2, 12, 8, 8, groups=3, pre_shift=True, channels_last=channels_last)
    first, second = gradients(run, p), gradients(run, p)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_saves_nothing_but_x_and_small_tensors(run: Runner) -> None:
    p = problem(2, 12, 16, 16, groups=3, pre_shift=True)
    sizes: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = p.x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(replace(p, x=x))
    assert sizes.pop(x.untyped_storage().data_ptr()) == x.nbytes
    assert sum(sizes.values()) < x.nbytes / 10


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 6, 0, 4)], ids=["no sample", "no position"])
def test_empty(run: Runner, shape: tuple[int, ...]) -> None:
    p = problem(*shape, groups=2)
    outcome = gradients(run, p)
    assert outcome["y"].shape == outcome["x"].shape == shape
    assert all((outcome[name] == 0).all() for name in ("weight", "bias"))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_non_finite_input_spoils_its_group_alone(run: Runner, value: float) -> None:
    p = problem(1, 6, 4, 4, groups=2)
    p.x[0, 0, 0, 0] = value
    y = run(p)
    assert y[:, :3].isnan().any()
    torch.testing.assert_close(y[:, 3:], eager(p)[:, 3:])


def test_second_derivative_raises(run: Runner) -> None:
    p = problem(1, 6, 4, 4, groups=2)
    x = p.x.requires_grad_()
    (dx,) = torch.autograd.grad(run(replace(p, x=x)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        (x.sum() + dx.square().sum()).backward()


def test_scale_is_added_to_one_in_full_precision(run: Runner) -> None:
    """1 + scale rounded to fp16 loses a scale of 2⁻¹² altogether."""
    p = problem(1, 4, 64, 64, groups=2, dtype=torch.float16, activation=None)
    p = replace(p, scale=torch.full_like(p.scale, 2.0**-12), shift=None, bias=None)
    unscaled = eager(replace(p, scale=None).to(torch.float64))
    # The factor on y, from all of its elements, so that the rounding of each averages out.
    factor = float((run(p).double() * unscaled).sum() / unscaled.square().sum())
    assert abs(factor - (1 + 2.0**-12)) < 2.0**-15
    # And its gradients: dweight = Σ (1 + s)·S2 in fp32.
    found = gradients(run, p)["weight"]
    unscaled_gradient = gradients(run, replace(p, scale=torch.zeros_like(p.scale)))["weight"]
    torch.testing.assert_close(found / unscaled_gradient, torch.full((4,), 1 + 2.0**-12))


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles so small that every program loops, and a GPU so small that sums soon alternate with
    output."""
    pytest.importorskip("triton")
    monkeypatch.setattr(tiers, "STREAM_ELEMENTS", 64)
    monkeypatch.setattr(tiers, "SPLIT_TILES", dict.fromkeys(tiers.SPLIT_TILES, (32, 1, 2)))
    monkeypatch.setattr(tiers, "PART_BYTES", dict.fromkeys(tiers.PART_BYTES, 512))
    monkeypatch.setattr(tiers, "MIN_CHUNK", 16)
    # Fewer than a unit has parts.
    monkeypatch.setattr("resblock_bench.kernels.launch.FOLD_ELEMENTS", 4)
    monkeypatch.setattr(dispatch, "DEFAULT_MACHINE", tiers.Machine(sms=1, l2_bytes=2**20))
    for cached in (dispatch._machine, tiers.plan_launch):
        cached.cache_clear()
    yield
    for cached in (dispatch._machine, tiers.plan_launch):
        cached.cache_clear()


# NumPy, in the interpreter: lanes past the end, which are 1e4 from the mean and never stored.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("tier", ["B", "C", "D"])
def test_several_tiles_to_a_program(crowded: None, tier: tiers.Tier, channels_last: bool) -> None:
    p = problem(3, 4, 9, 17, groups=2, pre_shift=True, channels_last=channels_last, mean=1e4)
    with dispatch.prefer("triton", tier):
        for direction in ("forward", "backward"):
            how = dispatch.launch_for(direction, p.x, 2)
            assert how.block_hw < 9 * 17
            if tier != "B":
                assert how.splits > 1 and how.tiles > 1
                assert how.parts < how.lag < 3 * 4 // how.slab * how.parts
        check(run_operator, p)
        torch.manual_seed(0)
        dropped = run_operator(p, dropout_p=0.5) != 0
    with dispatch.prefer("triton", "A"):
        torch.manual_seed(0)
        assert torch.equal(dropped, run_operator(p, dropout_p=0.5) != 0)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(9, 17), (8, 16)], ids=["uneven", "even"])
def test_several_tiles_of_a_slab_that_is_not_full(crowded: None, size: tuple[int, int]) -> None:
    """About zero, where a tile that is read twice shows; 40 channels in slabs of 32."""
    p = problem(2, 40, *size, groups=20, pre_shift=True, channels_last=True)
    with dispatch.prefer("triton", "C"):
        how = dispatch.launch_for("backward", p.x, 20)
        assert how.slab == 32 and how.tiles > 1 and how.splits > 1
        check(run_operator, p)


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("tier", ["B", "C"])
def test_a_constant_is_its_own_mean_in_any_number_of_parts(
    crowded: None, tier: tiers.Tier, channels_last: bool
) -> None:
    p = problem(1, 6, 9, 17, groups=2, affine=False, modulated=False, activation=None,
                channels_last=channels_last)  # fmt: skip
    with dispatch.prefer("triton", tier):
        for value in (3.3, 0.01, 7.7):
            assert not run_operator(replace(p, x=torch.full_like(p.x, value))).any(), value


def test_float64_is_computed_in_float64() -> None:
    p = problem(2, 6, 5, 5, groups=2, pre_shift=True).to(torch.float64)
    truth = gradients(eager, p)
    for name, value in gradients(run_operator, p).items():
        assert error(value, truth[name]) < 1e-13, name


def test_autocast_keeps_16_bit_storage() -> None:
    p = problem(2, 6, 5, 5, groups=2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = run_operator(p)
    assert y.dtype == torch.bfloat16
    assert error(y, eager(p.to(torch.float64))) <= 2 * error(eager(p), eager(p.to(torch.float64)))


def test_long_group_is_split() -> None:
    """More than 65,536 positions in one group: several programs share it."""
    pytest.importorskip("triton")
    p = problem(1, 1, 70001, groups=1)
    with dispatch.prefer("triton"):
        launch = dispatch.launch_for("forward", p.x, 1)
        assert launch.tier == "C" and launch.splits > 1
        check(run_operator, p)
