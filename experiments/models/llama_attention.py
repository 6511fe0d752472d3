"""Rotary positions and the attention of grouped heads, causal within segments.

Axes as in `experiments.models.llama`: B batch, T and S positions, K key/value heads, G queries per
key/value head, H width of a head; N = K G query heads.

Rope: Su et al., arXiv:2104.09864; grouped heads: Ainslie et al., arXiv:2305.13245.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.models.llama_config import LlamaConfig

_MASKED = -1e9  # finite, so that a position that sees nothing stays finite


class Rope(NamedTuple):
    """The rotations of positions, for all heads."""

    cos: jax.Array  # (B, T, 1, H/2)
    sin: jax.Array  # (B, T, 1, H/2)


class KeysValues(NamedTuple):
    """What an attention reads; of scanned layers with a leading axis L."""

    k: jax.Array  # (B, S, K, H)
    v: jax.Array  # (B, S, K, H)


def rope(config: LlamaConfig, positions_BT: jax.Array, dtype) -> Rope:
    """Dimensions i and i + H/2 turn by their frequency, position by position; float32 at least."""
    wide = jnp.promote_types(dtype, jnp.float32)
    frequencies_11h = jnp.asarray(config.frequencies, wide)[None, None]
    angles_BT1h = (positions_BT.astype(wide)[:, :, None] * frequencies_11h)[:, :, None]
    return Rope(jnp.cos(angles_BT1h), jnp.sin(angles_BT1h))


def rotate(x_BTNH: jax.Array, turns: Rope) -> jax.Array:
    """The heads of all positions, turned."""
    first, second = jnp.split(x_BTNH.astype(turns.cos.dtype), 2, axis=-1)
    cos, sin = turns
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)


def attend(q_BTKGH: jax.Array, read: KeysValues, seen_BTS: jax.Array) -> jax.Array:
    """Grouped-query attention; the softmax in float32 or better."""
    scale, wide = q_BTKGH.shape[-1] ** -0.5, jnp.promote_types(q_BTKGH.dtype, jnp.float32)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH * scale, read.k, preferred_element_type=wide
    )
    scores_BKGTS = jnp.where(seen_BTS[:, None, None], scores_BKGTS, _MASKED)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(read.v.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, read.v)


def seen(slots: int, index, segments_BT, keys_BS) -> jax.Array:
    """Whether a position reads a slot, (B or 1, T, S): not behind it, and of the same segment."""
    if segments_BT is None:
        return jnp.tril(jnp.ones((slots, slots), bool))[None]
    places_T = index + jnp.arange(segments_BT.shape[1])
    causal_1TS = (jnp.arange(slots)[None, :] <= places_T[:, None])[None]
    return causal_1TS & (segments_BT[:, :, None] == keys_BS[:, None, :])


def written(old: jax.Array, new: jax.Array, index) -> jax.Array:
    """`old` (B, S, ...) with `new` (B, T, ...) from slot `index` on."""
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, axis=1)
