"""A model's folder as Hugging Face keeps it: its config, tensors and tokenizer, all accounted for.

PyTorch keeps a linear's weight as (out, in), a kernel is (in, out): transposed once, here. Whatever
is wrong with a file is a ValueError that names it and ends with a remedy.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.util
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tokenizers
from flax import nnx

from experiments.exits import first_line
from experiments.storage import read_json, write_atomic

Config = TypeVar("Config")
TensorName = Callable[[tuple], str]  # a leaf's path in the model -> its name in the file
Held = Callable[[tuple, nnx.Variable], nnx.Variable]  # a leaf's path and the leaf -> what is kept

CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"
CHAT_FILES = "chat_template.jinja", "tokenizer_config.json"
INDEX = "model.safetensors.index.json"
REMEDY = "copy or download all files of one model again"
MOST, MOST_LAYERS = 10**9, 1000  # of any size; of layers, each of which is built before it is read


class Tensors(collections.UserDict):
    """Arrays by name; where a function is given in an array's place, it is called when asked for.

    So a large model is never whole in memory as its file has it.
    """

    def __getitem__(self, name: str) -> np.ndarray:
        found = self.data[name]
        return found() if callable(found) else found


def folder_of(model: str | pathlib.Path) -> pathlib.Path:
    """The folder that `model` is, or the hub's files of NAME@COMMIT, downloaded once.

    Raises:
        FileNotFoundError: it is no folder and no such name, or the hub could not be reached.
    """
    folder = pathlib.Path(model).expanduser()
    if folder.is_dir():
        return folder
    import huggingface_hub  # a second to import: only where a name is asked for

    name, _, commit = str(model).partition("@")
    patterns = [CONFIG, "*.safetensors", INDEX, TOKENIZER, "spiece.model", *CHAT_FILES]
    try:
        if not re.fullmatch("[0-9a-f]{40}", commit):
            raise ValueError(
                "no NAME@COMMIT: the files of a name can change, those of a commit's 40 digits "
                f"cannot; commits are listed at https://huggingface.co/{name}/commits/main"
            )
        return pathlib.Path(
            huggingface_hub.snapshot_download(name, revision=commit, allow_patterns=patterns)
        )
    except Exception as error:  # of the hub, of its HTTP library and of the file system
        raise FileNotFoundError(
            f"there is no folder {folder}, and the Hugging Face hub did not give {str(model)!r} "
            f"({first_line(error)}). Without a network, copy {CONFIG}, {WEIGHTS} and "
            f"{TOKENIZER} or spiece.model from a connected machine into a folder, and pass that"
        ) from error


def package_folder(module: str, remedy: str) -> pathlib.Path:
    """The folder of an installed package, which is not imported.

    Raises:
        FileNotFoundError: it is not installed; the message is `remedy`.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(remedy)
    return pathlib.Path(next(iter(spec.submodule_search_locations)))


