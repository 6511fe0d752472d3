"""The byte-level BPE tokenizer of a GGUF file: its tokens, merges, and pre-tokenizer by name.

A text is cut into pieces by a pattern, and the bytes of a piece, each written as a character, are
merged pair by pair in the order of the merges. The file names the pattern; llama.cpp's source
(llama-vocab.cpp) says which one a name means.
"""

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from experiments.models.llama_files import check_fits
from experiments.models.llama_gguf import REMEDY, Gguf, config_of

_CONTROL, _USER_DEFINED = 3, 4  # types of tokens: these two are matched whole
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _pattern(digits: str) -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.Split(Regex(_WORDS % digits), behavior="isolated")]


# The file's name of a pre-tokenizer -> what comes before the bytes; GPT-2's pattern is ByteLevel's.
_LLAMA3 = {name: "llama3" for name in ("llama3", "llama-v3", "llama-bpe")}
_NAMES = _LLAMA3 | {"qwen2": "qwen2", "deepseek-r1-qwen": "qwen2"}
_NAMES |= {"smollm": "smollm", "gpt-2": "gpt-2"}


def tokenizer(found: Gguf) -> tokenizers.Tokenizer:
    """The tokenizer in the file's own tables; it adds the first token only if the file says so.

    Raises:
        ValueError: it is of another kind or pre-tokenizer, damaged, or does not fit the model.
    """
    kind, name = found.value("tokenizer.ggml.model"), found.value("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or name not in _NAMES:
        raise ValueError(
            f"{found.file}: its tokenizer is {kind!r:.40} with the pre-tokenizer {name!r:.40}; "
            f"expected 'gpt2' (byte-level BPE) with one of {', '.join(_NAMES)}. Use the model's "
            "tokenizer.json"
        )
    try:
        made = _bpe(found, _NAMES[name])
    except Exception as error:  # of tokenizers, which has no type of its own
        raise ValueError(
            f"{found.file}: the tokenizer's tables do not fit together ({error}); {REMEDY}"
        ) from error
    check_fits(made, config_of(found), found.file)
    return made


def _bpe(found: Gguf, name: str) -> tokenizers.Tokenizer:
    tokens, types = (found.value(f"tokenizer.ggml.{x}", []) for x in ("tokens", "token_type"))
    merges = [tuple(merge.split(" ")) for merge in found.value("tokenizer.ggml.merges", [])]
    if len(types) != len(tokens) or not merges:
        raise ValueError(f"{len(tokens)} tokens, {len(types)} types, {len(merges)} merges")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, fuse_unk=False, ignore_merges=name == "llama3")
    )
    if name == "qwen2":
        made.normalizer = normalizers.NFC()
    bytes_of = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=name in ("smollm", "gpt-2")
    )
    before = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "gpt-2": [],
        "llama3": _pattern("1,3"),
        "qwen2": _pattern("1"),
    }[name]
    made.pre_tokenizer = pre_tokenizers.Sequence([*before, bytes_of])
    made.decoder = decoders.ByteLevel()
    by_type = zip(tokens, types, strict=True)
    for token, kind in by_type:
        if kind in (_CONTROL, _USER_DEFINED):
            added = AddedToken(token, normalized=False, special=kind == _CONTROL)
            made.add_special_tokens([added]) if kind == _CONTROL else made.add_tokens([added])
    if found.value("tokenizer.ggml.add_bos_token", name == "llama3"):
        first = tokens[found.value("tokenizer.ggml.bos_token_id")]
        made.post_processor = processors.TemplateProcessing(
            single=f"{first} $A",
            pair=f"{first} $A {first} $B",
            special_tokens=[(first, vocabulary[first])],
        )
    return made
