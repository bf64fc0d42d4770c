"""What is read from compiled kernels, on snippets and on kernels whose machine code is known."""

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
from resblock_bench.bench.compiled.machine_code import Sass, parse_sass

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "support" / "machine_code_kernels.py"

PTXAS_LOG = """\
ptxas-blackwell info    : 0 bytes gmem
ptxas-blackwell info    : Function properties for helper
    8 bytes stack frame, 1 bytes spill stores, 2 bytes spill loads
ptxas-blackwell info    : Compiling entry function 'apply_kernel' for 'sm_100a'
ptxas-blackwell info    : Function properties for apply_kernel
    24 bytes stack frame, 20 bytes spill stores, 16 bytes spill loads
ptxas-blackwell info    : Used 128 registers, used 1 barriers, 24 bytes cumulative stack size
ptxas-blackwell info    : Compile time = 35.796 ms
"""

# A loop over two tiles of 4 × 32 bits within a loop that waits and looks something up; rare code
# behind the end, which comes back; the padding that ends every kernel.
NESTED = """\
\t.headerflags\t@"EF_CUDA_SM90"
\t.section\t.text.some_kernel,"ax",@progbits
some_kernel:
.text.some_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_7:
        /*0010*/                   LDG.E.STRONG.GPU R0, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_7) ;
.L_x_2:
        /*0030*/                   LDG.E R4, desc[UR4][R2.64] ;
.L_x_5:
        /*0040*/               @P1 LDG.E.EF.128 R8, desc[UR4][R2.64] ;
        /*0050*/              @!P1 BRA `(.L_x_9) ;
.L_x_4:
        /*0060*/                   STG.E.64 desc[UR4][R2.64], R8 ;
        /*0070*/                   BRA.U !UP0, `(.L_x_5) ;
        /*0080*/               @P0 CALL.REL.NOINC `(.L_x_3) ;
        /*0090*/                   BRA `(.L_x_2) ;
.L_x_3:
        /*00a0*/                   EXIT ;
.L_x_9:
        /*00b0*/                   MUFU.RCP R8, R8 ;
        /*00c0*/                   BRA `(.L_x_4) ;
.L_x_1:
        /*00d0*/                   BRA `(.L_x_1);
        /*00e0*/                   NOP;
        /*00f0*/                   NOP;
.L_x_0:
"""

PTX = """\
.visible .entry some_kernel(
	.param .u64 .ptr .global .align 1 some_kernel_param_0
{
	ld.param.b64 	%rd1, [some_kernel_param_0];
	@%p1 bra 	$L__BB0_3;
$L__BB0_1:
	add.s32 	%r7, %r7, 1;
$L__BB0_2:                              // =>This Inner Loop Header: Depth=1
	@%p3 ld.global.L1::evict_first.L2::cache_hint.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	@%p3 ld.global.b16 { %rs1 }, [ %rd1 + 64 ];
	ld.shared.b32 	%r5, [%r6];
	bra.uni 	$L__BB0_4;
$L__BB0_4:
	@%p4 bra 	$L__BB0_2;
	@!%p5 bra 	$L__BB0_1;
$L__BB0_3:
	ret;
}
"""


def sass(*instructions: str, **labels: int) -> Sass:
    return Sass(list(instructions), labels)


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


def test_ptxas_log_of_the_kernel_itself() -> None:
    usage = machine_code.parse_ptxas(PTXAS_LOG)
    assert usage == (128, 24, 20, 16)
    assert usage.registers == 128 and usage.spill_store_bytes == 20 and usage.stack_bytes == 24


def test_a_ptxas_log_without_numbers_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="ptxas stated no registers and spills"):
        machine_code.parse_ptxas(PTXAS_LOG.replace("Used 128 registers", "Used some"))


def test_sass_is_read_without_addresses_and_padding() -> None:
    program = parse_sass(NESTED)
    assert len(program.instructions) == 13
    assert program.instructions[0] == "LDC R1, c[0x0][0x28]"
    assert program.instructions[-1] == "BRA `(.L_x_4)"
    assert program.labels[".L_x_5"] == 4
    # A branch to itself in the middle, and a NOP there, are no padding.
    text = "/*00*/ NOP ;\n.L_0:\n/*10*/ BRA `(.L_0) ;\n/*20*/ EXIT ;\n"
    assert parse_sass(text).instructions == ["NOP", "BRA `(.L_0)", "EXIT"]


