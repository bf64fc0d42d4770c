"""What is read from a compiler's text, on snippets."""

import pytest

from resblock_bench.bench.compiled import sass
from resblock_bench.bench.compiled.sass import Sass, parse_sass

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


def written(*instructions: str, **labels: int) -> Sass:
    return Sass(list(instructions), labels)


def test_ptxas_log_of_the_kernel_itself() -> None:
    usage = sass.parse_ptxas(PTXAS_LOG)
    assert usage == (128, 24, 20, 16)
    assert usage.registers == 128 and usage.spill_store_bytes == 20 and usage.stack_bytes == 24


def test_a_ptxas_log_without_numbers_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="ptxas stated no registers and spills"):
        sass.parse_ptxas(PTXAS_LOG.replace("Used 128 registers", "Used some"))


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
    assert sass.loops(parse_sass(NESTED)) == [range(1, 3), range(3, 10), range(4, 8)]


def test_a_loop_ends_at_its_last_branch_back() -> None:
    program = written("MOV", "@P0 BRA `(a)", "@P1 BRA `(a)", "EXIT", a=0)
    assert sass.loops(program) == [range(3)]


def test_a_loop_may_be_left_by_a_call() -> None:
    left = ["LDG", "@P0 CALL.REL.NOINC `(out)", "BRA `(a)", "MOV", "@P1 BRA `(out)", "EXIT"]
    assert sass.loops(written(*left, a=0, out=3)) == [range(3), range(3, 5)]


def test_a_branch_back_that_nothing_leads_to_closes_no_loop() -> None:
    assert sass.loops(written("MOV", "EXIT", "@P0 BRA `(a)", "EXIT", a=2)) == []
    assert sass.loops(written("MOV", "BRA `(end)", "BRA `(a)", "EXIT", a=0, end=3)) == []


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
    assert sass.main_loops(program, tile_bits) == expected


def test_ptx_is_read_as_far_as_main_loops_need_it() -> None:
    program = sass.parse_ptx(PTX)
    assert [line for line in program.instructions if line != "NOP"] == [
        "@P0 BRA `($L__BB0_3)", "LDG.128", "LDG.16", "BRA `($L__BB0_4)", "@P0 BRA `($L__BB0_2)",
        "@P0 BRA `($L__BB0_1)", "EXIT",
    ]  # fmt: skip
    # The outer loop begins where the inner one does, but for what is not read.
    assert sass.loops(program) == [range(1, 9), range(2, 8)]


def test_an_unrolled_loop_does_several_tiles_a_turn() -> None:
    once, fourfold = ["LDG.128", "STG.128"], ["LDG.E.128"] * 4
    assert sass.tiles_per_turn([fourfold, once], [once, once]) == [4, 1]
    # What ptxas takes out of the loop, or repeats at its end, does not matter.
    assert sass.tiles_per_turn([fourfold], [[*once, "LDG.16"]]) == [4]
    assert sass.tiles_per_turn([fourfold, fourfold], [once]) == [1, 1]
    assert sass.tiles_per_turn([["EXIT"]], [["EXIT"]]) == [1]


def test_instructions_of_all_passes_are_summed_per_element() -> None:
    passes = [["FADD R0, R0, R1", "LDG.E.128 R0, R1"], ["MUFU.EX2 R0, R0", "FADD R0, R0, R1"]]
    found = sass.per_element(passes, [4.0, 8.0])
    assert {k: v for k, v in found.items() if v} == {
        "fp32": 1 / 4 + 1 / 8, "memory": 1 / 4, "mufu": 1 / 8, "total": 2 / 4 + 2 / 8,
    }  # fmt: skip


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
    assert sass.width(instruction) == bits


def test_only_global_accesses_are_counted() -> None:
    lines = ["LDG.E.U16 R0, [R2]", "LDG.E.128 R0, [R2]", "@P0 LDG.E.128 R4, [R2]"]
    lines += ["LDGSTS.E.BYPASS.128 [R0], [R2]", "LDS.64 R0, [R2]", "LDL R0, [R1]"]
    lines += ["STG.E.64 [R2], R0", "STL [R1], R0", "STS [R2], R0", "LDC.64 R0, c[0x0][0x28]"]
    assert list(sass.loads(lines).items()) == [(128, 3), (16, 1)]  # the widest first
    assert sass.stores(lines) == {64: 1}


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
    assert sass.category(instruction) == category
    counts = sass.categories([instruction, "EXIT"])
    assert counts[category] == (2 if category == "control/sync" else 1)
    assert counts["total"] == 2


def test_normalised_sass_holds_instructions_and_where_branches_lead() -> None:
    program = parse_sass(NESTED)
    text = sass.normalised(program)
    assert text.splitlines()[:4] == [
        "LDC R1, c[0x0][0x28]",
        "L0:",
        "LDG.E.STRONG.GPU R0, desc[UR4][R2.64]",
        "@!P0 BRA `(L0)",
    ]
    assert "some_kernel" not in text and "/*" not in text and ".L_x" not in text

    renamed = NESTED.replace(".L_x_", ".L_y_1").replace("some_kernel", "kernel")
    renamed = renamed.replace("/*00", "/*1")
    assert sass.normalised(parse_sass(renamed)) == text
    elsewhere = NESTED.replace("@!P1 BRA `(.L_x_9)", "@!P1 BRA `(.L_x_3)")
    assert sass.normalised(parse_sass(elsewhere)) != text
    assert sass.normalised(parse_sass(NESTED.replace("R8, R8", "R8, R9"))) != text


def test_what_the_last_program_does_alone_is_not_what_all_execute() -> None:
    """A conditional end behind an atomic; one before it, for lanes past the end, is none."""
    text = ["@P1 EXIT", "LDG.E R1", "ATOMG.E.ADD R2", "@P0 EXIT", "LDG.E R3", "STG.E R3", "EXIT"]
    program = written(*text)
    assert sass.common(program) == text[:4]
    assert sass.main_loops(program, 1e9) == [text[:4]]
    assert sass.common(written("LDG.E R1", "EXIT")) == ["LDG.E R1", "EXIT"]
