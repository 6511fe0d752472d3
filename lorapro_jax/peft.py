"""Adapters as Hugging Face PEFT's files: W x + scale B A x, with A = aᵀ (r, in), B = bᵀ (out, r).

PEFT and PyTorch are not needed; the package safetensors is (`pip install "lorapro-jax[peft]"`).
"""

import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from lorapro_jax import _layouts, _peft_files
from lorapro_jax._checks import check_one_of
from lorapro_jax._groups import Scale
from lorapro_jax._layouts import Layout, Pair
from lorapro_jax._paths import scale_at
from lorapro_jax._peft_files import Adapter
from lorapro_jax._peft_modules import Join, Share, Split, Target, plan, take

__all__ = ["Join", "Split", "load", "save"]


def save(
    directory: str | os.PathLike,
    lora: Any,
    scale: Scale,
    *,
    modules: Mapping[str, Target],
    layout: Layout | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
    rslora: bool = False,
    fan_in_fan_out: bool = False,
) -> None:
    """Writes every pair of `lora` as an adapter that `peft.PeftModel.from_pretrained` loads.

    An older adapter in the folder is replaced, and stays whole if the new one cannot be written.

    Args:
      directory: the folder for adapter_model.safetensors and adapter_config.json.
      lora: a pytree with the factors: Linen dicts, an nnx.State; other leaves are left alone.
      scale: s, a number or a callable of the pair's path. PEFT's is s up to float64's last digit.
      modules: {regex of the pair's whole path: name of the PyTorch module, a `Split` or a `Join`}.
        Names take the regex's groups as \\1, the indices on the batch axes as {0}, {1}.
      layout: how pairs are named and lie; `lp.layouts.FLAX` by default.
      base_model: what base_model_name_or_path shall say, such as "google-bert/bert-base-uncased".
      task_type: PEFT's, such as "CAUSAL_LM". A classifier's head is not in these files.
      rslora: write use_rslora, so that alpha is s √r instead of s r. Same numbers either way.
      fan_in_fan_out: write it, for base models of Conv1D layers (GPT-2). A and B do not change.

    Raises:
      ValueError: a pair that is incomplete, ambiguous or not in `modules`, or two for one module; a
        pattern that matches nothing; a scale that is not positive.
      OSError: the files cannot be written.
      ImportError: safetensors is not installed.

    Example:
      >>> import jax.numpy as jnp, lorapro_jax as lp, tempfile
      >>> lora = {"query_0": {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 6))}}
      >>> modules = {r"query_(\\d+)": r"encoder.layer.\\1.attention.self.query"}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     lp.peft.save(folder, lora, scale=2.0, modules=modules)

    References:
      LoRA, arXiv:2106.09685, section 4.1; rsLoRA, arXiv:2312.03732, theorem 3.2.
    """
    if task_type is not None:
        check_one_of("task_type", task_type, _peft_files.TASK_TYPES)
    paths, leaves, _ = _layouts.flatten(lora)
    pairs = _layouts.find_pairs(paths, leaves, layout, require_pairs=True)
    if not pairs:
        raise ValueError("lora has no leaves, so there is no adapter to save; pass the parameters")
    shares, adapters = plan(pairs, leaves, modules), {}
    for pair in pairs:
        s = float(scale_at(scale, pair.path))
        a, b = map(np.asarray, _layouts.read(pair, leaves))
        for share in shares[pair.path]:
            adapters[share.module] = Adapter(*take(share, a, b), s)
    folder = pathlib.Path(directory)
    options = {"base_model_name_or_path": base_model, "fan_in_fan_out": fan_in_fan_out}
    _peft_files.write(folder, adapters, rslora=rslora, task_type=task_type, **options)


