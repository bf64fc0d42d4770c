"""Launches of compiled kernels with a driver that launches nothing; run in a process of their own.

A launch the public way hands the driver tensors, one that is repeated hands it their addresses.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from resblock_bench.bench.cost.idle_driver import IdleDriver, Received, idle_driver
from resblock_bench.kernels import launcher
from resblock_bench.kernels.launcher import Launcher

GAIN = tl.constexpr(2)
N = 1024


@triton.jit(do_not_specialize=["free"])
def kernel(p_s, p_x, p_w, p_t, p_y, p_u, n, free, factor, BLOCK: tl.constexpr, ADD: tl.constexpr):
    o_i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p_x + o_i, o_i < n, 0.0).to(tl.float32) * factor * GAIN
    if p_w is not None:
        x *= tl.load(p_w + o_i, o_i < n, 0.0)
    if p_s is not None:
        tl.store(p_s + o_i, x, o_i < 1)
        tl.store(p_t + o_i, x, o_i < 1)
    tl.store(p_y + o_i, (x + free if ADD else x).to(p_y.dtype.element_ty), o_i < n)


CONSTANTS = {
    "n": N, "free": 3, "factor": 0.5, "BLOCK": 256, "ADD": True, "num_warps": 2, "maxnreg": 64
}  # fmt: skip


def tensors(offset: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, w and y; x begins `offset` elements after a multiple of 16 bytes."""
    return [torch.zeros(N + offset, dtype=dtype)[offset:], torch.zeros(N), torch.zeros(N)]


def prepared(scratch: dict[str, int] | None = None, **changes: Any) -> Launcher:
    scratch = scratch or dict.fromkeys(("p_s", "p_t", "p_u"), 0)
    return Launcher(kernel, 4, ("p_x", "p_w", "p_y"), {**CONSTANTS, **changes}, scratch)


def publicly(idle: IdleDriver, launch: Launcher, *given: Tensor | None) -> Received:
    """What the driver gets from kernel[grid](…)."""
    launch.kernel[(launch.programs,)](
        **dict(zip(launch.names, given, strict=True)), **launch.constants
    )
    return idle.received.pop()


def calls(idle: IdleDriver, launch: Launcher, *given: Tensor | None) -> tuple[bool, Received]:
    """Whether a call of the launcher was repeated, and what the driver got from it."""
    launch(*given)
    (got,) = idle.received
    idle.received.clear()
    return not any(isinstance(argument, Tensor) for argument in got.arguments), got


def plain(got: Received) -> Received:
    """With addresses for tensors."""
    values = (a.data_ptr() if isinstance(a, Tensor) else a for a in got.arguments)
    return got._replace(arguments=tuple(values))


def check(idle: IdleDriver, launch: Launcher, *given: Tensor | None) -> bool:
    """Whether a call was repeated; the driver must get what it gets from kernel[grid](…)."""
    repeated, got = calls(idle, launch, *given)
    expected = plain(publicly(idle, launch, *given))
    assert plain(got) == expected, (got, expected)
    types = [type(a) for a in expected.arguments]
    assert [type(a) for a in plain(got).arguments] == types
    return repeated


@contextmanager
def idle_with(launch: Launcher, *given: Tensor | None) -> Iterator[IdleDriver]:
    """The driver after a first call, with a second one repeated."""
    with idle_driver(keep=True) as idle:
        assert not check(idle, launch, *given)
        assert check(idle, launch, *given)
        yield idle


def repeated() -> None:
    """With the same and with other tensors."""
    launch, given = prepared(), tensors()
    with idle_with(launch, *given) as idle:
        assert check(idle, launch, *tensors())
        assert check(idle, launch, *given)


def values() -> None:
    """Whatever the values of the other arguments: each is compiled in, or passed."""
    for changes in (
        {"n": 1},
        {"n": N - 1},
        {"n": 2**40},
        {"free": 1},
        {"free": 2**31},
        {"factor": 1.0},
        {"ADD": False},
        {"num_warps": 4},
    ):
        launch = prepared(**changes)
        with idle_with(launch, *tensors()):
            pass
    x, _, y = tensors()
    with idle_with(prepared(), x, None, y):
        pass


def alignment() -> None:
    """An address that 16 does not divide needs another kernel, each time it comes."""
    launch, aligned, shifted = prepared(), tensors(), tensors(offset=1)
    with idle_with(launch, *aligned) as idle:
        function = publicly(idle, launch, *aligned).function
        assert not check(idle, launch, *shifted)
        for _ in range(2):
            repeated, got = calls(idle, launch, *shifted)
            assert repeated
            assert got.function == publicly(idle, launch, *shifted).function != function
            assert check(idle, launch, *aligned)
        shifted_y = [*aligned[:2], shifted[0]]
        assert not check(idle, launch, *shifted_y)
        assert check(idle, launch, *shifted_y)


