"""A T5 that answers with one of a few words: trained on their text, read as a classifier.

The words are a tree of tokens. An answer's likelihood is the product, over the branchings on its
way, of the softmax among the tokens that go on from there: where all words differ in their first
token, the softmax among those. The likelihoods of all answers sum to one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from flax import nnx

from experiments.models.t5 import T5


class Branching(NamedTuple):
    """A place where answers part."""

    prefix: tuple[int, ...]  # the tokens they share up to there
    tokens: tuple[int, ...]  # those that may follow
    choice: tuple[int, ...]  # of each answer, its index into `tokens`; -1 if it does not come here


def branchings(answers: Sequence[tuple[int, ...]]) -> list[Branching]:
    """All of them, from the root on.

    Raises:
        ValueError: two answers are equal, or one is the beginning of another.
    """
    prefixes = dict.fromkeys(answer[:t] for answer in answers for t in range(len(answer)))
    if len(set(answers)) < len(answers) or prefixes.keys() & set(answers):
        raise ValueError(f"the answers {answers} do not differ, or one is another's beginning")
    found = []
    for prefix in sorted(prefixes, key=len):
        here = len(prefix)
        following = [a[here] if a[:here] == prefix and len(a) > here else None for a in answers]
        tokens = tuple(sorted({token for token in following if token is not None}))
        if len(tokens) > 1:
            choice = tuple(-1 if token is None else tokens.index(token) for token in following)
            found.append(Branching(prefix, tokens, choice))
    return found


class T5Classifier(nnx.Module):
    """Logits of the answers, `model(tokens, mask) -> (B, C)`, and the loss of their text.

    Args:
      t5: the model.
      answers: of each class, its tokens, the end-of-sequence token included.
    """

    def __init__(self, t5: T5, answers: Sequence[tuple[int, ...]]):
        self.t5 = t5
        self.answers = tuple(map(tuple, answers))
        branchings(self.answers)  # raises for answers that cannot be told apart

    def __call__(self, tokens_BS, mask_BS, segments_BS=None, *, rngs=None) -> jax.Array:
        """Log-likelihoods of the answers (B, C), float32 or better. There are no segments."""
        del segments_BS
        places = branchings(self.answers)
        prefix_UP, length_U = self._padded([place.prefix for place in places], extra=1)
        count, batch = len(places), tokens_BS.shape[0]
        encoded_BSD = self.t5.encode(tokens_BS, mask_BS, rngs=rngs)
        memory = self.t5.decoder.memory(jnp.repeat(encoded_BSD, count, axis=0))
        inputs_BUP = jnp.broadcast_to(prefix_UP, (batch, *prefix_UP.shape))
        inputs_RP = self.t5.shifted(inputs_BUP.reshape(batch * count, -1))
        hidden_RPD = self.t5.decoder(
            self.t5.shared(inputs_RP), jnp.repeat(mask_BS, count, axis=0), memory, rngs=rngs
        )
        hidden_BUPD = hidden_RPD.reshape(batch, count, *hidden_RPD.shape[1:])
        logits_BUV = self.t5.logits(hidden_BUPD[:, np.arange(count), length_U])
        scores = []
        for i, place in enumerate(places):
            logs_BK = jax.nn.log_softmax(logits_BUV[:, i, np.array(place.tokens)], axis=-1)
            none_BK = jnp.concatenate([logs_BK, jnp.zeros((batch, 1), logs_BK.dtype)], axis=1)
            scores.append(none_BK[:, np.array(place.choice)])  # -1 is the 0 at the end
        return sum(scores[1:], scores[0])

    def losses(
        self, tokens_BS, mask_BS, segments_BS, labels_B, *, rngs=None
    ) -> tuple[jax.Array, jax.Array]:
        """Cross-entropy of every token of the right answers, and which of them count, (B, L)."""
        del segments_BS
        answers_CL, length_C = self._padded(self.answers)
        real_CL = np.arange(answers_CL.shape[1])[None, :] < length_C[:, None]
        targets_BL = jnp.asarray(answers_CL)[labels_B]
        weights_BL = jnp.asarray(real_CL)[labels_B]
        logits_BLV = self.t5(tokens_BS, mask_BS, self.t5.shifted(targets_BL), rngs=rngs)
        losses_BL = optax.losses.softmax_cross_entropy_with_integer_labels(logits_BLV, targets_BL)
        return losses_BL, weights_BL.astype(losses_BL.dtype)

    def _padded(
        self, rows: Sequence[tuple[int, ...]], extra: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rows as an array, `extra` wider than the longest, and their lengths."""
        lengths = np.array([len(row) for row in rows])
        padded = np.full((len(rows), lengths.max() + extra), self.t5.config.pad_token_id, np.int32)
        for i, row in enumerate(rows):
            padded[i, : len(row)] = row
        return padded, lengths


def answers_of(words: Sequence[str], tokenizer: tokenizers.Tokenizer) -> list[tuple[int, ...]]:
    """The tokens of each word, as the tokenizer ends a text.

    Raises:
        ValueError: the vocabulary lacks a part of a word, so that it could not be told apart.
    """
    encoded = [tokenizer.encode(word) for word in words]
    for word, found in zip(words, encoded, strict=True):
        if tokenizer.token_to_id("<unk>") in found.ids:
            raise ValueError(f"the tokenizer does not know {word!r}: {found.tokens}")
    return [tuple(found.ids) for found in encoded]
