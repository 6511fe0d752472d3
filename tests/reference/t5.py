"""Makes t5.npz: what transformers' T5 computes, which tests/test_t5.py compares ours with.

The reference shares no code with this project: PyTorch's T5ForConditionalGeneration, in float64, on
random weights that both sides draw with numpy. (Its norms would take their variance in float32 even
then, so they are given a forward pass that does not.) An adapter is folded into its weight there,
and its gradients are numpy's projections of PyTorch's dense ones, (s G bᵀ, s aᵀ G). Files are
compared live, in tests/test_t5_interop.py.

    python -m venv reference-venv
    reference-venv/bin/pip install torch==2.13.0
    reference-venv/bin/pip install transformers==5.23.0
    reference-venv/bin/python tests/reference/t5.py

For each of `CASES` the file holds `<case>/encoded`, `logits`, `loss`, `greedy` with its `eos`, and
`grad/<linear>/a` and `b`, in float64 rounded to float32; `buckets/<buckets>/<max_distance>`, the
bucket of the distances -300 to 300 in an encoder and in a decoder; and the `versions` that made it.
"""

import pathlib
import zlib

import numpy as np

RANK, SCALE = 3, 2.0
NEW_TOKENS = 12

# Sizes that are all different, so that no transposition passes. Near and far buckets are all used.
_SMALL = {
    "vocab_size": 61, "d_model": 24, "d_kv": 5, "d_ff": 40, "num_layers": 2,
    "num_decoder_layers": 3, "num_heads": 4, "relative_attention_num_buckets": 10,
    "relative_attention_max_distance": 17,
}  # fmt: skip
CASES = {
    "v1.0": _SMALL | {"feed_forward_proj": "relu", "tie_word_embeddings": True},
    "v1.1": _SMALL
    | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "d_kv": 7}
    | {"num_layers": 3, "num_decoder_layers": 2},
    "silu": _SMALL | {"feed_forward_proj": "gated-silu", "tie_word_embeddings": True, "d_kv": 6},
    "defaults": {
        "vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1,
        "num_decoder_layers": 1, "num_heads": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip
BASE = {
    "vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12,
    "num_decoder_layers": 12, "num_heads": 12, "tie_word_embeddings": True,
}  # fmt: skip


def drawn(name, shape):
    """A standard normal array that depends on `name` alone, exact in float32."""
    normal = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    return normal.astype(np.float32)


def weight(name, shape, case):
    """A float32 weight by its name in the file, so large that activations keep their size."""
    if "norm" in name:
        return 1 + np.float32(0.2) * drawn(name, shape)
    if "shared" in name:
        size = 0.2  # a tied model of larger ones only repeats its last token
    elif "lm_head" in name:
        size = 0.3
    elif "bias" in name:
        size = 0.5
    else:
        size = 1.2 * shape[1] ** -0.5
        size *= case["d_kv"] ** -0.5 if name.endswith("q.weight") else 1  # of q kᵀ
    return np.float32(size) * drawn(name, shape)


def adapter(name, m, n):
    """a (m, r) and b (r, n) in float32 of the linear with that name, m in and n out."""
    a = np.float32(0.3 * m**-0.5) * drawn(f"{name}/a", (m, RANK))
    return a, np.float32(0.3) * drawn(f"{name}/b", (RANK, n))


def batch(vocab_size, lengths=(45, 3, 28), targets=(21, 9, 1)):
    """tokens, mask, targets and their mask, padded with 0 at the end."""

    def padded(lengths, name):
        width = max(lengths)
        ids = np.random.default_rng(zlib.crc32(name)).integers(2, vocab_size, (len(lengths), width))
        mask = np.arange(width)[None, :] < np.asarray(lengths)[:, None]
        return np.where(mask, ids, 0).astype(np.int32), mask

    return *padded(lengths, b"tokens"), *padded(targets, b"targets")


def _norm(self, x):
    """T5LayerNorm in the dtype of x."""
    return self.weight * x / (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt()


def model(case, dtype):
    """The PyTorch model of a case with its weights, without adapters."""
    import torch
    import transformers

    if dtype == torch.float64:
        transformers.models.t5.modeling_t5.T5LayerNorm.forward = _norm
    config = transformers.T5Config(**case, dropout_rate=0.0, decoder_start_token_id=0)
    made = transformers.T5ForConditionalGeneration(config).to(dtype).eval()
    if not case["tie_word_embeddings"]:
        made.lm_head.weight = torch.nn.Parameter(torch.empty_like(made.lm_head.weight))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(torch.tensor(weight(name, tuple(parameter.shape), case)))
    return made


def linears(made):
    """The linears that have an adapter, by their names."""
    import torch

    return {
        name: module
        for name, module in made.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def computed(case, dtype, new_tokens=NEW_TOKENS):
    """Everything that is compared, by name, in float64."""
    import torch

    made = model(case, dtype)
    factors = {}
    with torch.no_grad():
        for name, linear in linears(made).items():
            pair = adapter(name, linear.in_features, linear.out_features)
            factors[name] = [x.astype(np.float64) for x in pair]
            linear.weight += torch.tensor(SCALE * (factors[name][0] @ factors[name][1]).T)
    tokens, mask, targets, target_mask = (torch.tensor(x) for x in batch(case["vocab_size"]))
    inputs = {"input_ids": tokens.long(), "attention_mask": mask.long()}
    labels = torch.where(target_mask, targets.long(), -100)
    out = made(**inputs, labels=labels)
    out.loss.backward()
    found = {
        "encoded": out.encoder_last_hidden_state.detach(),
        "logits": out.logits.detach(),
        "loss": out.loss.detach(),
    }
    found = {name: x.double().numpy() for name, x in found.items()}
    for name, linear in linears(made).items():
        G, (a, b) = linear.weight.grad.double().numpy().T, factors[name]
        found[f"grad/{name}/a"], found[f"grad/{name}/b"] = SCALE * G @ b.T, SCALE * a.T @ G
    with torch.no_grad():
        options = {"max_new_tokens": new_tokens, "do_sample": False, "use_cache": False}
        eos = _spread(made.generate(**inputs, **options, eos_token_id=None).numpy()[:, 1:])
        ended = made.generate(**inputs, **options, eos_token_id=eos, pad_token_id=0)
    return found | {"greedy": ended[:, 1:].numpy(), "eos": np.array(eos)}


def _spread(decoded):
    """The token that ends the rows at the most different places."""
    ends = {
        t: np.argmax(np.c_[decoded, [t] * len(decoded)] == t, axis=1) for t in set(decoded.flat)
    }
    return int(max(ends, key=lambda token: np.ptp(ends[token])))


def main():
    """Writes t5.npz beside this script."""
    import torch
    import transformers

    made = {}
    for case, settings in CASES.items():
        for name, value in computed(settings, torch.float64).items():
            made[f"{case}/{name}"] = value.astype(
                np.float32 if value.dtype.kind == "f" else np.int32
            )
        print(case, made[f"{case}/loss"], made[f"{case}/greedy"].tolist())
    bucket = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket
    for sizes in ((32, 128), (10, 17), (8, 20), (64, 256)):
        both = [bucket(torch.arange(-300, 301), way, *sizes).numpy() for way in (True, False)]
        made["buckets/{}/{}".format(*sizes)] = np.stack(both).astype(np.int32)
    versions = [f"torch {torch.__version__}", f"transformers {transformers.__version__}"]
    np.savez_compressed(pathlib.Path(__file__).with_suffix(".npz"), **made, versions=versions)


if __name__ == "__main__":
    main()
