"""Other projects' kernels, by stand-ins with their signatures; diffusers' block, where it is."""

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch
from msgspec import structs
from support.stand_ins import MODULES
from torch import Tensor

from resblock_bench.bench.measure import fingerprint, peers
from resblock_bench.bench.measure.implementations import IMPLEMENTATIONS, unusable_here
from resblock_bench.bench.measure.peers import PEERS, Ability
from resblock_bench.bench.measure.predict_memory import unpredictable
from resblock_bench.bench.measure.workload import Workload, draw_inputs, draw_weights
from resblock_bench.bench.records import Cell, Row

CPU = torch.device("cpu")
Install = Callable[[str], ModuleType]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Write a module that can be imported; afterwards it never was."""
    before = set(sys.modules)
    tops: set[str] = set()

    def written(module: str, text: str) -> None:
        folder = tmp_path
        for part in module.split("."):
            folder = folder / part
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").touch()
        (folder / "__init__.py").write_text(text)
        tops.add(module.partition(".")[0])
        monkeypatch.syspath_prepend(str(tmp_path))  # forgets what was not found before

    yield written
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in tops:
            del sys.modules[name]


@pytest.fixture
def install(write: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a stand-in in a peer's place, usable on a CPU; the module that notes its calls."""

    def installed(name: str) -> ModuleType:
        for module, text in MODULES[name].items():
            write(module, text)
        usable = replace(IMPLEMENTATIONS[name], unusable=lambda device: None)
        monkeypatch.setitem(IMPLEMENTATIONS, name, usable)
        return importlib.import_module(next(iter(MODULES[name])))

    return installed


def by(cell: Cell, impl: str) -> Cell:
    """The same cell, run by another implementation."""
    return structs.replace(cell, impl=impl)


def results(cell: Cell) -> dict[str, Tensor]:
    return Workload(cell, draw_weights(cell, 0), draw_inputs(cell, CPU, 0), CPU).results()


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_that_is_not_installed_says_how_to_install_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_located", lambda module: False)
    top = PEERS[name].modules[0].partition(".")[0]
    assert unusable_here(name, "cuda") == f"{top} is not installed: {PEERS[name].install}"


def test_a_missing_peer_is_a_skipped_row_with_the_reason(
    measure: Callable[..., Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_located", lambda module: False)
    row = measure(impl="liger")
    assert row.status == "skipped"
    assert row.reason == "liger_kernel is not installed: pip install liger-kernel"


def test_a_peer_for_gpus_is_skipped_on_a_cpu(
    measure: Callable[..., Row], monkeypatch: pytest.MonkeyPatch, make_cell: Callable[..., Cell]
) -> None:
    monkeypatch.setattr(peers, "_located", lambda module: True)
    row = measure(impl="flag-gems")
    assert (row.status, row.reason) == ("skipped", "it runs on cuda only")
    assert unpredictable(make_cell(impl="flag-gems")) == row.reason


def test_another_package_of_the_same_name_is_told_apart_and_not_imported(
    write: Callable[[str, str], None],
) -> None:
    write("apex", "raise RuntimeError('imported')")
    reason = str(unusable_here("apex", "cuda"))
    assert "the apex that is installed has no apex.contrib.group_norm: build NVIDIA's" in reason


def test_a_peer_at_its_older_place_is_found(write: Callable[[str, str], None]) -> None:
    """SGLang has moved its kernels."""
    write(PEERS["sglang"].modules[1], "CALLS = []")
    assert PEERS["sglang"].missing() is None
    assert peers._imported("sglang").CALLS == []


TRAINED = {
    "liger-flat": [3, 3],
    "flag-gems": ["forward", "forward", "backward", "backward"],
    "apex": ["silu", ""],
}


@pytest.mark.parametrize("checkpoint", ["none", "selective", "full"])
@pytest.mark.parametrize("name", TRAINED)
def test_a_norm_of_others_in_the_block_gives_its_output_and_gradients(
    install: Install, make_cell: Callable[..., Cell], name: str, checkpoint: str
) -> None:
    module = install(name)
    wide = {"channels": 128, "out_channels": 256, "layout": "nhwc"} if name == "apex" else {}
    cell = make_cell(checkpoint=checkpoint, **wide)
    found = results(by(cell, name))
    expected = results(cell)
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-4)
    if checkpoint == "none":
        assert TRAINED[name] == module.CALLS
    else:
        assert len(module.CALLS) > len(TRAINED[name]), "nothing was computed again"


@pytest.mark.parametrize(
    ("name", "conditioning", "calls"),
    [
        ("vllm-omni", "scale_shift", ["plain", "adaptive"]),
        ("vllm-omni", "add", ["plain", "plain"]),
        ("sglang", "scale_shift", [32]),
        ("sglang", "add", [32, 64]),
        ("apex", "add", ["silu", "silu"]),
    ],
)
@pytest.mark.parametrize("updown", ["none", "up", "down"])
def test_kernels_for_inference_give_the_blocks_output(
    install: Install,
    make_cell: Callable[..., Cell],
    name: str,
    conditioning: str,
    calls: list[object],
    updown: str,
) -> None:
    module = install(name)
    wide = {"channels": 128, "out_channels": 256, "layout": "nhwc"} if name == "apex" else {}
    shape = {"out_channels": 64, **wide}
    cell = make_cell(mode="inference", conditioning=conditioning, updown=updown, **shape)
    torch.testing.assert_close(
        results(by(cell, name))["out"], results(cell)["out"], rtol=1e-4, atol=1e-4
    )
    assert calls == module.CALLS


@pytest.mark.parametrize("name", ["vllm-omni", "sglang", "liger-flat", "flag-gems"])
def test_activations_of_16_bits_reach_the_kernel_as_they_are(
    install: Install, make_cell: Callable[..., Cell], name: str
) -> None:
    module = install(name)
    cell = make_cell(mode="inference", dtype="bf16")
    out = results(by(cell, name))["out"]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, results(cell)["out"], rtol=0.05, atol=0.1)
    assert module.CALLS


