"""Instructions that a CUDA row kernel executes per pair of logits, counted in its machine code; no GPU needed.

A loop is a branch back. Of the ways through a loop body, the counted one is the shortest that does the loop's work on
whole vectors: it has as many of the loop's marking instructions (the exponentials of a sum, the stores of a transform)
as any way has. So it leaves out what is rare or optional: the raising of a maximum, a bias, a tail, another cost.
"""

from __future__ import annotations

import collections
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CLASSES = {
    "special": ("MUFU",),
    "fp64": ("DADD", "DMUL", "DFMA", "DSETP"),
    "conversion": ("F2F", "F2FP", "I2F", "F2I"),
    "float": ("FADD", "FMUL", "FFMA", "FSEL", "FSETP", "FMNMX", "FADD2", "FMUL2", "FFMA2", "FMNMX3"),
    "memory": ("LDG", "STG", "LDS", "STS", "LDGSTS", "LDC", "ULDC", "LDCU"),
    "control": ("BRA", "BSSY", "BSYNC", "BREAK", "WARPSYNC"),
}
"""Opcodes by class; what is in none of them is integer arithmetic, moves and predicates."""


class Mark(NamedTuple):
    """The instruction that shows the work of a loop."""

    loop: str
    opcode: str
    per_pair: float
    """How many of them a pair of logits, one of the student and one of the teacher, takes."""


LOOPS = {
    "row_stats": (Mark("sums", "MUFU.EX2", 2),),
    "row_grad": (Mark("gradient", "MUFU.EX2", 2),),
    "row_stats_grad": (
        Mark("copy", "LDGSTS.E.BYPASS.128", 0.5), Mark("transform", "STS.128", 0.5), Mark("sums", "MUFU.EX2", 2),
        Mark("gradient", "MUFU.EX2", 2),
    ),
}  # fmt: skip
"""The loops of each kernel, in the order of their code."""


class Count(NamedTuple):
    kernel: str
    loop: str
    per_pair: dict[str, float]
    """Instructions per pair of logits, by class."""

    @property
    def total(self) -> float:
        return sum(self.per_pair.values())


class Instruction(NamedTuple):
    address: int
    text: str

    @property
    def opcode(self) -> str:
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0]


def functions(cubin: Path, cuobjdump: str | Path) -> Iterator[tuple[str, list[Instruction]]]:
    listing = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    for part in re.split(r"Function : ", listing)[1:]:
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;", part, re.MULTILINE)
        yield part.split("\n")[0], [Instruction(int(address, 16), text) for address, text in lines]


_KINDS = {"Li1": " of any cost", "Li2": " of any cost, terms"}
"""What the last parameter of row_grad says."""


def counts(cubin: Path, cuobjdump: str | Path) -> list[Count]:
    """Of the variants that whole vectors without softcap take, in a file of csrc/cuda."""
    found = []
    for name, instructions in functions(cubin, cuobjdump):
        kernel = re.search(r"\d(row_stats_grad|row_stats|row_grad)I(\w*?)EEv", name)
        if kernel is None or kernel[2].startswith(("Li1", "Lb1", "Li4ELb1")):
            continue
        for mark, path in _marked_loops(instructions, LOOPS[kernel[1]]):
            pairs = sum(each.opcode.startswith(mark.opcode) for each in path) / mark.per_pair
            classes = collections.Counter(_class(each) for each in path)
            loop = mark.loop + _KINDS.get(kernel[2].rstrip("E")[-3:] if kernel[1] == "row_grad" else "", "")
            found.append(Count(kernel[1], loop, {name: n / pairs for name, n in classes.items()}))
    return found


def _marked_loops(instructions: list[Instruction], marks: tuple[Mark, ...]) -> Iterator[tuple[Mark, list[Instruction]]]:
    loops = list(_loops(instructions))
    remaining = iter(loops)
    for mark in marks:
        for begin, end in remaining:
            path = _path(instructions, begin, end, mark.opcode)
            if path:
                yield mark, path
                break


def _loops(instructions: list[Instruction]) -> Iterator[tuple[int, int]]:
    """First and last instruction of each innermost loop, by place."""
    back = [
        (target, place)
        for place in range(len(instructions))
        for target in _successors(instructions, place)
        if target <= place and target != place
    ]
    for begin, end in sorted(back):
        if not any(begin <= other[0] and other[1] < end for other in back if other != (begin, end)):
            yield begin, end


def _successors(instructions: list[Instruction], place: int) -> list[int]:
    text = instructions[place].text
    branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
    is_conditional = text.startswith("@") or re.search(r"BRA(\.\w+)? !?U?P\d", text) is not None
    following = [place + 1] if place + 1 < len(instructions) else []
    if branch:
        target = int(branch[1], 16) // 16  # 16 bytes an instruction
        return [target, *(following if is_conditional else [])] if target < len(instructions) else following
    if re.search(r"\b(EXIT|RET)\b", text):
        return following if is_conditional else []
    return following


def _path(instructions: list[Instruction], begin: int, end: int, opcode: str) -> list[Instruction]:
    """The shortest way from `begin` to `end` with the most marking instructions, a multiple of 8 where there are 8."""
    is_mark = [each.opcode.startswith(opcode) for each in instructions]
    best: list[dict[int, tuple[int, int]]] = [{} for _ in instructions]  # marks so far -> (length, place before)
    best[begin][int(is_mark[begin])] = (1, -1)
    for place in range(begin, end):
        for marks, (length, _) in list(best[place].items()):
            for target in _successors(instructions, place):
                if place < target <= end:
                    key, new = marks + is_mark[target], (length + 1, place)
                    if key not in best[target] or new < best[target][key]:
                        best[target][key] = new
    reached = [marks for marks in best[end] if marks > 0]
    if not reached:
        return []
    marks = max([each for each in reached if each % 8 == 0] or reached)
    path, place = [], end
    while place >= 0:
        path.append(instructions[place])
        previous = best[place][marks][1]
        marks -= is_mark[place]
        place = previous
    return path[::-1]


def _class(instruction: Instruction) -> str:
    name = instruction.opcode.split(".")[0]
    return next((label for label, names in CLASSES.items() if name in names), "integer")
