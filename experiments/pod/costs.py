"""What one chip does in a compiled program, read off its HLO text: FLOPs, bytes, collectives.

XLA's own `cost_analysis()` counts the body of a loop once, however often it runs, so that a scan
over 32 layers seems to cost one. Here a body counts as often as it runs (`hlo.trips`); a loop whose
trips cannot be told counts once and is listed in `Cost.unknown_loops`.

flops:       2 per multiply-add of dot and convolution, which is what the TPU backend turns matrix
             products into; positions that meet only padding or holes do not count. 1 per element
             of float arithmetic, and per element that a reduction takes in. What happens inside a
             custom call (such as eigh's) is left out.
bytes:       operands and results, in the main memory, of what runs as one kernel. Where a kernel
             takes a slice of an operand, or updates a result in place, the slice counts. What lies
             in another memory space (the TPU's vector memory, S(1) in the layout) does not.
collectives: {kind: (operand bytes, sent bytes)}. On a ring of n chips an all-gather or a
             reduce-scatter sends (n - 1) / n of the whole array from each chip, an all-reduce
             twice that. The TPU backend spreads a collective over several kernels to overlap it
             with compute; it counts where it is started.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from experiments.pod import hlo
from experiments.pod.hlo import Computation, Instruction, Module

_COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"
)  # fmt: skip
# Move nothing: they name, group or rename what lies in memory, or run computations of their own.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while", "call",
    "conditional", "optimization-barrier", "opt-barrier", "partition-id", "replica-id",
}  # fmt: skip
_ARITHMETIC = {
    "add", "subtract", "multiply", "divide", "maximum", "minimum", "negate", "abs", "power", "sqrt",
    "rsqrt", "exponential", "exponential-minus-one", "log", "log-plus-one", "tanh", "logistic",
    "cosine", "sine", "erf", "cbrt",
}  # fmt: skip
_FREE_CUSTOM = re.compile(r'custom_call_target="(ConcatBitcast|AllocateBuffer|AsyncCollective\w+)"')


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one chip does in one run of a program."""

    flops: float
    bytes: float
    collectives: dict[str, tuple[float, float]]
    unknown_loops: tuple[str, ...] = ()

    @property
    def collective_bytes(self) -> float:
        """Bytes that a chip sends, over all kinds."""
        return sum(sent for _, sent in self.collectives.values())


class Run(NamedTuple):
    """An instruction where the walk meets it."""

    times: float  # how often it runs
    kernel: bool  # whether it is a part of a fusion
    instruction: Instruction
    inside: Computation


def cost(text: str, *, once: bool = False) -> Cost:
    """The cost of one run of a compiled module.

    Args:
      text: `compiled.as_text()`.
      once: count every loop's body once, as `cost_analysis` does.
    """
    module = hlo.parse(text)
    started = _started(module)
    unknown: list[str] = []
    flops, moved = 0.0, 0.0
    totals: dict[str, tuple[float, float]] = {}
    for run in _walk(module, module.entry, 1.0, False, once, unknown):
        flops += run.times * _flops(run)
        if not run.kernel:
            moved += run.times * _bytes(module, run)
        kind = run.instruction.opcode.removesuffix("-start")
        if kind in _COLLECTIVES and not _continued(run, started):
            own, sent = _sent(module, kind, run)
            before = totals.get(kind, (0.0, 0.0))
            totals[kind] = before[0] + run.times * own, before[1] + run.times * sent
    return Cost(flops, moved, totals, tuple(unknown))


def _walk(
    module: Module, name: str, times: float, kernel: bool, once: bool, unknown: list[str]
) -> Iterator[Run]:
    inside = module.computations[name]
    for i in inside.values():
        yield Run(times, kernel, i, inside)
        if i.opcode == "while":
            found = hlo.trips(module, i, inside)
            if found is None:
                unknown.append(i.name)
            runs = times * (1 if once or found is None else found)
            for part in ("body", "condition"):
                yield from _walk(module, i.attribute(part), runs, kernel, once, unknown)
        elif i.opcode in ("fusion", "call", "async-start", "conditional"):
            into = kernel or i.opcode in ("fusion", "async-start")
            for called in i.called():
                yield from _walk(module, called, times, into, once, unknown)


