"""What is found of compiled kernels whose machine code is known."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resblock_bench.bench.compiled import machine_code

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "support" / "machine_code_kernels.py"


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared_bytes", "resident_warps", "limit"),
    [
        (90, 4, 32, 0, 64, "warps"),
        (90, 1, 32, 0, 32, "blocks"),
        # 40·32 = 1280 registers a warp: 12 of 16384 a quarter, 48 in all.
        (90, 2, 40, 0, 48, "registers"),
        # 33·32 = 1056 are given as 1280.
        (100, 2, 33, 0, 48, "registers"),
        # 16 warps do not fit into 4·(16384 / 8192) = 8.
        (80, 16, 255, 0, 0, "registers"),
        # 33 KiB a block with the reserved one: 4 in 164 KiB, 6 in 228 KiB.
        (80, 4, 32, 32 * 1024, 16, "shared memory"),
        (90, 4, 32, 32 * 1024, 24, "shared memory"),
        (100, 4, 32, 32 * 1024, 24, "shared memory"),
        # 16793 bytes with the reserved ones, of which 10 would fit, are given as 16896.
        (80, 4, 32, 15769, 36, "shared memory"),
        (80, 4, 32, 164 * 1024, 0, "shared memory"),
    ],
)
def test_occupancy_by_hand(
    arch: int, warps: int, registers: int, shared_bytes: int, resident_warps: int, limit: str
) -> None:
    found = machine_code.occupancy(arch, warps, registers, shared_bytes)
    assert found == (resident_warps / 64, limit)


@pytest.mark.parametrize(
    ("blocks", "elements"),
    [
        ({"BLOCK_C": 4, "BLOCK_HW": 512, "BLOCK_S": 8}, 2048),
        ({"BLOCK_R": 16, "BLOCK_HW": 8}, 128),
        ({"BLOCK_N": 16, "BLOCK_C": 64}, 1024),
        ({"BLOCK": 64, "HW": 4096}, 64),
    ],
)
def test_elements_of_a_tile(blocks: dict[str, int], elements: int) -> None:
    names = ["p_x", *blocks]
    kinds = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    kernel = SimpleNamespace(arg_names=names, signature=inspect.Signature(kinds))
    assert machine_code.tile_elements(kernel, {"num_warps": 4, "p_x": None, **blocks}) == elements


def test_the_narrowest_tensor_decides_what_is_a_tile() -> None:
    half, single = (torch.empty(1, dtype=d) for d in (torch.float16, torch.float32))
    assert machine_code.narrowest_bits({"p_x": single, "p_y": half, "p_z": None, "C": 3}) == 16
    assert machine_code.narrowest_bits({"C": 3}) == 8


def test_an_interpreted_kernel_cannot_be_compiled() -> None:
    pytest.importorskip("triton")
    from support.machine_code_kernels import copy_kernel

    with pytest.raises(RuntimeError, match=r"copy_kernel cannot be compiled: .*TRITON_INTERPRET=1"):
        machine_code.specialise(copy_kernel, {})


def test_nvdisasm_is_taken_from_where_triton_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    bundled = machine_code._nvdisasm()
    assert bundled.is_file()
    mine = tmp_path / "nvdisasm"
    monkeypatch.setenv("TRITON_NVDISASM_PATH", str(mine))
    assert machine_code._nvdisasm() == bundled
    mine.touch()
    assert machine_code._nvdisasm() == mine


def test_triton_is_asked_for_its_ptxas(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 3.9 on that of 10.0 serves 9.0, too; 3.4 has one, and 3.2 another way to ask."""
    pytest.importorskip("triton")
    from triton.backends.nvidia import compiler

    assert machine_code._ptxas(90).is_file()

    def tool(name: str) -> SimpleNamespace:
        return SimpleNamespace(path=f"/{name}")

    def by_arch(arch: int) -> SimpleNamespace:
        return tool("ptxas" if arch < 90 else "ptxas-blackwell")

    monkeypatch.setattr(compiler, "get_ptxas", by_arch, raising=False)
    assert machine_code._ptxas(80) == Path("/ptxas")
    assert machine_code._ptxas(90) == Path("/ptxas-blackwell")
    monkeypatch.setattr(compiler, "get_ptxas", lambda: tool("only"))
    assert machine_code._ptxas(90) == Path("/only")
    monkeypatch.delattr(compiler, "get_ptxas")
    monkeypatch.setattr(
        compiler, "_path_to_binary", lambda name: (f"/{name}", "12.4"), raising=False
    )
    assert machine_code._ptxas(90) == Path("/ptxas")


