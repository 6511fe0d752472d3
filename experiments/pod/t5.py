"""T5 for a slice: the layers of `experiments.models.t5`, stacked along one axis and scanned.

The sums are T5's own; what differs is how they lie. The parameters of a stack's layers are arrays
with a leading axis L, and so are the adapters: a (L, D, r), b (L, r, F). So one layer is compiled
instead of L, and is recomputed in the backward pass where `remat` says so. The activations are told
to stay with their rows of the batch, lest the compiler send them to the kernels' shards instead.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from experiments.models import t5
from experiments.models.t5_config import T5Config
from lorapro_jax import nnx as lora

BASE = T5Config()
THREE_B = T5Config(
    d_model=1024, d_kv=128, d_ff=16_384, num_layers=24, num_decoder_layers=24, num_heads=32
)


@dataclasses.dataclass(frozen=True)
class Scan:
    """How the layers of a T5 are stacked."""

    rank: int  # of the adapters on every linear layer; 0 for none
    alpha: float
    remat: bool = False  # keep one (B, T, D) a layer and recompute the rest
    spec: PartitionSpec | None = None  # of the activations (B, T, D), on the mesh that is set


class ScannedStack(t5.T5Stack):
    """A `T5Stack` whose `layers` are one `T5Layer`, every parameter of which has an axis L."""

    def __init__(self, empty: t5.T5Stack, layers: t5.T5Layer, how: Scan):
        self.config, self.decoder = empty.config, empty.decoder
        self.position, self.norm = empty.position, empty.norm
        self.layers, self.how = layers, how

    def memory(self, encoded_BSD: jax.Array) -> jax.Array:
        """The encoder's output itself: a layer makes its keys and values when it is its turn."""
        return encoded_BSD

    def __call__(self, x_BTD, mask_BS, memory=None, *, rngs=None) -> jax.Array:
        """Hidden states of embeddings, without dropout."""
        assert rngs is None, "dropout is left out"
        positions_T = jnp.arange(x_BTD.shape[1])
        bias_BNTS = self.bias(positions_T, positions_T)
        padding_B11S = jnp.where(mask_BS, 0.0, t5._MASKED).astype(jnp.float32)[:, None, None, :]
        if not self.decoder:
            bias_BNTS = bias_BNTS + padding_B11S
        graph, layers = nnx.split(self.layers)

        def step(x_BTD, state):
            layer = nnx.merge(graph, state)
            read = layer.cross_attention.keys_values(memory) if self.decoder else None
            return self._placed(layer(x_BTD, bias_BNTS, read, padding_B11S)), None

        step = jax.checkpoint(step) if self.how.remat else step
        x_BTD, _ = jax.lax.scan(step, self._placed(x_BTD), layers)
        return self._placed(self.norm(x_BTD))

    def _placed(self, x_BTD: jax.Array) -> jax.Array:
        spec = self.how.spec
        return x_BTD if spec is None else jax.lax.with_sharding_constraint(x_BTD, spec)


def scanned(config: T5Config, how: Scan, *, rngs: nnx.Rngs, **dtypes: Any) -> t5.T5:
    """A T5 of `config` on scanned stacks; `dtypes` are those of `t5.T5`."""

    def made(layers: int, rngs: nnx.Rngs) -> t5.T5:
        sizes = dataclasses.replace(config, num_layers=layers, num_decoder_layers=layers)
        return t5.T5(sizes, rngs=rngs, **dtypes)

    def layer(side: str, rngs: nnx.Rngs) -> t5.T5Layer:
        one = getattr(made(1, rngs), side).layers[0]
        if how.rank:
            wide = jnp.promote_types(one.mlp.wo.param_dtype, jnp.float32)
            lora.add_lora(one, how.rank, how.alpha, targets=t5.ADAPTED, dtype=wide, rngs=rngs)
        return one

    model = made(0, rngs)
    for side, count in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
        stacked = nnx.split_rngs(splits=count)(nnx.vmap(functools.partial(layer, side)))(rngs)
        setattr(model, side, ScannedStack(getattr(model, side), stacked, how))
    return model
