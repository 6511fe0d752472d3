"""T5, v1.0 and v1.1, in Flax NNX: an encoder and a decoder of pre-norm layers.

    x <- x + attention(norm(x));  in the decoder x <- x + attention(norm(x), memory)
    x <- x + mlp(norm(x))

Scores are q kᵀ without a scale, plus a bias by the distance of the two positions, which all layers
of a stack share. Norms are RMS norms, linears have no bias.

Axes: B batch, T positions that attend, S positions attended to, D width, N heads, H width of a
head, F width of the MLP, V vocabulary. `dtype` is that of the activations, `param_dtype` that of
the weights; softmax, norms and logits are float32 or better whatever they are.

Raffel et al., arXiv:1910.10683; v1.1: Shazeer, arXiv:2002.05202 (gated MLP), and a head of its own.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.models.rows import rows_stay
from experiments.models.t5_config import ACTIVATIONS, T5Config

ADAPTED = r".*/(q|k|v|o|wi|wi_0|wi_1|wo)"  # every linear but the head
_MASKED = -1e9  # finite, so that a row without a token stays finite


class KeysValues(NamedTuple):
    """What an attention reads of a sequence."""

    k: jax.Array  # (B, S, N, H)
    v: jax.Array  # (B, S, N, H)


class _Made(NamedTuple):
    """How the parts of one model are made."""

    config: T5Config
    dtype: Any
    param_dtype: Any
    remat: bool
    rngs: nnx.Rngs

    def linear(self, d_in: int, d_out: int, std: float) -> nnx.Linear:
        return nnx.Linear(
            d_in, d_out, use_bias=False, kernel_init=self._normal(std), **self._common
        )

    def table(self, rows: int, width: int, std: float) -> nnx.Embed:
        return nnx.Embed(rows, width, embedding_init=self._normal(std), **self._common)

    def norm(self) -> nnx.RMSNorm:
        return nnx.RMSNorm(
            self.config.d_model, epsilon=self.config.layer_norm_epsilon, **self._common
        )

    def _normal(self, std: float):
        return nnx.initializers.normal(self.config.initializer_factor * std)

    @property
    def _common(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": self.rngs}


class T5Attention(nnx.Module):
    """Multi-head attention of one sequence to itself or to another."""

    def __init__(self, made: _Made):
        c = made.config
        inner = c.num_heads * c.d_kv
        self.num_heads = c.num_heads
        self.q = made.linear(c.d_model, inner, (c.d_model * c.d_kv) ** -0.5)
        self.k = made.linear(c.d_model, inner, c.d_model**-0.5)
        self.v = made.linear(c.d_model, inner, c.d_model**-0.5)
        self.o = made.linear(inner, c.d_model, inner**-0.5)
        self.dropout = nnx.Dropout(c.dropout_rate)

    def keys_values(self, x_BSD: jax.Array) -> KeysValues:
        """What `self` reads of a sequence."""
        return KeysValues(self._heads(self.k(x_BSD)), self._heads(self.v(x_BSD)))

    def __call__(self, x_BTD, read: KeysValues, bias_BNTS, *, rngs=None) -> jax.Array:
        """o(softmax(q kᵀ + bias) v), (B, T, D)."""
        scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", self._heads(self.q(x_BTD)), read.k)
        weights_BNTS = jax.nn.softmax(_wide(scores_BNTS) + bias_BNTS, axis=-1)
        weights_BNTS = _dropped(self.dropout, weights_BNTS.astype(read.v.dtype), rngs)
        attended_BTNH = jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, read.v)
        return self.o(attended_BTNH.reshape(*x_BTD.shape[:2], -1))

    def _heads(self, x_BTD: jax.Array) -> jax.Array:
        return x_BTD.reshape(*x_BTD.shape[:2], self.num_heads, -1)


class T5MLP(nnx.Module):
    """wo(relu(wi(x))), or the gated wo(act(wi_0(x)) * wi_1(x))."""

    def __init__(self, made: _Made):
        c = made.config
        self.gated, self.activation = ACTIVATIONS[c.feed_forward_proj]
        for name in ("wi_0", "wi_1") if self.gated else ("wi",):
            setattr(self, name, made.linear(c.d_model, c.d_ff, c.d_model**-0.5))
        self.wo = made.linear(c.d_ff, c.d_model, c.d_ff**-0.5)
        self.dropout = nnx.Dropout(c.dropout_rate)

    def __call__(self, x_BTD: jax.Array, *, rngs=None) -> jax.Array:
        """(B, T, D) to (B, T, D)."""
        if self.gated:
            inner_BTF = self.activation(self.wi_0(x_BTD)) * self.wi_1(x_BTD)
        else:
            inner_BTF = self.activation(self.wi(x_BTD))
        return self.wo(_dropped(self.dropout, inner_BTF, rngs))


class T5Layer(nnx.Module):
    """One layer of a stack; the decoder's (`cross`) attends to the encoder's output too."""

    def __init__(self, made: _Made, *, cross: bool):
        self.cross = cross
        self.attention, self.attention_norm = T5Attention(made), made.norm()
        if cross:
            self.cross_attention, self.cross_norm = T5Attention(made), made.norm()
        self.mlp, self.mlp_norm = T5MLP(made), made.norm()
        self.dropout = nnx.Dropout(made.config.dropout_rate)

    def __call__(
        self, x_BTD, bias_BNTS, memory=None, memory_bias_B11S=None, *, rngs=None
    ) -> jax.Array:
        """(B, T, D) to (B, T, D)."""
        drop = functools.partial(_dropped, self.dropout, rngs=rngs)
        y_BTD = self.attention_norm(x_BTD)
        read = self.attention.keys_values(y_BTD)
        x_BTD = x_BTD + drop(self.attention(y_BTD, read, bias_BNTS, rngs=rngs))
        if self.cross:
            y_BTD = self.cross_norm(x_BTD)
            seen_BTD = self.cross_attention(y_BTD, memory, memory_bias_B11S, rngs=rngs)
            x_BTD = x_BTD + drop(seen_BTD)
        return x_BTD + drop(self.mlp(self.mlp_norm(x_BTD), rngs=rngs))


class T5Stack(nnx.Module):
    """The encoder, or the causal decoder."""

    def __init__(self, made: _Made, layers: int, *, decoder: bool):
        c = made.config
        self.config, self.decoder, self.remat = c, decoder, made.remat
        self.position = made.table(c.relative_attention_num_buckets, c.num_heads, c.d_model**-0.5)
        self.layers = nnx.List(T5Layer(made, cross=decoder) for _ in range(layers))
        self.norm = made.norm()
        self.dropout = nnx.Dropout(c.dropout_rate)

    def memory(self, encoded_BSD: jax.Array) -> list[KeysValues]:
        """What the cross-attention of every layer reads, once for all positions decoded."""
        return [layer.cross_attention.keys_values(encoded_BSD) for layer in self.layers]

    def __call__(self, x_BTD, mask_BS, memory=None, *, rngs=None) -> jax.Array:
        """Hidden states of embeddings; `mask` is the encoder's input's, in both stacks."""
        positions_T = jnp.arange(x_BTD.shape[1])
        bias_BNTS = self.bias(positions_T, positions_T)
        padding_B11S = jnp.where(mask_BS, 0.0, _MASKED).astype(jnp.float32)[:, None, None, :]
        if not self.decoder:
            bias_BNTS = bias_BNTS + padding_B11S
        x_BTD = _dropped(self.dropout, x_BTD, rngs)
        for i, layer in enumerate(self.layers):
            read_of = None if memory is None else memory[i]
            args = rows_stay(x_BTD), bias_BNTS, read_of, padding_B11S
            x_BTD = _rematerialised(layer, *args, rngs) if self.remat else layer(*args, rngs=rngs)
        return _dropped(self.dropout, self.norm(x_BTD), rngs)

    def bias(self, queries_T: jax.Array, keys_S: jax.Array) -> jax.Array:
        """What is added to the scores for the positions, (1, N, T, S), float32 or better."""
        far = self.config.relative_attention_max_distance
        distance_TS = keys_S[None, :] - queries_T[:, None]
        bucket_of = buckets_by_distance(self.config, causal=self.decoder)
        bucket_TS = jnp.asarray(bucket_of)[jnp.clip(distance_TS, -far, far) + far]
        bias_TSN = _wide(self.position.embedding[...])[bucket_TS]
        if self.decoder:
            bias_TSN = jnp.where((distance_TS <= 0)[..., None], bias_TSN, _MASKED)
        return jnp.transpose(bias_TSN, (2, 0, 1))[None]


class T5(nnx.Module):
    """Token ids to the logits of the next ones: `model(tokens, mask, inputs) -> (B, T, V)`.

    Args:
      config: the sizes.
      tied: whether the head is the embedding; v1.1 has one of its own.
      dtype: of the activations.
      param_dtype: of the weights.
      remat: whether the backward pass computes every layer anew instead of keeping what is in it.
      rngs: draws the weights, as T5's pre-training did.
    """

    def __init__(
        self,
        config: T5Config,
        *,
        tied: bool = True,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        made = _Made(config, dtype, param_dtype, remat, rngs)
        self.config = config
        self.tied = tied
        self.shared = made.table(config.vocab_size, config.d_model, 1.0)
        self.encoder = T5Stack(made, config.num_layers, decoder=False)
        self.decoder = T5Stack(made, config.num_decoder_layers, decoder=True)
        if not tied:
            self.lm_head = made.linear(config.d_model, config.vocab_size, 1.0)

    def encode(self, tokens_BS: jax.Array, mask_BS: jax.Array, *, rngs=None) -> jax.Array:
        """The encoder's hidden states (B, S, D); those where `mask` is False mean nothing."""
        return self.encoder(self.shared(tokens_BS), mask_BS, rngs=rngs)

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Of the decoder's hidden states, (B, T, V), float32 or better."""
        if self.config.scale_decoder_outputs:
            hidden_BTD = hidden_BTD * self.config.d_model**-0.5
        table = self.shared.embedding[...].T if self.tied else self.lm_head.kernel[...]
        table_DV = table.astype(hidden_BTD.dtype)
        wide = jnp.promote_types(hidden_BTD.dtype, jnp.float32)
        return jnp.matmul(hidden_BTD, table_DV, preferred_element_type=wide)

    def __call__(self, tokens_BS, mask_BS, inputs_BT, *, rngs=None) -> jax.Array:
        """Logits (B, T, V) of the token that follows each of `inputs`; dropout if `rngs` is given.

        Args:
          tokens_BS: the encoder's input.
          mask_BS: which of it are tokens.
          inputs_BT: the decoder's, which start with `decoder_start_token_id` (`shifted`).
          rngs: with a "dropout" stream, in training.
        """
        memory = self.decoder.memory(self.encode(tokens_BS, mask_BS, rngs=rngs))
        hidden_BTD = self.decoder(self.shared(inputs_BT), mask_BS, memory, rngs=rngs)
        return self.logits(hidden_BTD)

    def shifted(self, targets_BT: jax.Array) -> jax.Array:
        """The decoder's inputs for targets: the start token, then all targets but the last."""
        start = jnp.full_like(targets_BT[:, :1], self.config.decoder_start_token_id)
        return jnp.concatenate([start, targets_BT[:, :-1]], axis=1)