def scratch() -> None:
    """Pieces of one allocation, each aligned, none where there is nothing to keep."""
    launch, given = prepared({"p_s": 5, "p_t": 6, "p_u": 0}), tensors()
    names = kernel.arg_names
    with idle_driver(keep=True) as idle:
        seen = []
        for _ in range(3):
            repeated, got = calls(idle, launch, *given)
            seen.append(repeated)
            values = dict(zip(names, plain(got).arguments, strict=False))
            assert values["p_s"] % 16 == 0 and values["p_t"] == values["p_s"] + 4 * 8
            assert values["p_u"] is None
            assert [values[name] for name in launch.names[:3]] == [t.data_ptr() for t in given]
        assert seen == [False, True, True]
        expected = publicly(idle, launch, *given, torch.zeros(8), torch.zeros(8))
        assert got.function == expected.function
        others = [i for i, name in enumerate(names) if name not in ("p_s", "p_t")]
        if launcher.TAKES_CONSTEXPRS:
            assert [plain(got).arguments[i] for i in others] == [
                plain(expected).arguments[i] for i in others
            ]
    with launcher.recording() as launches:
        launch(*given)
        (arguments,) = (recorded.arguments for recorded in launches)
        assert [arguments[name].numel() for name in ("p_s", "p_t")] == [8, 8]
        assert arguments["p_t"].dtype == torch.float32 and arguments["p_u"] is None


def device_and_stream() -> None:
    launch, given = prepared(), tensors()
    with idle_with(launch, *given) as idle:
        idle.stream = 7
        assert check(idle, launch, *given)
        assert calls(idle, launch, *given)[1].stream == 7
        function = publicly(idle, launch, *given).function
        idle.device = 1
        assert not check(idle, launch, *given)
        repeated, got = calls(idle, launch, *given)
        assert repeated and got.function != function
        idle.device = -1
        assert calls(idle, launch, *given)[1].function == function


def hooks() -> None:
    """A profiler's are called for every launch, with what it asks for."""
    launch, given = prepared(), tensors()
    seen: list[str] = []

    def enter(metadata: Any) -> None:
        seen.append("enter " + metadata.get()["name"])

    def leave(metadata: Any) -> None:
        seen.append("leave")

    with idle_with(launch, *given) as idle:
        for names in (["enter", "exit"], ["exit"]):
            seen.clear()
            with hooked(**{name: {"enter": enter, "exit": leave}[name] for name in names}):
                assert not calls(idle, launch, *given)[0]
                assert len(seen) == len(names), seen
            assert check(idle, launch, *given)
            assert len(seen) == len(names)


@contextmanager
def hooked(**added: Any) -> Iterator[None]:
    """Triton's launch hooks, as each version has them set."""
    if launcher.TRITON < (3, 5):
        place = launcher.CompiledKernel if launcher.TRITON < (3, 4) else launcher.knobs.runtime
        for name, hook in added.items():
            setattr(place, f"launch_{name}_hook", hook)
        yield
        for name in added:
            setattr(place, f"launch_{name}_hook", None)
        return
    chains = {name: getattr(launcher.knobs.runtime, f"launch_{name}_hook") for name in added}
    for name, hook in added.items():
        chains[name].add(hook)
    yield
    for name, hook in added.items():
        chains[name].remove(hook)


def debugging() -> None:
    """What compiles another kernel from now on does."""
    launch, given = prepared(), tensors()
    with idle_with(launch, *given) as idle:
        function = publicly(idle, launch, *given).function
        with switched("debug"):
            assert not check(idle, launch, *given)
            assert calls(idle, launch, *given)[1].function != function
        assert check(idle, launch, *given)


@contextmanager
def switched(name: str) -> Iterator[None]:
    import os

    if launcher.TRITON < (3, 4):
        os.environ["TRITON_DEBUG"] = "1"
        yield
        os.environ["TRITON_DEBUG"] = "0"
    else:
        launcher.knobs.runtime.debug = True
        yield
        launcher.knobs.runtime.debug = False


def patched() -> None:
    """Hooks before the launch, and tools that put their own function in Triton's place."""
    launch, given = prepared(), tensors()
    with idle_with(launch, *given) as idle:
        seen: list[Any] = []
        kernel.add_pre_run_hook(lambda *args, **kwargs: seen.append(kwargs["p_x"]))
        assert not calls(idle, launch, *given)[0]
        assert seen == [given[0]]
        kernel.pre_run_hooks.clear()
        for place in (JITFunction, kernel):
            original = place.run

            def run(*args: Any, original: Any = original, **kwargs: Any) -> Any:
                seen.append("run")
                return original(*args, **kwargs)

            place.run = run
            assert not calls(idle, launch, *given)[0]
            assert seen.pop() == "run"
            if place is kernel:
                del kernel.run
            else:
                JITFunction.run = original
            assert check(idle, launch, *given)