# Collectives


def _channel(i: Instruction) -> str | None:
    found = re.search(r"channel_id=(\d+)", i.text)
    return found[1] if found else None


def _starts(computation: Computation) -> bool:
    return any('"AsyncCollectiveStart"' in i.text for i in computation.values())


def _started(module: Module) -> set[str]:
    """The channels of the collectives that a kernel of their own starts."""
    return {
        channel
        for computation in module.computations.values()
        if _starts(computation)
        for i in computation.values()
        if (channel := _channel(i))
    }


def _continued(run: Run, started: set[str]) -> bool:
    """Whether this is a later part of a collective that was started elsewhere."""
    return _channel(run.instruction) in started and not _starts(run.inside)


def _sent(module: Module, kind: str, run: Run) -> tuple[float, float]:
    """(operand bytes, bytes that a chip sends on a ring)."""
    own = sum(hlo.shape_bytes(run.inside[name].shape) for name in run.instruction.operands)
    n = _group(module, run.instruction)
    share = (n - 1) / n
    return own, {
        "all-gather": own * (n - 1),
        "all-reduce": 2 * own * share,
        "reduce-scatter": own * share,
        "all-to-all": own * share,
        "collective-permute": own,
    }[kind]


def _group(module: Module, i: Instruction) -> int:
    """How many chips take part in one group of a collective."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", i.text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", named[2]))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", i.text):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", i.text):
        return listed[1].count(",") + 1
    return module.devices


# Bytes


def _here(array: tuple[str, list[int], str]) -> int:
    """Bytes of one array that lie in the main memory: none if it lies in another."""
    dtype, dims, layout = array
    return 0 if re.search(r"S\([1-9]", layout) else hlo.array_bytes(dtype, dims)


def _main_memory(shape: str) -> int:
    """Bytes of the arrays of a shape that lie in the main memory."""
    return sum(map(_here, hlo.arrays(shape)))


def _bytes(module: Module, run: Run) -> float:
    i, inside = run.instruction, run.inside
    if i.opcode in _FREE or i.opcode.endswith("-done") or _FREE_CUSTOM.search(i.text):
        return 0.0
    operands = [inside[name].shape for name in i.operands if name in inside]
    if i.opcode in ("dynamic-slice", "slice", "gather", "slice-start"):
        return _slice_bytes(i, operands[0])
    if i.opcode == "dynamic-update-slice":
        return 2.0 * _main_memory(operands[1])
    if i.opcode == "copy-start":  # (destination, source, context)
        return _here(hlo.arrays(i.shape)[0]) + _main_memory(operands[0])
    if i.opcode == "collective-permute-start":  # (source, destination, contexts)
        return _main_memory(i.shape)
    if i.opcode == "fusion":
        return _fusion_bytes(module, i, operands)
    return float(_main_memory(i.shape) + sum(map(_main_memory, operands)))


def _slice_bytes(i: Instruction, source: str) -> float:
    """Bytes written and read by taking a slice."""
    at = 1 if i.opcode == "slice-start" else 0  # ((source), destination, context)
    made = hlo.arrays(i.shape)[at]
    read = hlo.array_bytes(*made[:2]) if _main_memory(source) else 0
    return read + _here(made)


def _fusion_bytes(module: Module, i: Instruction, operands: list[str]) -> float:
    body = module.computations[i.called()[0]]
    total = 0.0
    for made in body.values():
        if made.opcode == "parameter" and _main_memory(operands[made.parameter()]):
            total += _read(module, made, body)
    last = hlo.root(body)
    parts = last.operands if last.opcode == "tuple" else (last.name,)
    return total + sum(_written(module, body, name) for name in parts)


def _read(module: Module, source: Instruction, body: Computation) -> float:
    """Bytes that a kernel reads of an operand: the slices, where slices are all that it takes."""
    total, whole = 0.0, hlo.shape_bytes(source.shape)
    for user in body.values():
        if source.name not in user.operands:
            continue
        kind = user.opcode.removesuffix("-start")
        if user.opcode in ("dynamic-slice", "slice", "gather"):
            total += hlo.shape_bytes(user.shape) if user.operands[0] == source.name else whole
        elif user.opcode in ("bitcast", "reshape"):
            total += _read(module, user, body)
        elif user.opcode == "fusion":
            inner = module.computations[user.called()[0]]
            for made in inner.values():
                fed = made.opcode == "parameter" and user.operands[made.parameter()]
                if fed == source.name:
                    total += _read(module, made, inner)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == source.name:
            continue  # written in place, not read
        elif user.opcode == "tuple" or kind in _COLLECTIVES or _FREE_CUSTOM.search(user.text):
            continue  # passed through, or counted as a collective
        else:
            return whole
    return min(total, whole)


def _written(module: Module, body: Computation, name: str) -> float:
    """Bytes that a kernel writes of one of its results."""
    result, source = body[name], hlo.through(body, name)
    if source.opcode == "fusion" and not source.shape.startswith("("):
        inner = module.computations[source.called()[0]]
        source = hlo.through(inner, hlo.root(inner).name)
        body = inner
    if source.opcode == "dynamic-update-slice":
        return hlo.shape_bytes(body[source.operands[1]].shape)
    if source.opcode in ("parameter", "get-tuple-element", *_COLLECTIVES):
        return 0.0
    return 0.0 if _FREE_CUSTOM.search(source.text) else _main_memory(result.shape)


# FLOPs


def _flops(run: Run) -> float:
    i, inside = run.instruction, run.inside
    if i.opcode == "dot":
        return _dot_flops(i, inside)
    if i.opcode == "convolution":
        return _convolution_flops(i, inside)
    if i.opcode in _ARITHMETIC:
        return _floats(i.shape)
    return _floats(inside[i.operands[0]].shape) if i.opcode == "reduce" else 0.0


def _floats(shape: str) -> float:
    """How many floating-point elements a shape has."""
    return float(
        sum(math.prod(dims) for dtype, dims, _ in hlo.arrays(shape) if dtype[0] in ("f", "b"))
    )


def _dot_flops(i: Instruction, inside: Computation) -> float:
    left = hlo.dimensions(inside[i.operands[0]].shape)
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.text)
    axes = [int(x) for x in contracted[1].split(",") if x] if contracted else []
    return 2.0 * math.prod(hlo.dimensions(i.shape)) * math.prod(left[axis] for axis in axes)


def _window(text: str, field: str, axes: int, default: int) -> list[int]:
    """One number for each spatial axis; the low side of a padding."""
    window = re.search(r"window=\{([^}]*)\}", text)
    found = re.search(rf"\b{field}=(\S+)", window[1]) if window else None
    return [int(part.split("_")[0]) for part in found[1].split("x")] if found else [default] * axes


@functools.cache
def _positions(
    out: int, size: int, wide: int, stride: int, low: int, base: int, dilation: int
) -> int:
    """(output, window) positions of one axis that meet an input, neither padding nor a hole."""
    reach = (wide - 1) * base + 1
    count = 0
    for k in range(size):
        for at in range(k * dilation - low, k * dilation - low + out * stride, stride):
            count += 0 <= at < reach and at % base == 0
    return count


def _convolution_flops(i: Instruction, inside: Computation) -> float:
    inputs, kernel, output = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.text).groups()
    left, right = (hlo.dimensions(inside[name].shape) for name in i.operands)
    out = hlo.dimensions(i.shape)
    axes = sorted(label for label in inputs if label.isdigit())
    windows = [
        _window(i.text, field, len(axes), default)
        for field, default in (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
    ]
    met = 1
    for n, axis in enumerate(axes):
        sizes = (
            out[output.index(axis)],
            right[kernel.index(axis)],
            left[inputs.index(axis)],
        )
        met *= _positions(*sizes, *(window[n] for window in windows))
    batch_and_features = out[output.index("b")] * out[output.index("f")]
    return 2.0 * batch_and_features * right[kernel.index("i")] * met