def token_loss(logits_BTV: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Mean cross-entropy of the unmasked target tokens, in nats; 0 where there is none."""
    losses_BT = optax.losses.softmax_cross_entropy_with_integer_labels(logits_BTV, targets_BT)
    weights_BT = mask_BT.astype(losses_BT.dtype)
    return jnp.sum(losses_BT * weights_BT) / jnp.maximum(jnp.sum(weights_BT), 1.0)


def buckets_by_distance(config: T5Config, *, causal: bool) -> np.ndarray:
    """The bucket of every distance key - query from -max_distance to max_distance, int32.

    Half of a direction's buckets hold one distance each, the others stretch evenly in log distance
    up to max_distance; from there on all is one bucket. A decoder has one direction. A table, for
    its logarithms decide on integers: they are not left to an accelerator's rounding.
    """
    buckets = config.relative_attention_num_buckets
    max_distance = config.relative_attention_max_distance
    distances = np.arange(-max_distance, max_distance + 1)
    offset, size = np.zeros_like(distances), np.maximum(-distances, 0)
    if not causal:
        buckets //= 2
        offset, size = np.where(distances > 0, buckets, 0), np.abs(distances)
    exact = buckets // 2
    logs = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact))
    far = exact + (logs / math.log(max_distance / exact) * (buckets - exact)).astype(np.int32)
    return (offset + np.where(size < exact, size, np.minimum(far, buckets - 1))).astype(np.int32)


@nnx.remat
def _rematerialised(layer: T5Layer, x_BTD, bias_BNTS, memory, memory_bias_B11S, rngs) -> jax.Array:
    return layer(x_BTD, bias_BNTS, memory, memory_bias_B11S, rngs=rngs)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _dropped(dropout: nnx.Dropout, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
    return dropout(x, deterministic=rngs is None, rngs=rngs)
