"""Read the machine code that `cuobjdump -sass` prints of a kernel: instructions, their stalls, and loops.

An instruction has 128 bits. Bits 41 to 44 of the upper half are its stall: the cycles until the same warp may issue
its next instruction, by the compiler's own knowledge of fixed latencies. Waiting for memory is not in them.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

# One instruction: address, an optional predicate, opcode, operands, and on the next line the upper half.
_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);[^\n]*\n\s*/\* 0x([0-9a-f]{16}) \*/",
    re.MULTILINE,
)
_ACCESS = ("LDG", "STG", "LDGSTS", "RED", "ATOMG")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
# HMMA up to 89 and on 120, HGMMA on 90, UTCHMMA on 100.
MATRIX_UNIT = re.compile(r"[HU]\w*MMA")
_PRODUCT = re.compile(r"HG?MMA\.(?:(\d+)x(\d+)x(\d+)|(1688|16816))\.")
# A loop with one of these waits for other threads or for memory.
_WAITS = re.compile(r"SYNCS\.\S*TRYWAIT|ATOM\w*\.(?:\S+\.)?CAS|NANOSLEEP")
_DOUBLE = re.compile(r"D(?:ADD|FMA|MNMX|MUL|SETP)\b")


class CodeError(ValueError):
    """Machine code that this module, or `work` of a configuration, does not describe."""


@dataclass(frozen=True)
class Instruction:
    """One line of the machine code; `stall` is in cycles, at least 1."""

    address: int
    predicate: str
    opcode: str
    operands: str
    stall: int

    @property
    def access(self) -> int:
        """Bytes of global memory that a thread reads or writes."""
        kind, *rest = self.opcode.split(".")
        return next((_WIDTHS[part] for part in rest if part in _WIDTHS), 4) if kind in _ACCESS else 0

    @property
    def products(self) -> int:
        """Operations of the matrix units, a warp; an addition and a multiplication count as two."""
        if not MATRIX_UNIT.match(self.opcode):
            return 0
        shape = _PRODUCT.match(self.opcode)
        if shape is None:
            raise CodeError(f"{self.opcode}: the size of this product is unknown; add it to sass.py")
        if shape[4]:
            return 2 * 16 * 8 * (8 if shape[4] == "1688" else 16)
        # Four warps work on one.
        return 2 * int(shape[1]) * int(shape[2]) * int(shape[3]) // 4

    @property
    def double(self) -> str:
        """The kind of float64 work: "arithmetic", "conversion", or "" for none."""
        if _DOUBLE.match(self.opcode):
            return "arithmetic"
        return "conversion" if "F64" in self.opcode.split(".")[1:] else ""


@dataclass(frozen=True)
class Loop:
    """The address of a loop's first instruction, and the addresses of all its instructions, of inner loops, too."""

    address: int
    body: frozenset[int]
    waits: bool


@dataclass(frozen=True)
class Code:
    """The instructions that a warp may run, by address, and their loops in the order of the code.

    blocks: the basic blocks, and for each the addresses of those that may follow it, by their first addresses.
    """

    instructions: dict[int, Instruction]
    loops: tuple[Loop, ...]
    blocks: dict[int, tuple[frozenset[int], frozenset[int]]]

    def around(self, address: int) -> list[Loop]:
        """Return the loops that an instruction is in, the outermost first."""
        return sorted((loop for loop in self.loops if address in loop.body), key=lambda loop: -len(loop.body))

    def skippable(self, entered: Collection[int]) -> set[int]:
        """Return the addresses that one pass of the code or of the innermost loop around them may leave out.

        entered: addresses of loops that run in each pass of the code around them. What leads to such a loop, and from
        it, is not left out. A loop that waits is, together with all that is in it, where a branch leads around it.
        """
        skipped: set[int] = set()
        everything = Loop(min(self.blocks), frozenset(self.instructions), False)
        for region in (everything, *self.loops):
            within = {start: after for start, (_, after) in self.blocks.items() if start in region.body}
            # Where a pass ends: the branches back to its beginning, or the ends of the code.
            ends = {start for start, after in within.items() if region.address in after}
            if region is everything:
                ends = {start for start in within if self._last(start).opcode == "EXIT"}
            forward = {start: after & within.keys() - {region.address} for start, after in within.items()}
            passed = {loop.address for loop in self.loops if loop.address in entered} & within.keys()
            passed -= {region.address}
            for start in within:
                if _always(start, region.address, passed, ends, forward):
                    continue
                innermost = (everything, *self.around(start))[-1]
                if innermost == region:
                    skipped |= self.blocks[start][0]
                elif innermost.waits and innermost.address == start:
                    skipped |= innermost.body
        return skipped

    def _last(self, start: int) -> Instruction:
        """Return the last instruction of a block."""
        return self.instructions[max(self.blocks[start][0])]


def instructions_of(text: str) -> list[Instruction]:
    """Return all instructions of a disassembly, also the NOP that fill up its end."""
    return [
        Instruction(int(address, 16), predicate, opcode, operands.strip(), max(1, int(upper, 16) >> 41 & 15))
        for address, predicate, opcode, operands, upper in _LINE.findall(text)
    ]