def test_loops_are_closed_by_branches_back_to_where_they_were_entered() -> None:
    assert machine_code.loops(parse_sass(NESTED)) == [range(1, 3), range(3, 10), range(4, 8)]


def test_a_loop_ends_at_its_last_branch_back() -> None:
    program = sass("MOV", "@P0 BRA `(a)", "@P1 BRA `(a)", "EXIT", a=0)
    assert machine_code.loops(program) == [range(3)]


def test_a_loop_may_be_left_by_a_call() -> None:
    left = ["LDG", "@P0 CALL.REL.NOINC `(out)", "BRA `(a)", "MOV", "@P1 BRA `(out)", "EXIT"]
    assert machine_code.loops(sass(*left, a=0, out=3)) == [range(3), range(3, 5)]


def test_a_branch_back_that_nothing_leads_to_closes_no_loop() -> None:
    assert machine_code.loops(sass("MOV", "EXIT", "@P0 BRA `(a)", "EXIT", a=2)) == []
    assert machine_code.loops(sass("MOV", "BRA `(end)", "BRA `(a)", "EXIT", a=0, end=3)) == []


@pytest.mark.parametrize(
    ("tile_bits", "found"),
    [
        # Within the innermost loop 128 bits, in the one around it 160; the waiting one loads only
        # what other programs left.
        (128, [range(4, 8)]),
        (32, [range(4, 8)]),
        (160, [range(3, 10)]),
        (161, [range(13)]),
    ],
)
def test_main_loops_load_a_tile_and_hold_none_that_does(tile_bits: int, found: list[range]) -> None:
    program = parse_sass(NESTED)
    expected = [[program.instructions[i] for i in loop] for loop in found]
    assert machine_code.main_loops(program, tile_bits) == expected


def test_ptx_is_read_as_far_as_main_loops_need_it() -> None:
    program = machine_code.parse_ptx(PTX)
    assert [line for line in program.instructions if line != "NOP"] == [
        "@P0 BRA `($L__BB0_3)", "LDG.128", "LDG.16", "BRA `($L__BB0_4)", "@P0 BRA `($L__BB0_2)",
        "@P0 BRA `($L__BB0_1)", "EXIT",
    ]  # fmt: skip
    # The outer loop begins where the inner one does, but for what is not read.
    assert machine_code.loops(program) == [range(1, 9), range(2, 8)]


def test_an_unrolled_loop_does_several_tiles_a_turn() -> None:
    once, fourfold = ["LDG.128", "STG.128"], ["LDG.E.128"] * 4
    assert machine_code.tiles_per_turn([fourfold, once], [once, once]) == [4, 1]
    # What ptxas takes out of the loop, or repeats at its end, does not matter.
    assert machine_code.tiles_per_turn([fourfold], [[*once, "LDG.16"]]) == [4]
    assert machine_code.tiles_per_turn([fourfold, fourfold], [once]) == [1, 1]
    assert machine_code.tiles_per_turn([["EXIT"]], [["EXIT"]]) == [1]


def test_instructions_of_all_passes_are_summed_per_element() -> None:
    passes = [["FADD R0, R0, R1", "LDG.E.128 R0, R1"], ["MUFU.EX2 R0, R0", "FADD R0, R0, R1"]]
    found = machine_code.per_element(passes, [4.0, 8.0])
    assert {k: v for k, v in found.items() if v} == {
        "fp32": 1 / 4 + 1 / 8, "memory": 1 / 4, "mufu": 1 / 8, "total": 2 / 4 + 2 / 8,
    }  # fmt: skip


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


@pytest.mark.parametrize(
    ("instruction", "bits"),
    [
        ("LDG.E R0, desc[UR16][R20.64]", 32),
        ("@P1 LDG.E.128 R4, desc[UR16][R20.64]", 128),
        ("@!PT LDG.E.LTC128B.U16 R4, [R2]", 16),
        ("LDG.E.EL.64.CONSTANT R4, [R2]", 64),
        ("STG.E.ENL2.256 desc[UR16][R20.64], R4", 256),
        ("LDG.E.S8 R4, [R2]", 8),
    ],
)
def test_width_of_an_access(instruction: str, bits: int) -> None:
    assert machine_code.width(instruction) == bits


