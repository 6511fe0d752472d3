"""Parameter paths as strings, the same for Linen, NNX and optax trees: `layers/0/query/lora_a`."""

import difflib
from collections.abc import Iterable

import jax

# nnx.State[Variable] and Linen's boxes put one more key behind a parameter's name;
# the pure trees that nnx.Optimizer passes to `update` do not.
_WRAPPER_KEYS = frozenset({"value", "raw_value", "array"})


def _key_str(key) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def path_str(path: tuple) -> str:
    """The normalised path of a leaf: keys joined by "/", a wrapper's attribute removed."""
    keys = list(path)
    while (
        keys and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name in _WRAPPER_KEYS
    ):
        keys.pop()
    return "/".join(_key_str(key) for key in keys)


def no_match_error(what: str, pattern: str, candidates: Iterable[str]) -> ValueError:
    """The error for a pattern that matches nothing: names it and the paths that come closest."""
    candidates = sorted(set(candidates))
    near = difflib.get_close_matches(pattern, candidates, n=3, cutoff=0.3) or candidates[:3]
    shown = ", ".join(near) if near else "there is none to match"
    return ValueError(
        f"{what} {pattern!r} matches none of {len(candidates)} paths; it is compared with the "
        f"whole path (re.fullmatch). Nearest: {shown}"
    )