def code_of(text: str) -> Code:
    """Return the code of a disassembly of one kernel.

    Left out is code from which the end of the kernel is not reached: the subroutines for the special arguments of a
    root or a quotient together with their calls, and the endless loop behind the end.
    """
    instructions = instructions_of(text)
    blocks, successors = _blocks(instructions)
    ends = {i for i, block in enumerate(blocks) if block[-1].opcode == "EXIT"}
    used = _reached({0}, successors) & _reached(ends, _reversed(successors))
    if 0 not in used:
        raise CodeError("the end of this code is not reached from its beginning")
    successors = [
        [j for j in following if j in used] if i in used else [] for i, following in enumerate(successors)
    ]
    loops = []
    for header, members in sorted(_natural_loops(used, successors).items()):
        body = [instruction for i in members for instruction in blocks[i]]
        waits = any(_WAITS.match(instruction.opcode) for instruction in body)
        addresses = frozenset(instruction.address for instruction in body)
        loops.append(Loop(blocks[header][0].address, addresses, waits))
    executed = {instruction.address: instruction for i in sorted(used) for instruction in blocks[i]}
    starts = [block[0].address for block in blocks]
    graph = {
        starts[i]: (frozenset(n.address for n in blocks[i]), frozenset(starts[j] for j in successors[i]))
        for i in sorted(used)
    }
    return Code(executed, tuple(loops), graph)


def _always(
    block: int, start: int, passed: set[int], ends: set[int], forward: dict[int, frozenset[int]]
) -> bool:
    """Return True if each way from `start` by way of all blocks `passed` to one of `ends` has this block."""

    def reached(begin: int) -> set[int]:
        seen, waiting = {begin} - {block}, [begin]
        while waiting:
            new = forward[waiting.pop()] - seen - {block}
            seen |= new
            waiting += new
        return seen

    if block == start or block in passed:
        return True
    first = reached(start)
    return not passed <= first or not all(reached(begin) & ends for begin in (start, *passed))


def _target(instruction: Instruction) -> int | None:
    """Return the address that a branch or a call goes to, None for another instruction."""
    kind = instruction.opcode.split(".")[0]
    if kind in ("BRX", "BRXU", "JMX", "JMXU"):
        raise CodeError(f"{instruction.opcode}: targets of computed branches are unknown")
    # BRA.DIV leaves for a repair of warps that have diverged.
    if kind not in ("BRA", "CALL", "JMP") or instruction.opcode == "BRA.DIV":
        return None
    target = re.search(r"0x([0-9a-f]+)$", instruction.operands)
    if target is None:
        raise CodeError(f"{instruction.opcode} {instruction.operands}: no target")
    return int(target[1], 16)


def _blocks(instructions: list[Instruction]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Return the basic blocks, and the blocks that may follow each of them."""
    targets = [_target(instruction) for instruction in instructions]
    leaders = {instructions[0].address, *(target for target in targets if target is not None)}
    blocks: list[list[Instruction]] = []
    for before, instruction in zip([None, *instructions], instructions):
        if before is None or instruction.address in leaders or _ends_block(before):
            blocks.append([])
        blocks[-1].append(instruction)
    number = {block[0].address: i for i, block in enumerate(blocks)}
    successors = []
    for i, block in enumerate(blocks):
        last, target = block[-1], _target(block[-1])
        following = [] if target is None else [number[target]]
        # The condition of a branch may be its first operand, too.
        conditional = last.predicate or re.match(r"!?U?P\d", last.operands)
        if (not _ends_block(last) or conditional or last.opcode == "BRA.DIV") and i + 1 < len(blocks):
            following.append(i + 1)
        successors.append(following)
    return blocks, successors


def _ends_block(instruction: Instruction) -> bool:
    return instruction.opcode.split(".")[0] in ("BRA", "CALL", "JMP", "EXIT", "RET")


def _reached(starts: set[int], successors: list[list[int]]) -> set[int]:
    """Return the blocks that are reached from `starts`."""
    seen, waiting = set(starts), list(starts)
    while waiting:
        new = set(successors[waiting.pop()]) - seen
        seen |= new
        waiting += new
    return seen


def _reversed(successors: list[list[int]]) -> list[list[int]]:
    before: list[list[int]] = [[] for _ in successors]
    for i, following in enumerate(successors):
        for j in following:
            before[j].append(i)
    return before


def _natural_loops(used: set[int], successors: list[list[int]]) -> dict[int, set[int]]:
    """Return the blocks of each loop by its header: where a branch goes that is only reached by way of its target."""
    before = _reversed(successors)
    passed = {i: set(used) for i in used}
    passed[0] = {0}
    changed = True
    while changed:
        changed = False
        for i in sorted(used - {0}):
            new = {i}.union(set.intersection(*(passed[j] for j in before[i])))
            changed = changed or new != passed[i]
            passed[i] = new
    loops: dict[int, set[int]] = {}
    for i in used:
        for header in passed[i].intersection(successors[i]):
            # All that leads to the branch without passing the header again.
            inside = _reached({i}, [[] if j == header else b for j, b in enumerate(before)])
            loops.setdefault(header, set()).update(inside | {header})
    return loops
