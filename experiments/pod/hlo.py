"""The text of a compiled HLO module: its computations and instructions, and how often loops run."""

import math
import re
from typing import NamedTuple

_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_NAME = r"%[^,}\s]+"


class Instruction(NamedTuple):
    """One line of HLO."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str  # what stands in and behind the operands' parentheses
    root: bool

    def attribute(self, name: str) -> str:
        """The computation that an attribute names."""
        return re.search(rf"\b{name}=({_NAME})", self.text)[1]

    def called(self) -> list[str]:
        """The computations of a fusion, a call or a conditional."""
        if branches := re.search(r"branch_computations=\{([^}]*)\}", self.text):
            return re.findall(_NAME, branches[1])
        return re.findall(rf"(?:calls|to_apply)=({_NAME})", self.text)


Computation = dict[str, Instruction]


class Module(NamedTuple):
    """A parsed module."""

    computations: dict[str, Computation]
    entry: str
    devices: int


def arrays(shape: str) -> list[tuple[str, list[int]]]:
    """[(dtype, dimensions)] of a shape, several for a tuple."""
    return [
        (dtype, [int(x) for x in dims.split(",") if x]) for dtype, dims in _ARRAY.findall(shape)
    ]


def shape_bytes(shape: str) -> int:
    """Bytes of a shape without padding; none for a token."""
    total = 0
    for dtype, dims in arrays(shape):
        bits = re.match(r"[a-z]+(\d+)", dtype)
        width = 1 if dtype == "pred" else int(bits[1]) / 8 if bits else 0
        total += math.ceil(math.prod(dims) * width)
    return total


def _balanced(text: str, start: int) -> int:
    """The index behind the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return i + 1
    raise ValueError(f"unbalanced HLO: {text[:80]}")


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s*(ROOT )?(%?[\w.-]+) = ", line)
    if not head:
        return None
    start = head.end()
    end = _balanced(line, start) if line[start] == "(" else line.index(" ", start)
    call = re.compile(r"\s*([\w-]+)\(").match(line, end)
    if not call:
        return None
    close = _balanced(line, call.end() - 1)
    operands = tuple(re.findall(r"%[^\s,()]+", line[call.end() : close - 1]))
    text = line[call.end() :]
    return Instruction(head[2], line[start:end], call[1], operands, text, bool(head[1]))


def parse(text: str) -> Module:
    """The module of `compiled.as_text()`; a ValueError if the text has no entry computation."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?(%\S+) \(.*\{$", line):
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif current is not None and (found := _instruction(line)):
            current[found.name] = found
    if not entry:
        raise ValueError("no ENTRY computation: this is not the text of a compiled HLO module")
    devices = re.search(r"num_partitions=(\d+)", text)
    return Module(computations, entry, int(devices[1]) if devices else 1)


def trips(module: Module, loop: Instruction, around: Computation) -> int | None:
    """How often a counted loop runs; None where that cannot be told, as for one that converges.

    Counted: XLA says so, or the condition is counter < constant, the counter starts at a constant
    and a constant is added to it.
    """
    if told := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text):
        return int(told[1])
    condition, body = (module.computations[loop.attribute(n)] for n in ("condition", "body"))
    test, before = _root(condition), _through(around, loop.operands[0])
    after = _root(body)
    if "direction=LT" not in test.text or {before.opcode, after.opcode} != {"tuple"}:
        return None
    counter, limit = (_through(condition, name) for name in test.operands)
    if counter.opcode != "get-tuple-element":
        return None
    index = int(re.search(r"index=(\d+)", counter.text)[1])
    added = _through(body, after.operands[index])
    steps = [_constant(_through(body, x)) for x in added.operands if added.opcode == "add"]
    start, stop = _constant(_through(around, before.operands[index])), _constant(limit)
    step = next((step for step in steps if step), None)
    if start is None or stop is None or step is None:
        return None
    return max(0, math.ceil((stop - start) / step))


def _root(computation: Computation) -> Instruction:
    """The instruction whose value a computation returns."""
    return next(i for i in computation.values() if i.root)


def _through(computation: Computation, name: str) -> Instruction:
    """The instruction behind copies and renamings."""
    i = computation[name]
    while i.opcode in ("copy", "bitcast", "convert", "reshape") and i.operands:
        i = computation[i.operands[0]]
    return i


def _constant(i: Instruction) -> int | None:
    found = re.match(r"(-?\d+)\)", i.text) if i.opcode == "constant" else None
    return int(found[1]) if found else None
