"""The TPU compiler's own estimate of a program's cycles, summed over its compiled text.

The text carries `"estimated_cycles"` for nearly every kernel that runs, for a loop's body once:
here a body counts as often as it runs, and of a conditional its dearest branch. What is left out
is told: the inside of custom calls, loops whose trips cannot be read, and kernels without an
estimate, which are small copies and the copies between memories that run beside the others.
"""

import re
from collections import Counter
from typing import NamedTuple

from experiments.pod import hlo

# They run nothing: they name, group or rename what lies in memory, or wait for it.
_FREE = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while", "call",
    "conditional", "opt-barrier", "optimization-barrier", "partition-id", "custom-call",
 "async-update",
})  # fmt: skip
_MARKERS = re.compile(r"AllocateBuffer|ConcatBitcast|AsyncCollective\w*")  # custom calls, also free


class Cycles(NamedTuple):
    """What the compiler expects of one run of a module."""

    total: int
    kernels: int  # that have an estimate, each as often as it runs
    by_operation: Counter  # {"slice of vmap()/slice": cycles}
    custom_calls: tuple[str, ...]  # targets, whose inside nothing counts
    without_estimate: Counter  # {opcode: how many of them, each as often as it runs}
    unknown_loops: tuple[str, ...]  # counted once


def cycles(text: str) -> Cycles:
    """The estimate of `compiled.as_text()`, of a program for a TPU."""
    module = hlo.parse(text)
    unknown: list[str] = []
    found = _computation(module, module.entry, unknown)
    by_operation: Counter = Counter()
    for (kind, operation), (_, spent) in found.items():
        if kind == "kernel":
            by_operation[operation] += spent
    targets = set(re.findall(r'custom_call_target="([^"]+)"', text))
    return Cycles(
        total=sum(by_operation.values()),
        kernels=sum(times for (kind, _), (times, _) in found.items() if kind == "kernel"),
        by_operation=by_operation,
        custom_calls=tuple(sorted(t for t in targets if not _MARKERS.fullmatch(t))),
        without_estimate=Counter(
            {name: times for (kind, name), (times, _) in found.items() if kind == "none"}
        ),
        unknown_loops=tuple(unknown),
    )


# {("kernel", operation) or ("none", opcode): (how often it runs, its cycles together)}
_Found = dict[tuple[str, str], tuple[int, int]]


def _computation(module: hlo.Module, name: str, unknown: list[str]) -> _Found:
    found: _Found = {}
    inside = module.computations[name]
    for i in inside.values():
        estimate = re.search(r'"estimated_cycles":"?(\d+)', i.text)
        if estimate:
            _add(found, {("kernel", _operation(i)): (1, int(estimate[1]))})
        elif i.opcode == "while":
            trips = hlo.trips(module, i, inside)
            if trips is None:
                unknown.append(i.name)
            for part in ("body", "condition"):
                once = _computation(module, i.attribute(part), unknown)
                _add(found, once, 1 if trips is None else trips)
        elif i.opcode == "conditional":
            branches = [_computation(module, branch, unknown) for branch in i.called()]
            _add(found, max(branches, key=lambda b: sum(spent for _, spent in b.values())))
        elif i.opcode in ("call", "async-start"):
            for called in i.called():
                _add(found, _computation(module, called, unknown))
        elif not _free(i):
            _add(found, {("none", i.opcode): (1, 0)})
    return found


def _free(i: hlo.Instruction) -> bool:
    scalar = not any(dims for _, dims, _ in hlo.arrays(i.shape))  # of the scalar core
    return scalar or i.opcode in _FREE or i.opcode.endswith("-done")


def _add(total: _Found, part: _Found, runs: int = 1) -> None:
    for key, (times, spent) in part.items():
        before = total.get(key, (0, 0))
        total[key] = before[0] + runs * times, before[1] + runs * spent


def _operation(i: hlo.Instruction) -> str:
    """What an instruction is, and the operation of the program that it came from."""
    origin = re.search(r'op_name="([^"]*)"', i.text)
    return f"{i.opcode} of {origin[1].split('/', 1)[-1]}" if origin else i.opcode
