"""What one chip does in a compiled TPU program: the compiler's estimated cycles, and bytes sent.

The text has `"estimated_cycles"` of nearly every kernel, and a loop's body once. Here a body counts
as often as it runs, and of a conditional the dearest branch. Custom calls, whose inside is not
counted, and loops whose trips cannot be read, which count once, are named. Small copies have no
estimate and count nothing. Waiting for other chips is not estimated. On a ring of n chips an
all-gather or a reduce-scatter sends (n - 1) / n of the whole array, an all-reduce twice that.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

_LINE = re.compile(r"\s*(ROOT )?(%\S+) = (.*?) ([\w-]+)\(([^)]*)\)?(.*)")
_HEAD = re.compile(r"(ENTRY )?(%\S+) \(.*\{$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|(?:true|false)_computation)=(%[^,}\s]+)"
    r"|branch_computations=\{([^}]*)\}"
)
_RENAMING = "copy", "bitcast", "convert", "reshape"
_MARKERS = re.compile(r"AllocateBuffer|ConcatBitcast|AsyncCollective\w*")  # free custom calls
_SENT = {  # by each of n chips, in operands
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


class Cost(NamedTuple):
    """What one run of a program costs a chip."""

    cycles: int
    kernels: int  # that have an estimate, each as often as it runs
    sent: dict[str, int]  # {"all-gather": bytes}
    custom_calls: tuple[str, ...]  # targets, whose inside nothing counts
    unknown_loops: tuple[str, ...]  # counted once


class _Instruction(NamedTuple):
    root: bool
    name: str
    shape: str
    opcode: str
    operands: str
    text: str  # what stands behind the operands

    def called(self) -> list[str]:
        """The computations of a loop, a fusion, a call or a conditional."""
        found = _CALLED.findall(self.text)
        return [name for one, several in found for name in (one or several).split(", ")]

    def names(self) -> list[str]:
        """The operands' names."""
        return re.findall(r"%[^\s,]+", self.operands)

    def match(self, pattern: str) -> str | None:
        """The pattern's first group."""
        found = re.search(pattern, self.text)
        return found and found[1]


_Computation = dict[str, _Instruction]


def cost(text: str) -> Cost:
    """The cost of `compiled.as_text()`; a ValueError if the text is none of a compiled program."""
    program: dict[str, _Computation] = {}
    entry, inside = None, {}
    for line in text.splitlines():
        if head := _HEAD.match(line):
            inside = program.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif found := _LINE.match(line):
            inside[found[2]] = _Instruction(bool(found[1]), *found.groups()[1:])
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of a compiled HLO module")
    devices = re.search(r"num_partitions=(\d+)", text)
    total = _Sum(program, int(devices[1]) if devices else 1).of(entry, 1, False)

    def part(kind: str) -> dict[str, int]:
        return {name: count for (what, name), count in total.items() if what == kind}

    targets = set(re.findall(r'custom_call_target="([^"]+)"', text))
    return Cost(
        total["cycles", ""],
        total["kernels", ""],
        part("sent"),
        tuple(sorted(t for t in targets if not _MARKERS.fullmatch(t))),
        tuple(part("unknown")),
    )


class _Sum:
    """Sums over the instructions that run: {(what, of which): how much}."""

    def __init__(self, program: dict[str, _Computation], devices: int):
        self.program, self.devices = program, devices
        # Collectives that are spread over several kernels, by their channels: the first counts.
        begin = [c for c in program.values() if _begins(c)]
        self.begun = {i.match(r"channel_id=(\d+)") for c in begin for i in c.values()} - {None}

    def of(self, name: str, times: int, fused: bool) -> Counter:
        """Of a computation that runs `times` times, as part of a kernel if it is fused."""
        total, inside = Counter(), self.program[name]
        for i in inside.values():
            total.update(self.own(i, inside, times, fused))
            if i.opcode == "while":
                trips = self.trips(i, inside)
                if trips is None:
                    total["unknown", i.name] += 1
                for part in i.called():
                    total.update(self.of(part, times * (1 if trips is None else trips), fused))
            elif i.opcode == "conditional":
                branches = [self.of(branch, times, fused) for branch in i.called()]
                total.update(max(branches, key=lambda found: found["cycles", ""]))
            elif i.opcode in ("fusion", "call", "async-start"):
                for part in i.called():
                    total.update(self.of(part, times, fused or i.opcode == "fusion"))
        return total

    def own(self, i: _Instruction, inside: _Computation, times: int, fused: bool) -> Counter:
        """Of one instruction, without what it calls."""
        found, kind = Counter(), i.opcode.removesuffix("-start")
        cycles = i.match(r'"estimated_cycles":"?(\d+)')
        if cycles and not fused:
            found["cycles", ""], found["kernels", ""] = times * int(cycles), times
        if kind in _SENT and (i.match(r"channel_id=(\d+)") not in self.begun or _begins(inside)):
            held = sum(_bytes(inside[name].shape) for name in i.names())
            found["sent", kind] = times * round(held * _SENT[kind](self.chips(i)))
        return found

    def trips(self, loop: _Instruction, around: _Computation) -> int | None:
        """How often a loop runs that counts from a constant to a constant; else None.

        A TPU's text has no `known_trip_count`, and its loops may be unrolled: steps of 2.
        """
        if told := loop.match(r'"known_trip_count":\{"n":"(\d+)"\}'):
            return int(told)
        condition = self.program[loop.match(r"condition=(%[^,\s]+)")]
        body = self.program[loop.match(r"body=(%[^,\s]+)")]
        test, after = (next(i for i in c.values() if i.root) for c in (condition, body))
        before = _behind(around, loop.names()[0])
        if "direction=LT" not in test.text or {before.opcode, after.opcode} != {"tuple"}:
            return None
        counter, limit = (_behind(condition, name) for name in test.names())
        if counter.opcode != "get-tuple-element":
            return None
        place = int(counter.match(r"index=(\d+)"))
        start, added = _behind(around, before.names()[place]), _behind(body, after.names()[place])
        steps = [_constant(_behind(body, name)) for name in added.names()]
        step = next(filter(None, steps), None) if added.opcode == "add" else None
        if None in (numbers := (_constant(start), _constant(limit), step)):
            return None
        return max(0, math.ceil((numbers[1] - numbers[0]) / step))

    def chips(self, i: _Instruction) -> int:
        """How many chips take part in one group of a collective."""
        if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", i.text):
            sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
            return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
        if listed := i.match(r"replica_groups=\{\{([\d,]+)\}"):
            return listed.count(",") + 1
        return int(i.match(r"replica_groups=\[\d+,(\d+)\]") or self.devices)


def _begins(computation: _Computation) -> bool:
    return any('"AsyncCollectiveStart"' in i.text for i in computation.values())


def _behind(computation: _Computation, name: str) -> _Instruction:
    """The instruction behind copies and renamings."""
    while (i := computation[name]).opcode in _RENAMING:
        name = i.names()[0]
    return i


def _constant(i: _Instruction) -> int | None:
    known = i.opcode == "constant" and re.fullmatch(r"-?\d+", i.operands)
    return int(i.operands) if known else None


def _bytes(shape: str) -> int:
    """Without padding; none for a token."""
    total = 0
    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        bits = 8 if dtype == "pred" else int((re.findall(r"[a-z]+(\d+)", dtype) or [0])[0])
        total += math.ceil(math.prod(int(x) for x in dims.split(",") if x) * bits / 8)
    return total