def there(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The file of that name; a FileNotFoundError that says what is in the folder instead."""
    file = folder / name
    if not file.is_file():
        found = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise FileNotFoundError(f"{file} does not exist; in the folder there is {found}")
    return file


def config(
    cls: type[Config], found: dict[str, Any], file: pathlib.Path, required: Iterable[str]
) -> Config:
    """The dataclass `cls` of what `found`, read from `file`, has for its fields; null is absent.

    An int is a size, at least 1, or, under a name that ends with _id, a token's number.
    """
    names = [field.name for field in dataclasses.fields(cls) if found.get(field.name) is not None]
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    try:
        if missing := [name for name in required if name not in names]:
            raise ValueError(f"{', '.join(missing)} missing; is it another architecture's?")
        return cls(**{name: _checked(name, kinds[name], found[name]) for name in names})
    except ValueError as error:
        raise ValueError(f"{file}: {error}; {REMEDY}") from error


def _checked(name: str, kind: type, value: Any) -> Any:
    number = kind in (int, float)
    least = 0 if kind is float or name.endswith("_id") else 1
    most = MOST_LAYERS if "layers" in name else MOST
    good = type(value) is kind or (kind is float and type(value) is int)
    if not good or (number and not least <= value <= most):
        expected = kind.__name__ + (f" from {least} to {most}" if number else "")
        raise ValueError(f"{name} is {value!r:.40}; expected {expected}")
    return value


def tensors_of(folder: pathlib.Path) -> tuple[pathlib.Path, Tensors]:
    """(the file to name in errors, all tensors) of one file, or of the shards of an index."""
    if not (folder / INDEX).is_file():
        file = there(folder, WEIGHTS)
        return file, read(file, REMEDY)
    index, tensors = folder / INDEX, Tensors()
    shard_of = read_json(index, (), "an index of shards", REMEDY).get("weight_map")
    shards = set(map(str, shard_of.values())) if isinstance(shard_of, dict) else {str(shard_of)}
    for shard in sorted(shards):
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", shard):  # no path: it could lead outside
            raise ValueError(
                f"{index}: weight_map names {shard!r:.60}; expected, of each tensor, the name of a "
                f".safetensors file in the same folder; {REMEDY}"
            )
        part = read(there(folder, shard), REMEDY)
        if twice := sorted(part.keys() & tensors.keys()):
            raise ValueError(f"{folder / shard}: {twice[0]} is in another shard too; {REMEDY}")
        tensors |= part
    if lost := sorted(shard_of.keys() - tensors.keys()):
        raise ValueError(f"{index}: the shards lack {len(lost)} tensors ({lost[0]}); {REMEDY}")
    return index, tensors


def read(file: pathlib.Path, remedy: str) -> Tensors:
    """Every tensor of a safetensors file, by name; each is read when it is asked for.

    Raises:
        ValueError: the file is damaged, or, when it is asked for, a tensor of a dtype that NumPy
            lacks. `remedy` says what to do.
    """

    def tensor(name: str) -> np.ndarray:
        with _told(file, remedy):
            return opened.get_tensor(name)

    with _told(file, remedy):
        opened = safetensors.safe_open(file, "numpy")
        return Tensors({name: functools.partial(tensor, name) for name in opened.keys()})  # noqa: SIM118


@contextlib.contextmanager
def _told(file: pathlib.Path, remedy: str) -> Iterator[None]:
    try:
        yield
    except (safetensors.SafetensorError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is damaged or cut short, or has a dtype that "
            f"NumPy lacks ({error}); {remedy}"
        ) from error


def read_tokenizer(file: pathlib.Path, remedy: str = REMEDY) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json, without the padding and truncation it asks for."""
    try:
        loaded = tokenizers.Tokenizer.from_file(str(file))
    except BaseException as error:  # a panic of the library's Rust is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        raise ValueError(f"{file} is damaged or no tokenizer ({error}); {remedy}") from error
    loaded.no_padding()
    loaded.no_truncation()
    return loaded


def filled(
    state: nnx.State,
    tensors: Mapping[str, np.ndarray],
    name_of: TensorName,
    *,
    what: str,
    file: pathlib.Path,
    remedy: str,
    sizes: str = CONFIG,
    held: Held = lambda path, variable: variable,
) -> nnx.State:
    """`state` with every leaf replaced by its tensor, in the leaf's dtype.

    `held` turns one leaf into what is kept of it, before the next tensor is read.

    Raises:
        ValueError: a tensor is missing, unexpected, of another shape or of integers. `what` says
            which model the file should hold, `sizes` where its sizes are, `remedy` what to do.
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
                f"{sizes} is expected; {remedy}"
            )
    new = {}
    for path, variable in flat.items():
        tensor = tensors[names[path]]
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise ValueError(
                f"{file}: {names[path]} is of {tensor.dtype}; expected floating-point numbers (a "
                f"quantized model has others); {remedy}"
            )
        array = tensor.T if path[-1] == "kernel" else tensor
        if array.shape != variable.shape:
            stored = variable.shape[::-1] if path[-1] == "kernel" else variable.shape
            raise ValueError(
                f"{file}: {names[path]} has shape {tensor.shape}, {sizes} asks for {stored}; "
                f"the two files belong to different models; {remedy}"
            )
        new[path] = held(path, variable.replace(jnp.asarray(array, variable.dtype)))
    return nnx.from_flat_state(new)


def named(state: nnx.State, name_of: TensorName) -> dict[str, np.ndarray]:
    """The leaves under their names in a file, linears transposed: what `filled` reads."""
    tensors = {}
    for path, variable in nnx.to_flat_state(state):
        array = np.asarray(variable[...])
        tensors[name_of(path)] = np.ascontiguousarray(array.T if path[-1] == "kernel" else array)
    return tensors


def save(
    folder: str | pathlib.Path,
    params: nnx.State,
    name_of: TensorName,
    told: dict[str, Any],
    files: dict[str, str],
) -> None:
    """Writes model.safetensors, the further `files`, and last `told` as config.json.

    Raises:
        ValueError: adapters are among the parameters, of a whole model.
    """
    if any(isinstance(variable, nnx.LoRAParam) for _, variable in nnx.to_flat_state(params)):
        raise ValueError(
            "the model has adapters, which a model's file has no place for; merge_lora it"
        )
    tensors = safetensors.numpy.save(named(params, name_of), metadata={"format": "pt"})
    texts = files | {CONFIG: json.dumps(told, indent=2) + "\n"}
    contents = {WEIGHTS: tensors} | {name: text.encode() for name, text in texts.items()}
    for name, content in contents.items():
        write_atomic(pathlib.Path(folder) / name, content, "the model")