def test_only_global_accesses_are_counted() -> None:
    lines = ["LDG.E.U16 R0, [R2]", "LDG.E.128 R0, [R2]", "@P0 LDG.E.128 R4, [R2]"]
    lines += ["LDGSTS.E.BYPASS.128 [R0], [R2]", "LDS.64 R0, [R2]", "LDL R0, [R1]"]
    lines += ["STG.E.64 [R2], R0", "STL [R1], R0", "STS [R2], R0", "LDC.64 R0, c[0x0][0x28]"]
    assert list(machine_code.loads(lines).items()) == [(128, 3), (16, 1)]  # the widest first
    assert machine_code.stores(lines) == {64: 1}


@pytest.mark.parametrize(
    ("instruction", "category"),
    [
        ("@P1 LDG.E.128 R4, desc[UR16][R20.64]", "memory"),
        ("SHFL.BFLY PT, R26, R25, 0x10, 0x1f", "shared"),
        ("LDSM.16.M88.4 R8, [R0]", "shared"),
        ("STL [R1], R0", "local"),
        ("MUFU.RCP R28, R27", "mufu"),
        ("@!P6 FMUL R27, R27, 16777216", "fp32"),
        ("FFMA2 R4, R4.F32x2.HI_LO, R6.F32x2.HI_LO, R8.F32x2.HI_LO", "fp32"),
        ("HADD2.F32 R17, -RZ, R4.H0_H0", "convert"),
        ("HADD2 R17, R4, R5", "fp16"),
        ("F2FP.BF16.F32.PACK_AB R4, R5, R4", "convert"),
        ("IMAD.MOV.U32 R0, RZ, RZ, R2", "move"),
        ("IMAD.U32 R0, R4, 0x10000, RZ", "integer/logic"),
        ("UIADD3 UR5, -UR5, URZ, URZ", "integer/logic"),
        ("UMOV UR4, URZ", "move"),
        ("ULDC.64 UR12, c[0x0][0x228]", "move"),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "control/sync"),
        ("BRA.U !UP0, `(.L_x_0)", "control/sync"),
        ("HMMA.16816.F32 R4, R8, R12, R4", "other"),
    ],
)
def test_category_of_an_instruction(instruction: str, category: str) -> None:
    assert machine_code.category(instruction) == category
    counts = machine_code.categories([instruction, "EXIT"])
    assert counts[category] == (2 if category == "control/sync" else 1)
    assert counts["total"] == 2


def test_normalised_sass_holds_instructions_and_where_branches_lead() -> None:
    program = parse_sass(NESTED)
    text = machine_code.normalised(program)
    assert text.splitlines()[:4] == [
        "LDC R1, c[0x0][0x28]",
        "L0:",
        "LDG.E.STRONG.GPU R0, desc[UR4][R2.64]",
        "@!P0 BRA `(L0)",
    ]
    assert "some_kernel" not in text and "/*" not in text and ".L_x" not in text

    renamed = NESTED.replace(".L_x_", ".L_y_1").replace("some_kernel", "kernel")
    renamed = renamed.replace("/*00", "/*1")
    assert machine_code.normalised(parse_sass(renamed)) == text
    elsewhere = NESTED.replace("@!P1 BRA `(.L_x_9)", "@!P1 BRA `(.L_x_3)")
    assert machine_code.normalised(parse_sass(elsewhere)) != text
    assert machine_code.normalised(parse_sass(NESTED.replace("R8, R8", "R8, R9"))) != text


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


def test_what_the_last_program_does_alone_is_not_what_all_execute() -> None:
    """A conditional end behind an atomic; one before it, for lanes past the end, is none."""
    text = ["@P1 EXIT", "LDG.E R1", "ATOMG.E.ADD R2", "@P0 EXIT", "LDG.E R3", "STG.E R3", "EXIT"]
    sass = Sass(text, {})
    assert machine_code.common(sass) == text[:4]
    assert machine_code.main_loops(sass, 1e9) == [text[:4]]
    assert machine_code.common(Sass(["LDG.E R1", "EXIT"], {})) == ["LDG.E R1", "EXIT"]
