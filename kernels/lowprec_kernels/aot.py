"""Compiles kernels for GPUs that are not there, and reads from the machine code what a timing would only hint at.

A case (`AotCase`) is a kernel with the types and constants of one launch, and with what its module promises of it:
which matrix instruction it uses, and how many instructions it spends on a weight. `python -m lowprec_kernels.aot`
compiles the tuples `AOT` of all modules, and fails where a kernel uses another matrix instruction, spills registers, or
spends more.

    instructions per weight = instructions of the main loop x lanes of a warp x warps / weights that one trip decodes

is what limits a kernel that unpacks weights: an SM of an H100 issues 4 x 32 lanes a cycle. Every instruction counts
once, predicated or not (`machine_code.py` says which loop is the main one). Where LLVM unrolled the loop, a trip
decodes a multiple; the groups of asynchronous copies tell, of which Triton's own loop has a known number. A loop
without them counts as not unrolled, which overstates what a weight costs.

Left out: what only a run can tell (occupancy, bank conflicts, waits). triton's wheel carries ptxas, nvdisasm and
cuobjdump, so neither CUDA nor a GPU is needed. A process in which Triton interprets its kernels cannot compile them.
"""

import argparse
import contextlib
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lowprec_kernels
from lowprec_kernels import machine_code

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
ALIGNMENT = 16
ASYNC_GROUP = re.compile("LDGDEPBAR")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AotCase:
    """One launch of a kernel, and what its module promises of it.

    Attributes:
        name: unique within the module.
        kernel: the function that `triton.jit` made.
        signature: argument -> Triton's type ("*bf16", "i32", "fp32", "tensordesc<bf16[128, 64]>"), constants aside.
        constants: argument -> value; None for a pointer that is not there.
        divisible: arguments that are multiples of 16 at launch, pointers included.
        warps, stages: as in `tuning.Config`.
        expected: target -> pattern of the matrix instructions; at least one must be there, and all must match.
        weights_per_trip: weights that the block decodes in one trip of the main loop as it is written.
        limits: target -> instructions per weight, at most.
        targets: what it is compiled for.
        options: more options of the compiler (`maxnreg`, ...).
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: tuple[str, ...] = ()
    warps: int = 4
    stages: int = 3
    expected: Mapping[str, str] = field(default_factory=dict)
    weights_per_trip: int | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    targets: tuple[str, ...] = TARGETS
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What became of a kernel.

    Attributes:
        target: for which GPU.
        lanes, warps: lanes of a warp, warps of a block.
        matrix: (opcode, how often) of the matrix instructions of the whole kernel, the most frequent first.
        loop: (opcode, how often) of the main loop; empty where there is no loop.
        unrolled: trips of the loop as it is written that one trip makes.
        registers: of a lane.
        stack_bytes: local memory of a lane.
        spills: loads and stores of local memory (NVIDIA), or registers that were spilled (AMD).
        shared_bytes: of a block.
    """

    target: str
    lanes: int
    warps: int
    matrix: tuple[tuple[str, int], ...]
    loop: tuple[tuple[str, int], ...]
    unrolled: int
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int

    @property
    def loop_instructions(self) -> int:
        """Instructions of the main loop, those that do nothing aside."""
        return sum(n for _, n in self.loop)

    def instructions_per_weight(self, weights_per_trip: int) -> float:
        """Instructions that the lanes of a block spend on one weight.

        Raises:
            ValueError: there is no loop.
        """
        if not self.loop:
            raise ValueError(f"{self.target}: no loop multiplies matrices or loads")
        return self.loop_instructions * self.lanes * self.warps / (weights_per_trip * self.unrolled)


def compile_for(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    target: str,
    divisible: Sequence[str] = (),
    num_warps: int = 4,
    num_stages: int = 3,
    **options: Any,
) -> Compiled:
    """Compiles a kernel and reads its machine code; the arguments are those of `AotCase`.

    Raises:
        ValueError: an argument has neither a type nor a value, or is not one of the kernel's.
        RuntimeError: this process interprets kernels.
    """
    # Not above: this package, which imports its every module, must import without triton.
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET to compile them")
    names = list(kernel.arg_names)
    if wrong := {*signature, *constants} ^ set(names):
        raise ValueError(f"{kernel.__name__}: give each argument a type or a value, once: {', '.join(sorted(wrong))}")
    if unknown := set(divisible) - set(signature):
        raise ValueError(f"{kernel.__name__}: no arguments that could be divisible: {', '.join(sorted(unknown))}")
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else signature[name] for name in names},
        constexprs=dict(constants),
        attrs={(names.index(name),): [["tt.divisibility", ALIGNMENT]] for name in divisible},
    )
    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target.removeprefix("sm_")), 32) if nvidia else GPUTarget("hip", target, 64)
    # What a launch does that says nothing of it; triton 3.9 warns of a change to come where nothing is said.
    options = {"enable_fp_fusion": True, **options, "num_warps": num_warps, "num_stages": num_stages}
    built = triton.compile(source, target=gpu, options=options)
    return _read_nvidia(built, target) if nvidia else _read_amd(built, target)


def _read_nvidia(built: Any, target: str) -> Compiled:
    import triton

    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        program = machine_code.parse_sass(_output(triton.knobs.nvidia.nvdisasm.path, "-c", cubin))
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin)
    spills = machine_code.count(program.instructions, machine_code.SPILLS)
    return _compiled(
        built,
        target,
        program,
        registers=_number(usage, r"REG:(\d+)"),
        stack_bytes=_number(usage, r"STACK:(\d+)"),
        spills=sum(spills.values()),
    )