def changed_source() -> None:
    """A global that was compiled in says so as it does the public way; so does another source."""
    global GAIN
    launch, given = prepared(), tensors()
    with idle_with(launch, *given) as idle:
        GAIN = tl.constexpr(3)
        try:
            launch(*given)
        except RuntimeError as error:
            assert "GAIN has changed" in str(error)
        else:
            raise AssertionError("the kernel was launched with the old value")
        finally:
            GAIN = tl.constexpr(2)
        idle.received.clear()
        assert not check(idle, launch, *given)
        assert check(idle, launch, *given)
        before = kernel.hash
        kernel.hash = None
        assert not calls(idle, launch, *given)[0]
        kernel.hash = before


def autotuned() -> None:
    """A wrapper that chooses anew is asked anew."""
    chooses = triton.heuristics({"ADD": lambda arguments: arguments["p_x"].data_ptr() > 0})(kernel)
    constants = {**CONSTANTS, **dict.fromkeys(("p_s", "p_t", "p_u"))}
    del constants["ADD"]
    launch, given = Launcher(chooses, 4, ("p_x", "p_w", "p_y"), constants), tensors()
    with idle_driver(keep=True) as idle:
        for _ in range(3):
            assert not calls(idle, launch, *given)[0]


def threads() -> None:
    """As the backward's, which is another than the forward's."""
    launch, given = prepared(), tensors()
    with idle_driver(keep=True) as idle:
        running = [
            threading.Thread(target=lambda: [launch(*given) for _ in range(200)]) for _ in range(4)
        ]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        expected = plain(publicly(idle, launch, *given))
        assert len(idle.received) == 800
        assert {plain(got) for got in idle.received} == {expected}


def recorded() -> None:
    """Nothing is launched, and all arguments are there."""
    launch, given = prepared(), tensors()
    with idle_with(launch, *given) as idle, launcher.recording() as launches:
        launch(*given)
        assert not idle.received
        ((of, grid, arguments),) = launches
        assert of is kernel and grid == (4,)
        absent = dict.fromkeys(("p_s", "p_t", "p_u"))
        tensors_by_name = {"p_x": given[0], "p_w": given[1], "p_y": given[2]}
        assert arguments == {**tensors_by_name, **absent, **CONSTANTS}


def operator() -> None:
    """The driver gets from the operator, forward and backward, what kernel[grid](…) sends it."""
    from resblock_bench.kernels.functional import group_norm_silu

    def given(dtype: Any = torch.float32, offset: int = 0, **absent: None) -> dict[str, Any]:
        scale, shift = torch.zeros(2, 256).chunk(2, dim=1)
        leaves = {
            "x": torch.zeros(2 * 128 * 16 + offset, dtype=dtype)[offset:].view(2, 128, 4, 4),
            "weight": torch.zeros(128 + offset)[offset:],
            "bias": torch.zeros(128),
            "scale": scale,
            "shift": shift,
            **absent,
        }
        return {k: None if t is None else t.requires_grad_() for k, t in leaves.items()}

    def sent(idle: IdleDriver, leaves: dict[str, Any], how: dict[str, Any]) -> list[Any]:
        """Of both launches; addresses of what the call allocates are of no account."""
        idle.received.clear()
        torch.manual_seed(0)
        y = group_norm_silu(num_groups=8, **leaves, **how)
        torch.autograd.grad(y, [t for t in leaves.values() if t is not None], torch.ones_like(y))
        known = {t.data_ptr() for t in leaves.values() if t is not None}
        found: list[Any] = []
        for got in idle.received:
            values = [
                "allocated" if type(a) is int and a > 2**40 and a not in known else a
                for a in plain(got).arguments
            ]
            found.append(got._replace(arguments=values))
        return found

    def is_repeated(idle: IdleDriver) -> bool:
        return not any(isinstance(a, Tensor) for got in idle.received for a in got.arguments)

    undisturbed = launcher._undisturbed
    variants: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"offset": 1}, {}),
        ({"dtype": torch.bfloat16}, {}),
        ({"scale": None}, {}),
        ({"weight": None, "bias": None}, {}),
        ({}, {"dropout_p": 0.1}),
        ({}, {"dropout_p": 0.2}),
        ({}, {"eps": 1e-3}),
        ({}, {"activation": None}),
        ({}, {}),
    ]
    with idle_driver(keep=True) as idle:
        for changes, how in variants:
            for _ in range(3):
                leaves = given(**changes)
                found = sent(idle, leaves, how)
                repeated = is_repeated(idle)
                launcher._undisturbed = lambda kernel: False
                expected = sent(idle, leaves, how)
                launcher._undisturbed = undisturbed
                assert not is_repeated(idle)
                assert len(found) == len(expected) == 2
                assert found == expected, (changes, how)
            assert repeated, (changes, how)
