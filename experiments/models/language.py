"""A decoder as the training loop sees it: the loss of the answers' tokens, and nothing else.

A position predicts the next token; it counts where that token is of segment 1 and no padding. The
logits (B, T, V) are never whole: they are computed for a chunk of positions at a time, and once
more in the backward pass.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.models.llama import Llama

CHUNK = 64  # positions whose logits are held at once, at most


class LanguageModel(nnx.Module):
    """Of a batch (tokens, mask, segments, each (B, T)) the losses of what is learnt."""

    def __init__(self, llama: Llama):
        self.llama = llama
        self.label_smoothing = 0.0  # of the losses that are trained on

    def __call__(self, tokens_BT, mask_BT, segments_BT, *, rngs=None) -> jax.Array:
        """(B, 2): the summed cross-entropy of a row's answers, and their number of tokens."""
        del rngs
        losses_BT, weights_BT = self._learnt(tokens_BT, mask_BT, segments_BT, 0.0)
        return jnp.stack([jnp.sum(losses_BT * weights_BT, 1), jnp.sum(weights_BT, 1)], axis=1)

    def losses(
        self, tokens_BT, mask_BT, segments_BT, labels_B=None, *, rngs=None
    ) -> tuple[jax.Array, jax.Array]:
        """Cross-entropy of the token after each position, and which of them count, (B, T).

        Of smoothed labels if there is `label_smoothing`.
        """
        del labels_B, rngs
        return self._learnt(tokens_BT, mask_BT, segments_BT, self.label_smoothing)

    def _learnt(self, tokens_BT, mask_BT, segments_BT, smoothing: float):
        hidden_BTD, _ = self.llama.hidden(tokens_BT)
        learnt_BT = (segments_BT == 1) & mask_BT
        targets_BT = jnp.roll(tokens_BT, -1, axis=1)
        counts_BT = jnp.roll(learnt_BT, -1, axis=1).at[:, -1].set(False)
        losses_BT = self._losses(hidden_BTD, targets_BT, smoothing)
        return losses_BT, counts_BT.astype(losses_BT.dtype)

    def _losses(self, hidden_BTD: jax.Array, targets_BT: jax.Array, smoothing: float) -> jax.Array:
        batch, length = targets_BT.shape
        count = -(-length // CHUNK)
        size = -(-length // count)

        def cut(x: jax.Array) -> jax.Array:  # (B, T, ...) -> (count, B, size, ...)
            x = jnp.pad(x, [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2))
            return jnp.swapaxes(x.reshape(batch, count, size, *x.shape[2:]), 0, 1)

        @jax.checkpoint
        def losses(chunk) -> jax.Array:
            hidden_BCD, targets_BC = chunk
            logits_BCV = self.llama.logits(hidden_BCD)
            losses_BC = optax.softmax_cross_entropy_with_integer_labels(logits_BCV, targets_BC)
            if not smoothing:
                return losses_BC
            uniform_BC = jax.nn.logsumexp(logits_BCV, axis=-1) - jnp.mean(logits_BCV, axis=-1)
            return losses_BC + smoothing * (uniform_BC - losses_BC)

        losses_NBC = jax.lax.map(losses, (cut(hidden_BTD), cut(targets_BT)))
        return jnp.swapaxes(losses_NBC, 0, 1).reshape(batch, -1)[:, :length]
