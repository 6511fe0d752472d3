"""Parameter paths as strings, the same for Linen, NNX and optax trees: `layers/0/query/lora_a`."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

import jax

from lorapro_jax._checks import check_scale

# nnx.State[Variable] and Linen's boxes put one more key behind a parameter's name;
# the pure trees that nnx.Optimizer passes to `update` do not.
_WRAPPERS = tuple(jax.tree_util.GetAttrKey(name) for name in ("value", "raw_value", "array"))


def path_str(path: tuple) -> str:
    """The normalised path of a leaf: keys joined by "/", a wrapper's attribute removed."""
    while path and path[-1] in _WRAPPERS:
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def scale_at(scale: Any, path: str) -> Any:
    """The s of the pair at `path`, of one number for all or a callable of the path."""
    value = scale(path) if callable(scale) else scale
    check_scale(value, f"{path}: scale")
    return value


def check_matches(what: str, patterns: Iterable[str], paths: Iterable[str]) -> None:
    """Raises ValueError for a pattern that matches none of the paths; names those nearest."""
    paths = sorted(set(paths))
    for pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in paths):
            near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.3) or paths[:3]
            raise ValueError(
                f"{what} {pattern!r} matches none of {len(paths)} paths; it is compared with the "
                f"whole path (re.fullmatch). Nearest: {', '.join(near) or 'there is none to match'}"
            )
