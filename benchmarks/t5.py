"""The adapters of T5-base: names and shapes of its linear maps, and trees of pairs of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lorapro_jax as lp
from experiments.pod.step import updated

LAYERS, WIDTH, MLP_WIDTH = 12, 768, 3072  # T5-base's
SCALE, RATE = 2.0, 1e-4  # no cost depends on them

Shapes = dict[str, tuple[int, int]]  # name -> (m, n)


def layer(attentions: tuple[str, ...]) -> Shapes:
    """The linear maps of one layer with these attentions."""
    square = {f"{attention}/{x}": (WIDTH, WIDTH) for attention in attentions for x in "qkvo"}
    return square | {"wi": (WIDTH, MLP_WIDTH), "wo": (MLP_WIDTH, WIDTH)}


ENCODER, DECODER = layer(("self",)), layer(("self", "cross"))


def base() -> Shapes:
    """The 192 linear maps of T5-base."""
    return {
        f"{stack}/layers/{i}/{place}": shape
        for stack, maps in (("encoder", ENCODER), ("decoder", DECODER))
        for i in range(LAYERS)
        for place, shape in maps.items()
    }


def abstract(shapes: Shapes, rank: int, batch: tuple[int, ...] = ()) -> dict:
    """{name: {lora_a (*batch, m, r), lora_b (*batch, r, n)}} in float32, without arrays."""

    def factor(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*batch, *shape), jnp.float32)

    return {
        name: {"lora_a": factor(m, rank), "lora_b": factor(rank, n)}
        for name, (m, n) in shapes.items()
    }


def normal(tree: Any, seed: int) -> Any:
    """Arrays of normals of size 1/30, about that of a trained factor."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32) / np.float32(30)), tree
    )


def transformations(layout: lp.Layout | None = None) -> dict[str, Any]:
    """{variant: transformation of the factors}; none of them decays weights."""
    adamw = optax.adamw(RATE, weight_decay=0.0)
    return {
        "adamw": adamw,
        "chain": optax.chain(lp.lorapro(SCALE, layout=layout), adamw),
        "factored": lp.lorapro_adamw(RATE, SCALE, mode="factored", layout=layout),
        "full": lp.lorapro_adamw(RATE, SCALE, mode="full", layout=layout),
        "muon": lp.lorapro_muon(RATE, SCALE, layout=layout),
    }


def step(tx: optax.GradientTransformation) -> Any:
    """The jitted step (params, state, grads) -> (params, state), of donated buffers."""
    return jax.jit(
        lambda params, state, grads: updated(tx, grads, state, params), donate_argnums=(0, 1)
    )
