"""The loop finder on code that is written here, the compiler on small kernels, and every kernel's promises.

A process that interprets kernels cannot compile them, so whatever compiles runs in a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lowprec_kernels import aot, machine_code
from lowprec_kernels.aot import TARGETS, AotCase, Compiled

# A loop over instruction 1 to 7, whose wait stands behind the end; before it a loop that only loads.
SASS = """
.text.kernel:
.L_x_9:
        /*0000*/                   LDG.E R1, [R2] ;
        /*0010*/              @!P0 BRA `(.L_x_9) ;
.L_x_1:
        /*0020*/                   LDGSTS.E.128 [R3], desc[UR4][R2.64] ;
        /*0030*/                   LDGDEPBAR ;
        /*0040*/              @!P1 BRA `(.L_x_2) ;
.L_x_3:
        /*0050*/                   NOP ;
        /*0060*/               @P2 FADD R1, R1, R1 ;
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0080*/                   BRA.U !UP0, `(.L_x_1) ;
        /*0090*/                   EXIT ;
.L_x_2:
        /*00a0*/                   SYNCS.PHASECHK.TRANS64 P1, [R1] ;
        /*00b0*/              @!P1 BRA `(.L_x_2) ;
        /*00c0*/                   BRA `(.L_x_3) ;
.L_x_4:
        /*00d0*/                   BRA `(.L_x_4);
"""
NESTED = """
.L_x_0:
        /*0000*/                   LDGSTS.E.128 [R3], desc[UR4][R2.64] ;
.L_x_1:
        /*0010*/                   IMMA.16832.S8.S8 R4, R4, R5, R4 ;
        /*0020*/                   IADD3 R0, R0, 0x1, RZ ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0040*/                   IMMA.16832.S8.S8 R4, R4, R5, R4 ;
        /*0050*/              @!P0 BRA `(.L_x_2) ;
        /*0060*/              @!P1 BRA `(.L_x_0) ;
        /*0070*/              @!P1 EXIT ;
        /*0080*/                   EXIT ;
"""
GCN = """
kernel:
\ts_load_dwordx2 s[0:1], s[4:5], 0x0   ; a comment
\ts_cbranch_scc1 .LBB0_3
.LBB0_2:                                ; %loop
\tglobal_load_dwordx4 v[0:3], v4, s[0:1]
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
\ts_nop 4
\ts_cbranch_scc0 .LBB0_2
.LBB0_3:
\ts_endpgm
\t.section .rodata
"""
TTGIR = """
    %0 = scf.for %i = %a to %b step %c {
      %1 = ttg.async_commit_group tokens %t
      %2 = scf.for %j = %a to %b step %c {
        %3 = ttg.async_commit_group tokens %t
        %4 = ttg.async_commit_group tokens %t
        %5 = scf.if %d {
          %6 = ttg.async_commit_group tokens %t
        }
        scf.yield
      }
      scf.yield
    }
    %7 = ttg.async_commit_group tokens %t
"""


def compiled(**changes: Any) -> Compiled:
    """A kernel that keeps its promises, but for the changes."""
    kept: dict[str, Any] = {
        "target": "sm_90",
        "lanes": 32,
        "warps": 4,
        "matrix": (("HGMMA.64x16x16.F32.BF16", 8),),
        "loop": (("HGMMA.64x16x16.F32.BF16", 8), ("LOP3.LUT", 56)),
        "unrolled": 1,
        "registers": 100,
        "stack_bytes": 0,
        "spills": 0,
        "shared_bytes": 1024,
    }
    return Compiled(**(kept | changes))


def case(**changes: Any) -> AotCase:
    """A case that asks for bfloat16 HGMMA and one instruction per weight."""
    asked: dict[str, Any] = {
        "expected": {"sm_90": "HGMMA.*BF16"},
        "weights_per_trip": 64 * 128,
        "limits": {"sm_90": 1.0},
    }
    return AotCase(name="case", kernel=None, signature={}, constants={}, **(asked | changes))


def run(*arguments: str | Path) -> Any:
    """What a process that does not interpret kernels prints as JSON."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def opcodes(loop: tuple[machine_code.Instruction, ...]) -> list[str]:
    return [instruction.opcode for instruction in loop]


def test_waits_behind_the_end_belong_to_the_loop_and_are_none() -> None:
    program = machine_code.parse_sass(SASS)
    assert len(program.instructions) == 14
    assert sorted(map(len, machine_code.loops(program))) == [2, 2, 10]
    assert opcodes(machine_code.main_loop(program)) == [
        "LDGSTS.E.128",
        "LDGDEPBAR",
        "BRA",
        "FADD",
        "HGMMA.64x128x16.F32.BF16",
        "BRA.U",
        "SYNCS.PHASECHK.TRANS64",
        "BRA",
        "BRA",
    ]


def test_the_largest_of_the_innermost_loops() -> None:
    assert opcodes(machine_code.main_loop(machine_code.parse_sass(NESTED))) == ["IMMA.16832.S8.S8", "IADD3", "BRA"]


def test_a_loop_that_loads_where_none_multiplies() -> None:
    program = machine_code.parse_sass(SASS.replace("HGMMA.64x128x16.F32.BF16", "FMUL"))
    assert len(machine_code.main_loop(program)) == 9
    assert machine_code.main_loop(machine_code.parse_sass("/*0000*/ LDG.E R1, [R2] ;\n/*0010*/ EXIT ;")) == ()
    assert machine_code.main_loop(machine_code.parse_sass("")) == ()


