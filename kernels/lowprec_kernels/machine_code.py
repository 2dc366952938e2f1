"""Reads disassembled kernels: their instructions, their loops, and which of the loops does the work.

The text is what `nvdisasm -c` prints of a cubin (SASS), or what Triton keeps of an AMD kernel (GCN). Loops are the
natural loops of the control flow: an edge to a block that lies on every path to where the edge starts, with all that
reaches the edge. Looking for jumps backwards would not do: waits for a barrier stand behind the end of the kernel, and
the jump back from there closes no loop.

The main loop is the largest of the innermost loops that multiply matrices or, where none does, that load from global
memory. Of a kernel specialised by warps it is the loop of those that multiply.
"""

import collections
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

MATRIX = re.compile(r"(?:H|Q|I|O|D)G?MMA\b|UTC\w*MMA\b|v_s?mfma|v_smfmac|v_dot|v_wmma")
LOADS = re.compile(r"LDG(?!DEP)|UTMALDG|UBLKCP|global_load|buffer_load")
SPILLS = re.compile(r"(?:LDL|STL)\b")
IDLE = re.compile(r"NOP\b|s_nop\b")
ENDS = re.compile(r"EXIT\b|RET\b|BRX|s_endpgm|s_setpc")
SASS_LABEL = re.compile(r"(\.L\w+):")
SASS = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
SASS_TARGET = re.compile(r"(.*)`\((\.L\w+)\)")
GCN_LABEL = re.compile(r"(\.LBB\w+):")
GCN = re.compile(r"\s+([a-z]\w+)\s*([^;]*)")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: with its modifiers.
        jump: the label that it jumps to, or None.
        passes: whether the next instruction may follow.
    """

    opcode: str
    jump: str | None = None
    passes: bool = True


@dataclass(frozen=True, slots=True)
class Program:
    """A kernel: its instructions, and the index that each label stands before."""

    instructions: tuple[Instruction, ...]
    labels: Mapping[str, int]


def parse_sass(text: str) -> Program:
    """What `nvdisasm -c` printed of a cubin with one kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := SASS_LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := SASS.match(line):
            predicate, opcode, operands = found.groups()
            target = SASS_TARGET.match(operands) if opcode.split(".")[0] == "BRA" else None
            # A predicate stands before the opcode or, a uniform one, before the label.
            conditional = bool(predicate) or bool(target and target[1].strip())
            ends = target or ENDS.match(opcode)
            instructions.append(Instruction(opcode, target[2] if target else None, conditional or not ends))
    return Program(tuple(instructions), labels)


def parse_gcn(text: str) -> Program:
    """The assembly that Triton keeps of an AMD kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := GCN_LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := GCN.match(line):
            opcode, operands = found.groups()
            jump = operands.strip() if opcode.startswith(("s_branch", "s_cbranch")) else None
            instructions.append(Instruction(opcode, jump, not (opcode == "s_branch" or ENDS.match(opcode))))
    return Program(tuple(instructions), labels)


def count(instructions: Iterable[Instruction], pattern: re.Pattern[str]) -> dict[str, int]:
    """Opcode -> how often, of those that match from their beginning; the most frequent first."""
    return dict(collections.Counter(i.opcode for i in instructions if pattern.match(i.opcode)).most_common())


def main_loop(program: Program) -> tuple[Instruction, ...]:
    """The instructions of the loop that does the work, without those that do nothing; empty if there is none."""
    bodies = [tuple(program.instructions[i] for i in sorted(body)) for body in _innermost(program)]
    return max((tuple(i for i in body if not IDLE.match(i.opcode)) for body in bodies), key=len, default=())


def _innermost(program: Program) -> list[frozenset[int]]:
    bodies = loops(program)
    for pattern in (MATRIX, LOADS):
        working = [b for b in bodies if any(pattern.match(program.instructions[i].opcode) for i in b)]
        if working:
            return [b for b in working if not any(other < b for other in working)]
    return []


def loops(program: Program) -> list[frozenset[int]]:
    """Every natural loop as indices of instructions; those that share a head are one."""
    if not program.instructions:
        return []
    blocks, following = _blocks(program)
    reached = _reach(following, 0)
    preceding: dict[int, list[int]] = collections.defaultdict(list)
    for block in reached:
        for after in following[block]:
            preceding[after].append(block)
    bodies: dict[int, set[int]] = {}
    for head in [block for block in reached if block in preceding]:
        avoiding = _reach(following, 0, without=head)
        for tail in preceding[head]:
            if tail not in avoiding:
                bodies.setdefault(head, {head}).update(_reach(preceding, tail, without=head))
    return [frozenset(i for block in body for i in blocks[block]) for body in bodies.values()]


def _blocks(program: Program) -> tuple[dict[int, range], dict[int, list[int]]]:
    """First instruction -> the instructions of a basic block, and -> the blocks that may follow it."""
    end = len(program.instructions)
    jumps = [(i, program.labels[x.jump]) for i, x in enumerate(program.instructions) if x.jump is not None]
    stops = [i + 1 for i, x in enumerate(program.instructions) if x.jump is not None or not x.passes]
    starts = sorted({0, *(target for _, target in jumps), *stops} - {end})
    blocks = {start: range(start, stop) for start, stop in zip(starts, [*starts[1:], end], strict=True)}
    following: dict[int, list[int]] = {}
    for start, block in blocks.items():
        last = program.instructions[block[-1]]
        after = [program.labels[last.jump]] if last.jump is not None else []
        following[start] = [b for b in ([*after, block.stop] if last.passes else after) if b in blocks]
    return blocks, following


def _reach(edges: Mapping[int, Iterable[int]], start: int, without: int | None = None) -> set[int]:
    """What can be reached from `start` (and itself) on paths that avoid `without`."""
    seen: set[int] = set()
    waiting = [start]
    while waiting:
        node = waiting.pop()
        if node not in seen and node != without:
            seen.add(node)
            waiting.extend(edges.get(node, ()))
    return seen


def async_groups(ttgir: str) -> int:
    """Groups of asynchronous copies that the longest innermost loop of Triton's own code starts in a trip."""
    bodies: list[list[str]] = []
    open_loops: list[tuple[int, list[str]]] = []
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        for _, body in open_loops:
            body.append(line)
        if "scf.for" in line and line.rstrip().endswith("{"):
            open_loops.append((indent, []))
        elif line.lstrip().startswith("}") and open_loops and indent == open_loops[-1][0]:
            bodies.append(open_loops.pop()[1])
    innermost = [b for b in bodies if not any("scf.for" in line for line in b)]
    return sum("async_commit_group" in line for line in max(innermost, key=len, default=[]))