def test_what_ptxas_knows_is_what_it_lists() -> None:
    pytest.importorskip("triton")
    assert machine_code.ptxas_knows(80) and machine_code.ptxas_knows(90)
    assert not machine_code.ptxas_knows(9)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What machine_code_kernels.py finds, in a process of its own."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("cache")
    parts = ("accesses", "loops", "errors", "specialisations", "hashes")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    # Multiply-adds are to be fused all the same.
    environment["TRITON_DEFAULT_FP_FUSION"] = "0"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *parts],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_accesses_and_spills_of_known_kernels(compiled: dict[str, Any]) -> None:
    found = compiled["accesses"]

    def accesses(name: str) -> tuple[dict[str, int], dict[str, int]]:
        code = found[name]
        assert (code["main_loads"], code["main_stores"]) == (code["loads"], code["stores"])
        return code["loads"], code["stores"]

    # 8 elements of 16 bits a thread: at once, or one by one where a row may start anywhere.
    assert accesses("aligned") == ({"128": 1}, {"128": 1})
    assert accesses("odd rows") == ({"16": 8}, {"16": 8})
    assert accesses("shifted") == ({"16": 8}, {"128": 1})
    assert found["aligned"]["instructions"]["memory"] == 2 / 8

    none = {"stack_bytes": 0, "spill_store_bytes": 0, "spill_load_bytes": 0}
    assert {k: found["aligned"][k] for k in none} == none
    assert (found["aligned"]["arch"], found["aligned"]["warps"]) == (90, 4)
    assert 0 < found["aligned"]["registers"] <= 32

    # 512 elements of 32 bits a thread, of which a thread's registers hold fewer than half.
    spilling = found["spilling"]
    assert spilling["warps"] == 1
    assert spilling["loads"] == spilling["stores"] == {"128": 128}
    registers = spilling["registers"]
    assert spilling["stack_bytes"] >= 4 * (512 - registers)
    assert spilling["spill_store_bytes"] >= 4 * (512 - registers)
    assert spilling["spill_load_bytes"] >= 4 * (512 - registers)
    assert spilling["instructions"]["local"] > 0 == found["aligned"]["instructions"]["local"]


def test_loops_of_known_kernels_and_their_hashes(compiled: dict[str, Any]) -> None:
    found = compiled
    # Of 10.0, ptxas has known nothing before CUDA 12.8, which comes with Triton 3.3.
    assert found["loops"].keys() - {"100"} == {"80", "90", "nested"}
    for arch in found["loops"].keys() - {"nested"}:
        code = found["loops"][arch]
        assert str(code["arch"]) == arch
        # ptxas unrolls the loop, and does the rest of the tiles behind it.
        assert code["main_loads"] == code["main_stores"]
        assert code["main_loads"].keys() == code["loads"].keys() == {"128"}
        assert code["loads"]["128"] > code["main_loads"]["128"] > 2
        per_element = code["instructions"]
        assert (per_element["fp32"], per_element["memory"]) == (1.0, 0.5)
        assert per_element["mufu"] == per_element["shared"] == per_element["local"] == 0.0
        assert per_element["total"] == pytest.approx(
            sum(v for k, v in per_element.items() if k != "total")
        )
        assert (code["occupancy"], code["occupancy_limit"]) == (1.0, "warps")
        assert code["shared_bytes"] == 0

    nested = found["loops"]["nested"]
    # Two passes, the second of which stores; the loops over rows and over the table are not among
    # them.
    assert nested["loads"].keys() == {"128", "32"}
    assert nested["main_loads"].keys() == nested["main_stores"].keys() == {"128"}
    assert nested["main_loads"]["128"] == 2 * nested["main_stores"]["128"]
    assert (nested["instructions"]["fp32"], nested["instructions"]["memory"]) == (2.0, 0.75)
    assert nested["shared_bytes"] == 4 * 4  # a float for each warp's sum

    hashes = {name: code["sass_hash"] for name, code in found["hashes"].items()}
    assert len(hashes["first"]) == 16
    assert hashes["again"] == hashes["first"] == hashes["twin"]
    assert hashes["other constant"] != hashes["first"]


def test_arguments_are_specialised_as_triton_does_and_wrong_ones_refused(
    compiled: dict[str, Any],
) -> None:
    found = compiled
    errors = found["errors"]
    assert errors["missing"] == "TypeError: missing a required argument: 'HW'"
    assert errors["misspelled"].startswith("KeyError: 'nun_warps is neither")
    assert errors["text"] == "TypeError: HW of a kernel cannot be compiled for a str."
    assert errors["architecture"].startswith("UsageError: unknown architecture '70'")
    assert "did not give the binary that Triton made" in errors["binary"]
    assert errors["line table"] == "none"
    assert "compiles nothing for sm_90" in errors["ptxas"]
    assert "take a newer Triton" in errors["ptxas"]
    assert errors["no tile"].startswith("ValueError: argument_kernel has no tile")

    if not found["specialisations"]:
        pytest.skip("this Triton keeps what a launch does before compiling somewhere else")
    for case in found["specialisations"]:
        assert case["ours"] == case["triton"], case["value"]