def test_what_a_peer_would_hand_on_to_pytorch_is_skipped(
    install: Install, measure: Callable[..., Row]
) -> None:
    install("apex")
    row = measure(impl="apex", layout="nhwc")
    assert row.status == "skipped"
    assert row.reason == (
        "this apex has no kernel for 32 channels, and would call PyTorch's: it has 128, 256"
    )


def test_vllm_without_triton_is_skipped(
    install: Install, write: Callable[[str, str], None], measure: Callable[..., Row]
) -> None:
    install("vllm-omni")
    write("vllm.triton_utils", "HAS_TRITON = False")
    row = measure(impl="vllm-omni", mode="inference")
    assert row.status == "skipped"
    assert "vllm finds no Triton here" in (row.reason or "")


def test_a_failing_peer_is_a_row_that_says_what_is_known_of_it(
    install: Install, measure: Callable[..., Row]
) -> None:
    """The backward of images, as Liger 0.8.5 has it."""
    install("liger")
    row = measure(impl="liger")
    assert row.status == "failed"
    assert (row.reason or "").startswith("RuntimeError: shape '[")
    assert "linkedin/Liger-Kernel#1375" in (row.reason or "")
    assert measure(impl="liger", mode="inference").status == "ok"


def test_a_peer_that_cannot_be_imported_is_a_failed_row(
    install: Install, write: Callable[[str, str], None], measure: Callable[..., Row]
) -> None:
    install("flag-gems")
    del sys.modules["flag_gems"]
    write("flag_gems", "raise ImportError('no driver')")
    row = measure(impl="flag-gems")
    assert row.status == "failed"
    assert (row.reason or "").startswith("ImportError: no driver")


def test_a_wrong_peer_is_not_timed(install: Install, measure: Callable[..., Row]) -> None:
    module = install("sglang")
    module.triton_group_norm_silu = lambda x, *rest, **more: torch.zeros_like(x)
    row = measure(impl="sglang", mode="inference")
    assert (row.status, row.samples_ms) == ("wrong", None)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"impl": "sglang"}, "sglang takes mode=inference only"),
        ({"impl": "liger", "layout": "nhwc"}, "liger takes layout=nchw only"),
        ({"impl": "diffusers", "dtype": "bf16"}, "diffusers takes dtype=fp32 only"),
        ({"impl": "apex", "layout": "nhwc", "dims": 3}, "apex takes dims=2 only"),
    ],
)
def test_a_cell_that_a_peer_is_not_made_for_is_skipped(
    measure: Callable[..., Row], changes: dict[str, object], sentence: str
) -> None:
    row = measure(**changes)
    assert row.status == "skipped"
    assert sentence in (row.reason or "")


def test_what_an_implementation_is_made_for_is_a_line() -> None:
    ability = Ability(devices=("cuda",), modes=("inference",), layouts=("nchw",), dims=(2,))
    assert str(ability) == "inference; fp32, bf16, fp16; nchw; 2-D; cuda"


def test_a_peers_version_is_in_its_row_and_its_code(
    install: Install, measure: Callable[..., Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("flag-gems")
    version = metadata.version
    codes = []
    for known in ("5.0.2", "5.0.3"):
        monkeypatch.setattr(
            metadata, "version", lambda name, v=known: v if name == "flag-gems" else version(name)
        )
        fingerprint.code_of.cache_clear()
        row = measure(impl="flag-gems")
        assert (row.status, row.versions["flag-gems"]) == ("ok", known)
        codes.append((row.code, measure().code))
        assert "flag-gems" not in measure().versions
    assert codes[0][0] != codes[1][0]
    assert codes[0][1] == codes[1][1]
    fingerprint.code_of.cache_clear()


@pytest.mark.parametrize("conditioning", ["scale_shift", "add"])
@pytest.mark.parametrize("updown", ["none", "up", "down"])
@pytest.mark.parametrize("checkpoint", ["none", "selective"])
def test_diffusers_block_is_the_references_with_its_weights(
    make_cell: Callable[..., Cell], conditioning: str, updown: str, checkpoint: str
) -> None:
    pytest.importorskip("diffusers")
    cell = make_cell(
        conditioning=conditioning, updown=updown, checkpoint=checkpoint, out_channels=64
    )
    found, expected = results(by(cell, "diffusers")), results(cell)
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-4)


def test_diffusers_block_drops_nothing_in_inference(make_cell: Callable[..., Cell]) -> None:
    pytest.importorskip("diffusers")
    cell = make_cell(mode="inference", dropout=0.9)
    found, expected = results(by(cell, "diffusers"))["out"], results(cell)["out"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_diffusers_block_is_measured_like_any_other(measure: Callable[..., Row]) -> None:
    diffusers = pytest.importorskip("diffusers")
    row = measure(impl="diffusers", dropout=0.3)
    assert row.status == "ok", row.reason
    assert row.memory is not None
    assert row.versions["diffusers"] == diffusers.__version__
