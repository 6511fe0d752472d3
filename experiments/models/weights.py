"""The tensors of safetensors files as the parameters of an NNX model, all of them accounted for.

PyTorch keeps a linear's weight as (out, in), a kernel is (in, out): transposed once, here.
"""

import pathlib
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx

TensorName = Callable[[tuple], str]  # a leaf's path in the model -> its name in the file


def read(file: pathlib.Path, remedy: str) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file, by name.

    Raises:
        ValueError: the file is damaged; the message ends with the `remedy`.
    """
    try:
        with safetensors.safe_open(file, "numpy") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is damaged or cut short ({error}); {remedy}"
        ) from error


def filled(
    state: nnx.State,
    tensors: dict[str, np.ndarray],
    name_of: TensorName,
    *,
    what: str,
    file: pathlib.Path,
    remedy: str,
) -> nnx.State:
    """`state` with every leaf replaced by its tensor, in the leaf's dtype.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape. `what` says which model
            the file should hold, `remedy` what to do.
    """
    flat = dict(nnx.to_flat_state(state))
    names = {path: name_of(path) for path in flat}
    expected = set(names.values())
    for problem, of in (
        ("missing", expected - set(tensors)),
        ("unexpected", set(tensors) - expected),
    ):
        if of:
            shown = ", ".join(sorted(of)[:3])
            raise ValueError(
                f"{file}: {len(of)} tensors {problem} ({shown}); {what} of the sizes in "
                f"config.json is expected; {remedy}"
            )
    new = {}
    for path, variable in flat.items():
        tensor = tensors[names[path]]
        array = tensor.T if path[-1] == "kernel" else tensor
        if array.shape != variable.shape:
            stored = variable.shape[::-1] if path[-1] == "kernel" else variable.shape
            raise ValueError(
                f"{file}: {names[path]} has shape {tensor.shape}, config.json asks for {stored}; "
                f"the two files belong to different models; {remedy}"
            )
        new[path] = variable.replace(jnp.asarray(array, variable.dtype))
    return nnx.from_flat_state(new)


def named(state: nnx.State, name_of: TensorName) -> dict[str, np.ndarray]:
    """The leaves under their names in a file, linears transposed: what `filled` reads."""
    tensors = {}
    for path, variable in nnx.to_flat_state(state):
        array = np.asarray(variable[...])
        tensors[name_of(path)] = np.ascontiguousarray(array.T if path[-1] == "kernel" else array)
    return tensors
