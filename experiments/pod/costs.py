"""What one chip does in a compiled TPU program: the compiler's estimated cycles, and bytes sent.

The text carries `"estimated_cycles"` for nearly every kernel that runs, and of a loop's body once.
Here a body counts as often as it runs, and of a conditional the dearest branch. What is left out is
told: the inside of custom calls, loops whose trips cannot be read (they count once), and kernels
without an estimate, which are small copies and copies between memories beside the others. Nobody
estimates how long a chip waits for others; instead there are the bytes that it sends. On a ring of
n chips an all-gather or a reduce-scatter sends (n - 1) / n of the whole array from each, an
all-reduce twice that.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from experiments.pod import hlo

# They run nothing: they name, group or rename what lies in memory, or wait for it.
_FREE = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while", "call",
    "conditional", "opt-barrier", "optimization-barrier", "partition-id", "custom-call",
    "async-update", "async-start",
})  # fmt: skip
_MARKERS = re.compile(r"AllocateBuffer|ConcatBitcast|AsyncCollective\w*")  # custom calls, also free
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')


class Cost(NamedTuple):
    """What one run of a module costs a chip."""

    cycles: int
    kernels: int  # that have an estimate, each as often as it runs
    by_operation: Counter  # {"slice of vmap()/slice": cycles}
    sent: Counter  # {"all-gather": bytes}
    custom_calls: tuple[str, ...]  # targets, whose inside nothing counts
    without_estimate: Counter  # {opcode: how many of them, each as often as it runs}
    unknown_loops: tuple[str, ...]  # counted once


class _Run(NamedTuple):
    """An instruction where the walk meets it."""

    times: int
    fused: bool  # a part of a kernel, whose estimate has it
    instruction: hlo.Instruction
    inside: hlo.Computation

    @property
    def cycles(self) -> int | None:
        """Of all times together; None without an estimate."""
        found = None if self.fused else _CYCLES.search(self.instruction.text)
        return self.times * int(found[1]) if found else None


def cost(text: str) -> Cost:
    """The cost of `compiled.as_text()`, of a program for a TPU."""
    module = hlo.parse(text)
    unknown: list[str] = []
    kernels, by_operation, sent, without = 0, Counter(), Counter(), Counter()
    started = _started(module)
    for run in _walk(module, module.entry, 1, False, unknown):
        i, cycles = run.instruction, run.cycles
        if cycles is not None:
            kernels += run.times
            by_operation[_operation(i)] += cycles
        elif not run.fused and not _free(i):
            without[i.opcode] += run.times
        kind = i.opcode.removesuffix("-start")
        if kind in _SENT and (_channel(i) not in started or _starts(run.inside)):
            own = sum(hlo.shape_bytes(run.inside[name].shape) for name in i.operands)
            sent[kind] += run.times * round(own * _SENT[kind](_chips(module, i)))
    targets = set(re.findall(r'custom_call_target="([^"]+)"', text))
    return Cost(
        cycles=sum(by_operation.values()),
        kernels=kernels,
        by_operation=by_operation,
        sent=sent,
        custom_calls=tuple(sorted(t for t in targets if not _MARKERS.fullmatch(t))),
        without_estimate=without,
        unknown_loops=tuple(unknown),
    )


def _walk(
    module: hlo.Module, name: str, times: int, fused: bool, unknown: list[str]
) -> Iterator[_Run]:
    inside = module.computations[name]
    for i in inside.values():
        yield _Run(times, fused, i, inside)
        if i.opcode == "while":
            trips = hlo.trips(module, i, inside)
            if trips is None:
                unknown.append(i.name)
            for part in ("body", "condition"):
                runs = times * (1 if trips is None else trips)
                yield from _walk(module, i.attribute(part), runs, fused, unknown)
        elif i.opcode == "conditional":
            branches = [list(_walk(module, b, times, fused, unknown)) for b in i.called()]
            yield from max(branches, key=lambda runs: sum(run.cycles or 0 for run in runs))
        elif i.opcode in ("fusion", "call", "async-start"):
            for called in i.called():
                yield from _walk(module, called, times, fused or i.opcode == "fusion", unknown)


def _free(i: hlo.Instruction) -> bool:
    scalar = not any(dims for _, dims in hlo.arrays(i.shape))  # of the scalar core
    return scalar or i.opcode in _FREE or i.opcode.endswith("-done")


def _operation(i: hlo.Instruction) -> str:
    """What an instruction is, and the operation of the program that it came from."""
    origin = re.search(r'op_name="([^"]*)"', i.text)
    return f"{i.opcode} of {origin[1].split('/', 1)[-1]}" if origin else i.opcode


# Collectives

_SENT = {  # by each of n chips, in operands
    "all-gather": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


def _channel(i: hlo.Instruction) -> str | None:
    found = re.search(r"channel_id=(\d+)", i.text)
    return found[1] if found else None


def _starts(computation: hlo.Computation) -> bool:
    return any('"AsyncCollectiveStart"' in i.text for i in computation.values())


def _started(module: hlo.Module) -> set[str]:
    """The channels of the collectives that are spread over several kernels: the first counts."""
    return {
        channel
        for computation in filter(_starts, module.computations.values())
        for i in computation.values()
        if (channel := _channel(i))
    }


def _chips(module: hlo.Module, i: hlo.Instruction) -> int:
    """How many chips take part in one group of a collective."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", i.text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", i.text):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", i.text):
        return listed[1].count(",") + 1
    return module.devices
