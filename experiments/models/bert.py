"""A BERT encoder in Flax NNX, post-LN blocks over x (B T, D), and a mean-pooled classifier.

    x <- norm(x + attention(x));  x <- norm(x + down(gelu(up(x))))

Axes: B batch, T and S positions, D width, N heads, H width of a head, F width of the MLP,
C classes; P = B T, the positions of the whole batch in one axis. Parameters are float32; `dtype`
is that of the activations. A block works on (P, D) from end to end: every linear, its gradient and
any adapter on it is then one matrix product.
"""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.models import weights
from experiments.models.rows import rows_stay
from experiments.storage import read_json

# Added to the scores of padded positions: finite, so that a row that is all padding stays finite.
_MASKED = -1e9


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The sizes of an encoder, under the names that Hugging Face's config.json gives them."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; every head needs the same width"
            )

    @classmethod
    def from_json(cls, path: str | pathlib.Path) -> "BertConfig":
        """Reads a Hugging Face config.json; ignores the keys that do not change the forward pass.

        Raises:
            ValueError: the file describes another architecture, or lacks a size.
        """
        path = pathlib.Path(path)
        found = read_json(path, (), "a model's configuration", weights.REMEDY)
        expected = {
            "model_type": "bert",
            "hidden_act": "gelu",
            "position_embedding_type": "absolute",
        }
        for key, value in expected.items():
            if found.get(key, value) != value:
                raise ValueError(
                    f"{path}: {key} is {found[key]!r}, this encoder computes {value!r}"
                )
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        return weights.config(cls, found, path, required)