def load(
    directory: str | os.PathLike,
    like: Any = None,
    *,
    modules: Mapping[str, Target] | None = None,
    layout: Layout | None = None,
) -> tuple[Any, dict[str, float]]:
    """The factors and scales of an adapter that PEFT, or `save`, wrote.

    Without `like`, the module "encoder.layer.0.query" becomes the pair "encoder/layer/0/query".
    With it, the factors go where `modules` says, in that tree's axes and dtypes.

    Args:
      directory: the folder with adapter_model.safetensors and adapter_config.json.
      like: a pytree whose factors (arrays or ShapeDtypeStructs) are to be replaced, of the
        adapter's ranks. Its other leaves are returned as they are.
      modules, layout: of `like`, as in `save`; modules are needed with it, and only there.

    Returns:
      (tree, scales): nested dicts with lora_a (in, r) and lora_b (r, out) at each module, or a tree
      like `like`; and {pair's path: s}, whose `scales.__getitem__` is the `scale` of this library.

    Raises:
      FileNotFoundError: a file of the two is missing.
      ValueError: a file is damaged or a pickle, holds other than plain LoRA on linear layers (DoRA,
        biases, embeddings, ...), contradicts the other file, or does not fit `like`.
      ImportError: safetensors is not installed.

    Example:
      >>> import jax, jax.numpy as jnp, lorapro_jax as lp, tempfile
      >>> lora = {"query": {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.ones((2, 6))}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     lp.peft.save(folder, lora, scale=2.0, modules={"query": "layer.0.query"})
      ...     tree, scales = lp.peft.load(folder)
      >>> scales, jax.tree.map(jnp.shape, tree["layer"]["0"]["query"])
      ({'layer/0/query': 2.0}, {'lora_a': (4, 2), 'lora_b': (2, 6)})
    """
    if (like is None) != (modules is None):
        raise ValueError("pass like= and modules= together, or neither of them")
    adapters = _peft_files.read(pathlib.Path(directory))
    if like is None:
        flat, scales = {}, {}
        for module, (A, B, scale) in adapters.items():
            flat |= {f"{module}.lora_a": jnp.asarray(A.T), f"{module}.lora_b": jnp.asarray(B.T)}
            scales[module.replace(".", "/")] = scale
        return unflatten_dict(flat, sep="."), scales
    paths, leaves, treedef = _layouts.flatten(like)
    pairs = _layouts.find_pairs(paths, leaves, layout, require_pairs=True)
    shares, scales = plan(pairs, leaves, modules or {}), {}
    expected = {share.module for found in shares.values() for share in found}
    missing, further = expected - adapters.keys(), adapters.keys() - expected
    for problem, names in (("has no adapter for", missing), ("also adapts", further)):
        if names:
            raise ValueError(
                f"{directory} {problem} {len(names)} modules: {', '.join(sorted(names)[:3])}; load "
                "it without `like` and `modules`, which must cover them all, to see what it holds"
            )
    for pair in pairs:
        found = [(share, adapters[share.module]) for share in shares[pair.path]]
        by_scale = {adapter.scale: share.module for share, adapter in found}
        if len(by_scale) > 1:
            named = ", ".join(f"{module} {s}" for s, module in by_scale.items())
            raise ValueError(
                f"{pair.path} has one scale for all its modules, but theirs differ: {named}; load "
                "the adapter without `like`, or into a tree with a pair for each"
            )
        (scales[pair.path],) = by_scale
        a, b = map(jnp.asarray, _assemble(pair, leaves, found))
        _layouts.write(pair, a, b, leaves)
    return jax.tree.unflatten(treedef, leaves), scales


def _assemble(pair: Pair, leaves: list, found: list[tuple[Share, Adapter]]) -> list[np.ndarray]:
    """The canonical factors of which each module holds its share; what two share must agree."""
    # The factors' entries numbered from 1: `take` then says where those of A and B belong.
    numbers = []
    for i, axes in ((pair.a, pair.a_axes), (pair.b, pair.b_axes)):
        shape = [leaves[i].shape[axis] for axis in axes.order if axis not in axes.summed]
        numbers.append(1 + np.arange(math.prod(shape)).reshape(shape))
    parts = [(share.module, x, _places(pair, share, x, *numbers)) for share, x in found]
    factors = []
    for k, name in enumerate("ab"):
        entries = np.zeros(1 + numbers[k].size)
        for _, adapter, places in parts:
            entries[places[k]] = adapter[k]
        for _, adapter, places in parts:
            if not np.array_equal(entries[places[k]], adapter[k], equal_nan=True):
                alike = (module for module, _, p in parts if np.array_equal(p[k], places[k]))
                raise ValueError(
                    f"{pair.path} has one {name} for {' and '.join(alike)}, but in the file theirs "
                    "differ; load it into a tree with a pair for each module"
                )
        factors.append(entries[numbers[k]])
    return factors


def _places(pair: Pair, share: Share, adapter: Adapter, a: Any, b: Any) -> tuple[Any, Any]:
    """The number in a and b of each entry of A and B; 0 off a diagonal of joined blocks."""
    A, B = take(share, a, b)
    if (adapter.A.shape, adapter.B.shape) != (A.shape, B.shape):
        rank, joined = divmod(adapter.A.shape[0], len(share.slices))
        hint = f": make `like` with rank {rank}" if rank != pair.rank and not joined else ""
        raise ValueError(
            f"{pair.path} does not fit {share.module}: `like` asks for lora_A {A.shape} and lora_B "
            f"{B.shape}, the file has {adapter.A.shape} and {adapter.B.shape}{hint}"
        )
    if np.any(adapter.A[A == 0]) or np.any(adapter.B[B == 0]):
        raise ValueError(
            f"{share.module} was not made of {len(share.slices)} separate pairs: its lora_"
            f"{share.diagonal.upper()} is not block-diagonal. Load it without `like`"
        )
    return A, B