def _read_amd(built: Any, target: str) -> Compiled:
    text = built.asm["amdgcn"]
    return _compiled(
        built,
        target,
        machine_code.parse_gcn(text),
        registers=_number(text, r"\.vgpr_count: *(\d+)"),
        stack_bytes=_number(text, r"\.private_segment_fixed_size: *(\d+)"),
        spills=_number(text, r"\.vgpr_spill_count: *(\d+)"),
    )


def _compiled(built: Any, target: str, program: machine_code.Program, **resources: int) -> Compiled:
    loop = machine_code.main_loop(program)
    return Compiled(
        target=target,
        lanes=built.metadata.target.warp_size,
        warps=built.metadata.num_warps,
        matrix=tuple(machine_code.count(program.instructions, machine_code.MATRIX).items()),
        loop=tuple(machine_code.count(loop, re.compile("")).items()),
        unrolled=_unrolled(loop, built.asm["ttgir"]),
        shared_bytes=built.metadata.shared,
        **resources,
    )


def _unrolled(loop: Sequence[machine_code.Instruction], ttgir: str) -> int:
    """How many trips of Triton's loop one trip of the main loop makes."""
    issued = sum(machine_code.count(loop, ASYNC_GROUP).values())
    written = machine_code.async_groups(ttgir)
    if not issued or not written:
        return 1
    if issued % written:
        raise ValueError(f"the main loop starts {issued} groups of copies, Triton's {written}: no multiple")
    return issued // written


def _output(tool: str, *arguments: str | Path) -> str:
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def _number(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    if not found:
        raise ValueError(f"no {pattern} in what the compiler says of the kernel")
    return int(found[1])


def problems(case: AotCase, compiled: Compiled) -> list[str]:
    """What the kernel does not keep of the promises; empty if it keeps all."""
    found = []
    expected = case.expected.get(compiled.target)
    opcodes = [opcode for opcode, _ in compiled.matrix]
    wrong = [opcode for opcode in opcodes if expected and not re.match(expected, opcode)]
    if expected and (wrong or not opcodes):
        found.append(f"{', '.join(wrong) or 'no matrix instruction'} instead of {expected}")
    if compiled.spills:
        found.append(f"{compiled.spills} spills")
    limit = case.limits.get(compiled.target)
    if limit is None:
        return found
    if case.weights_per_trip is None:
        raise ValueError(f"{case.name}: a limit needs weights_per_trip")
    if not compiled.loop:
        found.append("no main loop")
    elif (spent := compiled.instructions_per_weight(case.weights_per_trip)) > limit:
        found.append(f"{spent:.2f} instructions per weight, at most {limit:g}")
    return found


def cases() -> Iterator[tuple[str, AotCase]]:
    """Module and case, of every module of this package."""
    for module in sorted(m.name for m in pkgutil.iter_modules(lowprec_kernels.__path__)):
        found = getattr(importlib.import_module(f"lowprec_kernels.{module}"), "AOT", ())
        names = [case.name for case in found]
        if len(set(names)) < len(names):
            raise ValueError(f"lowprec_kernels.{module}: two cases have one name among {', '.join(names)}")
        yield from ((module, case) for case in found)


def check(module: str, case: AotCase, target: str) -> dict[str, Any]:
    """Compiles one case for one target -> a row of the table; that it does not compile is one of its problems."""
    row: dict[str, Any] = {"module": module, "case": case.name, "target": target}
    try:
        # Where ptxas fails, Triton prints the code, which must not get into the table.
        with contextlib.redirect_stdout(sys.stderr):
            compiled = compile_for(
                case.kernel,
                case.signature,
                case.constants,
                target,
                case.divisible,
                case.warps,
                case.stages,
                **case.options,
            )
    # A compiler has no common type of failure, and the other cases are to be seen as well.
    except Exception as error:
        return row | {"problems": ["does not compile: " + " <- ".join(_causes(error))]}
    spent = None
    if case.weights_per_trip is not None and compiled.loop:
        spent = compiled.instructions_per_weight(case.weights_per_trip)
    found = problems(case, compiled)
    return row | asdict(compiled) | {"instructions_per_weight": spent, "problems": found}


def _causes(error: BaseException | None) -> Iterator[str]:
    # Triton quotes the line that calls; why it fails is in the last.
    while error is not None:
        yield f"{type(error).__name__}: {error}"
        error = error.__cause__


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of `check` as text."""
    heads = ("target", "regs", "stack", "spills", "shared", "loop", "/weight")
    lines = [f"{'case':52}" + "".join(f"{head:>8}" for head in heads) + "  matrix"]
    for row in rows:
        spent = row.get("instructions_per_weight")
        columns = (
            row["target"],
            *(row.get(name, "") for name in ("registers", "stack_bytes", "spills", "shared_bytes")),
            sum(n for _, n in row.get("loop", ())),
            "" if spent is None else f"{spent:.2f}",
        )
        matrix = ", ".join(f"{n} {opcode}" for opcode, n in row.get("matrix", ()))
        lines.append(f"{row['module']}: {row['case']}".ljust(52) + "".join(f"{c:>8}" for c in columns) + f"  {matrix}")
        lines += [f"    {problem}" for problem in row["problems"]]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles the cases whose "module: name" matches; 1 if a promise is not kept."""
    parser = argparse.ArgumentParser(prog="python -m lowprec_kernels.aot", description=main.__doc__)
    parser.add_argument("pattern", nargs="?", default="", help='regular expression, searched in "module: case"')
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be given more than once; default: all")
    parser.add_argument("--json", action="store_true", help="a list of records instead of a table")
    options = parser.parse_args(arguments)
    rows = [
        check(module, case, target)
        for module, case in cases()
        if re.search(options.pattern, f"{module}: {case.name}")
        for target in options.target or TARGETS
        if target in case.targets
    ]
    print(json.dumps(rows) if options.json else table(rows))
    return int(any(row["problems"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