def gelu(x: jax.Array) -> jax.Array:
    """The exact gelu, x Phi(x), which BERT was trained with."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))


def _linear(d_in: int, d_out: int, config: BertConfig, dtype, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.normal(config.initializer_range)
    return nnx.Linear(
        d_in, d_out, kernel_init=init, dtype=dtype, param_dtype=jnp.float32, rngs=rngs
    )


def _norm(config: BertConfig, dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_eps,
        dtype=dtype,
        param_dtype=jnp.float32,
        use_fast_variance=False,  # E[x²] - E[x]² cancels in float32
        rngs=rngs,
    )


class BertEmbeddings(nnx.Module):
    """Word + position + segment embeddings, normalised."""

    def __init__(self, config: BertConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        def table(rows: int) -> nnx.Embed:
            init = nnx.initializers.normal(config.initializer_range)
            width = config.hidden_size
            return nnx.Embed(
                rows, width, embedding_init=init, dtype=dtype, param_dtype=jnp.float32, rngs=rngs
            )

        self.word = table(config.vocab_size)
        self.position = table(config.max_position_embeddings)
        self.segment = table(config.type_vocab_size)
        self.norm = _norm(config, dtype, rngs)

    def __call__(self, tokens_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
        """The sum of the three embeddings (B, T, D), normalised."""
        length, limit = tokens_BT.shape[1], self.position.num_embeddings
        if length > limit:
            raise ValueError(
                f"{length} tokens in a row, but the encoder has {limit} position embeddings; "
                f"truncate to max_length <= {limit}"
            )
        position_1TD = self.position(jnp.arange(length, dtype=jnp.int32))[None]
        return self.norm(self.word(tokens_BT) + self.segment(segments_BT) + position_1TD)


class BertAttention(nnx.Module):
    """Multi-head self-attention with its residual and norm."""

    def __init__(self, config: BertConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.query = _linear(width, width, config, dtype, rngs)
        self.key = _linear(width, width, config, dtype, rngs)
        self.value = _linear(width, width, config, dtype, rngs)
        self.out = _linear(width, width, config, dtype, rngs)
        self.norm = _norm(config, dtype, rngs)

    def __call__(self, x_PD: jax.Array, bias_B11S: jax.Array) -> jax.Array:
        """norm(x + attention(x)); `bias` is added to the scores."""
        batch, length = bias_B11S.shape[0], bias_B11S.shape[-1]

        def heads(y_PD: jax.Array) -> jax.Array:
            return y_PD.reshape(batch, length, self.num_heads, -1)

        q_BTNH, k_BSNH, v_BSNH = (
            heads(self.query(x_PD)),
            heads(self.key(x_PD)),
            heads(self.value(x_PD)),
        )
        attended_BTNH = attend(q_BTNH, k_BSNH, v_BSNH, bias_B11S)
        return self.norm(x_PD + self.out(attended_BTNH.reshape(x_PD.shape)))


def attend(q_BTNH, k_BSNH, v_BSNH, bias_B11S) -> jax.Array:
    """softmax(q kᵀ / sqrt(H) + bias) v, the softmax in float32 whatever the activations are."""
    scale = q_BTNH.shape[-1] ** -0.5
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH * scale, k_BSNH)
    weights_BNTS = jax.nn.softmax(scores_BNTS.astype(jnp.float32) + bias_B11S, axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS.astype(v_BSNH.dtype), v_BSNH)


class BertLayer(nnx.Module):
    """One block: attention, then the MLP up to F and down again."""

    def __init__(self, config: BertConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.attention = BertAttention(config, dtype=dtype, rngs=rngs)
        self.up = _linear(config.hidden_size, config.intermediate_size, config, dtype, rngs)
        self.down = _linear(config.intermediate_size, config.hidden_size, config, dtype, rngs)
        self.norm = _norm(config, dtype, rngs)

    def __call__(self, x_PD: jax.Array, bias_B11S: jax.Array) -> jax.Array:
        """Both halves of the block, each with its residual and norm."""
        x_PD = self.attention(x_PD, bias_B11S)
        return self.norm(x_PD + self.down(gelu(self.up(x_PD))))


class BertEncoder(nnx.Module):
    """Token ids to hidden states: `encoder(tokens, mask, segments=None) -> (B, T, D)`."""

    def __init__(
        self, config: BertConfig, *, dtype=jnp.float32, remat: bool = False, rngs: nnx.Rngs
    ):
        self.config, self.remat = config, remat
        self.embeddings = BertEmbeddings(config, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            BertLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)
        )

    def __call__(self, tokens_BT, mask_BT, segments_BT=None) -> jax.Array:
        """Hidden states of every position; those where `mask` is False mean nothing."""
        if segments_BT is None:
            segments_BT = jnp.zeros_like(tokens_BT)
        embedded_BTD = self.embeddings(tokens_BT, segments_BT)
        bias_BT = jnp.where(mask_BT, 0.0, _MASKED).astype(jnp.float32)
        x_PD = embedded_BTD.reshape(-1, embedded_BTD.shape[-1])
        call = nnx.remat(BertLayer.__call__) if self.remat else BertLayer.__call__
        for layer in self.layers:
            x_PD = call(layer, rows_stay(x_PD), bias_BT[:, None, None, :])
        return x_PD.reshape(embedded_BTD.shape)


def mean_pool(hidden_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """The mean of the unmasked positions, in float32; zero for a row that has none."""
    mask_BT1 = mask_BT[..., None].astype(jnp.float32)
    count_B1 = jnp.maximum(mask_BT1.sum(axis=1), 1.0)
    return (hidden_BTD.astype(jnp.float32) * mask_BT1).sum(axis=1) / count_B1


class BertClassifier(nnx.Module):
    """An encoder and a linear head on its mean-pooled output."""

    def __init__(
        self,
        config: BertConfig,
        num_labels: int,
        *,
        dropout: float = 0.0,
        dtype=jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        self.encoder = BertEncoder(config, dtype=dtype, remat=remat, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)
        self.head = _linear(config.hidden_size, num_labels, config, jnp.float32, rngs)

    def __call__(self, tokens_BT, mask_BT, segments_BT=None, *, rngs=None) -> jax.Array:
        """Logits (B, C) in float32. Dropout acts on the pooled features where `rngs` is given."""
        pooled_BD = mean_pool(self.encoder(tokens_BT, mask_BT, segments_BT), mask_BT)
        return self.head(self.dropout(pooled_BD, deterministic=rngs is None, rngs=rngs))

    def losses(
        self, tokens_BT, mask_BT, segments_BT, labels_B, *, rngs=None
    ) -> tuple[jax.Array, jax.Array]:
        """Cross-entropy of every row, and how much it counts: 1; both (B, 1)."""
        logits_BC = self(tokens_BT, mask_BT, segments_BT, rngs=rngs)
        losses_B = optax.losses.softmax_cross_entropy_with_integer_labels(logits_BC, labels_B)
        return losses_B[:, None], jnp.ones_like(losses_B)[:, None]

    def embeddings(self, tokens_BT, mask_BT, segments_BT=None) -> jax.Array:
        """Sentence embeddings (B, D): mean-pooled, then scaled to length one."""
        pooled_BD = mean_pool(self.encoder(tokens_BT, mask_BT, segments_BT), mask_BT)
        length_B1 = jnp.linalg.norm(pooled_BD, axis=-1, keepdims=True)
        return pooled_BD / jnp.maximum(length_B1, 1e-12)  # as torch's normalize