def test_loop_of_an_amd_kernel() -> None:
    loop = machine_code.main_loop(machine_code.parse_gcn(GCN))
    assert opcodes(loop) == ["global_load_dwordx4", "v_mfma_f32_32x32x8_bf16", "s_cbranch_scc0"]


def test_groups_of_copies_of_the_innermost_loop() -> None:
    assert machine_code.async_groups(TTGIR) == 3
    assert machine_code.async_groups("") == 0


def test_unrolled_loops_decode_more() -> None:
    group = machine_code.Instruction("LDGDEPBAR")
    assert aot._unrolled([group] * 6, TTGIR) == 2
    assert aot._unrolled([], TTGIR) == 1
    with pytest.raises(ValueError, match="no multiple"):
        aot._unrolled([group] * 4, TTGIR)
    assert compiled().instructions_per_weight(64 * 128) == 1
    assert compiled(unrolled=2).instructions_per_weight(64 * 128) == 0.5


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"target": "sm_80", "matrix": ()}, None),
        ({"matrix": ()}, "no matrix instruction instead of HGMMA"),
        ({"matrix": (("HGMMA.64x16x16.F32.BF16", 8), ("HMMA.16816.F32", 1))}, "HMMA.16816.F32 instead of HGMMA"),
        ({"spills": 3}, "3 spills"),
        ({"warps": 8}, "2.00 instructions per weight, at most 1"),
        ({"loop": ()}, "no main loop"),
    ],
)
def test_promises(changes: dict[str, Any], problem: str | None) -> None:
    found = aot.problems(case(), compiled(**changes))
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]


def test_a_limit_needs_weights() -> None:
    with pytest.raises(ValueError, match="weights_per_trip"):
        aot.problems(case(weights_per_trip=None), compiled())


def test_what_does_not_compile_is_a_row_of_the_table() -> None:
    # This process interprets kernels.
    row = aot.check("module", case(), "sm_90")
    assert "TRITON_INTERPRET" in row["problems"][0]
    assert "does not compile" in aot.table([row])


@pytest.mark.parametrize(("spills", "status"), [(0, 0), (3, 1)])
def test_command(spills: int, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def compile_for(*arguments: Any) -> Compiled:
        print("what ptxas would say")
        return compiled(target=arguments[3], spills=spills)

    monkeypatch.setattr(aot, "cases", lambda: iter([("first", case(targets=("sm_80", "sm_90"))), ("second", case())]))
    monkeypatch.setattr(aot, "compile_for", compile_for)
    assert aot.main(["first: c", "--json"]) == status
    rows = json.loads(capsys.readouterr().out)
    assert [(row["module"], row["target"], row["instructions_per_weight"]) for row in rows] == [
        ("first", "sm_80", 1.0),
        ("first", "sm_90", 1.0),
    ]
    assert aot.main(["--target", "sm_90"]) == status
    printed = capsys.readouterr().out
    assert printed.count("8 HGMMA.64x16x16.F32.BF16") == 2
    assert printed.count("3 spills") == 2 * status


def test_arguments_that_are_forgotten_are_named() -> None:
    """In a process that compiles; this one does not get that far."""
    program = """
from aot_kernels import GEMM, gemm
from lowprec_kernels.aot import compile_for
try:
    compile_for(gemm, GEMM, {"BLOCK_M": 16, "BLOCK_N": 16, "other": 1}, "sm_90")
except ValueError as error:
    print('"', error, '"', sep="")
"""
    assert run("-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})" + program).endswith(
        "BLOCK_K, other"
    )


@pytest.fixture(scope="module")
def small() -> dict[str, Any]:
    """Name -> what became of one of the small kernels."""
    found: dict[str, Any] = run(Path(__file__).parent / "aot_kernels.py")
    return found


@pytest.mark.parametrize(
    ("target", "opcode", "per_trip"),
    [
        ("sm_80", "HMMA.16816.F32.BF16", 32),
        ("sm_89", "HMMA.16816.F32.BF16", 32),
        ("sm_90", "HGMMA.64x128x16.F32.BF16", 2),
        ("sm_100", "UTCHMMA", 2),
        ("gfx942", "v_mfma_f32_32x32x8_bf16", 8),
    ],
)
def test_matrix_instructions(small: dict[str, Any], target: str, opcode: str, per_trip: int) -> None:
    found = small[f"gemm {target}"]
    assert [name for name, _ in found["matrix"]] == [opcode]
    assert dict(found["loop"])[opcode] == per_trip
    assert (found["spills"], found["stack_bytes"], found["unrolled"]) == (0, 0, 1)
    assert (found["lanes"], found["warps"]) == (64 if target == "gfx942" else 32, 8)
    assert found["registers"] > 0
    assert found["shared_bytes"] >= 2 * 128 * 32 * 2 * 2


def test_descriptors_are_copied_by_the_tensor_memory_accelerator(small: dict[str, Any]) -> None:
    assert dict(small["descriptors sm_90"]["loop"])["UTMALDG.2D"] == 2


def test_spills_are_counted(small: dict[str, Any]) -> None:
    assert small["spilling sm_80"]["spills"] > 100
    assert small["spilling sm_80"]["stack_bytes"] > 0


def test_loops_without_matrix_instructions(small: dict[str, Any]) -> None:
    assert dict(small["matvec sm_90"]["loop"])["FFMA"] == 8 * 512 / 128
    assert any(name.startswith("global_load") for name, _ in small["matvec gfx942"]["loop"])
    assert small["copy sm_90"]["loop"] == []


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_keeps_its_promises(target: str) -> None:
    rows = run("-m", "lowprec_kernels.aot", "--json", "--target", target)
    assert rows
    assert not [row for row in rows if row["problems"]], aot.table(rows)
