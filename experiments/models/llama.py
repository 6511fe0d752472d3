"""A Llama-shaped decoder in Flax NNX, its layers stacked along one axis and scanned.

    x <- x + o(attention(norm(x)));  x <- x + down(silu(gate(norm(x))) * up(norm(x)))

Axes: B batch, T and S positions, D width, K key/value heads, G queries per key/value head, H width
of a head, F width of the MLP, V vocabulary; N = K G query heads. The parameters of all layers lie
in arrays with a leading axis L, and so do the adapters: a (L, D, r), b (L, r, F). Scanning them
compiles one layer instead of L, and recomputing a layer in the backward pass (`jax.checkpoint`)
keeps one (B, T, D) a layer.

It is synthetic: random weights, for the shapes of the real ones. `nnx.eval_shape` of it holds no
array at all.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from lorapro_jax import nnx as lora

ADAPTED = r"[qkvo]|gate|up|down"  # every linear of a layer


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a decoder; the defaults are Llama 3 8B's."""

    vocab_size: int = 128_256
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_width: int = 128
    mlp_width: int = 14_336
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}; "
                "every key/value head serves the same number of queries"
            )
        if self.head_width % 2:
            raise ValueError(f"head_width {self.head_width} is odd; rotary positions turn halves")


TINY = LlamaConfig(
    vocab_size=64, width=32, layers=3, heads=4, kv_heads=2, head_width=8, mlp_width=48
)


def rotate(x_BTNH: jax.Array, theta: float) -> jax.Array:
    """Rotary positions: dimensions i and i + H/2 turned by T theta^(-2i/H), in float32 at least."""
    half, wide = x_BTNH.shape[-1] // 2, jnp.promote_types(x_BTNH.dtype, jnp.float32)
    frequencies = theta ** (-jnp.arange(half, dtype=wide) / half)
    positions = jnp.arange(x_BTNH.shape[1], dtype=wide)
    angles_1T1H = (positions[:, None] * frequencies[None, :])[None, :, None, :]
    cos, sin = jnp.cos(angles_1T1H), jnp.sin(angles_1T1H)
    first, second = jnp.split(x_BTNH.astype(wide), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)


def attend(q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
    """Causal grouped-query attention; the softmax in float32 or better."""
    scale, wide = q_BTKGH.shape[-1] ** -0.5, jnp.promote_types(q_BTKGH.dtype, jnp.float32)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH * scale, k_BSKH, preferred_element_type=wide
    )
    length = q_BTKGH.shape[1]
    seen_TS = jnp.tril(jnp.ones((length, length), bool))
    scores_BKGTS = jnp.where(seen_TS[None, None, None], scores_BKGTS, -1e9)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH)


class LlamaLayer(nnx.Module):
    """One block: attention, then the gated MLP."""

    def __init__(self, config: LlamaConfig, *, dtype, rngs: nnx.Rngs):
        self.config = config

        def linear(d_in: int, d_out: int) -> nnx.Linear:
            return nnx.Linear(
                d_in, d_out, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs
            )

        queries, keys = config.heads * config.head_width, config.kv_heads * config.head_width
        self.attention_norm = _norm(config, dtype, rngs)
        self.q = linear(config.width, queries)
        self.k = linear(config.width, keys)
        self.v = linear(config.width, keys)
        self.o = linear(queries, config.width)
        self.mlp_norm = _norm(config, dtype, rngs)
        self.gate = linear(config.width, config.mlp_width)
        self.up = linear(config.width, config.mlp_width)
        self.down = linear(config.mlp_width, config.width)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Both halves of the block, each added to its input."""
        x_BTD = x_BTD + self.o(self.attention(self.attention_norm(x_BTD)))
        y_BTD = self.mlp_norm(x_BTD)
        return x_BTD + self.down(nnx.silu(self.gate(y_BTD)) * self.up(y_BTD))

    def attention(self, y_BTD: jax.Array) -> jax.Array:
        """The attended values of all heads, (B, T, N H)."""
        c, (batch, length, _) = self.config, y_BTD.shape
        q_BTNH = self.q(y_BTD).reshape(batch, length, c.heads, c.head_width)
        k_BSKH = self.k(y_BTD).reshape(batch, length, c.kv_heads, c.head_width)
        v_BSKH = self.v(y_BTD).reshape(k_BSKH.shape)
        grouped = batch, length, c.kv_heads, c.heads // c.kv_heads, c.head_width
        q_BTKGH = rotate(q_BTNH, c.rope_theta).reshape(grouped)
        attended_BTKGH = attend(q_BTKGH, rotate(k_BSKH, c.rope_theta), v_BSKH)
        return attended_BTKGH.reshape(batch, length, -1)


def _norm(config: LlamaConfig, dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.width, epsilon=config.norm_eps, dtype=dtype, param_dtype=dtype, rngs=rngs
    )


class Llama(nnx.Module):
    """Token ids to logits: `model(tokens) -> (B, T, V)` in float32 or better.

    Args:
      config: the sizes.
      rank: of the adapters on every linear layer; 0 for none. They are float32 or better.
      alpha: the adapters' scale is alpha / rank.
      dtype: of the frozen weights and of the activations.
      spec: how activations (B, T, D) lie on the mesh that `jax.set_mesh` set; None without one.
      rngs: draws the weights.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        rank: int = 0,
        alpha: float = 32.0,
        dtype=jnp.bfloat16,
        spec: PartitionSpec | None = None,
        rngs: nnx.Rngs,
    ):
        factors = jnp.promote_types(dtype, jnp.float32)

        def layer(rngs: nnx.Rngs) -> LlamaLayer:
            made = LlamaLayer(config, dtype=dtype, rngs=rngs)
            if rank:
                lora.add_lora(made, rank, alpha, targets=ADAPTED, dtype=factors, rngs=rngs)
            return made

        self.spec = spec
        self.embedding = nnx.Embed(
            config.vocab_size, config.width, dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        stacked = nnx.split_rngs(splits=config.layers)(nnx.vmap(layer))
        self.layers = stacked(rngs)
        self.norm = _norm(config, dtype, rngs)
        self.head = nnx.Linear(
            config.width,
            config.vocab_size,
            use_bias=False,
            dtype=dtype,
            param_dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Logits of the token after each position."""
        graph, layers = nnx.split(self.layers)

        @jax.checkpoint
        def layer(x_BTD, state):
            return self._placed(nnx.merge(graph, state)(x_BTD)), None

        x_BTD, _ = jax.lax.scan(layer, self._placed(self.embedding(tokens_BT)), layers)
        logits_BTV = self.head(self.norm(x_BTD))
        return logits_BTV.astype(jnp.promote_types(logits_BTV.dtype, jnp.float32))

    def _placed(self, x_BTD: jax.Array) -> jax.Array:
        return x_BTD if self.spec is None else jax.lax.with_sharding_constraint(x_BTD, self.spec)


def next_token_loss(model: Llama, tokens_BT: jax.Array) -> jax.Array:
    """Mean cross-entropy of every token but the first, given those before it."""
    logits_BTV = model(tokens_BT)[:, :-1]
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT[:, 1:])
    return jnp.mean(losses_BT)
