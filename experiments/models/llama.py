"""Llama, Qwen2 and Qwen3 in Flax NNX: one decoder, its layers listed, or stacked and scanned.

    x <- x + o(attention(norm(x)));  x <- x + down(silu(gate(norm(x))) * up(norm(x)))

Axes: B batch, T and S positions, D width, K key/value heads, G queries per key/value head, H width
of a head, F width of the MLP, V vocabulary; N = K G query heads. Scanned, the parameters of all
layers lie in arrays with a leading axis L, and so do the adapters: a (L, D, r), b (L, r, F); one
layer is compiled instead of L.

Rows may hold several texts (`segments`, from 1; 0 is padding): a position sees those of its own
segment that are not behind it. `dtype` is that of the activations, `param_dtype` that of the
weights; softmax, norms and logits are float32 or better whatever they are.

Touvron et al., arXiv:2307.09288; Yang et al. (Qwen2, Qwen3), arXiv:2407.10671, arXiv:2505.09388.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from experiments.models.llama_attention import KeysValues, Rope, attend, rope, rotate, seen, written
from experiments.models.llama_config import TINY, LlamaConfig
from experiments.models.rows import rows_stay
from lorapro_jax import nnx as lora

__all__ = ["ADAPTED", "TINY", "Cache", "Llama", "LlamaConfig", "adapt", "next_token_loss"]

ADAPTED = r"(.*/)?(q|k|v|o|gate|up|down)"  # every linear of a layer


class Cache(NamedTuple):
    """The keys and values of the positions so far, with room for more."""

    layers: Any  # KeysValues with a leading axis L of scanned layers, else a list of L
    segments: jax.Array  # (B, S), int32; 0 in slots that nothing reads
    index: jax.Array  # int32, (): the slot that is written next, of every row


class _Made(NamedTuple):
    """How the parts of one model are made."""

    config: LlamaConfig
    dtype: Any
    param_dtype: Any

    def linear(self, d_in: int, d_out: int, bias: bool, rngs: nnx.Rngs, **options) -> nnx.Linear:
        return nnx.Linear(d_in, d_out, use_bias=bias, **self._dtypes, **options, rngs=rngs)

    def norm(self, width: int, rngs: nnx.Rngs) -> nnx.RMSNorm:
        return nnx.RMSNorm(width, epsilon=self.config.rms_norm_eps, **self._dtypes, rngs=rngs)

    def table(self, rngs: nnx.Rngs) -> nnx.Embed:
        c = self.config
        return nnx.Embed(c.vocab_size, c.hidden_size, **self._dtypes, rngs=rngs)

    @property
    def _dtypes(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}


class LlamaLayer(nnx.Module):
    """One block: attention, then the gated MLP."""

    def __init__(self, made: _Made, rngs: nnx.Rngs):
        self.config = c = made.config
        queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.attention_norm = made.norm(c.hidden_size, rngs)
        self.q = made.linear(c.hidden_size, queries, c.attention_bias, rngs)
        self.k = made.linear(c.hidden_size, keys, c.attention_bias, rngs)
        self.v = made.linear(c.hidden_size, keys, c.attention_bias, rngs)
        self.o = made.linear(queries, c.hidden_size, c.output_bias, rngs)
        if c.head_norms:
            self.q_norm, self.k_norm = made.norm(c.head_dim, rngs), made.norm(c.head_dim, rngs)
        self.mlp_norm = made.norm(c.hidden_size, rngs)
        self.gate = made.linear(c.hidden_size, c.intermediate_size, c.mlp_bias, rngs)
        self.up = made.linear(c.hidden_size, c.intermediate_size, c.mlp_bias, rngs)
        self.down = made.linear(c.intermediate_size, c.hidden_size, c.mlp_bias, rngs)

    def __call__(
        self, x_BTD, turns: Rope, seen_BTS, past: KeysValues | None = None, index=0
    ) -> tuple[jax.Array, KeysValues | None]:
        """(x after both halves of the block, `past` with x's keys and values from `index` on)."""
        q_BTNH, new = self.queries_keys_values(self.attention_norm(x_BTD), turns)
        read = new if past is None else KeysValues(*map(written, past, new, (index, index)))
        grouped = *new.k.shape[:3], -1, self.config.head_dim
        attended_BTKGH = attend(q_BTNH.reshape(grouped), read, seen_BTS)
        x_BTD = x_BTD + self.o(attended_BTKGH.reshape(*x_BTD.shape[:2], -1))
        y_BTD = self.mlp_norm(x_BTD)
        x_BTD = x_BTD + self.down(nnx.silu(self.gate(y_BTD)) * self.up(y_BTD))
        return x_BTD, None if past is None else read

    def queries_keys_values(self, y_BTD: jax.Array, turns: Rope) -> tuple[jax.Array, KeysValues]:
        """(q (B, T, N, H), keys and values), turned."""
        heads = *y_BTD.shape[:2], -1, self.config.head_dim
        q_BTNH, k_BTKH = self.q(y_BTD).reshape(heads), self.k(y_BTD).reshape(heads)
        if self.config.head_norms:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        v_BTKH = self.v(y_BTD).reshape(heads)
        return rotate(q_BTNH, turns), KeysValues(rotate(k_BTKH, turns), v_BTKH)


class Llama(nnx.Module):
    """Token ids to the logits of the next ones: `model(tokens) -> (B, T, V)`.

    Args:
      config: the sizes.
      scanned: whether the layers are one stack that a scan goes through.
      remat: whether the backward pass computes every layer anew instead of keeping what is in it.
      dtype: of the activations.
      param_dtype: of the weights.
      spec: how activations (B, T, D) lie on the mesh that `jax.set_mesh` set; by default their rows
        stay where those of the batch are.
      rngs: draws the weights.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        scanned: bool = False,
        remat: bool = False,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        spec: PartitionSpec | None = None,
        rngs: nnx.Rngs,
    ):
        made = _Made(config, dtype, param_dtype)
        self.config, self.scanned, self.remat = config, scanned, remat
        self.dtype, self.spec = dtype, spec
        self.embedding = made.table(rngs)
        if scanned:
            stacked = nnx.split_rngs(splits=config.num_hidden_layers)(
                nnx.vmap(LlamaLayer, in_axes=(None, 0))
            )
            self.layers = stacked(made, rngs)
        else:
            self.layers = nnx.List(LlamaLayer(made, rngs) for _ in range(config.num_hidden_layers))
        self.norm = made.norm(config.hidden_size, rngs)
        if not config.tie_word_embeddings:
            wide = {"preferred_element_type": jnp.promote_types(dtype, jnp.float32)}
            self.head = made.linear(config.hidden_size, config.vocab_size, False, rngs, **wide)

    def __call__(self, tokens_BT, positions_BT=None, segments_BT=None) -> jax.Array:
        """Logits (B, T, V) of the token after each position, float32 or better.

        Args:
          tokens_BT: the texts; those of a row that are shorter are padded at either end.
          positions_BT: of the tokens in their texts, where a row holds several or is padded at its
            start; 0, 1, 2, ... by default.
          segments_BT: the number of the text that a token belongs to, from 1; 0 is padding. By
            default a row is one text.
        """
        return self.logits(self.hidden(tokens_BT, positions_BT, segments_BT)[0])

    def hidden(
        self, tokens_BT, positions_BT=None, segments_BT=None, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """(hidden states (B, T, D), the cache with these positions in it), arguments as above.

        Raises:
          ValueError: the positions are more than the model's context, or than the cache has room.
        """
        length, index = tokens_BT.shape[1], 0 if cache is None else cache.index
        self.check_length(length)
        if cache is not None and length > (room := cache.segments.shape[1]):
            raise ValueError(f"{length} positions; the cache has {room}: make a larger one")
        if positions_BT is None:
            positions_BT = (index + jnp.arange(length))[None]
        keys_BS = segments_BT
        if cache is not None:
            if segments_BT is None:
                segments_BT = jnp.ones_like(tokens_BT)
            keys_BS = written(cache.segments, segments_BT, index)
        seen_BTS = seen(length if cache is None else keys_BS.shape[1], index, segments_BT, keys_BS)
        args = rope(self.config, positions_BT, self.dtype), seen_BTS
        x_BTD = self._placed(self.embedding(tokens_BT))
        x_BTD, layers = self._through(x_BTD, *args, cache and cache.layers, index)
        return self.norm(x_BTD), cache and Cache(layers, keys_BS, index + length)

    def _through(self, x_BTD, turns, seen_BTS, pasts, index):
        """(x after all layers, their keys and values).

        In a scan and in `jax.checkpoint` layers run as functions of their parameters; what they
        change, the counts of a dropout's keys, is given back to them. Otherwise they are called as
        they are: Qwix adds its adapters to a module while that is called.
        """

        def layer(graph, x_BTD, states):
            params, others, past = states
            module = nnx.merge(graph, params, others)
            x_BTD, read = module(x_BTD, turns, seen_BTS, past, index)
            return self._placed(x_BTD), (nnx.state(module, nnx.RngState), read)

        def run(module, x_BTD, past):
            graph, *states = nnx.split(module, nnx.Param, ...)
            call = functools.partial(layer, graph)
            if self.remat and past is None:
                call = jax.checkpoint(call)
            given = x_BTD, (*states, past)
            x_BTD, (counts, read) = jax.lax.scan(call, *given) if self.scanned else call(*given)
            nnx.update(module, counts)
            return x_BTD, read

        if self.scanned:
            return run(self.layers, x_BTD, pasts)
        reads = []
        for i, module in enumerate(self.layers):
            past = pasts and pasts[i]
            if self.remat:
                x_BTD, read = run(module, x_BTD, past)
            else:
                x_BTD, read = module(x_BTD, turns, seen_BTS, past, index)
                x_BTD = self._placed(x_BTD)
            reads.append(read)
        return x_BTD, reads

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Of hidden states, (B, T, V), float32 or better."""
        wide = jnp.promote_types(hidden_BTD.dtype, jnp.float32)
        if not self.config.tie_word_embeddings:
            return self.head(hidden_BTD).astype(wide)
        table_DV = self.embedding.embedding[...].T.astype(hidden_BTD.dtype)
        return jnp.matmul(hidden_BTD, table_DV, preferred_element_type=wide)

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """A cache with room for that many positions of each row."""
        self.check_length(slots)
        c = self.config
        shape = batch, slots, c.num_key_value_heads, c.head_dim
        if self.scanned:
            layers = KeysValues(*[jnp.zeros((c.num_hidden_layers, *shape), self.dtype)] * 2)
        else:
            layers = [
                KeysValues(*[jnp.zeros(shape, self.dtype)] * 2) for _ in range(c.num_hidden_layers)
            ]
        return Cache(layers, jnp.zeros((batch, slots), jnp.int32), jnp.int32(0))

    def check_length(self, length: int) -> None:
        """Raises a ValueError for rows longer than the model's context."""
        if length > (most := self.config.max_position_embeddings):
            raise ValueError(
                f"{length} positions; the model's context, max_position_embeddings, has {most}: "
                "shorten the texts or ask for fewer new tokens"
            )

    def _placed(self, x_BTD: jax.Array) -> jax.Array:
        if self.spec is None:
            return rows_stay(x_BTD)
        return jax.lax.with_sharding_constraint(x_BTD, self.spec)


def adapt(
    model: Llama, rank: int = 8, alpha: float = 16.0, *, targets=ADAPTED, rngs: nnx.Rngs, **options
) -> None:
    """`lorapro_jax.nnx.add_lora` in place, also where the layers are stacked.

    Args:
      model: without adapters.
      rank, alpha: as there.
      targets: compared with the path in the model ("layers/0/q"), or in a layer ("q") if they are
        stacked.
      rngs: draws the factors.
      options: as there.
    """
    if not model.scanned:
        lora.add_lora(model, rank, alpha, targets=targets, rngs=rngs, **options)
        return
    graph, states = nnx.split(model.layers)

    def adapted(state, rngs: nnx.Rngs) -> LlamaLayer:
        layer = nnx.merge(graph, state)
        lora.add_lora(layer, rank, alpha, targets=targets, rngs=rngs, **options)
        return layer

    stacked = nnx.split_rngs(splits=model.config.num_hidden_layers)(nnx.vmap(adapted))
    model.layers = stacked(states, rngs)


def next_token_loss(model: Llama, tokens_BT: jax.Array) -> jax.Array:
    """Mean cross-entropy of every token but the first, given those before it."""
    logits_BTV = model(tokens_BT)[:, :-1]
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT[:, 1:])
    return jnp.mean(losses_BT)
